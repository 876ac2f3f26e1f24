"""How a deployed institution treats each key of a server's configuration.

It follows the keys `TAKEN` within `LIMITS`, decides the keys `OWN` by its own settings, leaves all
other keys at their defaults, and refuses a key that does not exist.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from client.settings import Settings
from fedlora.config.config import RunConfig, from_flat
from fedlora.config.sections import INSTITUTIONS, MAX_LIST_TEXT, RESIDUAL_RANK
from fedlora.config.settings_schema import Scalar
from fedlora.errors import InputError, Refusal

MAX_TEXT = 1000
"""Characters of most texts; the institution neither reads nor logs a longer one."""
MAX_MODULES = 256
PROMPT_CHARACTERS_PER_TOKEN = 16
"""Characters of a prompt for each token of the longest row that the settings allow. A prompt is
tokenised with every record, and a longer one would leave no room for a text."""

OWN: Mapping[str, Callable[[Settings], Any]] = {
    "run-dir": lambda own: own.state,
    "data.source": lambda own: own.source,
    "data.test-source": lambda own: own.test_source,
    "data.partition": lambda _: "iid",
    "data.institutions": lambda _: 1,
    "data.min-records": lambda _: 1,
    "data.max-records": lambda _: 0,
    "data.text": lambda own: own.text,
    "data.label": lambda own: own.label,
    "data.test-fraction": lambda _: 0.0,
    "engine.threads": lambda own: own.threads,
    "engine.gpus": lambda own: float(own.gpu),
}
"""Keys whose value the settings decide; the server's value is not read."""

TAKEN = frozenset(
    {
        "seed",
        "model.name",
        "model.dtype",
        "model.quantization",
        "model.task",
        "adapter.method",
        "adapter.rank",
        "adapter.alpha",
        "adapter.dropout",
        "adapter.head",
        "adapter.target-modules",
        "data.labels",
        "data.prompt",
        "training.local-steps",
        "training.batch-size",
        "training.physical-batch",  # at most the institution's own (`apply`)
        "training.learning-rate",
        "training.optimizer",
        "training.proximal",
        "training.max-length",
        "training.gradient-checkpointing",
        "federation.rounds",  # the most rounds that an order may plan noise for
        "federation.strategy",
        "federation.weighting",
        "privacy.trust",
        "privacy.honest",
        "privacy.colluding",
        "privacy.epsilon",
        "privacy.delta",  # below 1 / units (`plan_run`), at most max-delta (`check_limits`)
        "privacy.max-grad-norm",
        "privacy.unit",
        "privacy.noise",
        "home.method",  # a wish for `fedlora home`, which the institution itself starts
        "home.steps",
    }
)
"""Keys whose value the server decides, within `LIMITS` and the bounds of every configuration."""


