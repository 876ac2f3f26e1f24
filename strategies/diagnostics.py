"""How far a round's result is from the true mean, and who sent what: figures for rounds.jsonl.

All come from the inner products of the round's adapters (`products`), float64. Where holding every
update would take more than ``EXACT_BYTES``, the long side of each factor is first projected to 64
Gaussian directions, the same for all (Johnson & Lindenstrauss 1984), and the same figures are
computed from what is left. As that is linear in the product, what is zero stays zero; a norm of one
layer is off by 13 % (standard deviation), of L layers by 13 % / sqrt(L).
"""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fedlora.adapters import AdapterState, kind
from fedlora.streams import RandomSource
from strategies import products
from strategies.base import Round, Weighted

EXACT_BYTES = 512 * 2**20
WIDTH = 64


class Watch:
    """Remembers of each update what `figures` needs, while it passes.

    Args:
        round: Whose updates pass.
        exact_bytes: Up to so many bytes of updates they are held whole.
    """

    def __init__(self, round: Round, exact_bytes: int = EXACT_BYTES) -> None:
        self._round = round
        self.exact = round.asked * round.before.only(round.parts).num_bytes <= exact_bytes
        self._projections: dict[tuple[str, int], torch.Tensor] = {}
        self._seen: list[tuple[str, float, AdapterState]] = []

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
        names = [name for name, _, _ in seen]
        total = math.fsum(weight for _, weight, _ in seen)
        share = np.array([weight / total for _, weight, _ in seen])
        before = self._kept(self._round.before)
        states = [before.updated(state) for _, _, state in seen]
        states += [before.updated(self._kept(result)), before]

        def tensors(name: str) -> list[torch.Tensor]:
            return [state[name] for state in states]

        factors = products.factors(self._round, tensors)
        off = np.array([*-share, 1.0, 0.0])  # result - mean
        mean = np.array([*share, 0.0, 0.0])
        change = products.changes(factors + products.vectors(self._round, tensors))[:-1, :-1]
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

    def _kept(self, state: AdapterState) -> AdapterState:
        if self.exact:
            return state
        return AdapterState({name: self._projected(name, t) for name, t in state.items()})

    def _projected(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A ``(r, 64)``, B ``(64, r)``, anything else ``(64,)``."""
        if kind(name) == "A":
            return tensor @ self._projection("A", tensor.shape[1])
        if kind(name) == "B":
            return self._projection("B", tensor.shape[0]).T @ tensor
        return tensor.flatten() @ self._projection("vector", tensor.numel())

    def _projection(self, side: str, length: int) -> torch.Tensor:
        if (side, length) not in self._projections:
            draw = RandomSource.seeded("diagnostics", 0, side, length).normal(length * WIDTH)
            values = torch.as_tensor(draw, dtype=torch.float32) / math.sqrt(WIDTH)
            self._projections[side, length] = values.view(length, WIDTH)
        return self._projections[side, length]


def _ratio(square: float, reference: float) -> float:
    """Root of the ratio of two squared lengths; 0 where both are 0."""
    return math.sqrt(max(square, 0.0) / reference) if reference > 0 else 0.0
