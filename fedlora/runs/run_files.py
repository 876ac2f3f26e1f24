"""Files of a run directory that every package reads, and the lock on a run directory.

Importing this module and reading a run's files load no torch.
"""

import contextlib
import fcntl
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any, cast

import fedlora
from fedlora import processors
from fedlora.errors import InputError
from fedlora.extras import version
from fedlora.files import code_digest
from fedlora.models.model_files import ONE_INSTITUTION

log = logging.getLogger("fedlora.server")
_held: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""The directories that `alone` has locked around this code."""

CONFIG = "config.toml"
"""In a run directory: the resolved configuration."""
HOME_CONFIG = "home.toml"
"""In the directory that `fedlora home` wrote: the run's configuration, as the institution followed
it."""
LEDGERS = "ledgers"
"""In a simulated run's directory: its ledgers."""
ENVIRONMENT = "environment.json"
"""In a run directory: versions, commit and processor."""
ROUNDS = "rounds.jsonl"
"""In a run directory: a line for each round."""
RESULT = "result.json"
"""In a run directory: the results. A run writes this file last, so it marks a complete run."""
PRIVACY = "privacy.json"
"""In a complete run's directory: what the run promised to each institution, and what was spent."""
AUDITED = "audited.json"
"""In the directory of an audited run: the ``data.source`` without planted records."""
RUNS, LATEST = "runs", "latest"
"""The directory of runs, and the link in it to the run that was started or resumed last."""
UNKNOWN = "unknown"
"""In ``origins``: the ``run`` of a start that is gone, or that an earlier version did not name."""
SUBMISSION = "submission.json"
"""In a run directory: the deployment's record of a submitted run."""
_HEADS = {
    "zero": "zeros",
    "labels": "the labels' words",
    "start": "adapter.start",
    "base": "the base model",
}
"""What the key ``head`` of ``result.json`` says, in words."""
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
"""The name of a run in a deployment, which is also its directory's."""
NODES = "nodes.json"
"""Beside a deployment's runs: Flower's node id -> the institution whose public key the node has."""
KEYS = "keys.json"
"""Beside a deployment's runs: institution -> its registered public key, PEM."""
SIZES = "sizes.json"
"""Beside a deployment's runs: institution -> the server's bound of its number of records."""


def ledgers(directory: Path) -> list[Path]:
    """The ledgers in a directory, sorted, without the stores of secure aggregation beside them."""
    return sorted(f for f in directory.glob("*.db") if not f.name.endswith(".secure.db"))


@contextlib.contextmanager
def alone(path: Path) -> Generator[None]:
    """Wait until no other process runs in this directory, and keep other processes out.

    A resumed run may start before the process of the killed server is gone. A directory that does
    not exist, and one of a network file system that locks none, is not locked. Inside a block of
    its own the lock is held already.
    """
    held = _held.get()
    if not path.is_dir() or path.resolve() in held:
        yield
        return
    descriptor = os.open(path, os.O_RDONLY)
    token = _held.set(held | {path.resolve()})
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("waiting for another process that works in %s", path)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            pass
        yield
    finally:
        _held.reset(token)
        os.close(descriptor)


def link_latest(run_dir: Path) -> None:
    """Point ``latest`` beside a run at it, atomically, if the run lies in a directory ``runs``.

    Nothing happens where links are not possible, or where ``latest`` is something else than a link.
    """
    link = run_dir.with_name(LATEST)
    if run_dir.parent.name != RUNS or run_dir == link or (link.exists() and not link.is_symlink()):
        return
    new = link.with_name(f".{LATEST}-{os.getpid()}")
    with contextlib.suppress(OSError):
        new.symlink_to(run_dir.name, target_is_directory=True)
        new.replace(link)


def is_complete(run_dir: Path) -> bool:
    """Whether a directory holds a complete run."""
    return (run_dir / RESULT).exists()


