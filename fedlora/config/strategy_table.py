"""The strategies of `strategies/`: one line each, with the traits that both sides need.

Institutions check a server's orders against these traits, and the configuration derives the choices
of ``federation.strategy`` and its refusals from them. The algorithm of strategy NAME is
``strategies/NAME.py``, which only the server loads.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.models.adapters import Part


@dataclass(frozen=True, kw_only=True)
class Traits:
    """The properties of a strategy apart from its algorithm.

    Args:
        summary: A few words for the help of ``federation.strategy``.
        sent: The parts of the adapter that institutions train and send in round 1, 2, ..., in turn.
        local_parts: The parts that institutions train and never send.
        factor_means: Whether the strategy averages each factor by itself. Coordinate-wise
            robust rules, and noise on the mean of the factors, need such a strategy.
        linear: Whether the new adapter is the mean of each trained tensor and nothing more, and no
            part stays at institutions. The server can then step on a sum
            (`strategies.noised_sum`).
        residuals: Whether the strategy puts the part of a mean that the factors do not hold into a
            frozen residual of the base's layers.
        changes_basis: Whether the factors of two rounds stand in different bases. A difference or a
            mean of factors of two rounds then means nothing, so there is no server optimizer, no
            server learning rate and no mean over the last rounds.
    """

    summary: str
    sent: tuple[tuple["Part", ...], ...] = (("A", "B", "magnitude", "head"),)
    local_parts: tuple["Part", ...] = ()
    factor_means: bool = False
    linear: bool = False
    residuals: bool = False
    changes_basis: bool = False

    @property
    def no_server_optimizer(self) -> bool:
        """Whether no server optimizer goes with the strategy.

        A residual carries the mean, or the factors change their basis.
        """
        return self.residuals or self.changes_basis

    @property
    def averaged(self) -> bool:
        """Whether adapters of several rounds have a mean."""
        return not (self.no_server_optimizer or self.local_parts)

    @property
    def trained_parts(self) -> tuple["Part", ...]:
        """The parts of the adapter that institutions train in any round."""
        return tuple(dict.fromkeys((*itertools.chain(*self.sent), *self.local_parts)))

    def parts_sent(self, number: int) -> tuple["Part", ...]:
        """The parts of the adapter that institutions train and send in a round, from 1."""
        return self.sent[(number - 1) % len(self.sent)]


_FROZEN_A: tuple["Part", ...] = ("B", "magnitude", "head")
_FROZEN_B: tuple["Part", ...] = ("A", "magnitude", "head")
_SHARED_A: tuple["Part", ...] = ("A", "head")
_OUTPUTS: tuple["Part", ...] = ("B", "magnitude")

STRATEGY_TABLE: Mapping[str, Traits] = {
    "fedavg": Traits(summary="mean of each factor", factor_means=True, linear=True),
    "ffa": Traits(summary="A frozen, exact", factor_means=True, linear=True, sent=(_FROZEN_A,)),
    "fedsvd": Traits(
        summary="as ffa, A orthonormal by an SVD a round", sent=(_FROZEN_A,), changes_basis=True
    ),
    "rolora": Traits(
        summary="A, B in turn, exact",
        factor_means=True,
        linear=True,
        sent=(_FROZEN_A, _FROZEN_B),
    ),
    "svd": Traits(summary="mean of the products, cut back to the rank"),
    "stack": Traits(summary="exact, fresh factors in each round", residuals=True),
    "exact": Traits(summary="exact, the base carries the rest", residuals=True),
    "fedsa": Traits(
        summary="only A shared", factor_means=True, sent=(_SHARED_A,), local_parts=_OUTPUTS
    ),
}
"""Strategy -> its traits, in the order of the configuration's help."""

PLUG_IN = Traits(summary="a plug-in")
"""The traits of ``federation.strategy = "module:object"``."""


def names_with(trait: Callable[[Traits], object]) -> str:
    """The strategies that have a trait, for an error's remedy."""
    return ", ".join(name for name, traits in STRATEGY_TABLE.items() if trait(traits))
