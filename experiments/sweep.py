"""The runs of a sweep: arms x grid, each identified by its configuration.

A sweep is a TOML file: ``base`` names a configuration, ``[set]`` overrides keys of it,
``[set.ARM]`` overrides keys in one arm, ``[grid]`` lists values. A grid entry is a key with a list,
or a name with a table of variants, each of which sets several keys together. An arm's own values
win over a variant's. See docs/experiments.md.
"""

import difflib
import itertools
import json
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments import results
from experiments.results import EPSILON
from fedlora.config import config as configs
from fedlora.config import plugins, ready, schemes
from fedlora.config.config import SECTIONS, RunConfig, check_values, from_flat
from fedlora.data import records
from fedlora.data.shards import Federation
from fedlora.errors import InputError
from fedlora.files import expanded, sha256
from fedlora.models import base_directory, model_files
from server import binding

ARMS = ("base", "central", "central-dp", "federated", "federated-dp")
KEYS = ("base", "set", "grid", "arms")
LOCAL_TRUST = {"privacy.trust": "local", "privacy.honest": 0, "privacy.colluding": 0}
SINGLE_INSTITUTION = {
    "federation.strategy": "fedavg",
    "federation.institutions-per-round": 0,
    "federation.weighting": "uniform",
    "federation.robust": "none",
    **LOCAL_TRUST,
    "privacy.institution-epsilon": math.inf,
    "home.method": "none",
}
"""Settings of a run with one institution: federation features must not change its result."""
SPLIT_KEYS = ("seed", "data.", "model.", "training.max-length")
"""Prefixes of keys that fix the factors of the untrained adapter and the split of the data."""
MACHINE_KEYS = ("accept", "engine.", "tracking.")
"""Prefixes of further keys that count where nothing is trained."""
STARTUP_SECONDS, OPERATIONS_PER_SECOND = 15.0, 5e11
"""A guess for the cost of cells; measured seconds correct it during the sweep."""

Axes = dict[str, list[tuple[Any, dict[str, Any]]]]
"""Axis -> its values, each as a label with the keys that the value sets."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One arm at one point of the grid with one seed.

    Args:
        arm: One of `ARMS`.
        axes: The grid's values without the seed; ``privacy.epsilon`` is inf in arms without DP.
        config: The run.
    """

    arm: str
    axes: Mapping[str, Any]
    config: RunConfig


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep.

    Args:
        name: The name of its directory, made from configuration, records and base weights
            by the sweep's key.
        config: The run.
        institutions: The number of institutions.
        cost: A guess of the run's seconds.
    """

    name: str
    config: RunConfig
    institutions: int
    cost: float


def read(path: Path) -> list[Case]:
    """Read and check the cases of a sweep file. Loads configurations only.

    Raises:
        InputError: Naming the value, its bound and the remedy.
    """
    tree = _toml(path)
    base, arms = _base(path, tree), _arms(tree)
    always, own = _overrides(tree, arms)
    axes = _grid(tree)
    _check_labels(axes, own)
    cases: dict[str, Case] = {}
    for choice in itertools.product(*axes.values()):
        values = dict(always)
        for _, chosen in choice:
            values |= chosen
        labels = {name: label for name, (label, _) in zip(axes, choice, strict=True)}
        labels.pop("seed", None)
        for arm in arms:
            config = _in_arm(arm, base, {**values, **own[arm]})
            if arm.endswith("-dp") and not config.privacy.enabled:
                continue  # this would be the arm without DP
            spent = {EPSILON: config.privacy.epsilon} if EPSILON in labels else {}
            case = Case(arm=arm, axes=labels | spent, config=config)
            cases.setdefault(results.case_key(arm, case.axes, config.seed), case)
    for arm in arms:
        if arm not in {case.arm for case in cases.values()}:
            raise InputError(
                f"arm {arm!r} needs a budget, but privacy.epsilon is inf wherever it runs; set "
                "privacy.epsilon to a number, or leave the arm out"
            )
    return list(cases.values())


def _toml(path: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"cannot read the sweep {path}: {error.strerror}; give the path of a TOML file"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    if unknown := sorted(tree.keys() - set(KEYS)):
        raise InputError(f"{unknown[0]} is no key of a sweep; keys are {', '.join(KEYS)}")
    for name, kind, example in (
        ("base", str, '"experiments/configs/fpb.toml"'),
        ("arms", list, '["federated", "federated-dp"]'),
        ("grid", dict, "seed = [1, 2, 3] below [grid]"),
    ):
        if not isinstance(tree.get(name), kind) or not tree[name]:
            raise InputError(f"{path} has no {name} that can be read; give one, such as {example}")
    return tree


def _base(path: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that the base gives. Its defaults follow in each arm, from the keys of all."""
    beside = path.parent / tree["base"]
    given = configs.given(beside if beside.is_file() else ready.locate(Path(tree["base"])))
    if from_flat(given).deployed:
        raise InputError(
            "data.source is 'institutions', for deployments; arms of a sweep need all records "
            "here: name them"
        )
    return given


