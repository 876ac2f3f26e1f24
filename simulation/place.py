"""The directory of a run, and paths that mean the same wherever its processes work."""

import os
from pathlib import Path

from fedlora.config.config import RunConfig
from fedlora.data import sources
from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.runs.run_files import CONFIG, is_complete
from server.run_directory import RunDirectory


def placed(config: RunConfig, directory: Path, *, resume: bool = False) -> RunConfig:
    """The configuration with absolute paths, for a directory that is free or to be resumed.

    Args:
        config: The run.
        directory: Its run directory.
        resume: Whether the directory holds this run, to be continued.

    Raises:
        InputError: If the directory does not fit, or a path begins with an unknown ``~NAME``.
    """
    directory = expanded(str(directory))
    if not resume and (directory / CONFIG).exists():
        raise InputError(
            f"{directory} holds another run; give another directory (--out, in Python out=...), or "
            f"continue that one with `fedlora run --resume {directory}`"
        )
    if resume and is_complete(directory):
        raise InputError(
            f"{directory} is complete; there is nothing to resume (see its result.json); "
            f"a new run with adapter.start = {directory} goes on from its adapter"
        )
    values = {"run-dir": str(directory.absolute())}
    for key in ("data.source", "data.test-source", "model.name", "adapter.start"):
        value = str(config.flat()[key])
        path = expanded(value)
        there = os.path.exists(path)  # noqa: PTH110  (False also where this user may not look)
        if value and (there or (key.startswith("data.") and sources.is_glob(value))):
            values[key] = str(path.absolute())
    if "adapter.start" in values:
        values["adapter.start"] = str(Path(values["adapter.start"]).resolve())  # runs/latest moves
    resolved = config.replace(values)
    RunDirectory(directory.absolute()).check(resolved)
    return resolved
