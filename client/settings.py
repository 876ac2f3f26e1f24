"""An institution's own settings: a TOML file on its own disk that no server can reach.

The settings name a deployed institution's records and ledger, its machine and its limits. The rules
for each key of a server's configuration are in `client.config_policy`.
"""

import dataclasses
import math
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora import files
from fedlora.config.sections import check_threads
from fedlora.config.settings_schema import Section, section
from fedlora.config.settings_schema import key as setting
from fedlora.config.strategy_table import STRATEGY_TABLE
from fedlora.data import sources
from fedlora.errors import InputError
from fedlora.secure import noise_shares

REPORTABLE = ("loss", "records")
"""Figures that a round without DP may report."""
_GATEWAY = re.compile(r"([\w.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_OWN_KEY = re.compile(
    r"(?<![\w./-])(data\.(?=((test-)?source|text|labels?)\b)|privacy\.(?=unit\b))"
)
"""What a run's configuration has before the keys of the institution's own records."""


@dataclass(frozen=True, kw_only=True)
class Settings(Section):
    """An institution's own settings; paths are absolute, or relative to the file's directory."""

    where = "in the institution's settings"
    name: str = setting("", "the institution's name in the federation")
    source: str = setting("", "the training records, as in data.source")
    test_source: str = setting("", "held-out records, whose texts are never trained on")
    text: str = setting("text", "column of the text, or several joined by commas")
    label: str = setting("label", "column of the label; the response for sft")
    labels: tuple[str, ...] = setting(
        (), "the classes, in order; a run must use the same; none for sft"
    )
    unit: str = setting("record", "unit of privacy: record, or the column that names the unit")
    ledger: str = setting("", "the privacy ledger, made by `fedlora ledger init`")
    state: str = setting("", "directory of local parts and other files between rounds")
    models: tuple[str, ...] = setting((), "accepted base models (model.name)")
    strategies: tuple[str, ...] = setting(
        ("fedavg",), "accepted strategies, and plug-ins of the server (module:object)"
    )
    max_steps: int = setting(10, "most optimizer steps of a round", at_least=1)
    max_length: int = setting(512, "most tokens of a row", at_least=4)
    max_rank: int = setting(64, "largest rank of the adapter and of a residual", at_least=1)
    physical_batch: int = setting(64, "most records in memory at a time", at_least=1)
    max_run_epsilon: float = setting(
        8.0, "largest epsilon of one run, at the run's delta and at the ledger's", above=0
    )
    max_delta: float = setting(1e-5, "largest delta of one run", above=0, below=1)
    secure_aggregation: bool = setting(
        False,
        "whether the institution adds a share of noise only, and trusts others for the rest "
        "(privacy.trust)",
    )
    min_honest: int = setting(
        noise_shares.MIN_HONEST,
        "least privacy.honest of a run with secure aggregation",
        at_least=noise_shares.MIN_HONEST,
    )
    min_colluding: int = setting(
        noise_shares.MIN_COLLUDING,
        "least privacy.colluding of a run with secure aggregation",
        at_least=noise_shares.MIN_COLLUDING,
    )
    max_alone_epsilon: float = setting(
        math.inf,
        "largest epsilon of one run if all other institutions collude, at the ledger's delta",
        above=0,
        infinite=True,
    )
    without_dp: bool = setting(
        False, "whether the institution trains without differential privacy too"
    )
    report: tuple[str, ...] = setting(
        (), f"figures that may leave without DP: {', '.join(REPORTABLE)}"
    )
    max_seconds: float = setting(
        1800.0, "most seconds that one message may take", at_least=1, at_most=1e7
    )
    threads: int = setting(1, "threads of training", at_least=1)
    gpu: bool = setting(False, "whether training uses a GPU")
    gateway: str = setting(
        "", "HOST:PORT of the federation (this and the next two: `fedlora node`)"
    )
    ca: str = setting("", "the federation's CA certificate, PEM")
    key: str = setting("", "this institution's private key; nobody else may read it")
    peers: str = setting(
        "", "directory of the other institutions' public keys, NAME.pub (secure aggregation)"
    )

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
        for strategy in self.strategies:
            if strategy not in STRATEGY_TABLE and ":" not in strategy:
                raise InputError(
                    f"strategies has {strategy!r}; each must be MODULE:OBJECT or one of "
                    f"{', '.join(STRATEGY_TABLE)}"
                )
        if unknown := sorted(set(self.report) - set(REPORTABLE)):
            raise InputError(
                f"report has {unknown[0]!r}; only {' and '.join(REPORTABLE)} may leave without DP"
            )
        gateway = _GATEWAY.fullmatch(self.gateway)
        if self.gateway and not (gateway and 0 < int(gateway[2]) < 2**16):
            raise InputError(
                f"gateway is {self.gateway!r}; it must be HOST:PORT with a port from 1 to 65535, "
                "such as fed.example.org:8443: correct gateway"
            )
        check_threads("threads", self.threads)


def absolute(path: Path) -> Path:
    """The path of a settings file on a command line as `load` takes it: without ``..``."""
    return Path(os.path.abspath(path))  # noqa: PTH100  (`Path.absolute` keeps "..")


def in_own_keys(message: str) -> str:
    """A message about records, with the settings' keys instead of those of a run's configuration.

    The readers of records are shared with simulations, whose keys are ``data.text`` and
    ``privacy.unit`` where the settings have ``text`` and ``unit``.
    """
    return _OWN_KEY.sub("", message)


def load(path: str) -> Settings:
    """Read a settings file.

    Args:
        path: The path in the SuperNode's ``--node-config``: absolute, without ``..``, no link.
            Only the owner may write to the file and its directory: a change can lift every limit.

    Raises:
        InputError: For such a path, or a missing, damaged or invalid file.
    """
    file = Path(path)
    try:
        if not file.is_absolute() or ".." in file.parts or file.is_symlink():
            raise InputError(
                f"settings is {path!r}; it must be an absolute path without .. or links"
            )
        if exposed := files.exposed(file):
            raise InputError(exposed)
        values: dict[str, Any] = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}; correct settings") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid TOML: {error}") from None
    made = section(Settings, values)
    records = (f for f in ("source", "test_source") if sources.is_path(getattr(made, f)))
    return dataclasses.replace(
        made,
        **{
            field: str(file.parent / files.expanded(value))
            for field in ("ledger", "state", "ca", "key", "peers", *records)
            if (value := getattr(made, field))
        },
    )
