"""A service's processes, with every line of their output as one line of JSON.

Flower, uvicorn, nginx and fedlora's apps have different log formats; a log collector gets one.
"""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from fedlora.errors import InputError
from fedlora.startup import end_with_parent

STOP = (signal.SIGTERM, signal.SIGINT)
STOP_SECONDS = 8.0
"""Seconds from SIGTERM to SIGKILL: fewer than Docker's ten."""

_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_FLOWER = re.compile(r"(DEBUG|INFO|WARNING|ERROR|CRITICAL)\s*:\s*(.*)")
_UVICORN = re.compile(r"\S+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) (\[uvicorn\.\w+\] .*)")
_NGINX = re.compile(r"\d{4}/\d\d/\d\d \d\d:\d\d:\d\d \[(\w+)\] \d+#\d+: (.*)")
_LEVELS = {
    "debug": "debug",
    "notice": "info",
    "warn": "warning",
    "crit": "critical",
    "alert": "critical",
    "emerg": "critical",
}


def record(
    service: str, line: str, before: str = "info", *, ready: bool = False
) -> dict[str, Any] | None:
    """Turn a line of output into a log record; None for an empty line.

    Args:
        service: The service's name.
        line: A line of Flower's, uvicorn's or nginx's log.
        before: The level of the line before. A line without a level continues an error, as a
            traceback does; after any other line its level is ``info``.
        ready: Whether a JSON object with a level is a finished record, which keeps its fields. Only
            for a program that escapes quoted text, which could otherwise forge records.
    """
    text = _COLOUR.sub("", line).strip()
    if not text:
        return None
    made: dict[str, Any] = {"time": now(), "service": service}
    if ready and text.startswith("{"):
        try:
            said = json.loads(text)
        except ValueError:
            said = None
        if isinstance(said, dict) and "level" in said:
            return {**made, **said, "service": service}
    for form in (_FLOWER, _UVICORN, _NGINX):
        if found := form.fullmatch(text):
            level, message = found[1].lower(), found[2].strip()
            return (
                {**made, "level": _LEVELS.get(level, level), "message": message}
                if message
                else None
            )
    return {**made, "level": before if before in ("error", "critical") else "info", "message": text}


def now() -> str:
    """The time, RFC 3339, UTC."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def run(
    service: str,
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str] | None = None,
    *,
    ready: bool = False,
) -> int:
    """Run processes until one of them ends, then end the others.

    SIGTERM and SIGINT are passed on. No process outlives this one, however that ends.

    Args:
        service: The service's name in the log.
        commands: The command of each process.
        environment: Variables to add to this process's own.
        ready: Whether the processes write records themselves (`record`).

    Returns:
        The exit code of the first process that ended, or 128 + N after signal N.

    Raises:
        InputError: When a program is missing.
    """
    stopping = threading.Event()
    started: list[subprocess.Popen[bytes]] = []

    def stop(number: int, _: object) -> None:
        stopping.set()
        for process in started:
            process.send_signal(number)

    before = {number: signal.signal(number, stop) for number in STOP}
    ended = threading.Semaphore(0)
    readers: list[threading.Thread] = []
    try:
        for command in commands:
            process = _start(command, {**os.environ, **(environment or {})})
            started.append(process)
            if stopping.is_set():  # the signal came before its handler knew of this process
                process.terminate()
            reader = threading.Thread(
                target=_read, args=(service, process, ended, ready), daemon=True
            )
            reader.start()
            readers.append(reader)
        while not ended.acquire(timeout=1.0):  # a signal's handler runs between two waits
            pass
        first = next(p for p in started if p.poll() is not None)
    finally:
        _end(started, terminate=not stopping.is_set())
        for number, handler in before.items():
            signal.signal(number, handler)
    for reader in readers:
        reader.join(1.0)
    return first.returncode if first.returncode >= 0 else 128 - first.returncode


def _start(command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            preexec_fn=end_with_parent,
        )
    except OSError as error:
        raise InputError(
            f"{command[0]} cannot be started: {error.strerror}; install it, or correct PATH"
        ) from None


def _end(started: Sequence[subprocess.Popen[bytes]], *, terminate: bool) -> None:
    """Wait until all processes have ended; kill those that take longer than `STOP_SECONDS`."""
    for process in started:
        if terminate and process.poll() is None:
            process.terminate()
    for process in started:
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _read(
    service: str,
    process: subprocess.Popen[bytes],
    ended: threading.Semaphore,
    ready: bool,
) -> None:
    """Write one process's lines as records.

    The pipe may stay open in child processes, so a second thread waits for the process to end.
    """
    waiter = threading.Thread(target=lambda: (process.wait(), ended.release()), daemon=True)
    waiter.start()
    assert process.stdout is not None
    level = "info"
    # lines end with a line feed and nothing else
    with io.TextIOWrapper(process.stdout, "utf-8", errors="replace", newline="\n") as lines:
        for line in lines:
            if made := record(service, line, level, ready=ready):
                level = made["level"]
                with contextlib.suppress(OSError):  # a full disk may have space again later
                    sys.stdout.write(json.dumps(made) + "\n")
                    sys.stdout.flush()
