"""The result of a run, read from its directory."""

import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.runs import finished_run
from fedlora.runs.run_files import CONFIG, PRIVACY, made_at_home, read_records, read_run_file

log = logging.getLogger("fedlora")


class Result:
    """A complete run: ``Result("runs/one")`` opens an earlier one.

    Args:
        directory: The run directory.
        model: Where the base model lies now, if not where the run found it.

    Raises:
        InputError: If the directory has no complete run, or an institution's own model.
    """

    def __init__(self, directory: str | Path, *, model: str | Path = "") -> None:
        self.directory = expanded(os.fspath(directory)).absolute()
        self._reading = {"model.name": os.fspath(model)} if model else {}
        if made_at_home(self.directory):
            raise InputError(
                f"{self.directory} has an institution's own model and no run; `fedlora predict`, "
                "`evaluate` and `merge` take it, and its card has the Python that opens it"
            )
        _ = self.figures  # refuses a directory without a complete run

    @cached_property
    def figures(self) -> dict[str, Any]:
        """``result.json``: figures on held-out rows, epsilon, the comparison of joining."""
        return read_run_file(self.directory)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A dictionary for each round, as in ``rounds.jsonl``: ``metrics``, ``epsilon_max``, ..."""
        return read_records(self.directory)

    @property
    def privacy(self) -> dict[str, Any]:
        """``privacy.json``: what is promised to each institution, in words and figures."""
        return read_run_file(self.directory, PRIVACY)

    @property
    def config(self) -> RunConfig:
        """The configuration of the run, complete."""
        return load(self.directory / CONFIG)

    @property
    def adapter(self) -> Path:
        """The directory of the adapter; its ``README.md`` has the Python to open it."""
        return self.directory / "adapter"

    def model(self, institution: str = "", *, own: bool = False) -> Any:
        """The base model with the adapter folded in: a ``transformers`` model on the CPU.

        Args:
            institution: The institution whose adapter is used, where each has its own.
            own: Whether it is the model that this institution made at home after the run.
        """
        merged, _ = finished_run.merged_model(
            self.directory, institution, self._reading, own_model=own
        )
        return merged.cpu()

    def predict(
        self, texts: Sequence[str], institution: str = "", *, own: bool = False
    ) -> list[dict[str, Any]]:
        """Answer texts: ``text``, ``answer`` and, where there are classes, ``score``, ``scores``.

        Args:
            texts: The texts, none of which is empty.
            institution: As for `model`.
            own: As for `model`.
        """
        given = [texts] if isinstance(texts, str) else list(texts)
        found = finished_run.predict(
            self.directory, given, institution, self._reading, own_model=own
        )
        if found["truncated"]:
            log.warning("%s of %s texts were longer than %s tokens, and lost their end",
                        found["truncated"], len(given), found["max_length"])  # fmt: skip
        return found["answers"]

    def __repr__(self) -> str:
        names = ("accuracy", "macro_f1", "token_loss", "epsilon_max", "rounds")
        shown = ", ".join(f"{k} {self.figures[k]}" for k in names if k in self.figures)
        return f"Result({str(self.directory)!r}: {shown})"
