"""Checks of an order, its adapter and its plan; all run before the charge."""

import math
from collections.abc import Sequence

import torch

from client.ledger import Ledger
from fedlora.config.config import RunConfig
from fedlora.config.sections import RESIDUAL_RANK
from fedlora.errors import Refusal
from fedlora.models.adapters import RESIDUAL_A, AdapterState
from fedlora.privacy import accounting, composition
from fedlora.privacy.accounting import PrivacyPlan
from fedlora.rounding import at_most
from fedlora.wire.messages import Release, TrainOrder

MAX_ANSWER = 999_000_000
"""The most bytes of an answer that the ledger stores: SQLite's 10^9, less those around it."""

ADAM_EPS = 1e-8
"""torch's Adam adds this to the root of its second moment."""


def check_order(order: TrainOrder, config: RunConfig) -> None:
    """Refuse rounds that the run does not have, and parts that its strategy does not train.

    Raises:
        Refusal: ``malformed-message`` or ``strategy-mismatch``.
    """
    rounds, strategy = config.federation.rounds, config.federation.strategy
    for name, value in (("round", order.round), ("participations", order.participations)):
        if not 1 <= value <= rounds:
            raise Refusal(
                "malformed-message",
                f"the order's {name} is {value}; it must be from 1 to federation.rounds ({rounds})",
            )
    traits = config.federation.traits
    parts, local = traits.parts_sent(order.round), traits.local_parts
    if (order.parts, order.kept) != (parts, local):
        raise Refusal(
            "strategy-mismatch",
            f"the order asks for {_listed(order.parts)} and lets the institution keep "
            f"{_listed(order.kept)}; under {strategy} an institution sends {_listed(parts)} in "
            f"round {order.round} and keeps {_listed(local)}",
        )


def check_base(order: TrainOrder | Release, digest: str) -> None:
    """Refuse an order for another base model.

    Args:
        order: The server's order or release.
        digest: SHA-256 of the base model that is loaded here.

    Raises:
        Refusal: ``base-mismatch``.
    """
    if order.base != digest:
        raise Refusal(
            "base-mismatch",
            f"the weights of the server's base model have the SHA-256 {order.base[:12]!r}..., and "
            f"those of model.name here {digest[:12]!r}...: all need the same files, byte for byte",
        )


def check_adapter(adapter: AdapterState, expected: AdapterState, config: RunConfig) -> None:
    """Refuse an adapter that the run does not have.

    Args:
        adapter: The order's adapter.
        expected: An adapter of the run.
        config: The run.

    Raises:
        Refusal: ``adapter-mismatch``.
    """
    residuals = config.federation.traits.residuals
    problem = adapter.validate_against(expected, residual=residuals)
    rank = max((len(t) for name, t in adapter.items() if name.endswith(RESIDUAL_A)), default=0)
    if not problem and rank > RESIDUAL_RANK:
        problem = f"a residual has rank {rank}, above {RESIDUAL_RANK}"
    if problem:
        raise Refusal(
            "adapter-mismatch", f"the order's adapter does not fit this configuration: {problem}"
        )


def check_report(asked: Sequence[str], allowed: Sequence[str]) -> None:
    """Refuse a request for figures that the institution does not send.

    Args:
        asked: Names of figures in the order.
        allowed: Names of figures that the institution sends.

    Raises:
        Refusal: ``metrics-not-allowed``.
    """
    if not set(asked) <= set(allowed):
        raise Refusal(
            "metrics-not-allowed",
            f"the server asks for {_listed(asked)}; the settings let {_listed(allowed)} leave",
        )


def check_step(order: TrainOrder, config: RunConfig, plan: PrivacyPlan) -> None:
    """Refuse an adapter that no step can change: training would end in a guard, after the charge.

    The noise alone moves every value by about the deviation of the noise on the averaged gradient
    times the learning rate (by the learning rate itself under Adam). Where that is less than the
    distance between the smallest value of a tensor and the next float32, the tensor stays as it is.

    Raises:
        Refusal: ``step-too-small``.
    """
    noise = plan.noise_multiplier * plan.max_grad_norm / plan.expected_batch_size
    if config.training.optimizer != "sgd":
        noise /= noise + ADAM_EPS
    step = config.training.learning_rate * noise
    for name, tensor in order.adapter.only((*order.parts, *order.kept)).items():
        smallest = tensor.abs().min()
        distance = float(torch.nextafter(smallest, torch.tensor(math.inf)) - smallest)
        if not step >= distance:
            raise Refusal(
                "step-too-small",
                f"a step moves a value by about {step:.2g}, and float32 cannot tell {name} from "
                f"itself by less than {distance:.2g}; raise training.learning-rate (now "
                f"{config.training.learning_rate:g}), or start from a smaller adapter",
            )


