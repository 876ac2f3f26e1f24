"""An institution's local parts on its own disk: the parts that it trains and does not send.

A round reads the newest file of an earlier round and writes its own. A round that is trained again,
after a crash or for a resumed server, therefore starts from the same values as before.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false

import logging
from pathlib import Path

import safetensors.torch

from fedlora.errors import Refusal
from fedlora.files import write_atomic
from fedlora.models.adapters import AdapterState

log = logging.getLogger("fedlora.client")

STORED_ROUNDS = 4
"""Rounds whose files stay: a server goes back at most to the checkpoint before its last."""
STORED_RUNS = 20
"""Runs whose files stay: a server that begins many must not fill the institution's disk."""


class LocalParts:
    """The files of one institution in one run.

    Args:
        directory: The files' directory; made by the first `store`.
        run: The run, letters and digits.
        configuration: The configuration's fingerprint; files of another one are not read.
    """

    def __init__(self, directory: Path, run: str, configuration: str) -> None:
        self._directory = directory
        self._stem = f"kept-{run}-{configuration[:16]}-"

    def load(self, before: int, default: AdapterState) -> AdapterState:
        """Read the values of the last stored round below ``before``.

        Args:
            before: A round, from 1.
            default: The result where nothing is stored; it gives names and shapes.

        Raises:
            Refusal: ``kept-part-unreadable`` for a damaged file; no other values replace it.
        """
        found = [file for file in self._files() if self._round(file) < before]
        if not found:
            return default
        try:
            state = AdapterState(safetensors.torch.load_file(found[-1]))
        except (OSError, safetensors.SafetensorError) as error:
            raise _unreadable(found[-1], type(error).__name__) from error
        if problem := state.validate_against(default):
            raise _unreadable(found[-1], problem)
        return state

    def store(self, round_number: int, state: AdapterState) -> None:
        """Write a round's values, unless one is not finite, then delete the oldest file."""
        if not state.is_finite():
            log.warning("round %d diverged; the part of an earlier round stays", round_number)
            return
        blob = safetensors.torch.save({name: t.contiguous() for name, t in state.items()})
        write_atomic(
            self._directory / f"{self._stem}{round_number:06d}.safetensors", blob, mode=0o600
        )
        for old in self._files()[:-STORED_ROUNDS]:
            old.unlink()
        newest: dict[str, int] = {}  # run and configuration -> its last change
        for file in self._directory.glob("kept-*.safetensors"):
            stem = file.stem.rpartition("-")[0]
            newest[stem] = max(newest.get(stem, 0), file.stat().st_mtime_ns)
        for stem in sorted(newest, key=lambda stem: newest[stem])[:-STORED_RUNS]:
            for old in self._directory.glob(f"{stem}-*.safetensors"):
                old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._stem}*.safetensors"))

    def _round(self, file: Path) -> int:
        return int(file.stem.removeprefix(self._stem))


def _unreadable(file: Path, problem: str) -> Refusal:
    return Refusal("kept-part-unreadable", f"{file} cannot be used: {problem}")
