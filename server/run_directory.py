"""A run on disk: what ran, where it is, and what a resume needs.

Every file is written whole or not at all. Importing this module, checking a directory and reading a
run's lines load no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import config as configuration
from fedlora.config import ENGINE_ONLY, RunConfig
from fedlora.errors import InputError
from fedlora.files import existing_parent, write_atomic

if TYPE_CHECKING:
    import torch

    from fedlora.adapters import AdapterState

KEPT_CHECKPOINTS = 2
SUBMISSION = "submission.json"
"""What a deployment knows of a run that it submitted."""
NODES = "nodes.json"
"""Beside a deployment's runs: Flower's node id -> the institution whose public key it has."""
SIZES = "sizes.json"
"""Beside it: institution -> the most records that the server believes it has."""
BESIDE = ("ledgers", "institutions.log", SUBMISSION)
"""What may be in a run's directory before the run begins."""
FREE_BYTES = 100 * 2**20
"""Free disk space below which a run does not start."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """Everything that the next round depends on.

    Args:
        run: Identity of the run; survives a resume.
        inputs: SHA-256 (hex) of base weights and records.
        round: The last round done; 0 before the first.
        adapter: The global adapter.
        moments: State of the server optimizer.
        asked: Institution -> rounds it was asked for.
        average: Sum of the adapters averaged so far, float64; empty when none is.
        averaged: How many that are.
        privacy: Institution -> what it last said it had spent.
        seconds: Time spent in rounds.
    """

    run: str
    inputs: str
    round: int
    adapter: AdapterState
    moments: Mapping[str, torch.Tensor]
    asked: Mapping[str, int]
    average: Mapping[str, torch.Tensor]
    averaged: int
    privacy: Mapping[str, Mapping[str, Any]]
    seconds: float


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, config: RunConfig) -> bool:
        """Whether the directory holds this very run, to be continued, or is free for it.

        Raises:
            InputError: If it holds another run or other files, or the disk is nearly full.
        """
        existing = self.path / "config.toml"
        if existing.exists():
            changed = changes(configuration.load(existing), config)
            if changed:
                raise InputError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed)}); "
                    "give another --out, or resume it unchanged"
                )
            return True
        if self.path.exists() and (
            not self.path.is_dir() or any(e.name not in BESIDE for e in self.path.iterdir())
        ):
            raise InputError(
                f"{self.path} holds other files; give an --out that is empty or not there"
            )
        try:
            parent = existing_parent(self.path)
        except OSError as error:
            raise InputError(f"{error}; give another --out") from None
        free = shutil.disk_usage(parent).free
        if free < FREE_BYTES:
            raise InputError(
                f"{parent} has {free / 2**20:.0f} MiB free; a run needs at least "
                f"{FREE_BYTES / 2**20:.0f} MiB: free some or give another --out"
            )
        return False

    def create(self, config: RunConfig) -> None:
        """Make the directory, with what runs in it and on what."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / "config.toml", config.to_toml().encode())
        self._json("environment.json", environment())

    def save(self, state: RunState) -> None:
        """Write a checkpoint, then drop the oldest."""
        import safetensors.torch

        tensors = {f"adapter/{k}": v.contiguous() for k, v in state.adapter.items()}
        tensors |= {f"moments/{k}": v.contiguous() for k, v in state.moments.items()}
        tensors |= {f"average/{k}": v.contiguous() for k, v in state.average.items()}
        plain = {
            field.name: getattr(state, field.name)
            for field in dataclasses.fields(state)
            if field.name not in ("adapter", "moments", "average")
        }
        blob = safetensors.torch.save(tensors, {"state": json.dumps(plain)})
        folder = self.path / "checkpoints"
        write_atomic(folder / f"round-{state.round:06d}.safetensors", blob)
        for old in sorted(folder.glob("round-*.safetensors"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def latest(self, *, newest_only: bool = False) -> RunState | None:
        """The newest checkpoint that can be read, or None. ``rounds.jsonl`` is cut back to it.

        Args:
            newest_only: Whether the one before may not take a damaged one's place: the round
                between them would be released a second time, under fresh noise.

        Raises:
            InputError: If there are checkpoints and none of those allowed can be read.
        """
        from safetensors import SafetensorError

        found = sorted((self.path / "checkpoints").glob("round-*.safetensors"), reverse=True)
        for file in found[:1] if newest_only else found:
            try:
                return self._read(file)
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                continue  # a damaged file; the one before it is whole
        if found:
            raise InputError(
                f"no checkpoint in {found[0].parent} can be read; start anew with another --out"
            )
        return None

    def _read(self, path: Path) -> RunState:
        import safetensors

        from fedlora.adapters import AdapterState

        parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "moments": {}, "average": {}}
        with safetensors.safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            plain = json.loads(file.metadata()["state"])
            keys: list[str] = file.keys()
            for key in keys:
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
        lines = [json.dumps(r) for r in read_records(self.path) if r["round"] <= plain["round"]]
        write_atomic(self.path / "rounds.jsonl", "".join(f"{line}\n" for line in lines).encode())
        return RunState(
            adapter=AdapterState(parts["adapter"]),
            moments=parts["moments"],
            average=parts["average"],
            **plain,
        )

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``rounds.jsonl``."""
        with (self.path / "rounds.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_result(self, result: Mapping[str, Any], privacy: Mapping[str, Any]) -> None:
        """Write ``privacy.json`` and, last, ``result.json``: a run that has one is complete."""
        self._json("privacy.json", privacy)
        self._json("result.json", result)

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomic(self.path / name, (json.dumps(finite(content), indent=2) + "\n").encode())


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Wait until no other process runs in this directory, and keep others out.

    A run that goes on after its server was killed may start before the old process is gone. A
    directory that is not there yet is nobody's.
    """
    if not path.is_dir():
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a run directory's ``rounds.jsonl``; a half-written last one is left out."""
    try:
        text = (path / "rounds.jsonl").read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def changes(old: RunConfig, new: RunConfig) -> list[str]:
    """What differs between two configurations, leaving out keys that cannot change a result."""
    before, after = old.flat(), new.flat()
    return [
        f"{key} was {before[key]}, now {after[key]}"
        for key in before
        if before[key] != after[key] and not key.startswith(ENGINE_ONLY)
    ]


def environment() -> dict[str, Any]:
    """Versions, source revision and device of this process."""
    import torch

    packages = (
        "fedlora",
        "torch",
        "flwr",
        "peft",
        "transformers",
        "opacus",
        "ray",
        "bitsandbytes",
        "numpy",
    )
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    sha = _git("rev-parse", "HEAD")
    return {
        "versions": versions,
        "python": platform.python_version(),
        "git_sha": sha or None,
        "git_dirty": bool(_git("status", "--porcelain")) if sha else None,
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": command(),
    }


def command() -> list[str]:
    """How this process was called, without the place of the program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _git(*arguments: str) -> str:
    here = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def finite(value: Any) -> Any:
    """JSON has no inf or nan: inf becomes the text "inf", nan becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value
