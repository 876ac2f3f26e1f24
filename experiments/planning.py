"""`fedlora plan`: noise for a budget, budget for a noise multiplier, and tables of both."""

from typing import Any

from rich.table import Table

from fedlora import accounting
from fedlora.accounting import Event
from fedlora.errors import InputError
from fedlora.terminal import Terminal

NOISE_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
STEP_FACTORS = (0.1, 0.25, 0.5, 1.0, 2.0)


def plan(
    *,
    records: int,
    batch_size: int,
    steps: int,
    epsilon: float | None,
    noise_multiplier: float | None,
    delta: float | None,
    accountant: str,
) -> dict[str, Any]:
    """Solve for ``epsilon`` or ``noise_multiplier``, the one that is None.

    Raises:
        InputError: If not exactly one is given, or a value is out of bounds.
    """
    if (epsilon is None) == (noise_multiplier is None):
        raise InputError(
            "give one of --epsilon (for the noise) and --noise-multiplier (for epsilon)"
        )
    for name, value in (("records", records), ("batch-size", batch_size), ("steps", steps)):
        if value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 1")
    if batch_size > records:
        raise InputError(f"--batch-size is {batch_size}, but there are {records} records; lower it")
    delta = accounting.default_delta(records) if delta is None else delta
    accounting.check_delta(delta, records)
    rate = batch_size / records
    if noise_multiplier is None and epsilon is not None:
        noise_multiplier = accounting.noise_multiplier(
            epsilon=epsilon, delta=delta, sample_rate=rate, steps=steps, accountant=accountant
        )
    sigma = noise_multiplier or 0.0
    spent = accounting.epsilon(
        (Event(noise_multiplier=sigma, sample_rate=rate, steps=steps),), delta, accountant
    )
    return {
        "noise_multiplier": sigma,
        "epsilon": spent,
        "delta": delta,
        "records": records,
        "batch_size": batch_size,
        "sample_rate": rate,
        "steps": steps,
        "accountant": accountant,
    }


def table(result: dict[str, Any]) -> list[dict[str, float]]:
    """Return epsilon near a plan: with other noise, then with other numbers of steps."""

    def at(sigma: float, steps: int) -> dict[str, float]:
        event = Event(noise_multiplier=sigma, sample_rate=result["sample_rate"], steps=steps)
        spent = accounting.epsilon((event,), result["delta"], result["accountant"])
        return {"noise_multiplier": sigma, "steps": steps, "epsilon": spent}

    sigma, steps = result["noise_multiplier"], result["steps"]
    rows = [at(sigma * factor, steps) for factor in NOISE_FACTORS]
    return rows + [
        at(sigma, max(1, round(steps * factor))) for factor in STEP_FACTORS if factor != 1.0
    ]


def show(result: dict[str, Any], console: Terminal) -> None:
    """Print a plan, and its table when it has one."""
    console.print(
        f"noise multiplier {result['noise_multiplier']:.4f} spends epsilon "
        f"{result['epsilon']:.4f} at delta {result['delta']:g}: {result['steps']} steps "
        f"at sample rate {result['sample_rate']:.5f} ({result['batch_size']} of "
        f"{result['records']} records), {result['accountant'].upper()} accountant"
    )
    if "table" in result:
        rows = Table("noise multiplier", "steps", "epsilon")
        for row in result["table"]:
            rows.add_row(
                f"{row['noise_multiplier']:.4f}", str(row["steps"]), f"{row['epsilon']:.4f}"
            )
        console.print(rows)
