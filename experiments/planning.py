"""`fedlora plan`: noise for a budget, budget for a noise multiplier, and tables of both."""

from dataclasses import dataclass
from typing import Any

from fedlora.config.sections import TrainingConfig
from fedlora.errors import InputError
from fedlora.privacy import accounting, composition
from fedlora.privacy.composition import Event
from fedlora.rounding import at_most
from fedlora.runs.run_files import finite
from fedlora.secure import noise_shares
from fedlora.terminal import Terminal


@dataclass(frozen=True, kw_only=True)
class Trust:
    """The trust of a plan with secure aggregation.

    Args:
        institutions: The number of institutions.
        honest: Institutions whose shares of noise are in every sum.
        colluding: Institutions that may tell the server all that they know.

    Raises:
        InputError: If the numbers do not fit together.
    """

    institutions: int
    honest: int
    colluding: int

    def __post_init__(self) -> None:
        if self.honest < noise_shares.MIN_HONEST:
            raise InputError(
                f"--honest is {self.honest}; it must be at least {noise_shares.MIN_HONEST}"
            )
        if self.colluding < noise_shares.MIN_COLLUDING:
            raise InputError(
                f"--colluding is {self.colluding}; it must be at least "
                f"{noise_shares.MIN_COLLUDING}, since an institution knows its own share"
            )
        if self.honest + self.colluding > self.institutions:
            raise InputError(
                f"--honest is {self.honest} and --colluding {self.colluding}, but --institutions "
                f"is {self.institutions}; lower one of them or raise --institutions"
            )


def trust_of(institutions: int | None, honest: int | None, colluding: int | None) -> Trust | None:
    """The trust of these options; None where none is given.

    Raises:
        InputError: If a part is missing, or the numbers do not fit together.
    """
    if institutions is None and honest is None and colluding is None:
        return None
    if institutions is None or honest is None:
        raise InputError("secure aggregation needs --institutions and --honest; give both")
    if colluding is None:
        colluding = noise_shares.MIN_COLLUDING
    return Trust(institutions=institutions, honest=honest, colluding=colluding)


def rate_of(records: int, batch_size: float) -> float:
    """The share of an institution's records in a step.

    As in a run, that of a number of records follows from the size class, not from the exact number.

    Args:
        records: Records of the institution.
        batch_size: As ``training.batch-size``.

    Raises:
        InputError: If a value is out of bounds.
    """
    if records < 1:
        raise InputError(f"--records is {records}; it must be at least 1")
    if batch_size > records:
        raise InputError(f"--batch-size is {batch_size}, but there are {records} records; lower it")
    return TrainingConfig(batch_size=batch_size).rate(accounting.public_size(records))


def plan(
    *,
    records: int,
    sample_rate: float,
    steps: int,
    epsilon: float | None,
    noise_multiplier: float | None,
    delta: float | None,
    trust: Trust | None,
) -> dict[str, Any]:
    """Solve for ``epsilon`` or ``noise_multiplier``, the one that is None.

    As in a run, the default delta follows from the size class (`fedlora.privacy.budget`).

    Args:
        records: Records of the institution.
        sample_rate: Share of the records in a step (`rate_of`).
        steps: Steps of the whole plan. Under secure aggregation a round that is given up costs its
            step like any other.
        epsilon: The budget.
        noise_multiplier: The noise; under secure aggregation that of the sum.
        delta: Its delta; None for the default of a run.
        trust: Secure aggregation; None where the institution adds all noise.

    Raises:
        InputError: If not exactly one is given, or a value is out of bounds.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError(
            "give one of --epsilon (for the noise) and --noise-multiplier (for epsilon)"
        )
    if steps < 1:
        raise InputError(f"--steps is {steps}; it must be at least 1")
    most = accounting.most_of_class(records)
    delta = accounting.public_delta(most) if delta is None else delta
    accounting.check_delta(delta, most)
    shares = 0 if trust is None else trust.honest
    if noise_multiplier is None and epsilon is not None:
        noise_multiplier = accounting.noise_multiplier(
            epsilon=epsilon,
            delta=delta,
            sample_rate=sample_rate,
            steps=steps,
            shares=shares,
        )
    sigma = noise_multiplier or 0.0
    event = Event(noise_multiplier=sigma, sample_rate=sample_rate, steps=steps, shares=shares)
    spent = composition.epsilon((event,), delta)
    return {
        "noise_multiplier": sigma,
        "epsilon": spent,
        "delta": delta,
        "records": records,
        "size_class": accounting.public_size(records),
        "sample_rate": sample_rate,
        "steps": steps,
        **({} if trust is None else _shared(trust, event, delta)),
    }


def _shared(trust: Trust, event: Event, delta: float) -> dict[str, Any]:
    """The figures of a plan that secure aggregation adds."""
    return {
        "honest": trust.honest,
        "colluding": trust.colluding,
        "institutions": trust.institutions,
        "least_survivors": noise_shares.least_survivors(
            trust.institutions, trust.honest, trust.colluding
        ),
        "share_noise_multiplier": event.alone().noise_multiplier,
        "epsilon_alone": finite(accounting.epsilon_alone((event,), delta)),
    }


def show(result: dict[str, Any], console: Terminal) -> None:
    """Print a plan."""
    console.print(
        f"noise multiplier {result['noise_multiplier']:.4f} spends epsilon "
        f"{at_most(result['epsilon'], 5)} at delta {result['delta']:g}: {result['steps']} steps "
        f"at sample rate {result['sample_rate']:.5f}, {result['records']} records (size class "
        f"{result['size_class']})"
    )
    if "honest" in result:
        alone = result["epsilon_alone"]
        console.print(
            f"secure aggregation: that noise is in a sum with the shares of {result['honest']} "
            f"honest institutions; each adds noise of multiplier "
            f"{result['share_noise_multiplier']:.4f}. It holds against {result['colluding']} "
            "colluding institutions; if all others collude, epsilon is "
            + (alone if isinstance(alone, str) else at_most(alone))
            + f". A round needs {result['least_survivors']} of {result['institutions']} "
            "institutions; a round that is given up costs its steps"
        )
