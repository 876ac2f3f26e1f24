"""The rules by which a deployed institution treats each key of a server's configuration.

`KEYS` names every key of `RunConfig`, with one of three rules: `Own`, `Unused` and `Taken`. A value
that the institution does not take is dropped before anything reads it. A value that it takes has
the bounds of `config.config`, which hold for everybody, and those of the institution's settings.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from client.settings import Settings
from fedlora.config.config import RunConfig, from_flat
from fedlora.config.sections import INSTITUTIONS, MAX_LIST_TEXT, RESIDUAL_RANK
from fedlora.config.settings_schema import Scalar
from fedlora.errors import InputError, Refusal

MAX_TEXT = 1000
"""Characters of a text unless `Taken` has another bound; longer texts are not read or logged."""
MAX_MODULES = 256
PROMPT_CHARACTERS_PER_TOKEN = 16
"""Characters of a prompt for each token of the longest row that the settings allow. A prompt is
tokenised with every record, and a longer one would leave no room for a text."""


@dataclass(frozen=True)
class Own:
    """The settings decide; the server's value is not read."""

    value: Callable[[Settings], Any]


@dataclass(frozen=True)
class Unused:
    """The key concerns the server or a simulation; it keeps its default at the institution."""


@dataclass(frozen=True)
class Limit:
    """A bound of the settings.

    Args:
        code: The refusal's code.
        allows: Whether the settings allow the run.
        what: A description of the run for the log; ``run`` is its configuration.
        setting: The setting that decides; empty where no institution takes such a run.
    """

    code: str
    allows: Callable[[Settings, RunConfig], bool]
    what: str
    setting: str = ""


@dataclass(frozen=True)
class Taken:
    """The institution follows the server's value within its limits.

    Args:
        limits: Checked in order.
        max_characters: Characters of the value, at most, where it is a text.
    """

    limits: tuple[Limit, ...] = ()
    max_characters: Callable[[Settings], int] = lambda _: MAX_TEXT


