"""Running a sweep: each cell is `fedlora run` in a process of its own, cheap cells first.

Cell processes are forks of a process that has imported everything, which saves most of the time of
a short cell. A complete cell is not run again. A started cell is resumed. A failed cell is
reported, and the others go on.
"""

import contextlib
import fcntl
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from multiprocessing import connection, reduction
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal

from experiments import results, sweep
from experiments.sweep import Case, Cell
from fedlora.errors import InputError
from fedlora.files import existing_parent, write_atomic
from fedlora.rounding import duration
from fedlora.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    command,
    finite,
    is_complete,
    other_code,
    read_run_file,
)
from fedlora.terminal import Terminal
from server import binding
from simulation.run import check_engine

Engine = Literal["auto", "ray", "inline"]
Execute = Callable[[list[str]], None]
LOCK = ".lock"
KEY = "cells.key"
"""The key of the names of a sweep's cells, readable by its owner only."""


def run(
    path: Path,
    out: Path,
    *,
    jobs: int,
    engine: Engine,
    execute: Execute,
    console: Terminal,
) -> dict[str, Any]:
    """Run the remaining cells of a sweep and write its results.

    Args:
        path: The sweep file.
        out: The sweep's directory.
        jobs: Cells at a time.
        engine: The cells' engine; auto: ray where a cell has several institutions and processors.
        execute: Runs `fedlora` with given arguments in the process of a cell. It must be a
            module's function, because the fork server looks it up by name.
        console: Shows progress.

    Returns:
        ``cells``, ``done`` (in this call), ``before`` (already complete), ``failed`` (cell ->
        reason), ``seconds``, ``out``, and ``results`` as returned by `results.summary`.

    Raises:
        InputError: Before a cell runs. An empty ``out`` may exist by then.
    """
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; it must be at least 1")
    if engine != "inline":
        check_engine("ray")
    cases = sweep.read(path)
    _check_place(out)
    key = _key(out)
    with console.status(f"splitting records for {len(cases)} cases"):
        made, names = sweep.cells(cases, key)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, console) as lock:
        _check_place(out)  # another sweep may have come here first
        _keep_key(out, key)
        _write_manifest(out, path, cases, names)
        left = [cell for cell in made.values() if not is_complete(results.run_dir(out, cell.name))]
        before = set(made) - {cell.name for cell in left}
        damaged = _damaged(out, before)
        console.write_line(
            f"{len(made)} cells, {len(before) - len(damaged)} complete; results in {out}"
        )
        if dropped := _drop_begun(out, left):
            console.write_line(f"begun with other code, so they start anew: {', '.join(dropped)}")
        started = time.monotonic()
        try:
            failed = _Runner(out, jobs, engine, execute, lock, console).run(left)
        finally:
            lines = results.write(out)
    return {
        "out": str(out),
        "cells": len(made),
        "before": len(before) - len(damaged),
        "done": len(left) - len(failed),
        "failed": {**damaged, **failed},
        "seconds": round(time.monotonic() - started, 1),
        "results": finite(lines),
    }


def _damaged(out: Path, cells: Iterable[str]) -> dict[str, str]:
    """The complete cells whose results cannot be read, or are of other code, with what to do."""
    found: dict[str, str] = {}
    for name in sorted(cells):
        directory = results.run_dir(out, name)
        files, unreadable = results.contents(directory)
        if unreadable:
            found[name] = f"its {unreadable} cannot be read; restore it, or remove {directory}"
        elif other := other_code(files[ENVIRONMENT]):
            found[name] = f"it is of other code ({other}); remove {directory} to run it again"
    return found


def _drop_begun(out: Path, cells: Iterable[Cell]) -> list[str]:
    """Remove begun cells of other code: one run should not be of two."""
    dropped: list[str] = []
    for cell in cells:
        directory = results.run_dir(out, cell.name)
        try:
            other = other_code(read_run_file(directory, ENVIRONMENT))
        except InputError:  # nothing there yet, or what the run itself refuses
            continue
        if other:
            shutil.rmtree(directory)
            dropped.append(cell.name)
    return dropped


