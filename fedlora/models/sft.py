"""Supervised fine-tuning: a causal model learns to write whole responses."""

import itertools
import math
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedlora.arrays import Int64
from fedlora.data.batches import Batch, PackedBatch, once, pad, rounded
from fedlora.data.encoding import ResponsePrompt
from fedlora.data.shards import Shard
from fedlora.models import metrics
from fedlora.models.tasks import (
    Task,
    base_model,
    causal_position,
    check_rows,
    evaluation_mode,
    model_inputs,
    row_positions,
)
from fedlora.privacy.streams import RandomSource

GENERATED_ROWS = 200  # rows of an evaluation with a generated response: generation is slow
PART = 64
"""Positions of a packed row whose logits are one product. The number of response tokens in a row
depends on its examples; a product's number of rows must not."""
MAX_PACKED_TOKENS = 640
"""Tokens of a packed row, unless the longest row has more."""
GREEDY: Mapping[str, Any] = MappingProxyType(
    {
        "do_sample": False,
        "num_beams": 1,
        "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0,
        "min_length": 0,
        "min_new_tokens": 0,
        "bad_words_ids": None,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
        "sequence_bias": None,
        "stop_strings": None,
    }
)
"""Of ``generate``: what a base's generation_config.json may set otherwise, such as a penalty on the
words of the prompt, among which the answers may be."""
MAX_RESPONSE_TOKENS = 128  # of a generated response
MAX_ANSWERS = 100
"""The largest number of different references that are read as classes."""
MAX_ANSWER_CHARACTERS = 40
"""The length of the longest reference that is read as a class."""


