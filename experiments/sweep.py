"""The runs of a sweep: arms x grid, each identified by its configuration.

A sweep is a TOML file: ``base`` names a configuration, ``[set]`` overrides keys of it,
``[set.ARM]`` overrides keys in one arm, ``[grid]`` lists values. A grid entry is a key with a list,
or a name with a table of variants, each of which sets several keys together. An arm's own values
win over a variant's; a listed key may be in no ``[set.ARM]`` and no other entry. See
docs/experiments.md.
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
from fedlora.config import plugins, ready
from fedlora.config.config import SECTIONS, PrivacyConfig, RunConfig, check_values, from_flat
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.files import expanded, sha256
from fedlora.models import base_directory, model_files
from server import binding

ARMS = ("base", "local", "local-dp", "central", "central-dp", "federated", "federated-dp")
KEYS = ("base", "set", "grid", "arms")
MAX_CELLS = 1000
"""The most cells of a sweep without --yes."""

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
MACHINE_KEYS = ("accept", "engine.", "tracking.", "federation.metrics")
"""Prefixes of further keys that count where nothing is trained."""

STARTUP_SECONDS = 15.0
OPERATIONS_PER_SECOND = 5e11
"""A guess for the cost of cells; measured seconds correct it during the sweep."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One arm at one point of the grid with one seed.

    Args:
        arm: One of `ARMS`.
        axes: The grid's values without the seed; ``privacy.epsilon`` and ``home.epsilon`` are inf
            in arms where they are not spent.
        config: The run. For local arms, the template of each institution's own run.
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
    base = _base(path, tree)
    arms = _arms(tree)
    always, own = _overrides(tree, arms)
    axes = _grid(tree)
    _check_labels(axes, own)
    cases: dict[str, Case] = {}
    for choice in itertools.product(*axes.values()):
        point = dict(zip(axes, choice, strict=True))
        values = dict(always)
        for chosen in choice:
            values |= chosen[1]
        labels = {name: label for name, (label, _) in point.items() if name != "seed"}
        for arm in arms:
            config = _in_arm(arm, base, {**values, **own[arm]})
            if arm.endswith("-dp") and not config.privacy.enabled:
                continue  # this would be the arm without DP
            ran = {EPSILON: config.privacy.epsilon}
            budgets = {key: value for key, value in ran.items() if key in labels}
            case = Case(arm=arm, axes=labels | budgets, config=config)
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
    for name in tree:
        if name not in KEYS:
            near = difflib.get_close_matches(name, KEYS, n=1)
            raise InputError(
                f"{name} is no key of a sweep; "
                + (f"did you mean {near[0]}?" if near else f"keys are {', '.join(KEYS)}")
            )
    for name, kind, example in (
        ("base", str, '"experiments/configs/fpb.toml"'),
        ("arms", list, '["local", "federated-dp"]'),
        ("grid", dict, "seed = [1, 2, 3] below [grid]"),
    ):
        if not isinstance(tree.get(name), kind):
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
    if not arms:
        raise InputError(f"arms is empty; list at least one of {', '.join(ARMS)}")
    for arm in arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(str(arm), ARMS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(f"arms has {arm!r}; it must be one of {', '.join(ARMS)}{hint}")
        if arms.count(arm) > 1:
            raise InputError(f"arms has {arm!r} twice; drop one")
    return arms


def _overrides(
    tree: Mapping[str, Any], arms: Sequence[str]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Return the overrides for all arms, and those of each arm."""
    given = tree.get("set", {})
    if not isinstance(given, dict):
        raise InputError(f"set is {given!r}; it must be a table of keys, below [set]")
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
            if key.startswith("home.") and not arm.startswith("federated"):
                raise InputError(
                    f"[set.{arm}] has {key}, but only federated arms train models at home; drop "
                    "it, or move it to [set]"
                )
            if key.startswith(SPLIT_KEYS):
                other = next((name for name in arms if name != arm), arm)
                raise InputError(
                    f"arms {arm!r} and {other!r} cannot share a split: [set.{arm}] has {key}; "
                    "move it to [set], which is for all arms"
                )
    always = _flat({name: value for name, value in given.items() if name not in ARMS})
    _check_keys("[set]", always)
    return always, own


Axes = dict[str, list[tuple[Any, dict[str, Any]]]]
"""Axis -> its values, each as a label with the keys that the value sets."""


def _grid(tree: Mapping[str, Any]) -> Axes:
    """Read and check the axes of a sweep file."""
    axes: Axes = {}
    for name, value in tree["grid"].items():
        variants = isinstance(value, dict) and name not in SECTIONS
        axes |= _variants(name, value) if variants else _lists({name: value})
    if not axes:
        raise InputError(
            "the grid is empty; list at least one key with its values, such as seed = [1, 2, 3]"
        )
    for name, choices in axes.items():
        if not choices:
            raise InputError(f"grid has no value for {name}; list at least one or drop it")
        labels = [label for label, _ in choices]
        for label, values in choices:
            if labels.count(label) > 1:
                raise InputError(f"grid has {name} {label!r} twice; drop one")
            _check_keys(f"grid {name}", values)
    return axes


def _variants(name: str, table: Mapping[str, Any]) -> Axes:
    if name == "seed":
        raise InputError("grid has a table of variants named seed; list seeds, as [1, 2]")
    return {name: [(label, _flat(values)) for label, values in table.items()]}


def _lists(tree: Mapping[str, Any]) -> Axes:
    axes: Axes = {}
    for key, listed in _flat(tree).items():
        if not isinstance(listed, list):
            raise InputError(f"grid has {key} = {listed!r}; it must be a list of values")
        axes[key] = [(_plain(one), {key: one}) for one in listed]
    return axes


def _check_labels(
    axes: Mapping[str, Sequence[tuple[Any, Mapping[str, Any]]]],
    own: Mapping[str, Mapping[str, Any]],
) -> None:
    """Refuse a grid whose labels would misstate the settings of a run."""
    places: dict[str, str] = {}
    for name, choices in axes.items():
        if name in (*results.COLUMNS, *results.JOINING_COLUMNS):
            raise InputError(
                f"grid has {name}, which is a column of the results; give it another name"
            )
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
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def _check_keys(where: str, values: Mapping[str, Any]) -> None:
    for key, remedy in (
        ("run-dir", "use --out"),
        ("data.view", "arms decide it"),
        ("privacy.ledger", "each cell has its own ledgers"),
    ):
        if key in values:
            raise InputError(f"{where} has {key}, which a sweep sets itself: {remedy}; drop it")


def _in_arm(arm: str, base: Mapping[str, Any], values: Mapping[str, Any]) -> RunConfig:
    """Return an arm's configuration: the base's keys, then ``values`` of the grid and [set]."""
    kind = arm.removesuffix("-dp")
    check_values(values)  # also of keys that the arm replaces
    everything = {**base, **values}
    free: dict[str, Any] = {}
    if kind == arm or float(everything.get(EPSILON, PrivacyConfig.epsilon)) == math.inf:
        budgets = (EPSILON, "privacy.institution-epsilon")
        free = dict.fromkeys(budgets, math.inf) | LOCAL_TRUST
    everything |= free
    if kind == "base":
        from_flat(everything)  # also checks the keys that are dropped below
        kept = (*SPLIT_KEYS, *MACHINE_KEYS, "adapter.head")
        start = {key: value for key, value in values.items() if key.startswith(kept)}
        everything = {**base, **start, **free, **SINGLE_INSTITUTION, "federation.rounds": 0}
    fixed = {"run-dir": "", "privacy.ledger": "", "data.view": "all"}
    if kind in ("local", "central"):
        everything = {k: v for k, v in everything.items() if not k.startswith("home.")}
        everything |= SINGLE_INSTITUTION
    start = str(everything.get("adapter.start", ""))
    if start and expanded(start).exists():  # runs/latest moves
        fixed["adapter.start"] = str(expanded(start).resolve())
    config = from_flat({**everything, **fixed})
    return config.replace({"data.view": "pooled"}) if kind == "central" else config


def cells(cases: Sequence[Case], key: str) -> tuple[dict[str, Cell], list[dict[str, str]]]:
    """Return the runs of all cases, and the names of each case's runs.

    Reads, splits and caches the records of every seed and partition, so that bad records are
    refused before the first run.

    Args:
        cases: The sweep's cases.
        key: The key of their names (hex): a plain digest would let anyone who knows all records but
            one try out the last, and a run's name goes out with its model card.

    Returns:
        Name -> cell, and a list of institution -> name of a cell; the institution is "" where all
        institutions are in one run.
    """
    made: dict[str, Cell] = {}
    needed: list[dict[str, str]] = [{} for _ in cases]
    order = sorted(range(len(cases)), key=lambda i: repr(_split_key(cases[i].config)))
    for index in order:
        case = cases[index]
        for institution, config in _runs(case):
            cell = _cell(case.arm, institution, config, key)
            needed[index][institution] = cell.name
            made.setdefault(cell.name, cell)
    return made, needed


def _split_key(config: RunConfig) -> tuple[Any, ...]:
    return config.seed, config.model.name, config.data, config.training.max_length


def _runs(case: Case) -> list[tuple[str, RunConfig]]:
    """Return institution (or "") and configuration of each run of a case."""
    config = case.config
    federation = records.load(config.replace({"data.view": "all"}))
    if not case.arm.startswith("local"):
        if case.arm.startswith("central") and not config.training.sample_rate:
            rows = config.training.batch_size * len(federation.names)  # of all institutions
            config = config.replace({"training.batch-size": rows})
        return [("", config)]
    return [
        (name, config.replace({"data.view": f"only:{name}"}))
        for i, name in enumerate(federation.names)
        if len(federation.held_out(i))  # without held-out rows nothing is measured
    ]


def _cell(arm: str, institution: str, config: RunConfig, key: str) -> Cell:
    seen = records.load(config)
    training, rounds = config.training, config.federation.rounds
    step = (
        training.sample_rate * len(seen.all_train)
        if training.sample_rate
        else training.batch_size * len(seen.names)
    )
    measured = len(seen.all_held_out) * config.federation.evaluations
    tokens = float(seen.all_train.lengths.sum()) / max(1, len(seen.all_train))
    work = tokens * (6 * rounds * training.local_steps * step + 2 * measured)
    if rounds:
        shards = [seen.train(i) for i in range(len(seen.names))]
        work += tokens * 6 * config.home.work_of_all([len(shard) for shard in shards])
    base = model_files.resolve(config.model.name)
    size = sum(file.stat().st_size for file in base.weights)
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
    parts = [arm.removesuffix("-dp"), *([institution] if institution else [])]
    name = f"{'-'.join(parts)}{budget}-seed-{config.seed}-{digest[:12]}"
    cost = STARTUP_SECONDS + work * size / 4 / OPERATIONS_PER_SECOND
    return Cell(name=name, config=config, institutions=len(seen.names), cost=cost)


def check_size(number: int, seconds: float) -> None:
    """Refuse a sweep so large that it may have been started by mistake.

    Raises:
        InputError: Naming the hours that the sweep would take.
    """
    if number > MAX_CELLS:
        raise InputError(
            f"the sweep has {number:,} cells, over {MAX_CELLS:,}: about {seconds / 3600:.0f} "
            "hours one after the other; make the grid smaller, or add --yes"
        )
