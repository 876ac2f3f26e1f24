"""What a model is trained and judged on: losses per example, predictions, metrics.

Three tasks share one interface. Classification on an encoder reads class logits off its head;
classification on a causal model compares the logits of the tokens that stand for the labels; sft
trains and generates whole responses. Logits are computed only at the positions a loss looks at:
with a vocabulary of 50,000 they would otherwise cost more than much of the forward.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedlora import metrics
from fedlora.batches import (
    Batch,
    Int64,
    PackedBatch,
    Side,
    collate,
    distinct,
    micro_batches,
    pack,
    pad,
    rounded,
)
from fedlora.data import Shard
from fedlora.encoding import (
    LABEL_PROMPT,
    RESPONSE_PROMPT,
    Encoded,
    LabelPrompt,
    PlainText,
    ResponsePrompt,
)
from fedlora.errors import InputError
from fedlora.streams import RandomSource

GENERATED_ROWS = 200  # rows of an evaluation that a model answers in full: generation is slow
RESPONSE_TOKENS = 128  # longest response that is generated
CLOSED_ANSWERS = 100  # so many different references, each as short as below, are read as classes
CLOSED_CHARACTERS = 40
WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "sliding_windows",
    "local_attention",
    "attention_chunk_size",
    "window_size",
)
"""What configurations call the tokens that a token can see, where that is not all of them."""
LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Rotary positions that change with the longest row of a batch, for all its rows."""


class Task(ABC):
    """One way to train and judge a model. Models are passed in; a task holds the tokenizer alone.

    Args:
        encoding: Turns texts and answers into tokens and targets.
        side: Where batches are padded.
    """

    def __init__(self, encoding: PlainText | LabelPrompt | ResponsePrompt, side: Side) -> None:
        tokenizer = encoding.tokenizer
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
        self._pad_id: int = next((i for i in ids if i is not None), 0)
        self._tokenizer = tokenizer
        self._side: Side = side
        self.encoding = encoding

    def encode(self, texts: list[str], answers: list[str], labels: tuple[str, ...]) -> Encoded:
        """Tokens and targets of rows; see the encodings in `fedlora.encoding`."""
        return self.encoding.encode(texts, answers, labels)

    def collate(self, shard: Shard, indices: Sequence[int] | Int64, width: int = 0) -> Batch:
        """The batch of these rows as `losses` wants it, padded to ``width`` or to the longest."""
        return collate(shard, indices, self._pad_id, self._side, width)

    def shapes(self, shard: Shard) -> Int64:
        """What decides the shape of each row's computation, ``(n, k)``; first its padded width.

        Batches of equally many rows of one shape are computed by the very same kernels, so that a
        row's result does not depend on which others are there.
        """
        return self.widths(shard)[:, None]

    def pack(
        self,
        shard: Shard,
        rows: Int64,
        *,
        first: int,
        total: int,
        slots: int,
        device: torch.device,
    ) -> PackedBatch:
        """These rows, of which equally wide ones follow each other, as one row of so many tokens.

        Args:
            shard: Holds them.
            rows: Numbers of the rows ``(n,)``.
            first: See `first_position`.
            total: Tokens of the packed row.
            slots: The most examples that such a row may hold.
            device: Of the model.
        """
        return pack(
            [shard.row(int(i)) for i in rows],
            shard.targets[rows],
            self.widths(shard)[rows],
            pad_id=self._pad_id,
            first=first,
            total=total,
            slots=slots,
            device=device,
        )

    def widths(self, shard: Shard) -> Int64:
        """What each row is padded to where examples are looked at one by one ``(n,)``."""
        return rounded(shard.lengths, self.encoding.max_length)

    def first_position(self, model: nn.Module) -> int | None:
        """Where a row's positions would begin in a packed row; None if it cannot be told them.

        Whether the model takes packed rows is for `fedlora.exactness` to find.
        """
        return None

    def words(self, model: nn.Module) -> list[int]:
        """Token ids that stand for pieces of text, some hundreds at most."""
        special = {*self._tokenizer.all_special_ids, self._pad_id}
        known = getattr(_config(model), "vocab_size", len(self._tokenizer))
        return [i for i in range(min(known, 1000)) if i not in special]

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Loss of each example, float32 ``(b,)``; it depends on no other example of the batch."""

    @abstractmethod
    def predict(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...], physical_batch: int = 64
    ) -> list[str]:
        """The model's answer to each row: a label, or the text it generates greedily."""

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
        physical_batch: int = 64,
        *,
        owner: Int64 | None = None,
    ) -> dict[str, Any]:
        """Metrics of the model on a shard, ready for JSON.

        Args:
            model: In any mode, which is restored.
            shard: At least one row.
            labels: The classes; empty for sft.
            physical_batch: Rows in memory at a time; changes nothing but speed.
            owner: Institution of each row ``(n,)``, to add ``by_owner``: its accuracy
                (classification only).

        Raises:
            InputError: If the shard is empty.
        """

    def answer(
        self, model: nn.Module, texts: Sequence[str], labels: tuple[str, ...]
    ) -> tuple[list[str], int]:
        """The model's answer to each text, and how many texts were cut to length."""
        nothing = labels[0] if labels else ""  # an answer that is not looked at
        encoded = self.encode(list(texts), [nothing] * len(texts), labels)
        return self.predict(model, shard_of(encoded), labels), encoded.truncated


