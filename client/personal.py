"""What an institution keeps of its adapter from round to round, on its own disk.

Files are never changed once written. A round reads the newest one of an earlier round, so that a
round that is trained again, after a crash or for a resumed server, starts from what it started from
before.
"""

from pathlib import Path

import safetensors.torch

from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.files import write_atomic

KEPT = 4
"""Rounds whose files stay: a server goes back at most to the checkpoint before its last."""


class Personal:
    """The files of one institution.

    Args:
        directory: Made when something is kept.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def latest(self, run: str, before: int) -> AdapterState:
        """What was kept in the last round below ``before`` of this run; empty if nothing was.

        Raises:
            Refusal: ``kept-part-unreadable`` for a damaged file: nothing else may take its place.
        """
        found = [file for file in self._files(run) if _round(file) < before]
        if not found:
            return AdapterState({})
        try:
            return AdapterState(safetensors.torch.load_file(found[-1]))
        except (OSError, safetensors.SafetensorError) as error:
            raise Refusal(
                "kept-part-unreadable", f"{found[-1]} cannot be read ({type(error).__name__})"
            ) from None

    def keep(self, run: str, round: int, state: AdapterState) -> None:
        """Write what a round of a run left, then drop the oldest."""
        blob = safetensors.torch.save({name: t.contiguous() for name, t in state.items()})
        write_atomic(self.directory / f"kept-{run}-{round:06d}.safetensors", blob)
        for old in self._files(run)[:-KEPT]:
            old.unlink()

    def _files(self, run: str) -> list[Path]:
        return sorted(self.directory.glob(f"kept-{run}-*.safetensors"))


def _round(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
