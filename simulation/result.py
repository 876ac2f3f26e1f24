"""The result of a run, read from its directory."""

import html
import importlib
import logging
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig, load
from fedlora.data import rows, tables
from fedlora.errors import InputError, RecordError
from fedlora.files import expanded
from fedlora.rounding import at_most, number
from fedlora.runs import finished_run
from fedlora.runs.run_files import CONFIG, PRIVACY, made_at_home, read_records, read_run_file
from server.privacy_statement import with_earlier_runs

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
        self._directory = expanded(os.fspath(directory)).absolute()
        self._reading = {"model.name": os.fspath(model)} if model else {}
        if made_at_home(self._directory):
            raise InputError(
                f"{self._directory} has an institution's own model and no run; `fedlora predict`, "
                "`evaluate` and `merge` take it, and its card has the Python that opens it"
            )
        _ = self.figures  # refuses a directory without a complete run

    @property
    def directory(self) -> Path:
        """The run directory, absolute."""
        return self._directory

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Result) and self.directory == other.directory

    def __hash__(self) -> int:
        return hash(self.directory)

    @cached_property
    def figures(self) -> dict[str, Any]:
        """``result.json``: figures on held-out rows, epsilon, the comparison of joining."""
        return read_run_file(self.directory)

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """A dictionary for each round, as in ``rounds.jsonl``: ``metrics``, ``epsilon_max``, ...

        Raises:
            InputError: If the run directory is no longer there.
        """
        read_run_file(self.directory)
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

    def tokenizer(self) -> Any:
        """The tokenizer of the model."""
        transformers: Any = importlib.import_module("transformers")
        return transformers.AutoTokenizer.from_pretrained(self.adapter, trust_remote_code=False)

    def predict(
        self, texts: Sequence[str] | tables.Table, institution: str = "", *, own: bool = False
    ) -> list[dict[str, Any]]:
        """Answer texts: ``text``, ``answer`` and, where there are classes, ``score``, ``scores``.

        ``institution`` and ``own`` are those of `model`.

        Args:
            texts: The texts, or a table with the run's columns of the text (``data.text``).
            institution: The institution whose adapter is used.
            own: Whether it is the institution's own model.

        Raises:
            InputError: If a text is empty, or a table has no such column.
        """
        if isinstance(texts, str):
            texts = [texts]
        elif tables.is_table(texts):
            columns = dict.fromkeys(rows.text_columns(self.config.data.text), "data.text")
            try:
                found = tables.texts(tables.frame(texts, "texts"), columns, "texts").values()
            except RecordError:
                raise InputError(
                    f"texts is a table without a column that the run reads ({', '.join(columns)}); "
                    "rename yours, or give a list of texts"
                ) from None
            texts = [rows.joined(parts) for parts in zip(*found, strict=True)]
        else:
            texts = list(texts)
        found = finished_run.predict(
            self.directory, texts, institution, self._reading, own_model=own
        )
        if found["truncated"]:
            log.warning("%s of %s texts were longer than %s tokens, and lost their end",
                        found["truncated"], len(texts), found["max_length"])  # fmt: skip
        return found["answers"]

    def __repr__(self) -> str:
        if not self.directory.exists():
            return f"Result({str(self.directory)!r}, which is gone)"
        shown = ", ".join(f"{name} {value}" for name, value in self._shown().items())
        return f"Result({str(self.directory)!r}: {shown})"

    def _repr_html_(self) -> str:
        """A table, for notebooks."""
        shown = self._shown() | {"protects": self.privacy["protects"], "in": str(self.directory)}
        rows = "".join(
            f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for name, value in shown.items()
        )
        return f"<table>{rows}</table>"

    def _shown(self) -> dict[str, str]:
        figures, config = self.figures, self.config
        names = ("accuracy", "macro_f1", "token_loss", *config.federation.metric_names)
        seeded = config.privacy.enabled and config.privacy.noise == "seeded"
        secret = " (were the noise secret)" if seeded else ""
        shown = {name: number(figures[name]) for name in names if name in figures}
        shown["epsilon"] = at_most(float(figures["epsilon_max"]), 3) + secret
        if figures["delta"] is not None:
            shown["delta"] = at_most(figures["delta"], 3)
        if (most := with_earlier_runs(config, self.privacy)) is not None:
            shown["epsilon with earlier runs"] = at_most(most["ledger_epsilon"], 3) + secret
        return shown | {"rounds": str(figures["rounds"])}