class Classification(Task):
    """One label for each text, by an encoder's head or by the word a causal model would say."""

    encoding: PlainText | LabelPrompt

    def __init__(self, encoding: PlainText | LabelPrompt) -> None:
        # On the left, the last position of every row of a batch is where its answer comes next.
        super().__init__(encoding, "left" if isinstance(encoding, LabelPrompt) else "right")
        self._label_tokens: dict[tuple[str, ...], torch.Tensor] = {}

    def first_position(self, model: nn.Module) -> int | None:
        """That of the model itself where it has its own, else 0.

        An encoder's is the one that gives, to the last bit, what the encoder gives when it is not
        told any: RoBERTa's family counts from after its padding.
        """
        from fedlora import attention  # it brings transformers' models, which reading does without

        base, config, most = _base(model), _config(model), self.encoding.max_length
        windows = [getattr(config, key, None) for key in WINDOWS]
        rope = str(getattr(config, "rope_parameters", ""))
        inner = base
        if isinstance(self.encoding, PlainText):
            inner = getattr(base, base.base_model_prefix)
        if (
            base.config._attn_implementation != attention.NAME
            or any(type(window) is int and window < most for window in windows)
            or any(kind in rope for kind in LENGTH_DEPENDENT)
            or "position_ids" not in inspect.signature(inner.forward).parameters
        ):
            return None
        if not isinstance(self.encoding, PlainText):
            return 0  # as in padded rows
        ids = torch.tensor([self.words(model)[: min(most, 5)]], device=base.device)
        mask = torch.ones_like(ids)
        with _evaluating(model):
            untold = base.pooled(ids, mask)
            for first in (0, self._pad_id + 1):
                if first + most > (getattr(config, "max_position_embeddings", 0) or math.inf):
                    continue
                positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
                if torch.equal(base.pooled(ids, mask, position_ids=positions), untold):
                    return first
        return None

    def losses(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Cross-entropy over the classes."""
        logits = self.logits(model, batch, labels)
        return functional.cross_entropy(logits, batch.targets.to(logits.device), reduction="none")

    def logits(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Score of each class, float32 ``(b, C)``: a softmax over them gives probabilities."""
        if isinstance(self.encoding, PlainText):
            return model(**_inputs(model, batch)).logits.float()
        if labels not in self._label_tokens:
            self._label_tokens[labels] = torch.tensor(self.encoding.tokens(labels))
        logits = self.next_token(model, batch)
        return logits[:, self._label_tokens[labels].to(logits.device)].float()

    def next_token(self, model: nn.Module, batch: Batch | PackedBatch) -> torch.Tensor:
        """A causal model's logits of the token after each row, ``(b, V)`` in its dtype."""
        if isinstance(batch, PackedBatch):
            inputs = {**_inputs(model, batch), "logits_to_keep": batch.row.last}
            return model(**inputs, use_cache=False).logits[0, : batch.row.examples]
        inputs = _causal_inputs(model, batch)
        # An index, no number: that would give a view, for which torch's product copies the whole
        # vocabulary's weights for every row.
        inputs["logits_to_keep"] = torch.tensor([-1], device=inputs["input_ids"].device)
        return model(**inputs, use_cache=False).logits[:, -1]

    def predict(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...], physical_batch: int = 64
    ) -> list[str]:
        """The label with the highest score for each row."""
        scores = self._scores(model, shard, labels, physical_batch)
        return [labels[int(i)] for i in scores.argmax(1)]

    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
        physical_batch: int = 64,
        *,
        owner: Int64 | None = None,
    ) -> dict[str, Any]:
        """``n``, ``accuracy``, ``macro_f1``, ``per_class``, ``loss`` (mean cross-entropy, nats)."""
        _check_rows(shard)
        scores = self._scores(model, shard, labels, physical_batch)
        predicted = scores.argmax(1)
        result = metrics.classification(
            [labels[int(i)] for i in shard.targets], [labels[int(i)] for i in predicted], labels
        )
        losses = functional.cross_entropy(torch.tensor(scores), torch.tensor(shard.targets))
        result["loss"] = float(losses)
        if owner is not None:
            right = predicted == shard.targets
            result["by_owner"] = {int(i): float(right[owner == i].mean()) for i in np.unique(owner)}
        return result

    def _scores(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...], physical_batch: int
    ) -> NDArray[np.float32]:
        first, copy_of = distinct(shard.row(i).tobytes() for i in range(len(shard)))
        scores = np.empty((len(shard), len(labels)), dtype=np.float32)
        with _evaluating(model):
            for rows in micro_batches(shard.lengths, first, physical_batch):
                logits = self.logits(model, self.collate(shard, rows), labels)
                scores[rows] = logits.cpu().numpy()
        return scores[first[copy_of]]