LIMITS: Mapping[tuple[str, str, str], Callable[[Settings, RunConfig], bool]] = {
    ("model.name", "model-not-allowed", "models"): lambda own, run: run.model.name in own.models,
    # Without a list of classes an institution would take them from its records' labels, and a
    # prompt that names the classes would carry one record's label to every row.
    ("model.task", "other-labels", "labels"): lambda own, run: (
        (run.model.task == "sft") == (not own.labels)
    ),
    ("adapter.rank", "adapter-too-large", "max-rank"): lambda own, run: (
        run.adapter.rank <= own.max_rank
    ),
    ("federation.strategy", "adapter-too-large", "max-rank"): lambda own, run: (
        not run.federation.traits.residuals or own.max_rank >= RESIDUAL_RANK
    ),
    ("adapter.target-modules", "adapter-too-large", ""): lambda _, run: (
        len(run.adapter.target_modules) <= MAX_MODULES
    ),
    # A server must not learn whether the records have other labels than these.
    ("data.labels", "other-labels", "labels"): lambda own, run: run.data.labels == own.labels,
    ("training.local-steps", "too-many-steps", "max-steps"): lambda own, run: (
        run.training.local_steps <= own.max_steps
    ),
    ("training.max-length", "rows-too-long", "max-length"): lambda own, run: (
        run.training.max_length <= own.max_length
    ),
    ("federation.strategy", "strategy-not-allowed", "strategies"): lambda own, run: (
        run.federation.strategy in own.strategies
    ),
    ("federation.weighting", "metrics-not-allowed", "report"): lambda own, run: (
        run.federation.weighting != "records" or "records" in own.report
    ),
    ("privacy.trust", "trust-not-allowed", "secure-aggregation"): lambda own, run: (
        own.secure_aggregation or not run.privacy.shares_noise
    ),
    ("privacy.honest", "too-few-honest", "min-honest"): lambda own, run: (
        not run.privacy.shares_noise or run.privacy.honest >= own.min_honest
    ),
    ("privacy.colluding", "too-few-colluding", "min-colluding"): lambda own, run: (
        not run.privacy.shares_noise or run.privacy.colluding >= own.min_colluding
    ),
    ("privacy.epsilon", "dp-required", "without-dp"): lambda own, run: (
        run.privacy.enabled or own.without_dp
    ),
    ("privacy.epsilon", "epsilon-too-large", "max-run-epsilon"): lambda own, run: (
        not run.privacy.enabled or run.privacy.epsilon <= own.max_run_epsilon
    ),
    ("privacy.unit", "other-unit", "unit"): lambda own, run: (
        not run.privacy.enabled or run.privacy.unit == own.unit
    ),
    ("privacy.noise", "seeded-noise", ""): lambda _, run: (
        not run.privacy.enabled or run.privacy.noise == "secure"
    ),
}
"""(key, the refusal's code, the setting that decides or "") -> whether the settings allow the run.

Checked in this order. Without a setting no institution takes such a run.
"""


def apply(settings: Settings, asked: Mapping[str, Scalar]) -> RunConfig:
    """The run's configuration as this institution follows it.

    Args:
        settings: The institution's own settings.
        asked: Flower's run config, as the server gave it.

    Raises:
        InputError: For an unknown key, and for a value that no run may have.
        Refusal: For a run that the settings do not allow; the code names the reason.
    """
    if asked.get("data.source") != INSTITUTIONS:
        raise Refusal("other-data", f"data.source is not {INSTITUTIONS}: the run names other data")
    known = RunConfig().flat()
    most = {
        "adapter.target-modules": MAX_LIST_TEXT,
        "data.labels": MAX_LIST_TEXT,
        "data.prompt": PROMPT_CHARACTERS_PER_TOKEN * settings.max_length,
    }
    for key, value in asked.items():
        if key not in known:
            raise InputError(
                f"the run has the key {key[:40]!r}, which this version does not know; the server "
                "must drop it, or both sides install one version"
            )
        allowed = most.get(key, MAX_TEXT)
        if key in TAKEN and isinstance(value, str) and len(value) > allowed:
            raise InputError(f"{key} has {len(value)} characters; it must have at most {allowed}")
    taken = {key: value for key, value in asked.items() if key in TAKEN}
    run = from_flat(taken | {key: value(settings) for key, value in OWN.items()})
    for (key, code, setting), allows in LIMITS.items():
        if not allows(settings, run):
            raise Refusal(code, _words(settings, run, key, setting))
    # The institution's own batch changes no result. Under the server's, running out of memory could
    # depend on a record.
    physical_batch = min(run.training.physical_batch, settings.physical_batch)
    return run.replace({"training.physical-batch": physical_batch, "privacy.unit": settings.unit})


def server_values(run: RunConfig) -> dict[str, Scalar]:
    """The part of a followed configuration that a server chose; `apply` gives the run again."""
    chosen = {key: value for key, value in run.flat().items() if key in TAKEN}
    return {**chosen, "data.source": INSTITUTIONS}


def _words(settings: Settings, run: RunConfig, key: str, setting: str) -> str:
    said = f"the run has {key} = {str(run.flat()[key])[:MAX_TEXT]}"
    if not setting:
        return f"{said}, which no institution takes; ask the operator to mend it"
    value = json.dumps(getattr(settings, setting.replace("-", "_")), ensure_ascii=False)
    return (
        f"{said}, which the settings of {settings.name} forbid: {setting} is {value}; "
        "change it, or ask the operator for another run"
    )
