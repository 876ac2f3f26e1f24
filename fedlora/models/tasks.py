"""A task: losses per example, predictions and metrics of a model.

Classification on an encoder takes class logits from the head. Classification on a causal model
compares the logits of the labels' tokens. Sft trains and generates whole responses. Logits are
computed only at the positions of a loss: with a vocabulary of 50,000 all of them would cost more
than much of the forward.
"""

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedlora.arrays import Int64
from fedlora.data.batches import Batch, PackedBatch, Side, pack, pad, rounded
from fedlora.data.encoding import Encoded, LabelPrompt, PlainText, ResponsePrompt
from fedlora.data.shards import Shard
from fedlora.errors import InputError

WINDOWS = (
    "sliding_window",
    "sliding_window_size",
    "sliding_windows",
    "local_attention",
    "attention_chunk_size",
    "window_size",
)
"""Keys of configurations for the number of tokens that a token attends to."""
LENGTH_DEPENDENT = ("longrope", "dynamic")
"""Kinds of rotary positions that depend on the longest row of a batch."""
MIN_MEAN_TOKENS = 10
"""Tokens that the rows of a pass may have on average before fewer rows fit into it."""


def row_positions(model: nn.Module, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Positions that count from each row's first token, for causal models that take them.

    Args:
        model: The model.
        mask: 1 for tokens and 0 for padding, ``(b, L)``.

    Returns:
        ``position_ids`` int64 ``(b, L)``; nothing for a model without that input.
    """
    base = base_model(model)
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return {}
    return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0) + causal_position(base)}


def causal_position(base: nn.Module) -> int:
    """The position of a causal model's first token: RoBERTa's family counts from after padding."""
    inner: Any = getattr(base, str(getattr(base, "base_model_prefix", "")), base)
    table = getattr(getattr(inner, "embeddings", None), "position_embeddings", None)
    padding = getattr(table, "padding_idx", None)
    return 0 if padding is None else int(padding) + 1


class Task(ABC):
    """A way to train and evaluate a model. A task holds the tokenizer and no model.

    Args:
        encoding: The encoding of texts and answers as tokens and targets.
        side: The side on which batches are padded.
        vocabulary: The number of tokens that the model knows; 0 when that is not known.
    """

    physical_batch = 64
    """The most rows of one pass of an evaluation; ``training.physical-batch`` may lower it."""

    def __init__(
        self, encoding: PlainText | LabelPrompt | ResponsePrompt, side: Side, vocabulary: int = 0
    ) -> None:
        tokenizer = encoding.tokenizer
        largest = 1 + max(tokenizer.get_vocab().values(), default=-1)
        self._most = min(vocabulary or largest, largest)
        self._all_known = self._most == largest
        pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
        self._pad_id = self._known(pad, end)
        self._unknown_id = self._known(tokenizer.unk_token_id, end, pad)
        self._tokenizer = tokenizer
        self._side: Side = side
        self.encoding = encoding

    def _known(self, *ids: int | None) -> int:
        """The first of these ids that is a token of the model, or 0."""
        return next((i for i in ids if i is not None and i < self._most), 0)

    def encode(self, texts: list[str], answers: list[str], labels: tuple[str, ...]) -> Encoded:
        """Tokens and targets of rows; see the encodings in `fedlora.data.encoding`.

        A token that was added to the tokenizer and not to the model becomes the unknown one, and a
        row without a token gets that: one such row would fail in the model, and under DP a failure
        must not follow from a record.
        """
        found = self.encoding.encode(texts, answers, labels)
        other = self._unknown_id
        ids = [row or [other] for row in found.ids]
        if not self._all_known:
            ids = [[i if i < self._most else other for i in row] for row in ids]
        return dataclasses.replace(found, ids=ids)

    def collate(self, shard: Shard, indices: Sequence[int] | Int64, width: int = 0) -> Batch:
        """The batch of these rows for `losses`, padded to ``width``, or to the longest row."""
        rows = np.asarray(indices, dtype=np.int64)
        tokens = [shard.row(int(i)) for i in rows]
        return pad(tokens, shard.targets[rows], self._pad_id, self._side, width)

    def shapes(self, shard: Shard) -> Int64:
        """The sizes that decide each row's kernels, ``(n, k)``; first its padded width.

        Batches of equally many rows of one shape are computed by the same kernels, so a row's
        result does not depend on the other rows.
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
        """These rows as one packed row; rows of one width follow each other.

        Args:
            shard: The records.
            rows: Numbers of the rows ``(n,)``.
            first: The first position; see `first_position`.
            total: The number of tokens in the packed row.
            slots: The largest number of examples in a packed row.
            device: The model's device.
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
        """The padded width of each row where examples are computed one by one, ``(n,)``."""
        return rounded(shard.lengths, self.encoding.max_length)

    def usual_tokens(self, rows: int) -> int:
        """Tokens that so many short rows have together; the size of packed rows follows from it."""
        return MIN_MEAN_TOKENS * rows

    def first_position(self, model: nn.Module) -> int | None:
        """The first position of each example in a packed row; None if rows must be padded.

        `fedlora.gradients.exactness` finds whether the model computes packed rows correctly.
        """
        base = base_model(model)
        # A causal model counts as in padded rows.
        return causal_position(base) if can_pack(base, base, self.encoding.max_length) else None

    def words(self, model: nn.Module) -> list[int]:
        """Ids of tokens that are text, at most a thousand."""
        special = {*self._tokenizer.all_special_ids, self._pad_id}
        known = getattr(text_config(model), "vocab_size", len(self._tokenizer))
        return [i for i in range(min(known, 1000)) if i not in special]

    @abstractmethod
    def losses(
        self, model: nn.Module, batch: Batch | PackedBatch, labels: tuple[str, ...]
    ) -> torch.Tensor:
        """Loss of each example, float32 ``(b,)``; it depends on no other example of the batch."""

    @abstractmethod
    def answers(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...]
    ) -> Generator[tuple[Int64, list[str], NDArray[np.float32] | None]]:
        """The model's answers, batch by batch from the longest rows to the shortest.

        Yields:
            Some rows ``(m,)``, each once over all batches; the answer to each of them, a label or
            the text that the model generates greedily; and the probability of each class
            ``(m, C)``, None without classes.
        """

    def predict(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...]
    ) -> tuple[list[str], NDArray[np.float32] | None]:
        """All `answers` in the order of the rows, and their probabilities ``(n, C)``."""
        said = [""] * len(shard)
        found = np.empty((len(shard), len(labels)), dtype=np.float32) if labels else None
        for rows, answers, probabilities in self.answers(model, shard, labels):
            for row, answer in zip(rows.tolist(), answers, strict=True):
                said[row] = answer
            if found is not None:
                found[rows] = probabilities
        return said, found

    @abstractmethod
    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
        *,
        owner: Int64 | None = None,
    ) -> dict[str, Any]:
        """Metrics of the model on a shard, ready for JSON.

        Args:
            model: The model; its mode is restored.
            shard: The records, at least one.
            labels: The classes; empty for sft.
            owner: Institution of each row ``(n,)``, to add ``by_owner``: its accuracy
                (classification only).

        Raises:
            InputError: If the shard is empty.
        """


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True


def model_inputs(model: nn.Module, batch: Batch | PackedBatch) -> dict[str, torch.Tensor]:
    """A batch as a model's arguments, on the model's device."""
    device = next(model.parameters()).device
    if isinstance(batch, PackedBatch):
        return {
            "input_ids": batch.input_ids,
            "position_ids": batch.position_ids,
            # four dimensions: the model takes it for a finished mask; attention knows the examples
            "attention_mask": torch.zeros(1, 1, 1, 1, device=device),
        }
    return {
        "input_ids": batch.input_ids.to(device),
        "attention_mask": batch.attention_mask.to(device),
    }


def base_model(model: nn.Module) -> Any:
    """The model without its adapter's wrapper."""
    base: Any = model
    return base.get_base_model() if hasattr(model, "get_base_model") else base


def can_pack(base: Any, inner: nn.Module, max_length: int) -> bool:
    """Whether a model can be given packed rows: our attention, every token in reach, positions.

    Args:
        base: The model without its adapter's wrapper.
        inner: The module that gets the positions.
        max_length: The most tokens of an example.
    """
    from fedlora.gradients import (
        attention,  # imports transformers' models; reading records needs none
    )

    config = text_config(base)
    windows = [getattr(config, key, None) for key in WINDOWS]
    rope = str(getattr(config, "rope_parameters", ""))
    return (
        base.config._attn_implementation == attention.NAME
        and not any(type(window) is int and window < max_length for window in windows)
        and not any(kind in rope for kind in LENGTH_DEPENDENT)
        and "position_ids" in inspect.signature(inner.forward).parameters
    )


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's text part."""
    return base_model(model).config.get_text_config()


def check_rows(shard: Shard) -> None:
    """Refuse to evaluate on an empty shard."""
    if not len(shard):
        raise InputError("there are 0 rows to evaluate on; give data with at least one")
