"""A round's distance from the true mean, and each update's length: figures for rounds.jsonl.

All figures come from the inner products of the round's adapters (`products`), float64. Where these
would take too much memory or time, each product is projected onto fixed Gaussian directions on both
sides (Johnson & Lindenstrauss 1984), to a 32 x 32 matrix a layer, and the figures are computed from
the projections. The projection is linear, so zero stays zero; a norm is off by up to 18 % (standard
deviation), less where many unrelated layers weigh alike.
"""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedlora.arrays import Floats
from fedlora.models.adapters import AdapterState
from fedlora.privacy.streams import RandomSource
from strategies import products
from strategies.base import Round, Weighted
from strategies.lowrank import carried
from strategies.products import Product

MAX_EXACT_BYTES = 128 * 2**20  # of all updates together: they are held whole
MAX_EXACT_RANKS = 1024  # of all updates together: the inner products of all their rows are computed
SKETCH_WIDTH = 32
MAX_PLAIN_VALUES = 4096  # a magnitude or head with up to so many values is held whole


class Watch:
    """Records the values of each passing update that `figures` needs.

    Args:
        this_round: The round of the updates.
    """

    def __init__(self, this_round: Round) -> None:
        self._round = this_round
        self.exact = (
            this_round.asked * this_round.before.only(this_round.parts).num_bytes <= MAX_EXACT_BYTES
            and this_round.asked * this_round.before.rank <= MAX_EXACT_RANKS
        )
        self._layers = len(this_round.before.layers())
        # The local parts of a product are not known here: then A is a vector like a head.
        self._products = "B" not in this_round.local_parts
        self._seen: list[tuple[str, float, _Kept]] = []

    def through(self, updates: Iterable[Weighted]) -> Iterator[Weighted]:
        """The same updates."""
        for update, weight in updates:
            whole = self._round.sent_to(update.institution).updated(update.adapter)
            self._seen.append((update.institution, weight, self._kept(whole)))
            yield update, weight
            del update, whole  # frees memory before the next one arrives

    def figures(self, result: AdapterState) -> dict[str, Any]:
        """The diagnostics of the aggregation for the round's record.

        Args:
            result: The strategy's result, before any server optimizer.

        Returns:
            ``exact``: whether the figures are exact, not estimates. ``error``: Frobenius distance
            of the change of the global s B A, with residuals, to the weighted mean of the changes
            of all noted s_k B_k A_k, relative to the weighted mean of s_k B_k A_k, over all layers;
            None where institutions keep their B. Where all start from the global adapter, this is
            the distance of the global s B A to that mean. ``norm``, ``cosine``:
            institution -> length of its change of s B A, magnitudes and head, and its cosine to
            the weighted mean change. Exact ones are right to 1e-8 of the products' norms; below
            that they are rounding. ``residual_rank``: the largest rank of the result's
            residuals, if it has any.
        """
        this_round = self._round
        seen = sorted(self._seen, key=lambda entry: entry[0])
        n, names = len(seen), [name for name, _, _ in seen]
        total = math.fsum(weight for _, weight, _ in seen)
        share = np.array([weight / total for _, weight, _ in seen])
        starts, of = this_round.starts(names)
        old, new = this_round.before, this_round.before.updated(result)
        kept = [kept for _, _, kept in seen] + [self._kept(state) for state in starts]
        whole = [self._kept(s, residual=r) for s in (new, old) for r in (False, True)]
        factors, vectors = self._inner([*kept, *whole])
        both = (factors + vectors)[: len(kept), : len(kept)]
        change = products.changes(both, of)
        norm = products.norms(change)
        along = change @ share
        length = norm * math.sqrt(max(float(share @ along), 0.0))
        cosine = np.divide(along, length, out=np.zeros(n), where=length > 0)
        mean, off = np.zeros(len(factors)), np.zeros(len(factors))
        mean[:n], off[:n], off[-4:] = share, -share, (1.0, 1.0, -1.0, -1.0)
        np.add.at(off, n + np.asarray(of, dtype=int), share)
        error = _ratio(float(off @ factors @ off), float(mean @ factors @ mean))
        residuals = [layer.residual for layer in new.layers().values()]
        ranks = [len(residual[0]) for residual in residuals if residual is not None]
        return {
            "exact": self.exact,
            "error": error if self._products else None,
            "norm": dict(zip(names, norm.tolist(), strict=True)),
            "cosine": dict(zip(names, np.clip(cosine, -1, 1).tolist(), strict=True)),
            **({"residual_rank": max(ranks)} if ranks else {}),
        }

    def _kept(self, state: AdapterState, *, residual: bool = False) -> "_Kept":
        """The products and vectors of an adapter, or of its residuals alone."""
        found = self._residuals(state) if residual else self._factors(state)
        parts = ("magnitude", "head") if self._products else ("A", "head")
        plain = [torch.zeros_like(t) if residual else t for t in state.only(parts).values()]
        if self.exact:
            return _Kept(found, [t.flatten().numpy() for t in plain])
        sketch = [
            np.ravel(c * (_directions("B", len(b)).T @ b) @ (a @ _directions("A", a.shape[1])))
            for c, b, a in found
        ]
        seen = [
            t if t.numel() <= MAX_PLAIN_VALUES else t @ _directions("head", t.shape[-1])
            for t in plain
        ]
        empty = np.zeros(0, np.float32)
        return _Kept([], [t.flatten().numpy() for t in seen], np.concatenate([empty, *sketch]))

    def _factors(self, state: AdapterState) -> list[Product]:
        if not self._products:
            return []
        return [products.product(self._round, layer) for layer in state.layers().values()]

    def _residuals(self, state: AdapterState) -> list[Product]:
        """A product of zero where a layer has no residual."""
        if not self._products:
            return []
        zero = [(0.0, layer.b[:, :1], layer.a[:1]) for layer in state.layers().values()]
        found = [carried(layer) for layer in state.layers().values()]
        return [each[0] if each else none for each, none in zip(found, zero, strict=True)]

    def _inner(self, kept: "Sequence[_Kept]") -> tuple[Floats, Floats]:
        """Inner products of the products, and of the other tensors, ``(n, n)`` each."""
        vectors = np.zeros((len(kept), len(kept)))
        for rows in zip(*(k.vectors for k in kept), strict=True):
            stack = np.stack(rows).astype(np.float64)
            vectors += stack @ stack.T
        if not self.exact:
            sketches = np.stack([k.sketch for k in kept]).astype(np.float64)
            return sketches @ sketches.T, vectors
        if not self._products:
            return np.zeros_like(vectors), vectors
        return products.inner(self._layers, lambda i: [k.products[i] for k in kept]), vectors


class _Kept(NamedTuple):
    """The stored parts of an adapter: its products, whole or projected, and the other tensors."""

    products: list[Product]
    vectors: list[npt.NDArray[np.float32]]
    sketch: npt.NDArray[np.float32] = np.zeros(0, np.float32)


@functools.cache
def _directions(side: str, length: int) -> torch.Tensor:
    """Fixed Gaussian directions, float32 ``(length, 32)``; they keep squared lengths on average."""
    draw = RandomSource.seeded("diagnostics", 0, side, length).normal(length * SKETCH_WIDTH)
    return torch.as_tensor(draw, dtype=torch.float32).view(length, SKETCH_WIDTH) / math.sqrt(
        SKETCH_WIDTH
    )


def _ratio(square: float, reference: float) -> float:
    """Root of the ratio of two squared lengths; 0 where both are 0."""
    return math.sqrt(max(square, 0.0) / reference) if reference > 0 else 0.0