KEYS: Mapping[str, Own | Unused | Taken] = {
    "seed": Taken(),
    "run-dir": Own(lambda own: own.state),
    "accept": Unused(),
    "model.name": Taken(
        (
            Limit(
                "model-not-allowed",
                lambda own, run: run.model.name in own.models,
                "trains {run.model.name}",
                "models",
            ),
        )
    ),
    "model.dtype": Taken(),
    "model.quantization": Taken(),
    # Without a list of classes an institution would take them from its records' labels, and a
    # prompt that names the classes would carry one record's label to every row.
    "model.task": Taken(
        (
            Limit(
                "other-labels",
                lambda own, run: (run.model.task == "sft") == (not own.labels),
                "has the task {run.model.task}, which goes with labels only for classification",
                "labels",
            ),
        )
    ),
    "adapter.method": Taken(),
    "adapter.rank": Taken(
        (
            Limit(
                "adapter-too-large",
                lambda own, run: run.adapter.rank <= own.max_rank,
                "has rank {run.adapter.rank}",
                "max-rank",
            ),
            Limit(
                "adapter-too-large",
                lambda own, run: (
                    not run.federation.traits.residuals or own.max_rank >= RESIDUAL_RANK
                ),
                f"has residuals of rank {RESIDUAL_RANK}",
                "max-rank",
            ),
        )
    ),
    "adapter.alpha": Taken(),
    "adapter.dropout": Taken(),
    "adapter.head": Taken(),
    "adapter.start": Unused(),
    "adapter.target-modules": Taken(
        (
            Limit(
                "adapter-too-large",
                lambda _, run: len(run.adapter.target_modules) <= MAX_MODULES,
                f"names more than {MAX_MODULES} target modules",
            ),
        ),
        max_characters=lambda _: MAX_LIST_TEXT,
    ),
    "data.source": Own(lambda own: own.source),
    "data.test-source": Own(lambda own: own.test_source),
    "data.partition": Own(lambda _: "iid"),
    "data.institutions": Own(lambda _: 1),
    "data.min-records": Own(lambda _: 1),
    "data.max-records": Own(lambda _: 0),
    "data.text": Own(lambda own: own.text),
    "data.label": Own(lambda own: own.label),
    "data.labels": Taken(
        (
            # A server must not learn whether the records have other labels than these.
            Limit(
                "other-labels",
                lambda own, run: run.data.labels == own.labels,
                "has the classes {run.data.labels}, in this order",
                "labels",
            ),
        ),
        max_characters=lambda _: MAX_LIST_TEXT,
    ),
    "data.prompt": Taken(max_characters=lambda own: PROMPT_CHARACTERS_PER_TOKEN * own.max_length),
    "data.test-fraction": Own(lambda _: 0.0),
    "data.view": Unused(),
    "training.local-steps": Taken(
        (
            Limit(
                "too-many-steps",
                lambda own, run: run.training.local_steps <= own.max_steps,
                "takes {run.training.local_steps} steps a round",
                "max-steps",
            ),
        )
    ),
    "training.batch-size": Taken(),
    "training.sample-rate": Taken(),
    # The institution takes the smaller of the server's value and its own (`apply`).
    "training.physical-batch": Taken(),
    "training.learning-rate": Taken(),
    "training.optimizer": Taken(),
    "training.proximal": Taken(),
    "training.max-length": Taken(
        (
            Limit(
                "rows-too-long",
                lambda own, run: run.training.max_length <= own.max_length,
                "takes rows of {run.training.max_length} tokens",
                "max-length",
            ),
        )
    ),
    "training.gradient-checkpointing": Taken(),
    "federation.rounds": Taken(),  # the most rounds that an order may plan noise for
    "federation.strategy": Taken(
        (
            Limit(
                "strategy-not-allowed",
                lambda own, run: run.federation.strategy in own.strategies,
                "uses {run.federation.strategy}",
                "strategies",
            ),
        )
    ),
    "federation.metrics": Unused(),
    "federation.institutions-per-round": Unused(),
    "federation.weighting": Taken(
        (
            Limit(
                "metrics-not-allowed",
                lambda own, run: run.federation.weighting != "records" or "records" in own.report,
                "weighs by exact counts",
                "report",
            ),
        )
    ),
    "federation.robust": Unused(),
    "federation.server-optimizer": Unused(),
    "federation.server-learning-rate": Unused(),
    "federation.server-head-learning-rate": Unused(),
    "federation.timeout": Unused(),  # max-seconds of the settings ends a long message
    "privacy.trust": Taken(
        (
            Limit(
                "trust-not-allowed",
                lambda own, run: own.secure_aggregation or not run.privacy.shares_noise,
                "has the trust {run.privacy.trust}",
                "secure-aggregation",
            ),
        )
    ),
    "privacy.honest": Taken(
        (
            Limit(
                "too-few-honest",
                lambda own, run: (
                    not run.privacy.shares_noise or run.privacy.honest >= own.min_honest
                ),
                "counts on {run.privacy.honest} honest institutions",
                "min-honest",
            ),
        )
    ),
    "privacy.colluding": Taken(
        (
            Limit(
                "too-few-colluding",
                lambda own, run: (
                    not run.privacy.shares_noise or run.privacy.colluding >= own.min_colluding
                ),
                "holds against {run.privacy.colluding} colluding institutions",
                "min-colluding",
            ),
        )
    ),
    # Without masks the server would see a vector with one institution's share of noise.
    "privacy.protocol": Taken(
        (
            Limit(
                "masks-required",
                lambda _, run: not run.privacy.shares_noise or run.privacy.protocol == "full",
                "has the protocol {run.privacy.protocol}, which masks no vector",
            ),
        )
    ),
    "privacy.epsilon": Taken(
        (
            Limit(
                "dp-required",
                lambda own, run: run.privacy.enabled or own.without_dp,
                "has no DP",
                "without-dp",
            ),
            Limit(
                "epsilon-too-large",
                lambda own, run: (
                    not run.privacy.enabled or run.privacy.epsilon <= own.max_run_epsilon
                ),
                "spends epsilon {run.privacy.epsilon:g}",
                "max-run-epsilon",
            ),
        )
    ),
    # Below 1 / units of the size class (`plan_run`), at most max-delta (`checks.check_limits`).
    "privacy.delta": Taken(),
    "privacy.max-grad-norm": Taken(),
    "privacy.unit": Taken(
        (
            Limit(
                "other-unit",
                lambda own, run: not run.privacy.enabled or run.privacy.unit == own.unit,
                "protects the unit {run.privacy.unit!r}",
                "unit",
            ),
        )
    ),
    "privacy.noise": Taken(
        (
            Limit(
                "seeded-noise",
                lambda _, run: not run.privacy.enabled or run.privacy.noise == "secure",
                "draws noise from a seed",
            ),
        )
    ),
    "privacy.ledger": Unused(),  # the path of the ledger is in the settings
    "privacy.max-epsilon": Unused(),
    "privacy.institution-epsilon": Unused(),
    "privacy.institution-max-norm": Unused(),
    # A wish for `fedlora home`, which the institution itself starts; no order depends on them.
    "home.method": Taken(),
    "home.steps": Taken(),
    "home.institutions": Unused(),
    "engine.workers": Unused(),
    "engine.threads": Own(lambda own: own.threads),
    "engine.gpus": Own(lambda own: float(own.gpu)),
    "engine.ray-address": Unused(),
    "tracking.mlflow": Unused(),
    "tracking.mlflow-model": Unused(),
    "tracking.tensorboard": Unused(),
    "tracking.callbacks": Unused(),
}


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
        raise _refusal(settings, "other-data", "names data of its own", "")
    run = from_flat(_taken(settings, asked))
    for rule in KEYS.values():
        for limit in rule.limits if isinstance(rule, Taken) else ():
            if not limit.allows(settings, run):
                raise _refusal(settings, limit.code, limit.what.format(run=run), limit.setting)
    # The institution's own batch changes no result. Under the server's, running out of memory could
    # depend on a record.
    physical_batch = min(run.training.physical_batch, settings.physical_batch)
    return run.replace({"training.physical-batch": physical_batch, "privacy.unit": settings.unit})


