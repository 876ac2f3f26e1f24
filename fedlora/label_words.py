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

import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch.nn import functional

from fedlora.errors import InputError
from fedlora.models import Base

MAX_TOKENS = 64
"""Tokens of a label's words that are read, at most."""
LOGIT_SCALE = 28.0
"""The difference of two labels' logits where their cosines with a text differ by 1 and the text's
pooled vector is as long as those of labels. Half and twice as much were tried
(benchmarks/LOG.md)."""
_BOUNDARY = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_]+")


def words(label: str) -> str:
    """A label in words: ``CashAndDueFromBanks`` and ``cash_and-due from/banks`` become the same."""
    return " ".join(part for part in _BOUNDARY.split(label) if part).lower()


def has_words(labels: Sequence[str]) -> bool:
    """Whether each label has a letter and no two have the same words."""
    said = [words(label) for label in labels]
    return all(re.search(r"[^\W\d_]", one) for one in said) and len(set(said)) == len(said)


@torch.no_grad()
def start_head(base: Base, labels: Sequence[str]) -> None:
    """Set the head of an encoder that has no adapter yet; a label's row is made from its words.

    Row c is ``LOGIT_SCALE (e_c - mean e) / m``: e are the labels' pooled vectors divided by their
    lengths, m is the mean length. The bias stays zero. Where `has_words` is false the head does
    too, since a number says nothing of its class.

    Args:
        base: An encoder with a head of zeros, ``(C, hidden)`` float32.
        labels: The C classes in their order.

    Raises:
        InputError: If the base fails on so short a text.
    """
    if not has_words(labels):
        return
    model: Any = base.model
    tokenizer: Any = base.tokenizer
    pooled: list[torch.Tensor] = []
    for label in labels:  # one by one: a row's last bits must not depend on the others' lengths
        made = tokenizer(words(label), truncation=True, max_length=MAX_TOKENS, return_tensors="pt")
        ids = made["input_ids"].to(model.device)
        try:
            pooled.append(model.pooled(ids, torch.ones_like(ids))[0])
        except (IndexError, RuntimeError, ValueError) as error:
            raise InputError(
                f"adapter.head is labels, but {base.name} fails on the words of {label[:40]!r} "
                f"({' '.join(str(error).split())[:120]}); set it to zero"
            ) from None
    vectors = torch.stack(pooled)
    lengths = vectors.norm(dim=1)
    if not (torch.isfinite(lengths).all() and lengths.min() > 0):
        return
    units = functional.normalize(vectors)
    head = cast(torch.nn.Linear, model.classifier)
    head.weight.copy_(LOGIT_SCALE * (units - units.mean(0)) / lengths.mean())
