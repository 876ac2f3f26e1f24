"""What an institution keeps of its adapter from round to round, on its own disk.

A round reads the newest file of an earlier round and writes its own, so that a round that is
trained again, after a crash or for a resumed server, starts from what it started from before.
"""

import logging
from pathlib import Path

import safetensors.torch
import torch

from fedlora.adapters import AdapterState
from fedlora.errors import Refusal
from fedlora.files import write_atomic

log = logging.getLogger("fedlora.client")

KEPT_ROUNDS = 4
"""Rounds whose files stay: a server goes back at most to the checkpoint before its last."""


class Personal:
    """The files of one institution in one run.

    Args:
        directory: Made when something is kept.
        run: The run, letters and digits.
        configuration: Its fingerprint: what was kept under another one is not seen.
    """

    def __init__(self, directory: Path, run: str, configuration: str) -> None:
        self._directory = directory
        self._stem = f"kept-{run}-{configuration[:16]}-"

    def latest(self, before: int, like: AdapterState) -> AdapterState:
        """What was kept in the last round below ``before``; ``like`` itself if nothing was.

        Args:
            before: A round, from 1.
            like: Names and shapes that it must have.

        Raises:
            Refusal: ``kept-part-unreadable`` for a damaged file: nothing else may take its place.
        """
        found = [file for file in self._files() if self._round(file) < before]
        if not found:
            return like
        try:
            state = AdapterState(safetensors.torch.load_file(found[-1]))
            problem = state.validate_against(like)
        except (OSError, safetensors.SafetensorError) as error:
            problem = type(error).__name__
        if problem:
            raise Refusal("kept-part-unreadable", f"{found[-1]} cannot be used: {problem}")
        return state

    def keep(self, round: int, state: AdapterState) -> None:
        """Write what a round left, then drop the oldest; what is not finite is not kept."""
        if not all(torch.isfinite(tensor).all() for tensor in state.values()):
            log.warning("round %d diverged; the part of an earlier round stays", round)
            return
        blob = safetensors.torch.save({name: t.contiguous() for name, t in state.items()})
        write_atomic(self._directory / f"{self._stem}{round:06d}.safetensors", blob)
        for old in self._files()[:-KEPT_ROUNDS]:
            old.unlink()

    def _files(self) -> list[Path]:
        return sorted(self._directory.glob(f"{self._stem}*.safetensors"))

    def _round(self, file: Path) -> int:
        return int(file.stem.removeprefix(self._stem))
