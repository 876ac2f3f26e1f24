"""Submitted runs: their configurations, Flower runs and states.

A submission is a directory below the results; its record, ``submission.json``, outlives every
process. When the server dies during a run, Flower's run dies with it. A new Flower run is then
submitted with the same configuration and directory, and the ServerApp continues from its last
checkpoint. A submission whose record cannot be read is neither continued nor ended, and holds up no
other one.
"""

import contextlib
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from deployment import superlink_client
from deployment.errors import FileError, FlowerError, Unanswered, in_words, named
from deployment.superlink_client import Server
from fedlora.config.config import RunConfig, from_flat
from fedlora.config.sections import INSTITUTIONS
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.runs.run_files import (
    RESULT,
    ROUNDS,
    RUN_NAME,
    SUBMISSION,
    GrowingLines,
    alone,
    is_complete,
    read_records,
)

State = Literal["running", "completed", "failed", "stopped"]
APP = Path(__file__).resolve().parents[1]
"""The installed source: the directory whose pyproject.toml describes the Flower app."""
INTERRUPTED = ("No heartbeat received from the task", "Task failed with unknown error.")
"""Flower's details of a ServerApp that was ended from outside."""
RAISED = "ServerApp failed with exception: "
MAX_TRIES = 5
"""The most starts of one submission without a new round."""
ASK_SECONDS = 5.0
"""Seconds between two requests to the SuperLink about one run."""


@dataclass(frozen=True, kw_only=True)
class Submission:
    """One submitted run.

    Args:
        name: The name of the submission and of its directory.
        config: The configuration, flat.
        state: The state; ``running`` until the end is known.
        details: The reason for its end; while it runs, the problem that the server has with it.
        runs: Ids of its Flower runs since the last `submit` or `resume` without an answer, in
            order.
        rounds: Rounds that were done at the start of its last Flower run.
        tries: Flower runs since the last new round.
    """

    name: str
    config: dict[str, Any]
    state: State = "running"
    details: str = ""
    runs: tuple[str, ...] = ()
    rounds: int = 0
    tries: int = 0

    def __post_init__(self) -> None:
        if self.directory.name != self.name:
            raise ValueError(f"{self.name!r} is not the name of its run-dir, {self.directory}")
        if self.state not in get_args(State):
            raise ValueError(f"its state is {self.state!r}")
        if not all(run.isdecimal() and int(run) < 2**64 for run in self.runs):
            raise ValueError(f"its runs are {self.runs}")
        if not isinstance(self.rounds, int) or not isinstance(self.tries, int):
            raise ValueError(f"its rounds are {self.rounds!r} and its tries {self.tries!r}")

    @property
    def directory(self) -> Path:
        """The directory of the submission's results."""
        return Path(self.config["run-dir"])

    @property
    def complete(self) -> bool:
        """Whether the ServerApp wrote its result, which it writes last."""
        return is_complete(self.directory)

    def rounds_done(self) -> list[dict[str, Any]]:
        """The record of each finished round."""
        with named(self.directory / ROUNDS, "read"):
            return read_records(self.directory)

    def result(self) -> dict[str, Any]:
        """The result of a completed run."""
        return _read_object(self.directory / RESULT)

    def save(self) -> None:
        """Write the submission's record."""
        content = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        with named(self.directory / SUBMISSION, "written"):
            write_atomic(self.directory / SUBMISSION, content.encode())


def submit(server: Server, config: RunConfig, name: str) -> Submission:
    """Submit a new run.

    Raises:
        InputError: For a configuration that is not for a deployment, or a name that is taken.
        FileError: When the submission's record cannot be written; nothing is left of it.
        Unanswered: When the SuperLink may have accepted the run, or a file failed meanwhile.
            The submission stays, and `proceed` checks for its run.
        FlowerError: When the SuperLink did not accept the run; the submission is removed.
    """
    if not RUN_NAME.fullmatch(name):
        raise InputError(
            f"--name is {name!r}; it must be 1 to 63 letters, digits, '-', '_' and '.', and begin "
            "with a letter or digit"
        )
    if not config.deployed:
        raise InputError(
            f"data.source is {config.data.source!r}; in a deployment each institution has its own "
            f"records: set it to {INSTITUTIONS}, and data.institutions and "
            "data.labels with it"
        )
    directory = server.results / name
    flat = from_flat({**config.flat(), "run-dir": str(directory)}).flat()
    with alone(server.results):
        if directory.exists() and not _is_unwritten(directory):
            raise InputError(f"{directory} exists; give another --name")
        made = Submission(name=name, config=dict(flat))
        try:
            made.save()
        except FileError:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        return _first_start(server, made, lambda: shutil.rmtree(directory))