def _check_place(out: Path) -> None:
    begun = (out / results.MANIFEST).exists()
    if (
        out.exists()
        and not begun
        and (not out.is_dir() or any(p.name not in (LOCK, KEY) for p in out.iterdir()))
    ):
        raise InputError(f"{out} holds other files; give an --out that is empty or does not exist")
    try:
        existing_parent(out)
    except OSError as error:
        raise InputError(f"{error}; give another --out") from None


def _key(out: Path) -> str:
    """The key of the names of the sweep's cells; of a new sweep a new one, see `_keep_key`."""
    if not (out / results.MANIFEST).exists() and not (out / KEY).exists():
        return secrets.token_hex(binding.KEY_BYTES)
    try:
        return binding.read_key(out / KEY)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the names of the cells in {out} need its {KEY}, which cannot be read ({error}); put "
            "it back, or give another --out"
        ) from None


def _keep_key(out: Path, key: str) -> None:
    if not (out / KEY).exists():
        binding.write_key(out / KEY, key)
    elif _key(out) != key:
        raise InputError(f"another sweep began in {out} meanwhile; start this one again")


@contextlib.contextmanager
def _locked(out: Path, console: Terminal) -> Iterator[int]:
    """Hold the sweep's lock. Cells inherit it, so that those of a killed sweep end first."""
    with (out / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.write_line(f"another sweep runs in {out}, or cells of a killed one; waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _write_manifest(out: Path, path: Path, cases: Sequence[Case], names: Sequence[str]) -> None:
    manifest = {
        "name": path.stem,
        "command": " ".join(command()),
        "cases": [
            {
                "arm": case.arm,
                "axes": {k: str(v) if v == float("inf") else v for k, v in case.axes.items()},
                "seed": case.config.seed,
                "cell": name,
            }
            for case, name in zip(cases, names, strict=True)
        ],
    }
    write_atomic(out / "sweep.toml", path.read_bytes())
    write_atomic(out / results.MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())


class _Runner:
    """Runs cells, ``jobs`` at a time, and ends running cells on an interrupt."""

    def __init__(
        self,
        out: Path,
        jobs: int,
        engine: Engine,
        execute: Execute,
        lock: int,
        console: Terminal,
    ) -> None:
        self._out, self._jobs, self._engine, self._execute = out, jobs, engine, execute
        self._lock, self._console = lock, console
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["experiments.warm"])
        self._running: set[BaseProcess] = set()
        self._stopped = threading.Event()
        self._shares = _shares(jobs)

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run all cells; return the failed ones with their reasons."""
        failed: dict[str, str] = {}
        waiting = sorted(cells, key=lambda cell: (cell.cost, cell.name))
        with ThreadPoolExecutor(self._jobs) as pool, self._console.status("running cells"):
            running: dict[Future[tuple[float, str]], Cell] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < self._jobs:
                        cell = waiting.pop(0)
                        running[pool.submit(self._cell, cell)] = cell
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        cell = running.pop(future)
                        seconds, error = future.result()
                        if error:
                            failed[cell.name] = error
                        done = len(cells) - len(waiting) - len(running)
                        self._console.write_line(
                            f"cell {done}/{len(cells)} · {cell.name} · "
                            f"{self._outcome(cell, error)} · {duration(seconds)}"
                        )
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return failed

    def _outcome(self, cell: Cell, error: str) -> str:
        if error:
            return f"failed: {error}"
        name, value = results.score(read_run_file(results.run_dir(self._out, cell.name)))
        return f"{name} {value:.3f}" if name else "done"

    def _cell(self, cell: Cell) -> tuple[float, str]:
        """Run a cell; return its seconds and, if it failed, the reason."""
        started, cores = time.monotonic(), self._shares.pop()
        try:
            error = self._run(cell, cores)
        except OSError as failed:
            error = f"{type(failed).__name__}: {failed}"
        finally:
            self._shares.append(cores)
        return time.monotonic() - started, error

    def _run(self, cell: Cell, cores: Sequence[int]) -> str:
        """Run a cell on these processors; return the reason if it failed.

        Raises:
            OSError: If its files cannot be written.
        """
        directory = results.run_dir(self._out, cell.name)
        workers = max(1, len(cores) // cell.config.engine.threads)
        several = min(workers, cell.institutions) > 1 and cell.config.federation.rounds
        auto = "ray" if several else "inline"
        arguments = ["run", "--json", "--engine", auto if self._engine == "auto" else self._engine]
        if (directory / CONFIG).exists():
            arguments += ["--resume", str(directory)]
        else:
            config = self._out / "configs" / f"{cell.name}.toml"
            write_atomic(config, cell.config.to_toml().encode())
            arguments += [str(config), "--out", str(directory)]
        log = self._out / "logs" / f"{cell.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_bytes(b"")  # of an earlier call
        process = self._processes.Process(
            target=_run_cell,
            args=(self._execute, arguments, log, cores, _InheritedFile(self._lock)),
        )
        process.start()
        self._running.add(process)
        if self._stopped.is_set():
            _end([process])
        process.join()
        self._running.discard(process)
        return "" if process.exitcode == 0 else _reason(log, process.exitcode)

    def _stop(self) -> None:
        """End all running cells; a second interrupt kills them, for the pool waits for each."""
        self._stopped.set()
        try:
            _end(list(self._running))
        except BaseException:
            for process in list(self._running):
                _send(process, signal.SIGKILL)
            raise


def _shares(jobs: int) -> list[list[int]]:
    """The processors of each of so many cells at a time: shares of those of this process."""
    if not hasattr(os, "sched_setaffinity"):  # macOS has no affinity
        return [[job] for job in range(jobs)]
    cores = sorted(os.sched_getaffinity(0))
    if jobs >= len(cores):
        return [[cores[job % len(cores)]] for job in range(jobs)]
    return [cores[job::jobs] for job in range(jobs)]


class _InheritedFile:
    """A file descriptor that a cell's process keeps open until it ends."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self._descriptor)

    def __setstate__(self, duplicate: Any) -> None:
        self._descriptor = duplicate.detach()


def _run_cell(
    execute: Execute,
    arguments: list[str],
    log: Path,
    cores: Sequence[int],
    _lock: _InheritedFile,
) -> None:
    """Run `fedlora run` in the process of a cell, with its errors in a file."""
    os.setsid()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, log)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    import torch

    torch.set_num_threads(len(cores))
    execute(arguments)


