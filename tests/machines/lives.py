"""A piece of work in a process of its own, which dies or stops at a chosen point."""

from __future__ import annotations

import contextlib
import functools
import os
import pickle
import signal
import sqlite3
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Report = Callable[[Any], None]
FILE_CALLS = ("fsync", "replace", "rename", "link", "unlink", "rmdir", "mkdir")


@dataclass(frozen=True)
class Cut:
    """Where a process is cut off.

    Args:
        at: ``statement`` (before an SQL statement), ``instruction`` (within one: every twentieth
            of SQLite's instructions) or ``file`` (before and after a call that changes names or
            syncs).
        number: Which of them, from 1; beyond the last the process lives to its end.
    """

    at: str
    number: int


MISTAKES = (TypeError, AttributeError, NameError)


class Life:
    """A fork of this process that runs ``work(report)``.

    Args:
        work: What it does. An exception in it fails the test.
        cut: Where it is cut off; None: nowhere.
        by: The signal that cuts it off: SIGKILL or SIGSTOP.
    """

    def __init__(self, work: Callable[[Report], None], cut: Cut | None, by: int = signal.SIGKILL):
        self._read, write = os.pipe()
        self._pid = os.fork()
        if self._pid:
            os.close(write)
            return
        # The child: it never comes back from here.
        code = 1
        try:
            os.close(self._read)
            if cut is not None:
                _cut_at(cut, by)
            with os.fdopen(write, "wb", buffering=0) as pipe:

                def report(value: Any) -> None:
                    pipe.write(pickle.dumps(("report", value)))

                try:
                    work(report)
                    code = 0
                except BaseException as error:
                    kind = "mistake" if isinstance(error, MISTAKES) else "error"
                    pipe.write(pickle.dumps((kind, traceback.format_exc())))
        finally:
            os._exit(code)

    def stopped(self) -> bool:
        """Whether it has stopped, rather than ended; waits for either."""
        _, status = os.waitpid(self._pid, os.WUNTRACED)
        self._ended = not os.WIFSTOPPED(status)
        self._status = status
        return not self._ended

    def signal(self, number: int) -> None:
        """Send a signal to a process that has stopped."""
        os.kill(self._pid, number)

    def end(self) -> tuple[list[Any], bool]:
        """Its reports, and whether it was killed; waits for its end."""
        found: dict[str, list[Any]] = {"report": [], "error": [], "mistake": []}
        with os.fdopen(self._read, "rb") as pipe:
            for kind, value in _unpickled(pipe):
                found[kind].append(value)
        reports, errors = found["report"], found["error"]
        if found["mistake"]:  # of the test itself: no machine has found a fault by it
            raise TypeError(found["mistake"][0])
        if not getattr(self, "_ended", False):
            _, self._status = os.waitpid(self._pid, 0)
        code = os.waitstatus_to_exitcode(self._status)
        assert not errors, errors[0]
        assert code in (0, -signal.SIGKILL), f"the process ended with {code}"
        return reports, code != 0


def live(work: Callable[[Report], None], cut: Cut | None = None) -> tuple[list[Any], bool]:
    """One life from beginning to end."""
    return Life(work, cut).end()


def _unpickled(pipe: Any) -> Iterator[tuple[str, Any]]:
    with contextlib.suppress(EOFError):
        while True:
            yield pickle.load(pipe)


def _cut_at(cut: Cut, by: int) -> None:
    """Make this process receive the signal at the point."""
    left = cut.number

    def point(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), by)

    if cut.at == "file":
        for name in FILE_CALLS:
            setattr(os, name, _between(point, getattr(os, name)))
        return
    connect = sqlite3.connect

    def watched(*arguments: Any, **named: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **named)
        if cut.at == "statement":
            connection.set_trace_callback(point)
        else:
            connection.set_progress_handler(point, 20)
        return connection

    sqlite3.connect = watched


def _between(point: Callable[[], None], call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapped(*arguments: Any, **named: Any) -> Any:
        point()
        result = call(*arguments, **named)
        point()
        return result

    return wrapped