def _is_unwritten(directory: Path) -> bool:
    """Whether a kill during `submit` left this directory: nothing but drafts of the record."""
    return directory.is_dir() and all(
        one.name.startswith(f".{SUBMISSION}.") for one in directory.iterdir()
    )


def find(server: Server, name: str) -> Submission:
    """The submission of this name.

    Raises:
        InputError: When there is no such submission.
        FileError: When its record cannot be read, or is not its own, such as that of a directory
            that was copied.
    """
    file = server.results / name / SUBMISSION
    with named(file, "read"):
        known = RUN_NAME.fullmatch(name) and file.exists()
    if not known:
        raise InputError(
            f"{server.results} holds no submission {name!r}; there are: "
            f"{', '.join(sorted(names(server))) or 'none'}"
        )
    content = _read_object(file)
    with named(file, "read"):
        submission = Submission(**{**content, "runs": tuple(content["runs"])})
        directory = submission.directory.resolve()
    if directory != file.parent.resolve():
        raise FileError(
            f"{file} is the record of {directory}; if {file.parent} is a copy of it, move the copy "
            f"out of {server.results}"
        )
    return submission


def names(server: Server) -> list[str]:
    """The names of all submissions, also of those that `find` cannot read.

    Those come first whose directories changed longest ago: a running one's changes with each round.
    """
    with named(server.results, "read"):
        folders = [one for one in server.results.iterdir() if RUN_NAME.fullmatch(one.name)]
    made: list[tuple[float, str]] = []
    for folder in folders:
        changed = 0.0
        try:
            changed = folder.stat().st_ctime
            (folder / SUBMISSION).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # no submission, or the SuperLink has just refused it
        except OSError:
            pass  # `find` names the problem
        made.append((changed, folder.name))
    return [name for _, name in sorted(made)]


def observe(server: Server, name: str) -> Submission:
    """The submission's current state, from Flower and from its directory."""
    with alone(server.results):
        return _observed(server, find(server, name))[0]


def stop(server: Server, name: str) -> Submission:
    """Stop a run. Its finished rounds are kept, and so is its end if it ends before the stop."""
    with alone(server.results):
        submission, _ = _observed(server, find(server, name))
        if submission.state != "running":
            return submission
        last = submission.runs[-1:]
        unfinished = superlink_client.unfinished(server, str(submission.directory))
        for run in (*{*unfinished}.difference(last), *last):  # last: its end ends the submission
            superlink_client.stop(server, run)
        submission, _ = _observed(server, submission)
        if submission.state in ("completed", "failed"):
            return submission
        return _ended(submission, "stopped", "stopped by the operator")


def resume(server: Server, name: str) -> Submission:
    """Start a failed or stopped run again, after its last finished round.

    Raises:
        InputError: For a run that has not failed and was not stopped.
        FileError: When its files cannot be read or written; the submission stays as it was.
        Unanswered: When the SuperLink may have accepted the run, or a file failed meanwhile.
            The submission is running, and `proceed` checks for its run.
        FlowerError: When it did not; the submission stays as it was.
    """
    with alone(server.results):
        submission, _ = _observed(server, find(server, name))
        if submission.state not in ("failed", "stopped"):
            raise InputError(
                f"{name} is {submission.state}; only a failed or stopped run is resumed"
            )
        again = dataclasses.replace(
            submission,
            state="running",
            details="",
            rounds=len(submission.rounds_done()),
            tries=0,
        )
        # without runs: an ended run's status would end this submission again, should no answer come
        dataclasses.replace(again, runs=()).save()
        return _first_start(server, again, submission.save)


def proceed(server: Server, *, since: float = -math.inf) -> tuple[list[str], dict[str, str]]:
    """Restart every submission whose Flower run was ended from outside.

    Args:
        server: The server.
        since: The server's start (monotonic clock). A Flower run of an earlier server lost its
            ServerApp with that server.

    Returns:
        A line for each action; and submission -> the reason why it waits for the next pass: its
        files cannot be read or written, or the SuperLink did not fulfil a request.
    """
    actions: list[str] = []
    waiting: dict[str, str] = {}
    for name in names(server):
        try:
            if _running(server, name):
                with alone(server.results):
                    if submission := _running(server, name):
                        actions += _proceed(server, submission, since)
        except (FlowerError, OSError, ValueError, TypeError, KeyError) as error:
            waiting[name] = in_words(error)
            with contextlib.suppress(OSError):  # its record cannot hold the reason
                _note(server, name, waiting[name])
    return actions, waiting


def _running(server: Server, name: str) -> Submission | None:
    """A submission that runs; None also if it was taken back, as the SuperLink refused it."""
    try:
        submission = find(server, name)
    except InputError:
        return None
    return submission if submission.state == "running" else None