class Sft(Task):
    """Instruction tuning: the loss of an example is the mean over its response's tokens."""

    encoding: ResponsePrompt

    def __init__(self, encoding: ResponsePrompt) -> None:
        super().__init__(encoding, "right")

    def losses(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the response tokens, with the end token, in nats."""
        assert isinstance(batch, Batch), "responses are padded"
        totals, tokens = self._response_losses(model, batch)
        return totals / tokens

    def shapes(self, shard: Shard) -> Int64:
        """Padded width and padded response of each row, ``(n, 2)``."""
        responses = rounded(shard.lengths - shard.targets, self.encoding.max_length)
        return np.column_stack([super().shapes(shard), responses])

    def predict(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...], physical_batch: int = 64
    ) -> list[str]:
        """The response to each row's prompt, generated greedily."""
        rows = np.arange(len(shard))
        return self._generate(model, shard, rows, physical_batch, RESPONSE_TOKENS)

    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
        physical_batch: int = 64,
        *,
        owner: Int64 | None = None,
    ) -> dict[str, Any]:
        """Token loss on all rows; exact match, and accuracy over a closed set of answers, on some.

        Returns:
            ``n`` rows; ``token_loss`` (nats, mean over all response ``tokens``), ``perplexity``;
            ``exact_match`` over ``generated`` rows, always the same ones. If the references are
            few and short, ``accuracy``, ``macro_f1`` and ``per_class`` over the generated rows too,
            and ``unparseable``: rows whose response begins with no reference, which are wrong.
        """
        _check_rows(shard)
        total, tokens = self._token_loss(model, shard, physical_batch)
        some = RandomSource.seeded("generated rows", 0).permutation(len(shard))[:GENERATED_ROWS]
        lengths = shard.lengths[some] - shard.targets[some]
        longest = min(int(lengths.max()), RESPONSE_TOKENS)
        said = self._generate(model, shard, some, physical_batch, longest)
        references: list[str] = [
            self._text(shard.row(i)[shard.targets[i] :]) for i in range(len(shard))
        ]
        truth = [references[int(i)] for i in some]
        result: dict[str, Any] = {
            "n": len(shard),
            "tokens": tokens,
            "token_loss": total / tokens,
            "perplexity": math.exp(min(total / tokens, 700.0)),
            "exact_match": metrics.accuracy(truth, said),
            "generated": len(some),
        }
        closed = sorted(set(references))
        if len(closed) <= CLOSED_ANSWERS and max(map(len, closed)) <= CLOSED_CHARACTERS:
            parsed = [metrics.leading_answer(text, closed) for text in said]
            result["unparseable"] = parsed.count(None)
            result |= {**metrics.classification(truth, parsed, closed), "n": len(shard)}
        return result

    def _response_losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the response tokens' losses and their number, float32 ``(b,)`` each."""
        inputs = _inputs(model, batch)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        b, width = ids.shape
        first, last = batch.targets.to(ids.device)[:, None], mask.sum(1, keepdim=True)
        # A position's logits predict the token after it: from before the first to before the last.
        # Every row gets logits at equally many positions, those of the longest response, rounded.
        most = rounded((last - first).amax(0).cpu().numpy(), self.encoding.max_length)
        r = min(int(most[0]), width)
        looks = (first - 1).clamp(max=width - r) + torch.arange(r, device=ids.device)  # (b, r)
        kept = torch.zeros_like(mask, dtype=torch.bool).scatter_(1, looks, True)
        logits = model(**inputs, use_cache=False, logits_to_keep=kept).logits  # (b * r, V)
        following = ids.gather(1, (looks + 1).clamp(max=width - 1))
        nll = functional.cross_entropy(logits.float(), following.flatten(), reduction="none")
        counts = (looks >= first - 1) & (looks < last - 1)
        totals = nll.view(b, r).masked_fill(~counts, 0.0).sum(1)
        return totals, counts.sum(1).to(nll.dtype)

    def _token_loss(self, model: nn.Module, shard: Shard, physical_batch: int) -> tuple[float, int]:
        first, copy_of = distinct(
            shard.row(i).tobytes() + shard.targets[i].tobytes() for i in range(len(shard))
        )
        losses = np.empty((len(shard), 2))
        with _evaluating(model):
            for rows in micro_batches(shard.lengths, first, physical_batch):
                both = torch.stack(self._response_losses(model, self.collate(shard, rows)), 1)
                losses[rows] = both.cpu().numpy()
        total, tokens = losses[first[copy_of]].sum(0)
        return float(total), int(tokens)

    def _generate(
        self, model: nn.Module, shard: Shard, rows: Int64, physical_batch: int, max_tokens: int
    ) -> list[str]:
        """Greedy responses to the prompts of the given rows."""
        prompts = [shard.row(int(i))[: shard.targets[i]] for i in rows]
        first, copy_of = distinct(prompt.tobytes() for prompt in prompts)
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        ends = self.encoding.end_tokens()
        said: dict[int, str] = {}
        generate: Any = model.generate
        with _evaluating(model):
            for some in micro_batches(lengths, first, physical_batch):
                tokens = [prompts[int(i)] for i in some]
                batch = pad(tokens, some, lengths[some], self._pad_id, "left")
                inputs = _inputs(model, batch)
                written = generate(
                    **inputs,
                    do_sample=False,
                    use_cache=True,
                    max_new_tokens=max_tokens,
                    eos_token_id=ends,
                    pad_token_id=self._pad_id,
                )[:, inputs["input_ids"].shape[1] :]
                for i, ids in zip(some, written.cpu().numpy(), strict=True):
                    stop = np.flatnonzero(np.isin(ids, ends))
                    said[int(i)] = self._text(ids[: stop[0]] if len(stop) else ids)
        return [said[int(i)] for i in first[copy_of]]

    def _text(self, ids: NDArray[Any]) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


