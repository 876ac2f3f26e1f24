"""An institution's own settings: a TOML file on its own disk that no server can reach.

The settings name a deployed institution's records and ledger, its machine and its limits. The rules
for each key of a server's configuration are in `client.server_keys`.
"""

import dataclasses
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import files
from fedlora.config import check_threads
from fedlora.errors import InputError
from fedlora.settings_schema import Section, section
from fedlora.settings_schema import key as setting


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """An institution's own settings; paths are absolute, or relative to the file's directory."""

    name: str = setting("", "its name in the federation")
    source: str = setting("", "its training records, as in data.source")
    test_source: str = setting("", "records whose texts are never trained on")
    text: str = setting("text", "column of the text (several: joined by commas)")
    label: str = setting("label", "column of the label; for sft the response")
    labels: tuple[str, ...] = setting(
        (), "the classes, in order; a run must use the same; none for sft"
    )
    unit: str = setting("record", "who is protected: a record, or the column that names them")
    ledger: str = setting("", "its privacy ledger, made by `fedlora ledger init`")
    state: str = setting("", "directory of what it keeps from round to round")
    rank: int = setting(0, "rank of its factors; 0: the run's adapter.rank", at_least=0)
    models: tuple[str, ...] = setting((), "base models that it trains (model.name)")
    strategies: tuple[str, ...] = setting(("fedavg",), "strategies that it takes part in")
    max_steps: int = setting(10, "most optimizer steps of a round", at_least=1)
    max_length: int = setting(512, "most tokens of a row", at_least=4)
    max_rank: int = setting(64, "most rank of the adapter, and of a residual", at_least=1)
    physical_batch: int = setting(64, "most records in memory at a time", at_least=1)
    max_run_epsilon: float = setting(
        8.0, "most epsilon of one run, at its delta and at the ledger's", above=0
    )
    max_delta: float = setting(1e-5, "largest delta of one run", above=0, below=1)
    without_dp: bool = setting(False, "whether it trains without differential privacy")
    report: tuple[str, ...] = setting((), "figures that may leave without DP: loss, records")
    max_seconds: float = setting(1800.0, "most seconds that one message may take", at_least=1)
    threads: int = setting(1, "threads that training takes", at_least=1)
    gpu: bool = setting(False, "whether it trains on a GPU")
    gateway: str = setting(
        "", "HOST:PORT of the federation (this and the next two: `fedlora node`)"
    )
    ca: str = setting("", "the federation's CA certificate, PEM")
    key: str = setting("", "this institution's private key; nobody else may read it")

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("name", "source", "ledger", "state", "models"):
            if not getattr(self, field):
                raise InputError(f"{field} is missing from the institution's settings; add it")
        if not all(c.isalnum() or c in "-_." for c in self.name) or self.name.startswith("."):
            raise InputError(
                f"name is {self.name!r}; it must be letters, digits, '-', '_' and '.', and begin "
                "with none of the latter"
            )
        if self.rank > self.max_rank:
            raise InputError(
                f"rank is {self.rank}; it must be at most max-rank ({self.max_rank}): lower it, or "
                "raise max-rank"
            )
        check_threads("threads", self.threads)


def load(path: str) -> Settings:
    """Read a settings file.

    Args:
        path: As the SuperNode's ``--node-config`` gives it. Absolute, without ``..``, no link, and
            nobody but its owner may write to it or its directory: a change can lift every limit.

    Raises:
        InputError: For such a path, or a missing, damaged or invalid file.
    """
    file = Path(path)
    if not file.is_absolute() or ".." in file.parts or file.is_symlink():
        raise InputError(f"settings is {path!r}; it must be an absolute path without .. or links")
    try:
        if exposed := files.exposed(file):
            raise InputError(exposed)
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; mend settings") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    made = section(Settings, values)
    here = file.parent
    return dataclasses.replace(
        made,
        **{field: str(here / getattr(made, field)) for field in ("ledger", "state")},
        **{field: str(here / path) for field in ("ca", "key") if (path := getattr(made, field))},
        **{
            field: str(here / value) if value.endswith((".csv", ".jsonl", ".parquet")) else value
            for field in ("source", "test_source")
            if (value := getattr(made, field))
        },
    )
