"""A run on disk: its configuration and environment, its state, and the files to resume it.

Every file is written whole or not at all, except ``rounds.jsonl``, which grows by lines; readers
skip a half-written last one. Importing this module, checking a directory and reading a
run's lines load no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fedlora
from fedlora.config.config import ENGINE_ONLY, RunConfig, load
from fedlora.errors import InputError
from fedlora.files import existing_parent, write_atomic
from fedlora.runs import seal
from fedlora.runs.run_files import (
    AUDITED,
    CONFIG,
    ENVIRONMENT,
    LEDGERS,
    PRIVACY,
    RESULT,
    ROUNDS,
    SUBMISSION,
    environment,
    finite,
    other_code,
    read_lines,
    read_records,
    revision,
)
from server import binding

if TYPE_CHECKING:
    import torch

    from fedlora.models.adapters import AdapterState

MAX_CHECKPOINTS = 2
FOREIGN_FILES = (LEDGERS, "institutions.log", SUBMISSION, AUDITED)
"""Files that may be in a run's directory before the run begins."""
OTHER = "another --out (in a deployment: --name)"
"""The remedy where a run cannot be in a directory."""
MIN_FREE_BYTES = 100 * 2**20
"""Free disk space below which a run does not start."""
ORDERS = "orders.jsonl"
"""File with a line for each recent round whose orders were sent: its number and institutions."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """The complete state on which the next round depends.

    Args:
        run: Identity of the run; survives a resume.
        inputs: SHA-256 (hex) of base weights, records, the tokenizer's encoding and the code of
            ``federation.strategy``.
        round: The last round done; 0 before the first.
        adapter: The global adapter.
        moments: State of the server optimizer.
        asked: Institution -> number of rounds for which it was asked.
        average: Sum of the adapters averaged so far, float64; empty when none is.
        averaged: The number of adapters in ``average``.
        privacy: Institution -> its last report of its spending.
        seconds: Time spent in rounds.
        dtype: The dtype of the base model; empty in a checkpoint of an earlier version.
        head: What the head of the first adapter was made of, see `server.start.head_start`; empty
            without a head and in a checkpoint of an earlier version.
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
    dtype: str = ""
    head: str = ""

    @classmethod
    def first(
        cls, run: str, inputs: str, adapter: AdapterState, *, dtype: str, head: str
    ) -> RunState:
        """The state of a run before its first round."""
        return cls(
            run=run,
            inputs=inputs,
            round=0,
            adapter=adapter,
            moments={},
            asked={},
            average={},
            averaged=0,
            privacy={},
            seconds=0.0,
            dtype=dtype,
            head=head,
        )

    def final_adapter(self) -> AdapterState:
        """The adapter that a run releases: the last one, or the mean of the last ones."""
        from fedlora.models.adapters import AdapterState

        if not self.averaged:
            return self.adapter
        return AdapterState({k: (v / self.averaged).float() for k, v in self.average.items()})


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, config: RunConfig) -> bool:
        """Whether the directory holds this run, to be resumed; otherwise it is free for the run.

        Raises:
            InputError: If it holds another run or other files, or the disk is nearly full.
        """
        existing = self.path / CONFIG
        if existing.exists():
            self._check_version(config)  # first: another version may have other keys
            changed = changes(load(existing), config)
            if changed:
                raise InputError(
                    f"{self.path} holds a run with another configuration ({'; '.join(changed)}); "
                    f"give {OTHER}, or resume it unchanged"
                )
            return True
        if self.path.exists() and (
            not self.path.is_dir() or any(not _is_foreign(e.name) for e in self.path.iterdir())
        ):
            raise InputError(
                f"{self.path} holds other files; give an --out that is empty or does not exist"
            )
        try:
            parent = existing_parent(self.path)
        except OSError as error:
            raise InputError(f"{error}; give {OTHER}") from None
        usage = shutil.disk_usage(parent)
        if not usage.total:
            raise InputError(
                f"{parent} is on a file system that stores no files, such as /proc or /sys; give "
                f"{OTHER}"
            )
        free = usage.free
        if free < MIN_FREE_BYTES:
            raise InputError(
                f"{parent} has {free / 2**20:.0f} MiB free; a run needs at least "
                f"{MIN_FREE_BYTES / 2**20:.0f} MiB: free some or give {OTHER}"
            )
        return False

    def _check_version(self, config: RunConfig) -> None:
        """Check that the version and the code that began a run continue it.

        A deployment, whose image knows no commit, may mend its code during a run.

        Raises:
            InputError: If it is another, whose rounds would not follow from the ones before.
        """
        if not (self.path / ENVIRONMENT).exists() and not self._checkpoints():
            return  # the process ended while it made the directory
        try:
            about = json.loads((self.path / ENVIRONMENT).read_bytes())
            begun = about["versions"]["fedlora"]
            other = other_code(about | {"code": revision()["code"]} if config.deployed else about)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path / ENVIRONMENT} cannot be read ({error}), so that nothing says which "
                f"version began the run; restore the file, or begin a run with {OTHER}"
            ) from None
        if begun != fedlora.__version__:
            raise InputError(
                f"{self.path} was begun with fedlora {begun}, and this is {fedlora.__version__}: "
                "its checkpoint continues only with the version that wrote it; install that, or "
                f"begin a run with {OTHER} (in a sweep: remove this directory)"
            )
        if other:
            raise InputError(
                f"{self.path} was begun with fedlora at {other} (+: code with uncommitted changes; "
                "code: a digest of fedlora's files): all rounds of a run are of one code; restore "
                f"that one, or begin a run with {OTHER}"
            )

    def create(self, config: RunConfig) -> None:
        """Make the directory, with the run's configuration and environment."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomic(self.path / CONFIG, config.to_toml().encode())
        self._json(ENVIRONMENT, environment())

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
        write_atomic(self.path / "checkpoints" / f"round-{state.round:06d}.safetensors", blob)
        for old in self._checkpoints()[:-MAX_CHECKPOINTS]:
            old.unlink()

    def latest(self, *, newest_only: bool = False) -> RunState | None:
        """The newest checkpoint that can be read, or None. ``rounds.jsonl`` is cut back to it.

        Args:
            newest_only: Whether a damaged newest checkpoint is an error. An older checkpoint would
                release the round between them a second time, under fresh noise.

        Raises:
            InputError: If there are checkpoints, but no allowed one can be read, or none is there
                though a round was begun: its releases would count in no statement.
        """
        from safetensors import SafetensorError

        found = self._checkpoints()[::-1]
        for file in found[:1] if newest_only else found:
            try:
                state = self._read(file)
                records = [r for r in read_records(self.path) if r["round"] <= state.round]
            except (OSError, SafetensorError, ValueError, KeyError, TypeError):
                continue  # a damaged file; the checkpoint before it is whole
            self._lines(ROUNDS, records)
            return state
        begun = any(read_lines(self.path / name) for name in (ROUNDS, ORDERS))
        if found or begun:
            raise InputError(
                f"no checkpoint in {self.path / 'checkpoints'} can be read"
                + ", but the run has begun" * (not found)
                + f"; restore it, or start anew with {OTHER}"
            )
        return None

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("round-*.safetensors"))

    def _read(self, path: Path) -> RunState:
        import safetensors

        from fedlora.models.adapters import AdapterState

        parts: dict[str, dict[str, torch.Tensor]] = {"adapter": {}, "moments": {}, "average": {}}
        with safetensors.safe_open(path, "pt") as file:  # pyright: ignore[reportUnknownVariableType]
            plain = json.loads(file.metadata()["state"])
            keys: list[str] = file.keys()
            for key in keys:
                part, _, name = key.partition("/")
                parts[part][name] = file.get_tensor(key)
        return RunState(
            adapter=AdapterState(parts["adapter"]),
            moments=parts["moments"],
            average=parts["average"],
            **plain,
        )

    def append_orders(self, number: int, names: Iterable[str]) -> None:
        """Record the institutions of a round before any order leaves.

        An institution may be charged and answer although the server dies before the round's
        checkpoint. Without this record the resumed run would not know that it was asked. The file
        keeps only the rounds that a resume from the oldest checkpoint would repeat.
        """
        oldest = number - MAX_CHECKPOINTS
        lines = [line for line in read_lines(self.path / ORDERS) if line["round"] > oldest]
        self._lines(ORDERS, [*lines, {"round": number, "institutions": sorted(names)}])

    def asked(self, number: int) -> set[str]:
        """Institutions that were asked in a round, by this process or an earlier one."""
        lines = read_lines(self.path / ORDERS)
        return {name for line in lines if line["round"] == number for name in line["institutions"]}

    def append(self, record: Mapping[str, Any]) -> None:
        """Add a line to ``rounds.jsonl``."""
        with (self.path / ROUNDS).open("a", encoding="utf-8") as file:
            file.write(json.dumps(finite(record)) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def write_result(
        self,
        result: Mapping[str, Any],
        privacy: Mapping[str, Any],
        config: RunConfig,
        *,
        records: str,
        signer: seal.Signer | None,
    ) -> None:
        """Write ``privacy.json``, bound to the run, and, last, ``result.json``.

        ``result.json`` marks a complete run.

        Args:
            result: The content of ``result.json``.
            privacy: The promise, as `server.privacy_statement.statement` makes it.
            config: The run.
            records: `Population.fingerprint`.
            signer: The key that signs ``privacy.json``; None in a simulation.
        """
        encoded = _encoded(result)
        run = binding.bind(self.path, config, result=result, encoded=encoded, records=records)
        self._json(PRIVACY, seal.sealed({"run": run, **privacy}, signer))
        write_atomic(self.path / RESULT, encoded)

    def _lines(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        text = "".join(f"{json.dumps(record)}\n" for record in records)
        write_atomic(self.path / name, text.encode())

    def _json(self, name: str, content: Mapping[str, Any]) -> None:
        write_atomic(self.path / name, _encoded(content))


def _is_foreign(name: str) -> bool:
    """Whether a file is one of `FOREIGN_FILES`, or what a kill left of the first write."""
    return name in FOREIGN_FILES or name.startswith((f".{SUBMISSION}.", f".{CONFIG}."))


def _encoded(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(finite(content), indent=2) + "\n").encode()


def with_tracking(config: RunConfig) -> RunConfig:
    """The configuration with the tracking section of its submission.

    Flower, which hands a run's configuration to institutions too, does not have that section.
    """
    try:
        text = (Path(config.run_dir) / SUBMISSION).read_text(encoding="utf-8")
    except FileNotFoundError:
        return config
    submitted = json.loads(text)["config"]
    return config.replace({k: v for k, v in submitted.items() if k.startswith("tracking.")})


def changes(old: RunConfig, new: RunConfig) -> list[str]:
    """Differences between two configurations that make another run.

    The machine may be another one, also with fewer processors or no GPU, which changes rounding.
    """
    before, after = old.flat(), new.flat()
    return [
        f"{key} was {before[key]}, now {after[key]}"
        for key in before
        if before[key] != after[key] and not key.startswith((*ENGINE_ONLY, "engine."))
    ]