def _arms(tree: Mapping[str, Any]) -> list[str]:
    arms: list[str] = tree["arms"]
    for arm in arms:
        if arm not in ARMS or arms.count(arm) > 1:
            near = difflib.get_close_matches(str(arm), ARMS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"arms has {arm!r}; it must have each at most once of "
                             f"{', '.join(ARMS)}{hint}")  # fmt: skip
    return arms


def _overrides(
    tree: Mapping[str, Any], arms: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the overrides for all arms, and those of each arm."""
    given = tree.get("set", {})
    own = {arm: _flat(given.get(arm, {})) for arm in arms}
    for arm in ARMS:
        if arm in given and arm not in arms:
            raise InputError(f"[set.{arm}] exists, but arms has no {arm!r}; drop it or add it")
    for arm, values in own.items():
        _check_keys(f"[set.{arm}]", values)
        for key in values:
            if key == EPSILON and not arm.endswith("-dp"):
                raise InputError(
                    f"[set.{arm}] has {key}, but the arm is without DP; drop it, or name the arm "
                    f"{arm}-dp"
                )
            if key.startswith(SPLIT_KEYS):
                raise InputError(
                    f"[set.{arm}] has {key}, and all arms share one split; move it to [set]"
                )
    always = _flat({name: value for name, value in given.items() if name not in ARMS})
    _check_keys("[set]", always)
    return always, own


def _grid(tree: Mapping[str, Any]) -> Axes:
    """Read and check the axes of a sweep file."""
    axes: Axes = {}
    for name, value in tree["grid"].items():
        if isinstance(value, dict) and name not in SECTIONS:
            axes[name] = [(label, _flat(values)) for label, values in value.items()]
            continue
        for key, listed in _flat({name: value}).items():
            if not isinstance(listed, list):
                raise InputError(f"grid has {key} = {listed!r}; it must be a list of values")
            axes[key] = [(_plain(one), {key: one}) for one in listed]
    for name, choices in axes.items():
        labels = [label for label, _ in choices]
        if not labels or len(set(map(str, labels))) < len(labels):
            raise InputError(f"grid has {name} = {labels}; list at least one value, each once")
        for _, values in choices:
            _check_keys(f"grid {name}", values)
    return axes


def _check_labels(axes: Axes, own: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse a grid whose labels would misstate the settings of a run."""
    places: dict[str, str] = {}
    for name, choices in axes.items():
        if name in results.COLUMNS:
            raise InputError(f"grid has {name}, a column of the results; give it another name")
        for key in {key for _, values in choices for key in values}:
            if key in places:
                raise InputError(
                    f"grid {places[key]} and grid {name} both set {key}, so labels of one would "
                    "not match the runs; set it in one of them"
                )
            places[key] = name
    for (arm, values), (name, choices) in itertools.product(own.items(), axes.items()):
        for label, chosen in choices:
            if chosen and chosen.keys() <= values.keys():
                raise InputError(
                    f"[set.{arm}] sets all keys of grid {name} {label!r}, so the arm would run "
                    "without it under its name; drop one of them"
                )


def _plain(value: Any) -> Any:
    """Return the label of a grid value in a table."""
    return ",".join(map(str, value)) if isinstance(value, list) else value


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"privacy": {"epsilon": 8}}`` to ``{"privacy.epsilon": 8}``."""
    if not isinstance(tree, dict):
        raise InputError(f"{prefix or 'a table'} is {tree!r}; it must be a table of keys")
    found: dict[str, Any] = {}
    for name, value in tree.items():
        nested = isinstance(value, dict)
        found |= _flat(value, f"{prefix}{name}.") if nested else {prefix + name: value}
    return found


def _check_keys(where: str, values: Mapping[str, Any]) -> None:
    if "run-dir" in values:
        raise InputError(f"{where} has run-dir, which a sweep sets itself: use --out; drop it")


def _in_arm(arm: str, base: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
    """Return an arm's configuration: the base's keys, then ``values`` of the grid and [set]."""
    kind = arm.removesuffix("-dp")
    check_values(values)  # also of keys that the arm replaces
    everything = {**base, **values}
    free: dict[str, Any] = {}
    if kind == arm or float(everything.get(EPSILON, 0.0)) == math.inf:
        budgets = (EPSILON, "privacy.institution-epsilon")
        free = dict.fromkeys(budgets, math.inf) | LOCAL_TRUST
    everything |= free
    if kind == "base":
        from_flat(everything)  # also checks the keys that are dropped below
        kept = (*SPLIT_KEYS, *MACHINE_KEYS, "adapter.head")
        start = {key: value for key, value in values.items() if key.startswith(kept)}
        everything = {**base, **start, **free, **SINGLE_INSTITUTION, "federation.rounds": 0}
    if kind == "central":
        everything = {k: v for k, v in everything.items() if not k.startswith("home.")}
        everything |= SINGLE_INSTITUTION
    start = str(everything.get("adapter.start", ""))
    if start and expanded(start).exists():  # runs/latest moves
        everything["adapter.start"] = str(expanded(start).resolve())
    config = from_flat({**everything, "run-dir": ""})
    if kind == "central":
        return config.replace({"data.partition": schemes.POOLED + config.data.partition})
    return config


def cells(cases: Sequence[Case], key: str) -> tuple[dict[str, Cell], list[str]]:
    """Return the runs of all cases, and the name of each case's run.

    Reads and splits the records of every seed and partition, so that bad records are refused before
    the first run.

    Args:
        cases: The sweep's cases.
        key: The key of their names (hex): a plain digest would let anyone who knows all records but
            one try out the last, and a run's name goes out with its model card.
    """
    made: dict[str, Cell] = {}
    names = [""] * len(cases)
    for index in sorted(range(len(cases)), key=lambda i: repr(_split_key(cases[i].config))):
        cell = _cell(cases[index], key)
        names[index] = cell.name
        made.setdefault(cell.name, cell)
    return made, names


def _split_key(config: RunConfig) -> tuple[Any, ...]:
    return config.seed, config.model.name, config.data, config.training.max_length


def _cell(case: Case, key: str) -> Cell:
    config = case.config
    if case.arm.startswith("central") and config.training.batch_size >= 1:
        whole = config.replace({"data.partition": schemes.inner(config.data.partition)})
        rows = config.training.batch_size * len(records.load(whole).names)  # of all institutions
        config = config.replace({"training.batch-size": rows})
    seen = records.load(config)
    base = model_files.resolve(config.model.name)
    inputs = [config.fingerprint(), base_directory.digest(base), seen.fingerprint()]
    inputs.append(records.encoding(config))
    if config.adapter.start:  # another adapter may come to stand there
        folder = expanded(config.adapter.start)
        files = [f for place in (folder, folder / "adapter") for f in place.glob("*.safetensors")]
        inputs += [sha256(file) for file in sorted(files)]
    if config.plug_ins:  # their code may change under one name
        inputs.append(json.dumps(plugins.describe(config.plug_ins)))
    digest = binding.keyed(key, "\n".join(inputs))
    budget = f"-epsilon-{config.privacy.epsilon:g}" if config.privacy.enabled else ""
    size = sum(file.stat().st_size for file in base.weights)
    return Cell(
        name=f"{case.arm.removesuffix('-dp')}{budget}-seed-{config.seed}-{digest[:12]}",
        config=config,
        institutions=len(seen.names),
        cost=STARTUP_SECONDS + _work(config, seen) * size / 4 / OPERATIONS_PER_SECOND,
    )


def _work(config: RunConfig, seen: Federation) -> float:
    """The tokens of a run, times the operations of each parameter on one."""
    training, rounds = config.training, config.federation.rounds
    shards = [seen.train(i) for i in range(len(seen.names))]
    step = sum(training.rate(max(1, len(shard))) * len(shard) for shard in shards)
    measured = len(seen.all_held_out) * config.federation.evaluations
    tokens = float(seen.all_train.lengths.sum()) / max(1, len(seen.all_train))
    work = tokens * (6 * rounds * training.local_steps * step + 2 * measured)
    if rounds:
        work += tokens * 6 * config.home.work_of_all([len(shard) for shard in shards])
    return work