def server_values(run: RunConfig) -> dict[str, Scalar]:
    """The part of a followed configuration that a server chose; `apply` gives the run again."""
    chosen = {key: v for key, v in run.flat().items() if isinstance(KEYS[key], Taken)}
    return {**chosen, "data.source": INSTITUTIONS}


def _taken(settings: Settings, asked: Mapping[str, Scalar]) -> dict[str, Any]:
    """The values that the institution takes, and its own, by ``section.key``.

    Raises:
        InputError: For an unknown key, and for a value that is too long to be read.
    """
    values: dict[str, Any] = {}
    for name, value in asked.items():
        rule = KEYS.get(name)
        if rule is None:
            raise InputError(
                f"the run has the key {name[:40]!r}, which this version does not know; the server "
                "must drop it, or both sides install one version"
            )
        if not isinstance(rule, Taken):
            continue
        allowed = rule.max_characters(settings)
        if isinstance(value, str) and len(value) > allowed:
            raise InputError(
                f"{name} has {len(value)} characters; it must have at most {allowed} here: the "
                "server must shorten it"
            )
        values[name] = value
    own = {name: rule.value(settings) for name, rule in KEYS.items() if isinstance(rule, Own)}
    return values | own


def _refusal(settings: Settings, code: str, what: str, setting: str) -> Refusal:
    if not setting:
        return Refusal(
            code, f"the run {what}, which no institution takes; ask the operator to mend it"
        )
    value = json.dumps(getattr(settings, setting.replace("-", "_")), ensure_ascii=False)
    return Refusal(
        code,
        f"the run {what}, which the settings of {settings.name} forbid: {setting} is {value}; "
        "change it, or ask the operator for another run",
    )
