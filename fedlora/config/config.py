"""One run's configuration: frozen dataclasses <-> TOML <-> Flower's flat run config.

Keys are kebab-case and spelled ``section.key`` on the command line and in Flower's run config.
Every section checks itself when it is made, so a `RunConfig` that exists is valid; each bad value
is one `InputError` that names the key, the value, the bound and the remedy.
"""

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import tomllib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedlora.config import config_rules, gone, schemes
from fedlora.config.sections import (
    INSTITUTIONS,
    MIN_NATURAL_RECORDS,
    AdapterConfig,
    DataConfig,
    EngineConfig,
    FederationConfig,
    HomeConfig,
    ModelConfig,
    PrivacyConfig,
    TrackingConfig,
    TrainingConfig,
)
from fedlora.config.settings_schema import Scalar, Section, coerce, hints_of, kebab, key
from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.runs.run_files import other_writer

ACCEPTABLE = ("delta", "noise")
"""Findings that void a result (`fedlora.data.findings`), and that ``accept`` may name."""
ENGINE_ONLY = ("run-dir", "accept", "tracking.")
"""Keys that decide a run's place, speed and refusal, and no result."""
UNRELEASED = (
    *("home.", "engine.", "adapter.head", "training.physical-batch"),
    *("data.source", "data.test-source"),
)
"""Keys that do not change what a round releases, so that an institution may change them between two
tries at one order, which carries the head. A ledger knows the records themselves, wherever they
lie."""
TOGETHER_ONLY = ("privacy.", "federation.")
"""Keys of training together: an institution's model alone does not depend on them."""


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """The configuration of one run, complete."""

    seed: int = key(
        1,
        "seed of all random draws; with privacy.noise = secure not of DP: noise, sampling of "
        "units, dropout in private steps",
        at_least=0,
    )
    run_dir: str = key("", "directory of the results; empty: runs/NAME-TIME")
    accept: tuple[str, ...] = key(
        (),
        "findings of `fedlora check` that void a result and are accepted all the same: "
        + ", ".join(ACCEPTABLE),
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    adapter: AdapterConfig = dataclasses.field(default_factory=AdapterConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
    federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
    privacy: PrivacyConfig = dataclasses.field(default_factory=PrivacyConfig)
    home: HomeConfig = dataclasses.field(default_factory=HomeConfig)
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    tracking: TrackingConfig = dataclasses.field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := sorted(set(self.accept) - set(ACCEPTABLE)):
            raise InputError(
                f"accept has {unknown[0]!r}; it must be one of {', '.join(ACCEPTABLE)}: only "
                "findings that void a result need to be accepted"
            )
        schemes.parse(
            self.data.partition,
            institutions=self.data.institutions,
            has_classes=self.model.task != "sft",
        )
        federation, privacy = self.federation, self.privacy
        config_rules.check_federation(federation, privacy)
        if self.deployed and (
            not self.data.institutions or (self.model.task != "sft" and not self.data.labels)
        ):
            raise InputError(
                "data.source is 'institutions', where nobody sees all records: list the classes in "
                "data.labels (none for sft), and the number of institutions in data.institutions"
            )
        if self.deployed:
            config_rules.check_lists(self.flat())
        if privacy.shares_noise:
            config_rules.check_secure(federation, privacy, self.flat(), deployed=self.deployed)
        config_rules.check_robust(federation, privacy)
        config_rules.check_strategy(federation)
        config_rules.check_home(self.home, self.model.task)
        config_rules.check_plug_ins(self.plug_ins)

    @property
    def plug_ins(self) -> list[tuple[str, str]]:
        """(key, ``module:object``) of the code that is not part of fedlora."""
        named = [
            ("federation.strategy", self.federation.own_code),
            *(("tracking.callbacks", name) for name in self.tracking.callbacks),
            *(
                (key, value.removeprefix(schemes.PYTHON))
                for key, value in (
                    ("data.source", self.data.source),
                    ("data.test-source", self.data.test_source),
                    ("data.partition", schemes.inner(self.data.partition)),
                )
                if value.startswith(schemes.PYTHON)
            ),
        ]
        return [(key, name) for key, name in named if name]

    def at_home(self, institutions: int) -> list[int]:
        """The numbers of the institutions whose models at home a run compares, ascending.

        Args:
            institutions: All institutions of the run.
        """
        compares = self.home.method != "none" and self.federation.rounds > 0 and not self.deployed
        return self.home.chosen(institutions) if compares and institutions > 1 else []

    @property
    def deployed(self) -> bool:
        """Whether each institution brings its own records, on a machine of its own."""
        return self.data.source == INSTITUTIONS

    def flat(self) -> dict[str, Scalar]:
        """Every key as ``section.key`` with a value that Flower's run config can carry."""
        return {name: json.dumps(v) if isinstance(v, tuple) else v for name, v in _walk(self)}

    def shared(self) -> dict[str, Scalar]:
        """`flat` without the keys of tracking, which only the server needs."""
        return {k: v for k, v in self.flat().items() if not k.startswith(TrackingConfig.prefix)}

    def public(self) -> dict[str, Scalar]:
        """`shared` without paths and machines of the server, for a released adapter."""
        own = (
            "run-dir",
            "adapter.start",
            "data.test-source",
            EngineConfig.prefix,
        )
        return {k: v for k, v in self.shared().items() if not k.startswith(own)}

    def to_toml(self) -> str:
        """The fully resolved configuration as TOML text."""
        tree: dict[str, Any] = {}
        for name, value in _walk(self):
            section, _, key = name.rpartition(".")
            target = tree.setdefault(section, {}) if section else tree
            target[key] = list(typing.cast(Any, value)) if isinstance(value, tuple) else value
        return tomli_w.dumps(tree)

    def fingerprint(self, *without: str) -> str:
        """SHA-256 (hex) of every key that can change a result, without some of them."""
        left_out = (*ENGINE_ONLY, *without)
        kept = {k: v for k, v in self.flat().items() if not k.startswith(left_out)}
        return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()

    def replace(self, values: Mapping[str, Any]) -> "RunConfig":
        """A changed copy; ``values`` maps ``section.key`` to a value or to its text.

        Every other key keeps its value, also one that was a default. Defaults that follow from
        other keys are those of `load` and `from_flat`.

        Raises:
            InputError: For an unknown key, a wrong type or a value out of bounds.
        """
        return from_flat({**self.flat(), **values})


SECTIONS: dict[str, type[Section]] = {
    field.name: field.default_factory
    for field in dataclasses.fields(RunConfig)
    if isinstance(field.default_factory, type)
}


def _walk(config: RunConfig) -> Iterable[tuple[str, Any]]:
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name in SECTIONS:
            for inner in dataclasses.fields(value):
                yield f"{field.name}.{kebab(inner.name)}", getattr(value, inner.name)
        else:
            yield kebab(field.name), value


@functools.cache
def _fields() -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """``section.key`` -> (field, its type)."""
    found: dict[str, tuple[dataclasses.Field[Any], Any]] = {}
    for cls in (RunConfig, *SECTIONS.values()):
        hints = hints_of(cls)
        for field in dataclasses.fields(typing.cast(Any, cls)):
            if field.name not in SECTIONS:
                found[cls.prefix + kebab(field.name)] = (field, hints[field.name])
    return found


def describe() -> list[tuple[str, str, str, str]]:
    """(key, type, default, one line) of every key, in order."""
    rows: list[tuple[str, str, str, str]] = []
    for name, (field, kind) in _fields().items():
        names = {str: "text", tuple[str, ...]: "list of text", tuple[float, ...]: "list of numbers"}
        shown = "|".join(field.metadata["choices"]) or names.get(kind) or kind.__name__
        rows.append((name, shown, json.dumps(field.default), field.metadata["help"]))
    return rows


def from_flat(values: Mapping[str, Any]) -> RunConfig:
    """The configuration with ``values`` (``section.key`` -> value or its text) over the defaults.

    Raises:
        InputError: For an unknown key (with the nearest valid one), a wrong type or a bad value.
    """
    values = {**_dependent_defaults(values), **values}
    parts: dict[str, dict[str, Any]] = {section: {} for section in ("", *SECTIONS)}
    for name, value in values.items():
        section, _, key = name.rpartition(".")
        _field(name)
        parts[section][key.replace("-", "_")] = value
    made = {section: cls(**parts[section]) for section, cls in SECTIONS.items()}
    return RunConfig(**parts[""], **typing.cast(dict[str, Any], made))


def check_values(values: Mapping[str, Any]) -> None:
    """Check each value by itself, also one that another key makes meaningless.

    Raises:
        InputError: For an unknown key, a wrong type or a value out of its own bounds.
    """
    for name, value in values.items():
        field, kind = _field(name)
        coerce(name, value, kind, field.metadata["bounds"])


def _field(name: str) -> tuple[dataclasses.Field[Any], Any]:
    """The field of a key, and its type. Raises `InputError` for what is no key."""
    known = _fields()
    if name in gone.KEYS:
        raise InputError(f"{name} is gone; {gone.KEYS[name]}")
    if name not in known:
        raise InputError(f"{name} is not a configuration key; {_meant(name)}")
    return known[name]


def _meant(name: str) -> str:
    """The keys that a name may have meant, for an error."""
    known = _fields()
    same = [key for key in known if key.rpartition(".")[2] == name.rpartition(".")[2]]
    near = same or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else "`fedlora config` lists the keys"


def _dependent_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that differ from the declared ones, given the values of other keys."""
    traits = STRATEGY_TABLE.get(str(values.get("federation.strategy", "fedavg")))
    found: dict[str, Any] = {}
    if values.get("model.task") == "sft":
        found["home.method"] = "none"
    if traits is not None and traits.no_server_optimizer:
        found["federation.server-optimizer"] = "none"
    optimizer = {**found, **values}.get("federation.server-optimizer")
    if optimizer in ("none", "momentum"):
        found["federation.server-learning-rate"] = 1.0
    return {**found, **_simulation_defaults(values)}


def _simulation_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults of a simulation, whose institutions may differ much in size.

    Under one noise the update of an institution of one record is hundreds of times longer than
    that of a large one, and would count as much. Without DP they are the same, so that both runs
    have the same institutions and weights.
    """
    if values.get("data.source", DataConfig.source) == INSTITUTIONS:
        return {}
    found: dict[str, Any] = {}
    partition = str(values.get("data.partition", DataConfig.partition))
    if schemes.inner(partition).partition(":")[0] in schemes.BY_VALUE:
        found["data.min-records"] = MIN_NATURAL_RECORDS
    weighed = values.get("federation.robust", "none") != "median"
    try:
        hidden = float(values.get("privacy.institution-epsilon", PrivacyConfig.institution_epsilon))
    except (TypeError, ValueError):
        return found  # refused where the value is checked
    if weighed and math.isinf(hidden):
        found["federation.weighting"] = "public-size"
    return found


def from_context(run_config: Mapping[str, Any], run_id: int) -> RunConfig:
    """The configuration with which a Flower app was started.

    Its run directory is ``runs/flower-ID`` unless the configuration names another.
    """
    config = from_flat(run_config)
    if config.run_dir:
        return config
    return dataclasses.replace(config, run_dir=str(Path(f"runs/flower-{run_id}").absolute()))


def load(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read a TOML file; ``overrides`` win.

    Raises:
        InputError: If the file is missing, is not TOML, or holds a bad key or value. If it is that
            of a run which another fedlora wrote, the error names that one.
    """
    file = expanded(str(path))
    values = given(file)
    try:
        return from_flat({**values, **(overrides or {})})
    except InputError as error:
        if not (writer := other_writer(file.parent)) or _is_valid(values):
            raise  # what is wrong is an override
        raise InputError(
            f"{file.parent} was written by {writer}: read it with the one that wrote it ({error})"
        ) from None


def _is_valid(values: Mapping[str, Any]) -> bool:
    try:
        from_flat(values)
    except InputError:
        return False
    return True


def given(path: Path) -> dict[str, Any]:
    """The keys that a TOML file gives, ``section.key`` -> value, unchecked.

    Raises:
        InputError: If the file is missing or is not TOML.
    """
    if path.suffix in (".csv", ".jsonl", ".parquet"):
        raise InputError(
            f"{path} holds records and no configuration; `fedlora init {path}` writes one"
        )
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the config {path}: {error.strerror}; give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    values: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= {f"{name}.{k}": v for k, v in typing.cast(dict[str, Any], value).items()}
        else:
            values[name] = value
    return values


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """``["a.b=1", ...]`` as a mapping.

    Raises:
        InputError: For an item without ``=``.
    """
    pairs: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if not equals:
            raise InputError(f"--set {item} has no value; write --set KEY=VALUE")
        pairs[name.strip()] = value.strip()
    return pairs
