"""Classification: class logits of an encoder, or label tokens of a causal model."""

import math
from collections.abc import Generator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from fedlora.arrays import Int64
from fedlora.data.batches import Batch, PackedBatch, once
from fedlora.data.encoding import LabelPrompt, PlainText
from fedlora.data.shards import Shard
from fedlora.models import metrics
from fedlora.models.tasks import (
    Task,
    base_model,
    can_pack,
    check_rows,
    evaluation_mode,
    model_inputs,
    row_positions,
    text_config,
)


class Classification(Task):
    """One label for each text, from an encoder's head or from a causal model's next token."""

    encoding: PlainText | LabelPrompt

    def __init__(self, encoding: PlainText | LabelPrompt, vocabulary: int = 0) -> None:
        # With padding on the left, the answer follows the last position of every row.
        side = "left" if isinstance(encoding, LabelPrompt) else "right"
        super().__init__(encoding, side, vocabulary)
        self._label_tokens: dict[tuple[str, ...], torch.Tensor] = {}

    def first_position(self, model: nn.Module) -> int | None:
        """The first position of an unpacked row: 0, but RoBERTa's family counts from after padding.

        An encoder's first position is the one whose output equals, to the last bit, the output
        without explicit positions.
        """
        if not isinstance(self.encoding, PlainText):
            return super().first_position(model)
        base, config, most = base_model(model), text_config(model), self.encoding.max_length
        if not can_pack(base, getattr(base, base.base_model_prefix), most):
            return None
        ids = torch.tensor([self.words(model)[: min(most, 5)]], device=base.device)
        mask = torch.ones_like(ids)
        with evaluation_mode(model):
            without = base.pooled(ids, mask)
            for first in (0, self._pad_id + 1):
                if first + most > (getattr(config, "max_position_embeddings", 0) or math.inf):
                    continue
                positions = torch.arange(first, first + ids.shape[1], device=ids.device)[None]
                if torch.equal(base.pooled(ids, mask, position_ids=positions), without):
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
            return model(**model_inputs(model, batch)).logits.float()
        if labels not in self._label_tokens:
            self._label_tokens[labels] = torch.tensor(self.encoding.tokens(labels))
        logits = self.next_token(model, batch)
        return logits[:, self._label_tokens[labels].to(logits.device)].float()

    def next_token(self, model: nn.Module, batch: Batch | PackedBatch) -> torch.Tensor:
        """A causal model's logits of the token after each row, ``(b, V)`` in its dtype."""
        if isinstance(batch, PackedBatch):
            inputs = {**model_inputs(model, batch), "logits_to_keep": batch.row.last}
            return model(**inputs, use_cache=False).logits[0, : batch.row.examples]
        inputs = model_inputs(model, batch)
        inputs |= row_positions(model, inputs["attention_mask"])
        # An index and not a number: a number gives a view, for which torch's product copies the
        # whole vocabulary's weights for every row.
        inputs["logits_to_keep"] = torch.tensor([-1], device=inputs["input_ids"].device)
        return model(**inputs, use_cache=False).logits[:, -1]

    def answers(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...]
    ) -> Generator[tuple[Int64, list[str], NDArray[np.float32]]]:
        """The label with the highest score for each row, and the softmax of the scores."""
        for rows, scores in self._scored(model, shard, labels):
            said = [labels[int(i)] for i in scores.argmax(1)]
            yield rows, said, torch.tensor(scores).softmax(1).numpy()

    def evaluate(
        self,
        model: nn.Module,
        shard: Shard,
        labels: tuple[str, ...],
        *,
        owner: Int64 | None = None,
    ) -> dict[str, Any]:
        """``n``, ``accuracy``, ``macro_f1``, ``per_class``, ``loss`` (mean cross-entropy, nats)."""
        check_rows(shard)
        predicted = np.empty(len(shard), dtype=np.int64)
        losses = np.empty(len(shard), dtype=np.float32)
        for rows, scores in self._scored(model, shard, labels):
            predicted[rows] = scores.argmax(1)
            some, targets = torch.tensor(scores), torch.tensor(shard.targets[rows])
            losses[rows] = functional.cross_entropy(some, targets, reduction="none").numpy()
        truth, said = ([labels[int(i)] for i in index] for index in (shard.targets, predicted))
        result = metrics.classification(truth, said, labels)
        # Not a mean: torch's cross-entropy of all rows adds them up like this, for the same bits.
        only = torch.zeros(len(shard), dtype=torch.int64)
        result["loss"] = float(functional.nll_loss(-torch.tensor(losses)[:, None], only))
        if owner is not None:
            right = predicted == shard.targets
            result["by_owner"] = {int(i): float(right[owner == i].mean()) for i in np.unique(owner)}
        return result

    def _scored(
        self, model: nn.Module, shard: Shard, labels: tuple[str, ...]
    ) -> Generator[tuple[Int64, NDArray[np.float32]]]:
        """Rows ``(m,)`` and their scores ``(m, C)``, batch by batch."""
        keys = (shard.row(i).tobytes() for i in range(len(shard)))
        for batch, rows, equal in once(keys, shard.lengths, self.physical_batch):
            with evaluation_mode(model):
                scores = self.logits(model, self.collate(shard, batch), labels).cpu().numpy()
            yield rows, scores[equal]
