"""Shared parts of strategies: the round, sampling of institutions, checks, weights of updates."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fedlora.errors import Refusal
from fedlora.gradients.lora_layers import Scale
from fedlora.models.adapters import PARTS, AdapterState, Part
from fedlora.privacy.accounting import is_size_class
from fedlora.privacy.streams import RandomSource
from fedlora.wire.messages import ClientUpdate

MAX_VALUE = 2.0**10
"""Largest magnitude of a value that counts, in an update and in an aggregate."""
Weighted = tuple[ClientUpdate, float]
"""An update and its weight, not normalised: the total is known only after the last update."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round before its replies arrive.

    Args:
        number: The round's number, from 1.
        asked: The number of asked institutions, an upper bound of the number of updates.
        before: The global adapter with all parts.
        sent: The adapter in the orders; None: the global one.
        parts: The parts that institutions train and send.
        local_parts: The parts that institutions train and do not send.
        weighting: ``uniform``, or anything else for each update's own size.
        sizes: Institution -> its size class, where updates do not state it.
        max_sizes: Institution -> the bound of its size as a weight; no entry means no bound.
        words: The length of an institution's vector under secure aggregation; 0 where updates are
            adapters.
        alpha: LoRA's alpha.
        rslora: Whether the scale is alpha / sqrt(rank) instead of alpha / rank.
        seed: The public seed of a strategy's draws.
        run: Identity of the run.
    """

    number: int
    asked: int
    before: AdapterState
    sent: AdapterState | None = None
    parts: tuple[Part, ...] = PARTS
    local_parts: tuple[Part, ...] = ()
    weighting: str = "uniform"
    words: int = 0
    sizes: Mapping[str, float] = field(default_factory=dict[str, float])
    max_sizes: Mapping[str, float] = field(default_factory=dict[str, float])
    alpha: float = 1.0
    rslora: bool = False
    seed: int = 0
    run: str = ""

    @property
    def start(self) -> AdapterState:
        """The adapter from which institutions start."""
        return self.before if self.sent is None else self.sent

    def weight(self, update: ClientUpdate) -> float:
        """The update's weight beside others: 1, or its size, up to ``max_sizes``."""
        if self.weighting == "uniform":
            return 1.0
        size = self.sizes.get(update.institution, update.size)
        return min(size, self.max_sizes.get(update.institution, math.inf))

    def scale(self, rank: int) -> float:
        """The factor s of s B A for factors of this rank."""
        return Scale(self.alpha, self.rslora).of(rank)


Aggregate = Callable[[Round, Iterable[Weighted]], AdapterState]


def the_global_adapter(this_round: Round) -> AdapterState:
    """Institutions start from the global adapter as it is."""
    return this_round.before


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """The algorithm that combines adapters into one; `config.strategy_table` has its traits.

    Args:
        aggregate: A pure function of the round and its valid updates, in any order of arrival. It
            returns the new adapter, the same for every order but for rounding; without updates an
            empty adapter, which changes nothing. It reads nothing else and draws no random number,
            so under DP it is post-processing: it spends no privacy.
        start: A pure function of the round that returns the adapter from which institutions start.
            It may draw from the round's public seed.
    """

    aggregate: Aggregate
    start: Callable[[Round], AdapterState] = the_global_adapter


def sample(
    asked: Mapping[str, int], *, per_round: int, cap: int, seed: int, round_number: int
) -> list[str]:
    """The institutions to ask in a round.

    These are the institutions asked least so far, ties broken at random, none over ``cap``. While
    the same institutions are online, counts stay within one of each other. No institution is asked
    more often than ``cap``, so each can plan its noise for that many rounds.

    Args:
        asked: Institution -> rounds for which it was asked so far; only these can be asked.
        per_round: Institutions asked in each round; 0 for all.
        cap: The most rounds of an institution, from `FederationConfig.participations`.
        seed: The run's seed.
        round_number: The round's number, from 1.

    Returns:
        Names, sorted.
    """
    names = sorted(name for name, times in asked.items() if times < cap)
    if per_round and per_round < len(names):
        lot = RandomSource.seeded("sampling", seed, round_number).permutation(len(names))
        order = sorted(range(len(names)), key=lambda i: (asked[names[i]], int(lot[i])))
        names = sorted(names[i] for i in order[:per_round])
    return names


def check_header(update: ClientUpdate, *, institution: str, this_round: Round) -> None:
    """Refuse an update for another order, or with a size that the weighting does not allow.

    Args:
        update: The update, as it arrived.
        institution: The institution that was asked.
        this_round: The round of the order.

    Raises:
        Refusal: ``wrong-institution``, ``other-run``, ``stale-update``, ``invalid-size``.
    """
    if update.institution != institution:
        raise Refusal("wrong-institution", f"{institution} answered as {update.institution!r}")
    if update.run != this_round.run:
        raise Refusal("other-run", f"run {update.run!r} was answered in run {this_round.run!r}")
    if update.round != this_round.number:
        raise Refusal(
            "stale-update", f"round {update.round} was answered in round {this_round.number}"
        )
    _check_size(update.size, "uniform" if this_round.words else this_round.weighting)


def validate(update: ClientUpdate, *, institution: str, this_round: Round) -> None:
    """Refuse an invalid update, whatever other institutions sent.

    Args:
        update: The update, as it arrived.
        institution: The institution that sent it, checked by `check_header`.
        this_round: The round of the order. Keys, shapes and dtype must be those of the parts in
            the order, and no value above `MAX_VALUE`.

    Raises:
        Refusal: With the reason as its code.
    """
    if this_round.words or update.words is not None:
        _check_words(update, this_round.words)
        return
    problem = update.adapter.validate_against(this_round.start.only(this_round.parts))
    if problem:
        raise Refusal("invalid-update", problem)
    own = largest(update.adapter)
    if own > MAX_VALUE:
        raise Refusal("too-large", f"a value is {own:g}; at most {MAX_VALUE:g} counts")


def _check_words(update: ClientUpdate, length: int) -> None:
    """Refuse a vector of another length; nothing else can be known about it."""
    found = None if update.words is None else len(update.words)
    if not length or found != length or update.adapter:
        raise Refusal("invalid-update", f"it has {found} words, but {length or None} were ordered")


def _check_size(size: float, weighting: str) -> None:
    """Refuse a size that the weighting cannot give."""
    fits, what = {
        "uniform": (size == 0, "none is asked for"),
        "public-size": (is_size_class(size), "a power of two"),
        "records": (1 <= size < math.inf and size == int(size), "a whole number from 1"),
    }[weighting]
    if not fits:
        raise Refusal("invalid-size", f"size is {size}, under weighting {weighting}: {what}")


def largest(adapter: AdapterState) -> float:
    """The largest magnitude of an adapter's values; 0 for an empty one."""
    return max((max(float(t.max()), -float(t.min())) for t in adapter.values()), default=0.0)
