"""Rounds of one institution or of several, each played as `client.institution` says.

Institutions of a simulation that follow equal orders under DP train in shared passes. Each has its
own records, ledger, sampling, clipped sum and noise; they share the base model's arithmetic only.
"""

import logging
from collections.abc import Generator, Sequence

from client.private_round import PrivateRound, Trained, train_rounds
from fedlora.wire.messages import ClientUpdate

log = logging.getLogger("fedlora.client")
Outcome = ClientUpdate | Exception
Play = Generator[PrivateRound, Trained, ClientUpdate]
"""A round: yields itself once it is charged, is sent what training made, and ends in its answer."""


def answer(plays: Sequence[Play]) -> list[Outcome]:
    """Play rounds to their ends, equal orders in shared passes.

    Where shared training fails, each round trains alone: its charge is in the ledger, so it has
    the same key and is the same release.

    Returns:
        The answer of each round, or its error: one institution's error ends no other's round.
    """
    outcomes: dict[int, Outcome] = {}
    cohorts: dict[str, list[tuple[int, PrivateRound]]] = {}

    def go_on(number: int, made: Trained | Exception | None) -> None:
        try:
            charged = _go_on(plays[number], made)
        except StopIteration as end:
            outcomes[number] = end.value
        except Exception as error:
            outcomes[number] = error
        else:
            cohorts.setdefault(charged.training_digest, []).append((number, charged))

    for number in range(len(plays)):
        go_on(number, None)
    for members in list(cohorts.values()):
        trained = _train([charged for _, charged in members])
        for (number, _), made in zip(members, trained, strict=True):
            go_on(number, made)
    return [outcomes[number] for number in range(len(plays))]


def _go_on(play: Play, made: Trained | Exception | None) -> PrivateRound:
    """Let a round begin, or go on with what training made of it."""
    if made is None:
        return next(play)
    return play.throw(made) if isinstance(made, Exception) else play.send(made)


def _train(rounds: Sequence[PrivateRound]) -> Sequence[Trained | Exception]:
    """What training made of rounds of one order, or its error."""
    try:
        return train_rounds(rounds)
    except Exception as error:
        if len(rounds) == 1:
            return [error]
        log.exception("training %d institutions together failed", len(rounds))
        return [made for one in rounds for made in _train([one])]
