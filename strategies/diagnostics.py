"""How far a round's result is from the true mean, and who sent what: figures for rounds.jsonl.

All come from the inner products of the round's adapters (`products`), float64. Where that would
take too much memory or time, each product is seen through fixed Gaussian directions on both sides
(Johnson & Lindenstrauss 1984), as a 32 x 32 matrix a layer, and the same figures are computed from
what is seen. As that is linear in the product, what is zero stays zero; a norm of one layer is off
by 18 % (standard deviation), of L layers by 18 % / sqrt(L).
"""

import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from fedlora.adapters import AdapterState, kind
from fedlora.streams import RandomSource
from strategies import products
from strategies.base import Round, Weighted
from strategies.products import Floats

EXACT_BYTES = 512 * 2**20
EXACT_RANKS = 1024  # of all updates together: the inner products of all their rows are made
WIDTH = 32
WHOLE = 4096  # a magnitude or head of so many values is held whole


class Watch:
    """Remembers of each update what `figures` needs, while it passes.

    Args:
        round: Whose updates pass.
        exact_bytes: Up to so many bytes of updates they are held whole.
    """

    def __init__(self, round: Round, exact_bytes: int = EXACT_BYTES) -> None:
        self._round = round
        rank = max((len(t) for name, t in round.before.items() if kind(name) == "A"), default=0)
        self.exact = (
            round.asked * round.before.only(round.parts).num_bytes <= exact_bytes
            and round.asked * rank <= EXACT_RANKS
        )
        self._seen: list[tuple[str, float, AdapterState | _Sketch]] = []

    def through(self, updates: Iterable[Weighted]) -> Iterator[Weighted]:
        """The same updates."""
        for update, weight in updates:
            self._seen.append((update.institution, weight, self._kept(update.adapter)))
            yield update, weight
            del update  # before the next one comes

    def figures(self, result: AdapterState) -> dict[str, Any]:
        """What the round's record says of its aggregation.

        Args:
            result: The strategy's, before any server optimizer.

        Returns:
            ``exact``: whether these are no estimates. ``error``: Frobenius distance of the result's
            s B A to the weighted mean of all s_k B_k A_k that passed, relative to that mean, over
            all layers. ``norm``, ``cosine``: institution -> length of its change of s B A,
            magnitudes and head, and its cosine to the weighted mean change. Exact ones are right to
            1e-8 of the products' norms; below that they are rounding.
        """
        seen = sorted(self._seen, key=lambda entry: entry[0])
        names, before = [name for name, _, _ in seen], self._round.before
        total = math.fsum(weight for _, weight, _ in seen)
        share = np.array([weight / total for _, weight, _ in seen])
        kept = [*(state for _, _, state in seen), self._kept(result), self._kept(before)]
        factors, vectors = self._inner(kept)
        off = np.array([*-share, 1.0, 0.0])  # result - mean
        mean = np.array([*share, 0.0, 0.0])
        change = products.changes(factors + vectors)[:-1, :-1]
        norm = products.norms(change)
        along = change @ share
        length = norm * math.sqrt(max(float(share @ along), 0.0))
        cosine = np.divide(along, length, out=np.zeros(len(seen)), where=length > 0)
        return {
            "exact": self.exact,
            "error": _ratio(float(off @ factors @ off), float(mean @ factors @ mean)),
            "norm": dict(zip(names, norm.tolist(), strict=True)),
            "cosine": dict(zip(names, np.clip(cosine, -1, 1).tolist(), strict=True)),
        }

    def _kept(self, state: AdapterState) -> "AdapterState | _Sketch":
        return state if self.exact else _sketch(self._round, self._round.before.updated(state))

    def _inner(self, kept: "list[AdapterState | _Sketch]") -> tuple[Floats, Floats]:
        """Inner products of the products, and of all else, ``(n, n)`` each."""
        sketches = [k for k in kept if isinstance(k, _Sketch)]
        if sketches:
            parts = [np.stack(v).astype(np.float64) for v in zip(*sketches, strict=True)]
            return parts[0] @ parts[0].T, parts[1] @ parts[1].T
        states = [self._round.before.updated(k) for k in kept if isinstance(k, AdapterState)]

        def tensors(name: str) -> list[torch.Tensor]:
            return [state[name] for state in states]

        return products.factors(self._round, tensors), products.vectors(self._round, tensors)


class _Sketch(NamedTuple):
    """What is kept of an adapter: its products as they are seen, and its magnitudes and head."""

    factors: npt.NDArray[np.float32]
    vectors: npt.NDArray[np.float32]


def _sketch(round: Round, state: AdapterState) -> _Sketch:
    factors, vectors = [torch.zeros(0)], [torch.zeros(0)]
    for name, tensor in state.items():
        if kind(name) == "A":
            b = state[name.replace(".lora_A.", ".lora_B.")]
            left = _directions("B", len(b)).T @ b  # (32, r)
            right = tensor @ _directions("A", tensor.shape[1])  # (r, 32)
            factors.append((round.scale(len(tensor)) * left @ right).flatten())
        elif kind(name) != "B":
            whole = tensor.numel() <= WHOLE
            seen = tensor if whole else tensor @ _directions("head", tensor.shape[-1])
            vectors.append(seen.flatten())
    return _Sketch(torch.cat(factors).numpy(), torch.cat(vectors).numpy())


@functools.cache
def _directions(side: str, length: int) -> torch.Tensor:
    """Fixed Gaussian directions, float32 ``(length, 32)``; they keep squared lengths on average."""
    draw = RandomSource.seeded("diagnostics", 0, side, length).normal(length * WIDTH)
    return torch.as_tensor(draw, dtype=torch.float32).view(length, WIDTH) / math.sqrt(WIDTH)


def _ratio(square: float, reference: float) -> float:
    """Root of the ratio of two squared lengths; 0 where both are 0."""
    return math.sqrt(max(square, 0.0) / reference) if reference > 0 else 0.0
