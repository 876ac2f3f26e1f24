"""What every strategy shares: its shape, who is asked in a round, which updates count, weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedlora.adapters import PARTS, AdapterState, Part
from fedlora.errors import Refusal
from fedlora.streams import RandomSource
from fedlora.wire import ClientUpdate

Aggregate = Callable[[Sequence[ClientUpdate], Sequence[float]], AdapterState]


def all_parts(round: int) -> tuple[Part, ...]:
    """Everything is trained in every round."""
    return PARTS


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way to make one adapter of many.

    Args:
        aggregate: Pure. Takes updates sorted by institution and their weights, which sum to 1;
            returns the new adapter. It reads nothing but the updates, so under DP it is
            post-processing: it spends no privacy.
        reference: The paper.
        parts: Round (from 1) -> what institutions train and send in it; the rest of the global
            adapter stays.
    """

    aggregate: Aggregate
    reference: str
    parts: Callable[[int], tuple[Part, ...]] = all_parts


def participations(rounds: int, institutions: int, per_round: int) -> int:
    """The most rounds that `sample` can ask one institution for: every one, or an even share.

    Args:
        rounds: Rounds of the run.
        institutions: Institutions in the federation.
        per_round: Asked each round; 0 for all.
    """
    if not per_round or per_round >= institutions:
        return rounds
    return math.ceil(rounds * per_round / institutions)


def sample(
    asked: Mapping[str, int], *, per_round: int, cap: int, seed: int, round: int
) -> list[str]:
    """The institutions to ask in a round.

    Those asked least so far, ties broken by lot, none over ``cap``. Asking the least-asked keeps
    all counts within one of each other, so nobody can be asked more often than `participations`
    says, and each can plan its noise for that many rounds.

    Args:
        asked: Institution -> rounds it was asked for so far. Only these can be asked.
        per_round: Asked each round; 0 for all.
        cap: From `participations`.
        seed: The run's seed.
        round: From 1.

    Returns:
        Names, sorted.
    """
    names = sorted(name for name, times in asked.items() if times < cap)
    if per_round and per_round < len(names):
        lot = RandomSource.seeded("sampling", seed, round).permutation(len(names))
        order = sorted(range(len(names)), key=lambda i: (asked[names[i]], int(lot[i])))
        names = sorted(names[i] for i in order[:per_round])
    return names


def validate(
    update: ClientUpdate, *, institution: str, round: int, reference: AdapterState
) -> None:
    """Refuse an update that must not count.

    Args:
        update: As it came.
        institution: Whose answer it has to be.
        round: The order's round.
        reference: The global adapter: its keys, shapes and dtype are the ones allowed.

    Raises:
        Refusal: With the reason as its code.
    """
    if update.institution != institution:
        raise Refusal("wrong-institution", f"{institution} answered as {update.institution}")
    if update.round != round:
        raise Refusal("stale-update", f"round {update.round} was answered in round {round}")
    problem = update.adapter.validate_against(reference)
    if problem:
        raise Refusal("invalid-update", problem)
    if not (math.isfinite(update.size) and update.size >= 0):
        raise Refusal("invalid-size", f"size is {update.size}")


def weights(updates: Sequence[ClientUpdate], weighting: str) -> list[float]:
    """Weights that sum to 1: equal ones, or each update's own ``size``.

    Raises:
        Refusal: If sizes are asked for and none is above 0.
    """
    if weighting == "uniform":
        return [1.0 / len(updates)] * len(updates)
    total = math.fsum(u.size for u in updates)
    if total <= 0:
        raise Refusal(
            "invalid-size",
            f"federation.weighting is {weighting}, but no update carries a size above 0",
        )
    return [u.size / total for u in updates]
