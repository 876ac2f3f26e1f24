"""`run`: the federation of a configuration, or of a data frame, in this process."""

import contextlib
import difflib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, cast

from fedlora.config import plugins, ready, schemes
from fedlora.config.config import RunConfig, describe, from_flat, load
from fedlora.data import records, rows, sources, tables
from fedlora.data.tables import Table
from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.startup import quiet_libraries
from fedlora.terminal import Terminal
from simulation.place import placed
from simulation.result import Result
from simulation.run import simulate

Record = Mapping[str, Any]
"""A round's line of ``rounds.jsonl``."""
BY_INSTITUTION = f"natural:{tables.INSTITUTION}"
OWN = {
    "data.source": "data",
    "data.test-source": "test_data",
    "run-dir": "out",
    "tracking.callbacks": "on_round",
}
"""Keys that `run` takes as arguments of other names."""


def run(
    config: str | Path | RunConfig | None = None,
    *,
    data: Table | str | Path | None = None,
    test_data: Table | str | Path | None = None,
    on_round: Callable[[Record], object] | None = None,
    out: str | Path | None = None,
    engine: Literal["inline", "ray"] = "inline",
    progress: bool = True,
    **keywords: Any,
) -> Result:
    """Simulate a federation and return its result, as ``fedlora run`` does it.

    Args:
        config: A TOML file, the name of a ready configuration (``demo``), or a `RunConfig`; without
            it every key has its default.
        data: The records, in place of ``data.source``: a source as the configuration has it, a
            ``pandas.DataFrame``, a ``datasets.Dataset``, a dictionary of columns, or a dictionary
            with one of these for each institution. Records by institution (also a directory or glob
            of files) are partitioned by it.
        test_data: The held-out rows, in place of ``data.test-source``, in the same forms.
        on_round: Called after each round with its line of ``rounds.jsonl``. What it raises ends the
            run; finished rounds are kept.
        out: The run directory; by default ``runs/NAME-TIME``.
        engine: ``inline`` works in this process, ``ray`` in worker processes.
        progress: Whether progress and warnings are printed.
        **keywords: Any key of the configuration by its last part with underscores: ``epsilon=3.0``,
            ``batch_size=64``. ``model`` is ``model.name``; keys of ``[home]`` begin with ``home_``.
            They win over ``config``.

    Raises:
        InputError: Before any training, for a value that the caller can correct.
        RunFailed: If the run cannot go on; the last checkpoint stays in its directory.
    """
    quiet_libraries()
    plugins.forget()
    records.forget()
    if engine not in ("inline", "ray"):
        raise InputError(f"engine is {engine!r}; it must be inline or ray")
    values = _overrides(keywords)
    if on_round is not None:
        kept = _resolved(config, {}).tracking.callbacks
        values["tracking.callbacks"] = [*kept, plugins.give("tracking.callbacks", on_round)]
    if data is not None and _by_institution(data):
        # The number of institutions in the configuration is that of its own records.
        values = {"data.partition": BY_INSTITUTION, "data.institutions": 0} | values
    given = {"data.source": data, "data.test-source": test_data}
    given = {key: table for key, table in given.items() if table is not None}
    with contextlib.ExitStack() as held:
        columns = _resolved(config, values | dict.fromkeys(given, tables.MEMORY)) if given else None
        for key, table in given.items():
            if isinstance(table, str | Path):
                values[key] = str(table)
            elif columns is not None:
                unit = columns.privacy.unit if key == "data.source" else "record"
                wanted = rows.wanted_columns(columns.data, unit)
                values[key] = held.enter_context(tables.hold(table, wanted, OWN[key]))
        resolved = _resolved(config, values)
        name = Path(config).stem if isinstance(config, str | Path) else "run"
        default = resolved.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"
        directory = expanded(str(out or default)).absolute()
        simulate(placed(resolved, directory), engine, Terminal(quiet=not progress))
    return Result(directory)


def _overrides(keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Keywords as ``section.key`` -> value. Plug-ins are named, and found in this process.

    Raises:
        InputError: For a keyword that is none, with the nearest one.
    """
    known: dict[str, str] = {}
    for key, *_ in describe():
        section, _, last = key.rpartition(".")
        name = "model" if key == "model.name" else last.replace("-", "_")
        known[f"home_{name}" if section == "home" else name] = key
    found: dict[str, Any] = {}
    for name, value in keywords.items():
        key = known.get(name, "")
        if not key or key in OWN:
            near = [OWN[key]] if key else difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else "`fedlora config` lists the keys"
            raise InputError(f"{name} is no keyword of fedlora.run; {hint}")
        if key == "federation.strategy":
            value = plugins.give(key, value)
        elif key == "data.partition" and not isinstance(value, str):
            value = schemes.PYTHON + plugins.give(key, value)
        found[key] = value
    return found


def _resolved(config: str | Path | RunConfig | None, values: Mapping[str, Any]) -> RunConfig:
    """The configuration with other values. Defaults that depend on other keys follow them."""
    if config is None:
        return from_flat(values)
    if isinstance(config, RunConfig):
        return config.replace(values)
    if isinstance(cast(object, config), str | Path):
        return load(ready.locate(expanded(str(config))), values)
    raise InputError(
        f"config is a {type(config).__name__}; it must be the path of a TOML file, the name of a "
        "ready configuration, or a RunConfig; give records as data=..."
    )


def _by_institution(data: Table | str | Path) -> bool:
    if isinstance(data, str | Path):
        return sources.is_per_institution(str(data))
    return tables.by_institution(data)