def _proceed(server: Server, submission: Submission, since: float) -> list[str]:
    name = submission.name
    submission, interrupted = _observed(server, submission, since=since)
    if submission.state != "running":
        return [f"{name} {submission.state}: {submission.details or 'all rounds done'}"]
    if not interrupted:
        if submission.details:  # the problem is over
            dataclasses.replace(submission, details="").save()
        return []
    done = len(submission.rounds_done())
    tries = submission.tries if done == submission.rounds else 0
    if tries >= MAX_TRIES:
        details = f"ended from outside {tries} times in round {done + 1}"
        _ended(submission, "failed", f"{details}; see the server's log")
        return [f"{name} failed: {details}"]
    again = dataclasses.replace(submission, rounds=done, tries=tries)
    again.save()  # on a full disk Flower gets no run that could not be recorded
    again = _start(server, again)
    if submission.runs:  # not before: a stopped run would end the submission if the start failed
        superlink_client.stop(server, submission.runs[-1])
    return [f"{name} continues after round {done} as Flower's run {again.runs[-1]}"]


def _note(server: Server, name: str, problem: str) -> None:
    """Record the problem that the server has with a running submission, for `deploy status`."""
    with alone(server.results):
        submission = _running(server, name)
        if submission and submission.details != problem:
            dataclasses.replace(submission, details=problem).save()


def follow(
    server: Server, name: str, show: Callable[[dict[str, Any]], None], *, after: int = 0
) -> Submission:
    """Wait until a submission has ended.

    Args:
        server: The server.
        name: The submission.
        show: Called once with the record of each round.
        after: The number of first rounds that are not shown.
    """
    shown, asked = after, time.monotonic()
    file = find(server, name).directory / ROUNDS
    lines = GrowingLines(file)
    while True:
        submission = find(server, name)
        with named(file, "read"):
            records = lines.read()
        for record in records[shown:]:
            shown += 1
            show(record)
        if submission.state != "running":
            return submission
        if time.monotonic() - asked > ASK_SECONDS:
            asked = time.monotonic()
            with contextlib.suppress(FlowerError):  # an unreachable SuperLink may come back
                observe(server, name)
        time.sleep(1.0)


def _first_start(server: Server, saved: Submission, undo: Callable[[], None]) -> Submission:
    """Start a submission whose record has no runs yet; undo the record only if Flower has no run.

    Raises:
        Unanswered: When Flower may have the run, or the record cannot be undone.
    """
    try:
        try:
            return _start(server, saved)
        except Unanswered:
            raise
        except (FlowerError, InputError):
            undo()
            raise
    except OSError as error:
        raise Unanswered(
            f"the start of {saved.name} was interrupted ({in_words(error)})"
        ) from error


def _start(server: Server, submission: Submission) -> Submission:
    """Start a Flower run, or adopt the run of an earlier start without an answer."""
    unfinished = superlink_client.unfinished(server, str(submission.directory))
    unknown = [run for run in unfinished if run not in submission.runs]
    sent = from_flat(submission.config).shared()  # institutions get the same values as Flower
    run = unknown[-1] if unknown else superlink_client.start(server, APP, sent)
    started = dataclasses.replace(
        submission, runs=(*submission.runs, run), tries=submission.tries + 1, details=""
    )
    started.save()
    return started


def _observed(
    server: Server, submission: Submission, *, since: float = -math.inf
) -> tuple[Submission, bool]:
    """The submission's current state, and whether its Flower run was ended from outside."""
    if submission.state != "running":
        return submission, False
    if not submission.runs:  # Flower's answer to a submitted or resumed run is unknown
        return submission, True
    status, details, age = superlink_client.status(server, submission.runs[-1])
    if status == "finished:completed":
        if submission.complete:
            return _ended(submission, "completed", ""), False
        return _ended(submission, "failed", "the ServerApp ended without a result"), False
    if status == "finished:stopped":
        return _ended(submission, "stopped", details or "stopped"), False
    if status == "finished:failed" and not details.startswith(INTERRUPTED):
        return _ended(submission, "failed", details.removeprefix(RAISED)), False
    orphaned = status in ("starting", "running") and age > time.monotonic() - since
    interrupted = orphaned or status in ("finished:failed", "unknown")
    if interrupted and submission.complete:  # it ended before Flower noted so
        return _ended(submission, "completed", ""), False
    return submission, interrupted


def _read_object(file: Path) -> dict[str, Any]:
    """A JSON object on disk."""
    with named(file, "read"):
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise TypeError("it is no JSON object")
    return content


def _ended(submission: Submission, state: State, details: str) -> Submission:
    ended = dataclasses.replace(submission, state=state, details=details)
    ended.save()
    return ended
