"""A classification head that starts from the words of the labels.

A base that embeds texts of one meaning near each other knows what ``card_not_working`` says before
it has seen a record. Its head then starts as a zero-shot classifier, from which rare classes gain
most: noise that hides their few records does not hide their names.

Reference: zero-shot heads: Radford et al. (2021), CLIP, arXiv 2103.00020; a trained head that
starts from one: Wortsman et al. (2022), arXiv 2109.01903.
"""

# torch and transformers type some of their functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from fedlora.data.batches import micro_batches
from fedlora.data.data import shard_of
from fedlora.errors import InputError
from fedlora.models.tasks import Task, base_model, evaluation_mode, model_inputs

LOGIT_SCALE = 28.0
"""The difference of two labels' logits where their cosines with a text differ by 1 and the text's
pooled vector is as long as those of labels. Half and twice as much were tried
(benchmarks/LOG.md)."""
MAX_WEIGHT = 100.0
"""The largest weight of a head; larger ones would be those of a base with tiny hidden states."""


def words(label: str) -> str:
    """A label in words: ``CashAndDueFromBanks`` and ``cash_and-due from/banks`` become the same."""
    text = unicodedata.normalize("NFC", label)
    found: list[str] = []
    for before, one, after in zip(f" {text}", text, f"{text[1:]} ", strict=False):
        if not one.isalnum() and unicodedata.category(one)[0] != "M":  # a mark belongs to a letter
            found.append(" ")
            continue
        joined = before.islower() or before.isdigit() or (before.isupper() and after.islower())
        found.append(f" {one}" if one.isupper() and joined else one)
    return " ".join("".join(found).lower().split())


def head(model: nn.Module, task: Task, labels: Sequence[str]) -> torch.Tensor:
    """The head of an encoder as a zero-shot classifier; a label's row is made from its words.

    Row c is ``LOGIT_SCALE (e_c - mean e) / m``: e are the labels' pooled vectors divided by their
    lengths, m is the mean length.

    Args:
        model: The encoder, with an adapter that changes no output.
        task: Its task, which encodes the words as it encodes texts.
        labels: The C classes in their order.

    Returns:
        The weight, float32 ``(C, hidden)``.

    Raises:
        InputError: If a label has no word that the tokenizer knows, such as ``2``, or two have the
            same; if the model fails on them, or its pooled vectors are too short.
    """
    said = [words(label) for label in labels]
    encoded = task.encode(said, list(labels), tuple(labels))
    special: set[int] = set(task.encoding.tokenizer.all_special_ids)
    seen: dict[tuple[int, ...], str] = {}
    for label, text, ids in zip(labels, said, encoded.ids, strict=True):
        if not any(letter.isalpha() for letter in text) or not set(ids) - special:
            raise InputError(f"the label {label[:40]!r} has no words that the tokenizer knows")
        if (twin := seen.setdefault(tuple(ids), label)) != label:
            raise InputError(f"the labels {twin[:40]!r} and {label[:40]!r} have the same words")
    shard = shard_of(encoded)
    widths = task.widths(shard)
    batches = micro_batches(shard.lengths, np.arange(len(shard)), task.physical_batch)
    pooled: list[torch.Tensor] = []
    for rows in batches:
        batch = task.collate(shard, rows, int(widths[rows].max()))
        try:
            with evaluation_mode(model):
                pooled.append(base_model(model).pooled(**model_inputs(model, batch)).cpu())
        except torch.OutOfMemoryError:  # which another time may not happen
            raise
        except (IndexError, RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:120]
            raise InputError(f"the base fails on the labels' words ({why})") from None
    vectors = torch.cat(pooled)[np.argsort(np.concatenate(batches))]
    units = functional.normalize(vectors)
    weight = LOGIT_SCALE * (units - units.mean(0)) / vectors.norm(dim=1).mean()
    if not weight.abs().max() <= MAX_WEIGHT:
        raise InputError("the base's hidden states are too small")
    return weight