def read_run_file(run_dir: Path, name: str = RESULT) -> dict[str, Any]:
    """Read a JSON file of a complete run.

    Raises:
        InputError: If the file does not exist, cannot be read, is no object, or has a key twice:
            of these a program reads the last, and a person the first.
    """
    try:
        text = (run_dir / name).read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_single)
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        return cast(dict[str, Any], found)
    except (OSError, ValueError, RecursionError) as error:
        if made_at_home(run_dir):
            raise InputError(
                f"{run_dir} holds an institution's own model and no run; its report.txt says what "
                "joining gave, and `fedlora predict` takes it"
            ) from None
        go_on = f"run --resume {run_dir}"
        with contextlib.suppress(OSError):  # of a directory that this user may not enter
            if (run_dir / SUBMISSION).exists():
                go_on = f"deploy submit --name {run_dir.name}"
        raise InputError(
            f"{run_dir} holds no complete run that can be read ({name}: {_reason(error)}); "
            f"give the directory that a finished run printed, or continue the run with `fedlora "
            f"{go_on}`"
        ) from None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}, {error}" if type(error) is ValueError else type(error).__name__


def _single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def refuse_audited(run_dir: Path, instead: str) -> None:
    """Refuse an audited run: its adapter knows planted records too.

    Args:
        run_dir: The run's directory.
        instead: What to do with the run itself, as a verb.

    Raises:
        InputError: If an audit made the run.
    """
    if is_audited(run_dir):
        raise InputError(
            f"{run_dir} is an audited run, which was trained on planted records too; {instead} the "
            "run itself"
        )


def void(result: Mapping[str, Any]) -> list[str]:
    """Why a result is void: the texts of findings that its run accepted; empty where it is not.

    Args:
        result: The content of result.json.
    """
    return [finding["text"] for finding in result.get("findings", []) if finding["voids"]]


