"""A command's wall time and the peak memory of its whole process tree.

Memory is proportional (PSS): a page that several processes share counts once, in equal parts.
"""

import contextlib
import json
import re
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

SAMPLING_SECONDS = 2.0
"""Seconds between two samples of the memory. A sample costs the run some 60 ms; shorter peaks are
missed, on every side."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a command: wall time, peak MiB of its tree, its last line of JSON."""

    seconds: float
    peak_mib: float
    said: Mapping[str, Any]


class Failed(RuntimeError):
    """A command that failed; the text is the end of its output."""


def pss_mib(pid: int) -> float:
    """Proportional memory of one process; 0 when it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
        return int(re.findall(r"^Pss:\s+(\d+)", rollup, re.MULTILINE)[0]) / 1024
    return 0.0


def resident(what: str) -> int:
    """Bytes of memory that this process holds (``VmRSS``) or held at most (``VmHWM``)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(rf"^{what}:\s+(\d+)", status, re.MULTILINE)[0])


def forget_peak() -> None:
    """Begin the highest resident memory of this process anew."""
    Path("/proc/self/clear_refs").write_text("5")


def tree_mib(root: int) -> float:
    """Proportional memory of a process and all its descendants."""
    with contextlib.suppress(psutil.NoSuchProcess):
        below = psutil.Process(root).children(recursive=True)
        return sum(map(pss_mib, [root, *(process.pid for process in below)]))
    return 0.0


@contextlib.contextmanager
def meanwhile(look: Callable[[], None], every: float) -> Iterator[None]:
    """Call a function at intervals, in a thread, until the block ends."""
    ended = threading.Event()

    def again() -> None:
        while not ended.wait(every):
            look()

    thread = threading.Thread(target=again)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def run(
    command: Sequence[str], *, environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Measured:
    """Run a command to its end.

    Args:
        command: The command; its last line on stdout that begins with ``{`` is its result.
        environment: The whole environment; None for this process's own.
        cwd: The working directory; None for this process's own.

    Raises:
        Failed: When the command exits with another code than 0.
    """
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        peak = [0.0]

        def watch() -> None:
            peak[0] = max(peak[0], tree_mib(process.pid))

        with meanwhile(watch, SAMPLING_SECONDS):
            try:
                code = process.wait()
                seconds = time.perf_counter() - started
            finally:
                process.kill()  # where this one is interrupted
        written = [_text(out), _text(err)]
    if code:
        end = "\n".join(text[-2000:] for text in written)
        raise Failed(f"{' '.join(command)} exited with {code}\n{end}")
    lines = [line for line in written[0].splitlines() if line.startswith("{")]
    said = json.loads(lines[-1]) if lines else {}
    return Measured(seconds=seconds, peak_mib=peak[0], said=said)


def _text(file: Any) -> str:
    file.seek(0)
    return file.read()
