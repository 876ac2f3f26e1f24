"""Institutions' privacy records, checked against the plans that the server makes itself.

An institution plans its noise from the configuration, the number of rounds and its size class. The
server knows the first two; delta and sample rate of a privacy record imply the size class. Almost
every figure of a record is therefore known beforehand, and a record with another figure is no
record of this run.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.config.sections import MIN_DELTA
from fedlora.errors import InputError, Refusal
from fedlora.privacy import accounting, composition
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.privacy.budget import delta_of, plan_run
from fedlora.privacy.composition import Event
from fedlora.wire.messages import PrivacySpent

log = logging.getLogger("fedlora.server")

MAX_SIZE_CLASS = 2**40
"""Units of an institution in the largest size class that the server accepts."""
NOISE_TOLERANCE = 0.01
"""The largest relative difference of a reported noise multiplier from the server's plan. Two
machines' plans are 0.1 percent apart at most; less noise is also held against the budget."""
EPSILON_TOLERANCE = 1e-6
"""Relative excess of epsilon over the budget that rounding can cause."""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """The possible spending of institutions in a run under DP.

    Args:
        config: The run.
        participations: The most rounds for which an institution is asked.
    """

    config: RunConfig
    participations: int

    def checked(self, said: PrivacySpent, size_class: float | None = None) -> PrivacyPlan:
        """Check a record against the run.

        Args:
            said: The record, as the institution sent it.
            size_class: The institution's size class, where its update states one.

        Returns:
            The plan that the record follows.

        Raises:
            Refusal: ``invalid-privacy-record``, with the impossible figure.
        """
        privacy = self.config.privacy
        known = {
            "unit": privacy.unit,
            "noise": privacy.noise,
            "max_grad_norm": privacy.max_grad_norm,
        }
        for name, value in known.items():
            _require(said, name, getattr(said, name) == value, f"the run has {value}")
        limit = privacy.epsilon * (1 + EPSILON_TOLERANCE)
        local_steps = self.config.training.local_steps
        steps = range(local_steps, local_steps * self.participations + 1, local_steps)
        _require(said, "epsilon", 0 <= said.epsilon <= limit, f"it is at most {privacy.epsilon:g}")
        _require(said, "steps", said.steps in steps, f"it is one of {steps}")
        _require(said, "ledger_epsilon", 0 <= said.ledger_epsilon < math.inf, "it is finite")
        alone = said.ledger_epsilon_alone
        _require(said, "ledger_epsilon_alone", alone >= said.ledger_epsilon, "it is no smaller")
        possible = MIN_DELTA <= said.ledger_delta < 1  # a smaller one would end each later report
        _require(said, "ledger_delta", possible, f"it is from {MIN_DELTA:g} on and below 1")
        _require(said, "ledger_limit", 0 < said.ledger_limit < math.inf, "it is finite, above 0")
        plan = self._plan(said, size_class)
        sigma = plan.noise_multiplier
        same = abs(said.noise_multiplier - sigma) <= NOISE_TOLERANCE * sigma
        _require(said, "noise_multiplier", same, f"the plan has {sigma:.6g}")
        if said.noise_multiplier < sigma:
            less = dataclasses.replace(plan, noise_multiplier=said.noise_multiplier)
            spent = composition.epsilon(less.events, less.delta)
            bound = f"with it the run spends {spent:.6g} of {privacy.epsilon:g}"
            _require(said, "noise_multiplier", spent <= limit, bound)
        return plan

    def _plan(self, said: PrivacySpent, size_class: float | None) -> PrivacyPlan:
        """The plan of the size class that has this delta and sample rate."""
        sizes = [2**k for k in range(MAX_SIZE_CLASS.bit_length())]
        for size in sizes if size_class is None else [s for s in sizes if s == size_class]:
            training = self.config.training
            rate = training.rate(size)
            try:
                if (said.delta, said.sample_rate) == (delta_of(self.config.privacy, size), rate):
                    return plan_run(self.config, size, self.participations)
            except InputError:
                continue  # an institution of this size cannot follow the configuration
        raise Refusal(
            "invalid-privacy-record",
            f"no institution that follows this run has delta {said.delta:g} and sample rate "
            f"{said.sample_rate:g}" + ("" if size_class is None else f" with size {size_class:g}"),
        )

    def possible(self, privacy: Mapping[str, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
        """The possible records of a checkpoint; the others count as never sent."""
        kept: dict[str, Mapping[str, Any]] = {}
        for name, record in privacy.items():
            try:
                self.checked(PrivacySpent.stored(record))
            except (Refusal, ArithmeticError, TypeError, ValueError, KeyError) as error:
                log.warning("the checkpoint's privacy record of %s is left out: %s", name, error)
            else:
                kept[name] = record
        return kept

    def stated(self, record: Mapping[str, Any], rounds_asked: int) -> dict[str, Any]:
        """The entry of privacy.json for an institution that reported, from the server's own plan.

        An institution may have been charged for a round, and its reply seen on the way, although no
        reply arrived in time. So every round counts for which it was asked, or more if it reports
        more. Where it reports less noise than the plan, within the tolerance, its figure counts.

        Args:
            record: Its last record, checked.
            rounds_asked: The number of rounds for which it was asked.
        """
        said = PrivacySpent.stored(record)
        plan = self.checked(said)
        sigma = min(said.noise_multiplier, plan.noise_multiplier)
        whole = dataclasses.replace(plan, noise_multiplier=sigma)
        steps = max(said.steps, rounds_asked * whole.steps_per_round)
        spent = (dataclasses.replace(whole.round_event, steps=steps),)
        return {
            **dataclasses.asdict(said),
            "epsilon": composition.epsilon(spent, whole.delta),
            **self._alone(whole, spent),
            "noise_multiplier": sigma,
            "steps": steps,
            "rounds_asked": rounds_asked,
            "unreported_steps": steps - said.steps,
            "institution_says": dataclasses.asdict(said),
        }

    def _alone(self, plan: PrivacyPlan, spent: Sequence[Event]) -> dict[str, Any]:
        """What an institution's own share of noise is and protects; empty without shares."""
        if not plan.honest:
            return {}
        alone = accounting.epsilon_alone(spent, plan.delta)
        return {
            "epsilon_alone": alone if math.isfinite(alone) else "inf",
            "share_noise_multiplier": plan.share_noise_multiplier,
        }


def _require(said: PrivacySpent, name: str, holds: bool, bound: str) -> None:
    if not holds:
        value = repr(getattr(said, name))[:80]
        raise Refusal("invalid-privacy-record", f"{name} is {value}, but {bound}")