def make(
    task: Literal["classification", "sft"],
    kind: Literal["encoder", "causal"],
    tokenizer: Any,
    *,
    prompt: str,
    max_length: int,
    positions: int = 0,
) -> Task:
    """The task of a configuration.

    Args:
        task: ``model.task``.
        kind: What the base is; only a causal one can write responses.
        tokenizer: A Hugging Face tokenizer in its fast form.
        prompt: ``data.prompt``, for causal models only: a template with ``{text}`` once, and
            ``{labels}`` where it lists them; empty for the task's own.
        max_length: ``training.max-length``, in tokens.
        positions: The most tokens that the model can place; 0 when it sets no limit.

    Raises:
        InputError: For a prompt on an encoder, an encoder for sft, a tokenizer without a fast
            form, and a length that the model cannot take.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "model.name has a tokenizer without a fast form (tokenizer.json); "
            "convert it or use another model"
        )
    most = min(tokenizer.model_max_length, positions or max_length)
    if max_length > most:
        raise InputError(
            f"training.max-length is {max_length}, but the base model takes at most {most} tokens; "
            "lower it"
        )
    if kind == "encoder":
        if task == "sft":
            raise InputError("model.task is sft, but model.name is an encoder; name a causal model")
        if prompt:
            raise InputError(
                "data.prompt is for causal models, but model.name is an encoder; leave it empty"
            )
        return Classification(PlainText(tokenizer=tokenizer, max_length=max_length))
    if task == "classification":
        label_prompt = prompt or LABEL_PROMPT
        return Classification(
            LabelPrompt(tokenizer=tokenizer, prompt=label_prompt, max_length=max_length)
        )
    return Sft(
        ResponsePrompt(tokenizer=tokenizer, prompt=prompt or RESPONSE_PROMPT, max_length=max_length)
    )


@contextmanager
def _evaluating(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def _inputs(model: nn.Module, batch: Batch | PackedBatch) -> dict[str, torch.Tensor]:
    device = next(model.parameters()).device
    if isinstance(batch, PackedBatch):
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            # four dimensions: taken for a mask that is made already; attention has the examples'
            "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        }
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
    }


def _causal_inputs(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """Inputs with positions that count from each row's first token, for models that take them."""
    inputs = _inputs(model, batch)
    if "position_ids" in inspect.signature(_base(model).forward).parameters:
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return inputs


def _base(model: nn.Module) -> Any:
    """The model without its adapter's wrapper."""
    base: Any = model
    return base.get_base_model() if hasattr(model, "get_base_model") else base


def _config(model: nn.Module) -> Any:
    return _base(model).config.get_text_config()


def shard_of(encoded: Encoded) -> Shard:
    """A shard of freshly encoded rows, each its own unit."""
    rows = len(encoded.ids)
    return Shard(
        tokens=np.array([token for ids in encoded.ids for token in ids], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, encoded.ids)], dtype=np.int64),
        targets=np.array(encoded.targets, dtype=np.int64),
        units=np.arange(rows, dtype=np.int64),
    )


def _check_rows(shard: Shard) -> None:
    if not len(shard):
        raise InputError("there are 0 rows to evaluate on; give data with at least one")