def check_size(order: TrainOrder, plan: PrivacyPlan) -> None:
    """Refuse an adapter whose answer has more than ``MAX_ANSWER`` bytes: it is stored.

    Args:
        order: An accepted order.
        plan: The plan of the run.

    Raises:
        Refusal: ``adapter-too-large``.
    """
    numbers = sum(tensor.numel() for tensor in order.adapter.only(order.parts).values())
    kept = sum(tensor.numel() for tensor in order.adapter.only(order.kept).values())
    size = 8 * numbers if plan.honest else 4 * (numbers + kept)
    if size > MAX_ANSWER:
        raise Refusal(
            "adapter-too-large",
            f"the answer would have {size:,} bytes, and at most {MAX_ANSWER:,} can be stored: "
            "lower adapter.rank or name fewer adapter.target-modules",
        )


def check_limits(
    plan: PrivacyPlan,
    ledger: Ledger,
    *,
    max_delta: float,
    max_run_epsilon: float,
    max_alone_epsilon: float,
) -> None:
    """Refuse a run whose delta or epsilon is above the institution's own limits.

    A run's epsilon has a meaning at its delta only, and the server chooses the run's delta and
    accountant. So the epsilon of the whole run is computed again at the ledger's delta with the
    ledger's accountant, which the institution chose.

    Args:
        plan: The run's plan.
        ledger: The institution's ledger.
        max_delta: Largest delta of a run.
        max_run_epsilon: Largest epsilon of a run, at the ledger's delta.
        max_alone_epsilon: The same if all other institutions collude, under secure aggregation.

    Raises:
        Refusal: ``delta-too-large``, ``epsilon-too-large`` or ``alone-epsilon-too-large``.
    """
    if plan.delta > max_delta:
        raise Refusal(
            "delta-too-large",
            f"the run has delta {plan.delta:g}, above max-delta ({max_delta:g}); "
            "ask for a smaller privacy.delta, or raise max-delta",
        )
    spent = composition.epsilon(plan.events, ledger.delta, ledger.accountant)
    if spent > max_run_epsilon:
        raise Refusal(
            "epsilon-too-large",
            f"the run spends epsilon {plan.epsilon:g} at its delta {plan.delta:g}, which "
            f"is {spent:.4g} at the ledger's delta {ledger.delta:g}, above max-run-epsilon "
            f"({max_run_epsilon:g}); ask for a smaller privacy.epsilon or "
            "privacy.delta, or raise max-run-epsilon",
        )
    if plan.honest and max_alone_epsilon < math.inf:
        alone = accounting.epsilon_alone(plan.events, ledger.delta, ledger.accountant)
        if alone > max_alone_epsilon:
            raise Refusal(
                "alone-epsilon-too-large",
                f"if all other institutions collude, the run spends epsilon {at_most(alone)} at "
                f"the ledger's delta {ledger.delta:g}, above max-alone-epsilon "
                f"({max_alone_epsilon:g}); ask for a smaller privacy.epsilon or privacy.honest, or "
                "raise max-alone-epsilon",
            )


def check_ledger_delta(ledger: Ledger, path: object, units: int) -> None:
    """Refuse a ledger whose delta is too large for the records.

    Args:
        ledger: The institution's ledger.
        path: The ledger's file, for the message.
        units: Units of privacy in the records.

    Raises:
        Refusal: ``ledger-delta``.
    """
    most = accounting.most_of_class(units)
    if ledger.delta >= 1 / most:
        raise Refusal(
            "ledger-delta",
            f"{path} has delta {ledger.delta:g}; it must be below 1 / "
            f"units ({1 / most:g} for this size class): make another ledger with a smaller --delta",
        )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"