def unprotected_origins(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The runs without a promise that a run goes back to (`fedlora.models.model_files.Origin`).

    Args:
        result: The content of result.json.
    """
    return [
        origin
        for origin in result.get("origins", [])
        if not origin["private"] and origin["source"] != ONE_INSTITUTION
    ]


def said_of_origins(result: Mapping[str, Any]) -> str:
    """A further sentence for each of `unprotected_origins`; often empty."""
    return "".join(
        f" What it started from ({origin['source']}) is gone or was not written down, so nobody "
        "knows what it reveals."
        if origin["run"] == UNKNOWN
        else f" What it started from was trained by the run {origin['run']} on "
        f"`{origin['source']}` without a promise for these records: whatever that reveals of them "
        "is in no figure here."
        for origin in unprotected_origins(result)
    )


def said_of_head(described: Mapping[str, Any]) -> str:
    """What a head was made of; empty where there is none, or an earlier version ran.

    Args:
        described: The content of ``result.json``, or the model of ``fedlora check``.
    """
    head = described.get("head", "")
    return f"head from {_HEADS[head]}" if head in _HEADS else ""


def ledger_alone(statement: Mapping[str, Any]) -> float | None:
    """The largest epsilon of a ledger if all others collude in runs with secure aggregation.

    None where it is not above the largest ``ledger_epsilon``.

    Args:
        statement: The content of privacy.json.
    """
    ledgers = statement["institutions"].values()
    # a file of an older version has no figure for it
    alone = max((float(one.get("ledger_epsilon_alone", 0.0)) for one in ledgers), default=0.0)
    return alone if alone > max((one["ledger_epsilon"] for one in ledgers), default=0.0) else None


def made_at_home(run_dir: Path) -> bool:
    """Whether `fedlora home` wrote the directory: it holds one institution's own model only."""
    return (run_dir / HOME_CONFIG).exists()


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a run directory's ``rounds.jsonl``."""
    return read_lines(path / ROUNDS)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines without a half-written last one; empty where there is no file.

    Raises:
        InputError: If another line is not JSON in UTF-8.
    """
    try:
        return GrowingLines(file).read()
    except ValueError:
        raise InputError(
            f"{file} has a line that is no JSON; restore the file from a copy, or run again"
        ) from None


class GrowingLines:
    """The lines of a file of JSON lines that grows. Each line is read once.

    Not for several threads at once.

    Args:
        file: The file; it may not exist yet.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        self._forget()

    def _forget(self) -> None:
        self._found: list[dict[str, Any]] = []
        self._last, self._start = b"", 0  # the last line in _found and its position in the file

    def read(self) -> list[dict[str, Any]]:
        """All lines without a half-written last one; empty where there is no file.

        The file is read from its beginning if the last line read is no longer in its place: the
        file was cut back, or another file has its name.

        Returns:
            A list that later calls may extend.

        Raises:
            ValueError: If a line is not JSON in UTF-8. The next call begins with this line.
        """
        try:
            file = self._file.open("rb")
        except FileNotFoundError:
            self._forget()
            return self._found
        with file:
            file.seek(self._start)
            if file.read(len(self._last)) != self._last:
                self._forget()
                file.seek(0)
            for line in file:
                if line.endswith(b"\n"):
                    self._found.append(json.loads(line))
                    self._last, self._start = line, self._start + len(self._last)
        return self._found


def environment() -> dict[str, Any]:
    """Return versions, source revision and devices of this process."""
    import torch

    packages = (
        "torch",
        "flwr",
        "peft",
        "transformers",
        "opacus",
        "ray",
        "bitsandbytes",
        "numpy",
    )
    return {
        "versions": {"fedlora": fedlora.__version__, **{name: version(name) for name in packages}},
        "python": platform.python_version(),
        **revision(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "cores": processors.count(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "command": command(),
    }


@cache
def revision() -> Mapping[str, Any]:
    """The commit of the code, whether packages have uncommitted changes, and a digest of them.

    The first two are None where unknown. All are read once a process: a checkout may move on while
    the code that runs does not.
    """
    sha = _project_git("rev-parse", "HEAD")
    dirty = (
        bool(_project_git("status", "--porcelain", "--", "fedlora", *fedlora.ROOMS))
        if sha
        else None
    )
    return {"git_sha": sha or None, "git_dirty": dirty, "code": code()}


@cache
def code() -> str:
    """A digest of fedlora's files, read once a process."""
    root = Path(__file__).resolve().parents[2]
    return code_digest(*(root / package for package in ("fedlora", *fedlora.ROOMS)))


def commit(about: Mapping[str, Any]) -> str:
    """Return 12 digits of a `revision`, with a plus for uncommitted changes; "" if unknown."""
    sha = about["git_sha"]
    return f"{sha[:12]}{'+' * bool(about['git_dirty'])}" if sha else ""


def other_code(about: Mapping[str, Any]) -> str:
    """How the code of a `revision` differs from this one's, in words; empty where it does not.

    An unknown commit is any, and so is the code of an earlier version, which noted no digest of it.
    """
    now = revision()
    if commit(about) and commit(now) and commit(about) != commit(now):
        return f"commit {commit(about)}, and this is {commit(now)}"
    if about.get("code", now["code"]) != now["code"]:
        return f"code {about['code'][:12]}, and this is {now['code'][:12]}"
    return ""


def other_writer(run_dir: Path) -> str:
    """How another fedlora wrote a run, in words; empty where this one did, or where nothing says.

    Args:
        run_dir: The run's directory.
    """
    try:
        about = json.loads((run_dir / ENVIRONMENT).read_bytes())
        begun, other = about["versions"]["fedlora"], other_code(about)
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    if begun != fedlora.__version__:
        return f"fedlora {begun}, this is {fedlora.__version__}"
    return f"fedlora at {other}" if other else ""


def is_audited(run_dir: Path) -> bool:
    """Whether a run was trained on planted records too."""
    return (run_dir / AUDITED).exists() or (run_dir.resolve().parent / "audit.json").exists()


def command() -> list[str]:
    """Return this process's command line, with the program's name instead of its path."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def _project_git(*arguments: str) -> str:
    """Run git in the project's own repository; return its output, empty without such a repository.

    The code may lie inside another repository, as in a virtual environment. That repository's
    commit says nothing about this code.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def finite(value: Any) -> Any:
    """Replace values that JSON cannot hold: inf becomes the text "inf", nan becomes null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]  # pyright: ignore[reportUnknownVariableType]
    return value