class Sft(Task):
    """Instruction tuning: the loss of an example is the mean over its response's tokens."""

    encoding: ResponsePrompt

    def __init__(self, encoding: ResponsePrompt, vocabulary: int = 0) -> None:
        super().__init__(encoding, "right", vocabulary)

    def losses(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Mean negative log-likelihood of the response tokens, with the end token, in nats."""
        if isinstance(batch, PackedBatch):
            return _packed_losses(model, batch)
        totals, tokens = self._response_losses(model, batch)
        return totals / tokens

    def usual_tokens(self, rows: int) -> int:
        """A row begins with a prompt, and counts as half of the longest row."""
        return min(self.encoding.max_length * rows // 2, MAX_PACKED_TOKENS)

    def shapes(self, shard: Shard) -> Int64:
        """Padded width and padded response of each row, ``(n, 2)``."""
        responses = rounded(shard.lengths - shard.targets, self.encoding.max_length)
        return np.column_stack([super().shapes(shard), responses])

    def answers(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...]
    ) -> Generator[tuple[Int64, list[str], None]]:
        """The response to each row's prompt, generated greedily."""
        everything = np.arange(len(shard))
        for rows, said in self._written(model, shard, everything, MAX_RESPONSE_TOKENS):
            yield rows, said, None

    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
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
        check_rows(shard)
        total, tokens = self._token_loss(model, shard)
        sampled = RandomSource.seeded("generated rows", 0).permutation(len(shard))[:GENERATED_ROWS]
        lengths = shard.lengths[sampled] - shard.targets[sampled]
        longest = min(int(lengths.max()), MAX_RESPONSE_TOKENS)
        said = self._generate(model, shard, sampled, longest)
        references: list[str] = [
            self._text(shard.row(i)[shard.targets[i] :]) for i in range(len(shard))
        ]
        truth = [references[int(i)] for i in sampled]
        result: dict[str, Any] = {
            "n": len(shard),
            "tokens": tokens,
            "token_loss": total / tokens,
            "perplexity": math.exp(min(total / tokens, 700.0)),
            "exact_match": metrics.accuracy(truth, said),
            "generated": len(sampled),
        }
        spelling = {text.casefold(): text for text in sorted(set(references), reverse=True)}
        closed = sorted(spelling.values())  # `leading_answer` reads an answer whatever its case
        if len(closed) <= MAX_ANSWERS and max(map(len, closed)) <= MAX_ANSWER_CHARACTERS:
            parsed = [metrics.leading_answer(text, closed) for text in said]
            result["unparseable"] = parsed.count(None)
            classes = [spelling[text.casefold()] for text in truth]
            result |= {**metrics.classification(classes, parsed, closed), "n": len(shard)}
        return result

    def _response_losses(self, model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum of the response tokens' losses and their number, float32 ``(b,)`` each."""
        inputs = model_inputs(model, batch)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        b, width = ids.shape
        first, last = batch.targets.to(ids.device)[:, None], mask.sum(1, keepdim=True)
        # A position's logits predict the token after it: from before the first to before the last.
        # Every row gets logits at equally many positions: the longest response's number, rounded.
        most = rounded((last - first).amax(0).cpu().numpy(), self.encoding.max_length)
        r = min(int(most[0]), width)
        positions = (first - 1).clamp(max=width - r) + torch.arange(r, device=ids.device)  # (b, r)
        scored = torch.zeros_like(mask, dtype=torch.bool).scatter_(1, positions, True)
        logits = model(**inputs, use_cache=False, logits_to_keep=scored).logits  # (b * r, V)
        following = ids.gather(1, (positions + 1).clamp(max=width - 1))
        nll = functional.cross_entropy(logits.float(), following.flatten(), reduction="none")
        counts = (positions >= first - 1) & (positions < last - 1)
        totals = nll.view(b, r).masked_fill(~counts, 0.0).sum(1)
        return totals, counts.sum(1).to(nll.dtype)

    def _token_loss(self, model: nn.Module, shard: Shard) -> tuple[float, int]:
        keys = (shard.row(i).tobytes() + shard.targets[i].tobytes() for i in range(len(shard)))
        losses = np.empty((len(shard), 2))
        with evaluation_mode(model):
            for batch, rows, equal in once(keys, shard.lengths, self.physical_batch):
                both = torch.stack(self._response_losses(model, self.collate(shard, batch)), 1)
                losses[rows] = both.cpu().numpy()[equal]
        total, tokens = losses.sum(0)
        return float(total), int(tokens)

    def _generate(self, model: nn.Module, shard: Shard, rows: Int64, max_tokens: int) -> list[str]:
        """Greedy responses to the prompts of the given rows."""
        said = [""] * len(rows)
        for places, texts in self._written(model, shard, rows, max_tokens):
            for place, text in zip(places.tolist(), texts, strict=True):
                said[place] = text
        return said

    def _written(
        self, model: nn.Module, shard: Shard, rows: Int64, max_tokens: int
    ) -> Generator[tuple[Int64, list[str]]]:
        """Greedy responses batch by batch, and the places ``(m,)`` of their rows in ``rows``."""
        prompts = [shard.row(int(i))[: shard.targets[i]] for i in rows]
        lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
        ends = self.encoding.end_tokens()
        generate: Any = model.generate
        config: Any = model.config
        first_position = causal_position(base_model(model))
        most = (getattr(config, "max_position_embeddings", None) or sys.maxsize) - first_position
        keys = (prompt.tobytes() for prompt in prompts)
        for some, places, equal in once(keys, lengths, self.physical_batch):
            tokens = [prompts[int(i)] for i in some]
            batch = pad(tokens, lengths[some], self._pad_id, "left")
            with evaluation_mode(model):
                inputs = model_inputs(model, batch)
                room = most - inputs["input_ids"].shape[1]
                if first_position:  # else the model counts by the mask itself
                    inputs |= row_positions(model, inputs["attention_mask"])
                written = generate(
                    **inputs,
                    **GREEDY,
                    use_cache=True,
                    max_new_tokens=max(1, min(max_tokens, room)),
                    eos_token_id=ends,
                    pad_token_id=self._pad_id,
                )[:, inputs["input_ids"].shape[1] :]
            said: list[str] = []
            for ids in written.cpu().numpy():
                stop = np.flatnonzero(np.isin(ids, ends))
                said.append(self._text(ids[: stop[0]] if len(stop) else ids))
            yield places, [said[i] for i in equal]

    def _text(self, ids: NDArray[Any]) -> str:
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip()


def _packed_losses(model: nn.Module, batch: PackedBatch) -> torch.Tensor:
    """The mean loss of each example's response, float32 ``(n,)``.

    Products with the vocabulary and sums over it are computed for `PART` positions at a time, and
    each example's mean by itself, so that no other example changes a bit of an example's loss.
    """
    row, device = batch.row, batch.input_ids.device
    counts: list[int] = (np.array(row.lengths) - batch.targets.numpy()).tolist()
    ends = itertools.accumulate(row.lengths)
    answers = [i for end, n in zip(ends, counts, strict=True) for i in range(end - n, end)]
    # Response tokens fill up the last part; their second losses are not read.
    filled = torch.tensor(
        np.resize(np.array(answers, np.int64), -(-len(answers) // PART) * PART), device=device
    )
    with _logits_at(base_model(model).get_output_embeddings(), filled - 1, row.total):
        logits = model(**model_inputs(model, batch), use_cache=False).logits[0]  # (r, V)
    parts = zip(
        torch.split(logits, PART), torch.split(batch.input_ids[0, filled], PART), strict=True
    )
    each = [functional.cross_entropy(x.float(), ids, reduction="none") for x, ids in parts]
    nll = torch.cat(each)[: len(answers)]
    return torch.stack([torch.mean(response) for response in torch.split(nll, counts)])


@contextmanager
def _logits_at(output: Any, positions: torch.Tensor, total: int) -> Generator[None]:
    """Have a model's output layer compute logits at some positions only, `PART` at a time.

    The positions are chosen in the layer, and not by the argument ``logits_to_keep``: some models
    have further products between the two, which then have a fixed number of rows too.

    Args:
        output: The layer.
        positions: Places in the packed row ``(r,)``, r a multiple of `PART`.
        total: The number of tokens in the packed row, T.

    Raises:
        RuntimeError: If the layer was not called once, with ``(1, T, f)``.
    """
    whole: Any = output.forward
    own = "forward" in vars(output)  # a replaced forward
    seen: list[tuple[int, ...]] = []

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        seen.append(hidden.shape[:-1])
        parts = torch.split(hidden[0, positions], PART)
        return torch.cat([whole(part) for part in parts])[None]  # (1, r, V)

    output.forward = forward
    try:
        yield
    finally:
        del output.forward
        if own:
            output.forward = whole
    if seen != [(1, total)]:
        raise RuntimeError(f"the output layer got {seen} instead of one row of {total} tokens")
