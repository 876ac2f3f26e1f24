"""Submitted runs: their configurations, Flower runs and states.

A submission is a directory below the results; its record, ``submission.json``, outlives every
process. When the server dies during a run, Flower's run dies with it. A new Flower run is then
submitted with the same configuration and directory, and the ServerApp continues from its last
checkpoint. A submission whose record cannot be read holds up no other one.
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
from deployment.errors import FlowerError, Unanswered, in_words, named
from deployment.superlink_client import Server
from fedlora.config.config import RunConfig, from_flat
from fedlora.config.sections import INSTITUTIONS
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.runs.run_files import (
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
        details: The reason for its end.
        runs: Ids of its Flower runs since the last `submit` without an answer, in order.
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
        with named(self.directory / ROUNDS):
            return read_records(self.directory)

    def save(self) -> None:
        """Write the submission's record."""
        content = json.dumps(dataclasses.asdict(self), indent=2) + "\n"
        with named(self.directory / SUBMISSION):
            write_atomic(self.directory / SUBMISSION, content.encode())


def submit(server: Server, config: RunConfig, name: str) -> Submission:
    """Submit a new run, or continue a failed or stopped one after its last finished round.

    Raises:
        InputError: For a configuration that is not for a deployment, or a name that is taken.
        FileError: When the submission's record cannot be read or written.
        Unanswered: When the SuperLink may have accepted the run. The submission stays, and
            `proceed` checks for its run.
        FlowerError: When the SuperLink did not accept the run; all is as before.
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
    made = Submission(
        name=name, config=from_flat({**config.flat(), "run-dir": str(directory)}).flat()
    )
    with alone(server.results):
        before = _earlier(server, made) if (directory / SUBMISSION).exists() else None
        if before:
            made = dataclasses.replace(made, rounds=len(before.rounds_done()))
        # without runs: an ended run's status would end this submission again, should no answer come
        made.save()
        try:
            return _start(server, made)
        except Unanswered:
            raise
        except FlowerError:
            if before:
                before.save()
            else:
                shutil.rmtree(directory)
            raise


def _earlier(server: Server, made: Submission) -> Submission:
    """The failed or stopped submission that a new one of its name continues."""
    before, _ = _observed(server, find(server, made.name))
    if before.state not in ("failed", "stopped"):
        raise InputError(f"{made.name} is {before.state}; give another --name")
    if before.config != made.config:
        raise InputError(
            f"{made.name} {before.state} under another configuration; give its own "
            f"({before.directory / 'config.toml'}), or another --name"
        )
    return before


def find(server: Server, name: str) -> Submission:
    """The submission of this name.

    Raises:
        InputError: When there is no such submission.
        FileError: When its record cannot be read, or is not its own, such as that of a directory
            that was copied.
    """
    file = server.results / name / SUBMISSION
    if not RUN_NAME.fullmatch(name) or not file.exists():
        raise InputError(
            f"{server.results} holds no submission {name!r}; there are: "
            f"{', '.join(names(server)) or 'none'}"
        )
    with named(file):
        content = json.loads(file.read_text(encoding="utf-8"))
        submission = Submission(**{**content, "runs": tuple(content["runs"])})
        if submission.state not in get_args(State) or (
            submission.directory.resolve() != file.parent.resolve()
        ):
            raise ValueError(
                f"its state is {submission.state!r}, its run-dir {submission.directory}"
            )
    return submission


def names(server: Server) -> list[str]:
    """The names of all submissions, also of those that `find` cannot read."""
    return sorted(file.parent.name for file in server.results.glob(f"*/{SUBMISSION}"))


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
            with alone(server.results):
                if (submission := find(server, name)).state == "running":
                    actions += _proceed(server, submission, since)
        except (FlowerError, OSError, InputError) as error:
            waiting[name] = in_words(error)
    return actions, waiting


def _proceed(server: Server, submission: Submission, since: float) -> list[str]:
    name = submission.name
    submission, interrupted = _observed(server, submission, since=since)
    if submission.state != "running":
        return [f"{name} {submission.state}: {submission.details or 'all rounds done'}"]
    if not interrupted:
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
        with named(file):
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


def _start(server: Server, submission: Submission) -> Submission:
    """Start a Flower run, or adopt the run of an earlier start without an answer."""
    unfinished = superlink_client.unfinished(server, str(submission.directory))
    unknown = [run for run in unfinished if run not in submission.runs]
    sent = from_flat(submission.config).shared()  # institutions get the same values as Flower
    run = unknown[-1] if unknown else superlink_client.start(server, APP, sent)
    started = dataclasses.replace(
        submission, runs=(*submission.runs, run), tries=submission.tries + 1
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


def _ended(submission: Submission, state: State, details: str) -> Submission:
    ended = dataclasses.replace(submission, state=state, details=details)
    ended.save()
    return ended
