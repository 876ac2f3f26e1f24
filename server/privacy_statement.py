"""privacy.json: the promise of a run, its unit, adversary and epsilon, in figures and in words."""

from collections.abc import Mapping, Sequence
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.privacy import composition, odds
from fedlora.privacy.composition import Event, History
from server.run_directory import RunState
from server.spending import Spending

ADVERSARY = (
    "the server, the other institutions and anyone who sees any or all of the adapters that were "
    "sent in any round"
)
COLLUDING = (
    "the server, anyone who sees any or all of the sums and adapters of any round, and up to "
    "{colluding} institutions that tell them all that they know, as long as {honest} other "
    "institutions' shares of noise are in each sum"
)
ALONE = (
    ' If all other institutions collude, "epsilon_alone" of an institution is the bound for its '
    "records."
)
SIMULATED_KEYS = (
    " This simulation made all institutions' keys from its seed: the promise is that of a "
    "deployment, where each has a key of its own."
)
ADJACENCY = "add or remove one unit"
NO_PROMISE_WITHOUT_DP = (
    "Differential privacy was off (epsilon = inf). This run protects nobody: adapters may reveal "
    "training records."
)
INSTITUTION_LEVEL_ONLY = (
    "Differential privacy of records was off (privacy.epsilon = inf): the server saw updates that "
    "may reveal training records. What an institution's data did to the global adapters is "
    'protected from those who see only these, as "institution_level" says.'
)
NO_PROMISE_WITH_SEED = (
    "The noise came from a seed in the configuration. This run protects nobody: whoever has the "
    "configuration can subtract the noise. It is a simulation."
)

BY_SIZE_CLASS = "a power of ten below 1 / size class"
"""``delta`` of an institution whose size class nobody reported."""
STARTED = (
    " The run started from {what}: what that one reveals of the same "
    'records adds to this. "ledger_epsilon" of an institution is the bound for all runs on its '
    'ledger; "ledger_epsilon_alone" is that bound if, in runs with secure aggregation, all other '
    "institutions collude."
)
CLASSES_READ = (
    " The list of classes is taken for public: data.labels is empty, so it was read from the "
    "records"
)
CLASS_OF_A_RECORD = ", and a class of one record shows that record's label"
CLASS_OF_AN_INSTITUTION = (
    ", and a class that only one institution has shows that an institution with such records takes "
    "part"
)


def statement(
    config: RunConfig,
    names: Sequence[str],
    state: RunState,
    own_keys: Mapping[str, Any],
    spending: Spending | None,
    *,
    follows: bool,
) -> dict[str, Any]:
    """The content of privacy.json.

    Args:
        config: The run.
        names: All institutions.
        state: The state after the last round.
        own_keys: The aggregation's own keys, on institution-level DP or secure aggregation.
        spending: The possible spending of institutions; None when DP at institutions is off.
        follows: See `promise`.

    Returns:
        The promise in words, as odds, and for each institution an upper bound of its spending (see
        docs/privacy-accounting.md).
    """
    if spending is None:
        return {
            **promise(config, follows=follows),
            "epsilon": "inf",
            "institutions": {},
            **own_keys,
        }
    # Whether and what an institution reported may depend on its records.
    reports = {} if config.privacy.hides_institutions else state.privacy
    institutions = {
        name: spending.stated(reports[name], state.asked.get(name, 0))
        for name in names
        if name in reports
    }
    silent = {
        name: bound(config, state.asked[name])
        for name in names
        if name not in reports and state.asked.get(name)
    }
    return {
        **promise(config, follows=follows),
        **odds_of(config, institutions, silent),
        "institutions": institutions,
        **own_keys,
        "without_report": silent,
    }


def bound(config: RunConfig, rounds_asked: int) -> dict[str, Any]:
    """The entry of an institution whose report does not count: the whole run's epsilon."""
    return {
        "rounds_asked": rounds_asked,
        "epsilon_at_most": config.privacy.epsilon,
        "delta": config.privacy.delta or BY_SIZE_CLASS,
    }


def promise(config: RunConfig, *, follows: bool) -> dict[str, str]:
    """The promise of a run in words: ``protects`` and, under DP, ``adversary``, ``adjacency``.

    Args:
        config: The run.
        follows: Whether its start or its base goes back to an earlier run.
    """
    privacy = config.privacy
    if not privacy.enabled:
        words = NO_PROMISE_WITHOUT_DP
        if privacy.hides_institutions:
            seeded = privacy.noise == "seeded"
            words = NO_PROMISE_WITH_SEED if seeded else INSTITUTION_LEVEL_ONLY + _classes(config)
        return {"protects": words}
    unit = (
        "record" if privacy.unit == "record" else f"value of {privacy.unit!r} with all its records"
    )
    adversary = ADVERSARY
    if privacy.shares_noise:
        adversary = COLLUDING.format(honest=privacy.honest, colluding=privacy.colluding)
    words = (
        f"Each {unit} of an institution's training data is protected from {adversary}: whether it "
        "was there raises the probability of anything that they can observe to at most e^epsilon "
        "times what it is otherwise, plus delta."
    )
    if privacy.shares_noise:
        words += ALONE
        words += SIMULATED_KEYS * (not config.deployed)
    words += _classes(config)
    if config.adapter.start:
        words += STARTED.format(what="an earlier adapter (adapter.start)")
    elif follows:
        words += STARTED.format(what="a base model of an earlier run (merged.json)")
    return {
        "protects": NO_PROMISE_WITH_SEED if privacy.noise == "seeded" else words,
        "adversary": adversary,
        "adjacency": ADJACENCY,
    }