def _end_with_the_sweep() -> None:
    """End this cell and its Ray processes when the sweep was killed and cannot do so itself."""
    sweep = multiprocessing.parent_process()
    assert sweep, "a cell is started by its sweep"
    sweep.join()
    for number in (signal.SIGINT, signal.SIGKILL):
        os.killpg(0, number)
        time.sleep(10)


def _end(processes: Sequence[BaseProcess]) -> None:
    """Interrupt cells and their Ray processes; kill those that run on for ten seconds."""
    for number in (signal.SIGINT, signal.SIGKILL):
        for process in processes:
            _send(process, number)
        deadline = time.monotonic() + 10
        for process in processes:
            connection.wait([process.sentinel], max(0.0, deadline - time.monotonic()))
        processes = [one for one in processes if not connection.wait([one.sentinel], 0)]


def _send(process: BaseProcess, number: signal.Signals) -> None:
    """Send a signal to a cell and its Ray processes."""
    pid = process.pid
    assert pid, "the process was started"
    try:
        os.killpg(pid, number)
    except ProcessLookupError:  # it has ended, or is not yet a group leader
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _reason(log: Path, code: int | None) -> str:
    """Return the last error line of a cell, or how it ended where it says nothing of an error."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if said:
        return f"{said[-1]} (see {log})"
    ended = f"it ended with exit code {code}"
    if code is not None and code < 0:
        ended = f"it was ended by {signal.Signals(-code).name}"
        if code == -signal.SIGKILL:
            ended += ", which is what Linux sends where memory runs out"
    return f"{ended} (see {log}" + (f"; its last line: {lines[-1]})" if lines else ")")
