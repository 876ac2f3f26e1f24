"""The files of a released adapter: PEFT's two, and ``release.json`` about the run that made it.

The server writes them into a deployed run's ``adapter/``, which the operator can hand to any
institution; an institution that is online at the end of a run writes the same files itself.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fedlora.config.settings_schema import Scalar
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models.adapters import AdapterState, open_for
from fedlora.models.model_files import Origin, origins_of
from fedlora.models.trainable import Trainable
from fedlora.runs.run_files import RUN_NAME, finite
from fedlora.wire.messages import Release

FILE = "release.json"


@dataclass(frozen=True, kw_only=True)
class ReleaseFiles:
    """A directory with a released adapter.

    Args:
        directory: The directory.
        run: The run's identity.
        name: The run's name at the operator.
        round: The number of the last round.
        base: SHA-256 of the base model's weights.
        config: The run's configuration, flat, without any institution's own values.
        origins: The runs behind the run's start and base.
    """

    directory: Path
    run: str
    name: str
    round: int
    base: str
    config: Mapping[str, Scalar]
    origins: Sequence[Origin]

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read ``release.json``.

        Raises:
            InputError: If it is missing or damaged.
        """
        try:
            content: Any = json.loads((directory / FILE).read_text(encoding="utf-8"))
            content["origins"] = origins_of(content["origins"])
            made = cls(directory=directory, **content)
            if not (made.run.isascii() and made.run.isalnum() and RUN_NAME.fullmatch(made.name)):
                raise ValueError("the run has no name")
            if type(made.base) is not str or type(content["config"]) is not dict:
                raise TypeError("a field has a wrong type")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{directory / FILE} cannot be read ({type(error).__name__}); give the directory "
                "adapter/ of a finished run's results, as the operator hands it out"
            ) from None
        return made

    def adapter(self, work: Trainable, *, residuals: bool) -> AdapterState:
        """Read the adapter.

        Args:
            work: The model of the run.
            residuals: Whether the run's strategy has residuals; the adapter is then one.

        Raises:
            InputError: If the base is another one, or the adapter does not fit the run.
        """
        if self.base != work.base.digest:
            raise InputError(
                f"model.name {work.base.name} is not the base that run {self.name} was trained on "
                "(weights differ); restore that base"
            )
        adapter = open_for(self.directory, work.start, residuals=residuals)
        if problem := adapter.validate_against(work.start, residual=residuals):
            raise InputError(
                f"the adapter in {self.directory} does not fit run {self.name}: {problem}; ask the "
                "operator for it again"
            )
        return adapter


def describe(directory: Path, release: Release, config: Mapping[str, Scalar]) -> None:
    """Write ``release.json`` beside an adapter, with the run's configuration, flat."""
    about = {field: getattr(release, field) for field in ("run", "name", "round", "base")}
    about |= {"config": finite(config), "origins": list(release.origins)}
    write_atomic(directory / FILE, (json.dumps(about, indent=2) + "\n").encode())