def _classes(config: RunConfig) -> str:
    """What a class list shows that was read from the records; empty where none was."""
    if config.model.task != "classification" or config.data.labels:
        return ""
    of_record = CLASS_OF_A_RECORD * config.privacy.enabled
    return (
        f"{CLASSES_READ}{of_record}{CLASS_OF_AN_INSTITUTION * config.privacy.hides_institutions}."
    )


def history(config: RunConfig, spent: Mapping[str, Any]) -> History:
    """The releases of an institution, from its entry in privacy.json."""
    steps = Event(
        noise_multiplier=spent["noise_multiplier"],
        sample_rate=spent["sample_rate"],
        steps=spent["steps"],
        shares=config.privacy.shares,
    )
    return (steps,)


def odds_of(
    config: RunConfig,
    institutions: Mapping[str, Mapping[str, Any]],
    silent: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """``odds``: what an attacker can learn, each figure at the institution where it is largest.

    Institutions of one epsilon differ in delta and noise by their size class. The entry is empty
    without a promise, where no institution reported, and where one that did not may
    have a larger epsilon.

    Args:
        config: The run.
        institutions: The institutions that reported, as in privacy.json.
        silent: Those that were asked and did not.
    """
    if config.privacy.noise == "seeded" or not institutions:
        return {}
    epsilon = max(spent["epsilon"] for spent in institutions.values())
    if any(one["epsilon_at_most"] > epsilon for one in silent.values()):
        return {}
    alike: dict[tuple[Any, ...], Mapping[str, Any]] = {}
    for spent in institutions.values():  # of those that differ in steps only, the one with most
        figures = ("noise_multiplier", "sample_rate", "delta")
        key = tuple(spent[figure] for figure in figures)
        if key not in alike or spent["steps"] > alike[key]["steps"]:
            alike[key] = spent
    found = [odds.bounds(history(config, one), epsilon, one["delta"]) for one in alike.values()]
    return {"odds": odds.largest(found)}


def largest_epsilon(statement: Mapping[str, Any]) -> float:
    """The largest epsilon of an institution in the statement."""
    return max(
        (
            *(spent["epsilon"] for spent in statement["institutions"].values()),
            *(spent["epsilon_at_most"] for spent in statement.get("without_report", {}).values()),
        ),
        default=0.0,
    )


def with_earlier_runs(config: RunConfig, statement: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The entry with the largest ``ledger_epsilon``, where a ledger has other runs too.

    None if no ledger has any. A ledger's epsilon is at its own delta and by its own accountant,
    which the entry does not name: the run's spending is computed anew at that delta by both.

    Args:
        config: The run.
        statement: The content of privacy.json.
    """
    entries: list[Mapping[str, Any]] = [*statement["institutions"].values()]
    if not any(_has_other_runs(config, one) for one in entries):
        return None
    return max(entries, key=lambda one: one["ledger_epsilon"])


def _has_other_runs(config: RunConfig, spent: Mapping[str, Any]) -> bool:
    total, margin = spent["ledger_epsilon"], 1e-3  # of sums that another processor rounded
    says = spent.get("institution_says", spent)
    same_delta = says["delta"] == spent["ledger_delta"]
    if same_delta and abs(total - says["epsilon"]) <= margin * says["epsilon"]:
        return False  # the usual case, without composition
    # the ledger's figure is of the last report, before steps that were charged and not reported
    reported = {**spent, "steps": spent["steps"] - spent.get("unreported_steps", 0)}
    by_both = [
        composition.epsilon(history(config, reported), spent["ledger_delta"], accountant)
        for accountant in ("prv", "rdp")
    ]
    of_this_run = any(abs(total - own) <= margin * own for own in by_both)
    return total > (1 + margin) * min(by_both) and not of_this_run


def epsilon_alone(statement: Mapping[str, Any]) -> float | str | None:
    """The largest epsilon if all others collude; None without secure aggregation.

    It is "inf" where an institution that was asked did not report, since its noise is not known.
    """
    found = [spent["epsilon_alone"] for spent in statement["institutions"].values()
             if "epsilon_alone" in spent]  # fmt: skip
    if found and statement.get("without_report"):
        return "inf"
    return max(found, key=float, default=None)
