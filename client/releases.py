"""The adapters that runs released to an institution, on its own disk: ``state/released/RUN/``."""

import contextlib
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from peft import PeftModel

from fedlora import files
from fedlora.config.settings_schema import Scalar
from fedlora.errors import InputError
from fedlora.wire import released
from fedlora.wire.messages import Release
from fedlora.wire.released import ReleaseFiles

MAX_RELEASES = 20
"""Directories that stay, so that no server fills the disk."""

OLD = ".old-"
"""Begins the name of a directory while another takes its place."""


class Releases:
    """The released adapters of an institution.

    Args:
        state: The institution's directory of state.
    """

    def __init__(self, state: Path) -> None:
        self._directory = state / "released"

    def store(self, release: Release, config: Mapping[str, Scalar], model: PeftModel) -> None:
        """Store a released adapter whole or not at all, then delete the oldest ones.

        Args:
            release: The adapter and its run.
            config: The run's configuration, without the institution's own values.
            model: The model that the adapter belongs to.
        """
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._directory.glob(".*"):  # of a process that was killed
            if left not in self._directories():
                shutil.rmtree(left, ignore_errors=True)
        new = Path(tempfile.mkdtemp(dir=self._directory, prefix=".new-"))
        release.adapter.save(new, model)
        released.describe(new, release, config)
        place = self._directory / release.run
        before = place.with_name(f"{OLD}{place.name}")
        if place.exists():  # the server went on after a crash and sends it again
            place.rename(before)
        new.rename(place)
        files.sync(self._directory)
        for old in (before, *self._directories()[:-MAX_RELEASES]):
            shutil.rmtree(old, ignore_errors=True)

    def find(self, run: str) -> ReleaseFiles:
        """The released adapter of a run.

        Args:
            run: The run's name at the operator, or its identity.

        Raises:
            InputError: If there is none, or several runs have the name.
        """
        known, damaged = self._known()
        found = [one for one in known if run in (one.name, one.run)]
        if not found:
            names = ", ".join(one.name for one in known) or "none"
            raise InputError(
                f"--run is {run!r}, but {self._directory} has no such run; there are: {names}. "
                + "".join(f"{path} cannot be read. " for path in damaged)
                + "For another run give --adapter DIR, with adapter/ of the operator's results"
            )
        if len(found) > 1:
            raise InputError(
                f"--run is {run!r}, the name of {len(found)} runs; give the identity of one: "
                f"{', '.join(one.run for one in found)}"
            )
        return found[0]

    def _known(self) -> tuple[list[ReleaseFiles], list[Path]]:
        """The releases, and the directories that hold none which can be read."""
        known: list[ReleaseFiles] = []
        damaged: list[Path] = []
        try:
            with contextlib.suppress(FileNotFoundError):
                next(self._directory.iterdir(), None)  # glob takes what it may not read for empty
        except OSError as error:
            raise InputError(
                f"{self._directory} cannot be read ({error.strerror}); run the command as the "
                "user of the institution's node"
            ) from None
        for directory in self._directories():
            try:
                known.append(ReleaseFiles.open(directory))
            except InputError:
                damaged.append(directory)
        return known, damaged

    def _directories(self) -> list[Path]:
        """The directories, the oldest first."""
        found = {path.name: path for path in self._directory.glob("*") if path.name[0] != "."}
        for path in self._directory.glob(f"{OLD}*"):  # of a process that was killed in between
            found.setdefault(path.name.removeprefix(OLD), path)
        return sorted(found.values(), key=lambda path: path.stat().st_mtime_ns)
