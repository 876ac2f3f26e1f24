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
from fedlora import processors
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
from server import binding, tracking
from simulation.run import check_engine

Engine = Literal["auto", "ray", "inline"]
Execute = Callable[[list[str]], None]
LOCK = ".lock"
KEY = "cells.key"
"""The key of the names of a sweep's cells, readable by its owner only."""
DROPPED = ".dropped"
"""Where a begun cell of other code is while it is removed."""


def run(
    path: Path,
    out: Path,
    *,
    jobs: int,
    resume: bool,
    yes: bool,
    engine: Engine,
    execute: Execute,
    console: Terminal,
) -> dict[str, Any]:
    """Run the remaining cells of a sweep and write its results.

    Args:
        path: The sweep file.
        out: The sweep's directory.
        jobs: Cells at a time.
        resume: Whether ``out`` may hold a sweep already.
        yes: Whether the sweep may have more than `sweep.MAX_CELLS` cells.
        engine: The cells' engine; auto: ray where a cell has several institutions and workers.
        execute: Runs `fedlora` with given arguments in the process of a cell. It must be a
            module's function, because the fork server looks it up by name.
        console: Shows progress.

    Returns:
        ``cells``, ``done`` (in this call), ``before`` (already complete), ``failed`` (cell ->
        reason), ``seconds``, ``out``, and ``results`` as returned by `results.summary`.

    Raises:
        InputError: Before a cell runs. Caches, MLflow's run and an empty ``out`` may exist by then.
    """
    if jobs < 1:
        raise InputError(f"--jobs is {jobs}; it must be at least 1")
    if engine != "inline":
        check_engine("ray")
    cases = sweep.read(path)
    _check_place(out, resume)
    key = _key(out)
    if not yes and len(cases) > sweep.MAX_CELLS:
        sweep.check_size(len(cases), _guess(cases, key))
    with console.status(f"splitting records for {len(cases)} cases"):
        made, needed = sweep.cells(cases, key)
    if not yes:
        sweep.check_size(len(made), sum(cell.cost for cell in made.values()))
    tracked = next((case.config for case in cases if case.config.tracking.mlflow), cases[0].config)
    parent = tracking.begin_sweep(tracked, out)
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out, console) as lock:
        _check_place(out, resume)  # another sweep may have come here first
        _keep_key(out, key)
        _write_manifest(out, path, cases, needed)
        left = [cell for cell in made.values() if not is_complete(results.run_dir(out, cell.name))]
        before = set(made) - {cell.name for cell in left}
        damaged = _damaged(out, before)
        complete = len(before) - len(damaged)
        console.write_line(f"{len(made)} cells, {complete} complete; results in {out}")
        if others := _other_codes(out, before - damaged.keys()):
            console.write_line(
                f"some complete cells are of other code ({'; '.join(sorted(others))}); they are "
                f"kept: remove their directories from {out / 'cells'} to run them again"
            )
        if unknown := {path.name for path in (out / "cells").glob("*")} - made.keys():
            console.write_line(
                f"{len(unknown)} directories in {out / 'cells'} are of no cell of this sweep (its "
                "settings, records, model, tokenizer or arms were others) and count in nothing"
            )
        if dropped := _drop_begun(out, left):
            console.write_line(
                f"begun with other code, so that they start anew: {', '.join(sorted(dropped))}"
            )
        started = time.monotonic()
        try:
            failed = _Runner(out, jobs, engine, execute, lock, console, parent).run(left)
        finally:
            lines = results.write(out)
        if parent:
            tracking.end_sweep(tracked, parent, out / "results.csv")
    return {
        "out": str(out),
        "cells": len(made),
        "before": complete,
        "done": len(left) - len(failed),
        "failed": {**damaged, **failed},
        "seconds": round(time.monotonic() - started, 1),
        "results": finite(lines),
    }


def _damaged(out: Path, cells: Iterable[str]) -> dict[str, str]:
    """The complete cells whose results cannot be read, with what to do."""
    found: dict[str, str] = {}
    for name in sorted(cells):
        directory = results.run_dir(out, name)
        if unreadable := results.contents(directory)[1]:
            found[name] = (
                f"its {unreadable} cannot be read, so that its case counts in no mean; restore the "
                f"file, or remove {directory} to run the cell again"
            )
    return found


def _drop_begun(out: Path, cells: Iterable[Cell]) -> set[str]:
    """Remove begun cells of other code: one run should not be of two."""
    dropped: set[str] = set()
    gone = out / DROPPED
    if gone.exists():  # an earlier call was killed
        shutil.rmtree(gone)
    for cell in cells:
        directory = results.run_dir(out, cell.name)
        try:
            other = other_code(read_run_file(directory, ENVIRONMENT))
        except InputError:  # nothing there yet, or what the run itself refuses
            continue
        if other:
            directory.rename(gone)  # half a cell could neither be resumed nor start anew
            shutil.rmtree(gone)
            dropped.add(cell.name)
    return dropped


def _other_codes(out: Path, cells: Iterable[str]) -> set[str]:
    """The other code that ran these cells, in words."""
    found = (read_run_file(results.run_dir(out, name), ENVIRONMENT) for name in cells)
    return {said for one in found if (said := other_code(one))}


def _guess(cases: Sequence[Case], key: str) -> float:
    """Guess the seconds of all cases from the cost of each arm's first case."""
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.arm, case)
    seconds = {
        arm: sum(cell.cost for cell in sweep.cells([case], key)[0].values())
        for arm, case in first.items()
    }
    return sum(seconds[case.arm] for case in cases)


def _check_place(out: Path, resume: bool) -> None:
    if (out / results.MANIFEST).exists():
        if not resume:
            raise InputError(
                f"{out} holds a sweep; continue it with --resume, or give another --out"
            )
    elif out.exists() and (
        not out.is_dir() or any(p.name not in (LOCK, KEY) for p in out.iterdir())
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
            "it back, or give another --out (a sweep of an earlier fedlora has none)"
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
            console.write_line(
                f"another sweep runs in {out}, or cells of a killed sweep still do; waiting"
            )
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file.fileno()


def _write_manifest(
    out: Path, path: Path, cases: Sequence[Case], needed: Sequence[dict[str, str]]
) -> None:
    manifest = {
        "name": path.stem,
        "command": " ".join(command()),
        "cases": [
            {
                "arm": case.arm,
                "axes": {k: str(v) if v == float("inf") else v for k, v in case.axes.items()},
                "seed": case.config.seed,
                "cells": cells,
            }
            for case, cells in zip(cases, needed, strict=True)
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
        parent: str,
    ) -> None:
        self._parent = parent
        self._out, self._jobs, self._engine, self._execute = out, jobs, engine, execute
        self._lock, self._console = lock, console
        self._processes = multiprocessing.get_context("forkserver")
        self._processes.set_forkserver_preload(["experiments.warm"])
        self._running: set[BaseProcess] = set()
        self._stopped = threading.Event()

    def run(self, cells: Sequence[Cell]) -> dict[str, str]:
        """Run all cells; return the failed ones with their reasons."""
        failed: dict[str, str] = {}
        left = sorted(cells, key=lambda cell: (cell.cost, cell.name))
        spent, guessed = 0.0, 0.0  # seconds of finished cells
        with ThreadPoolExecutor(self._jobs) as pool, self._console.status("starting") as status:
            running: dict[Future[tuple[float, str]], Cell] = {}
            waiting = list(left)
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
                        else:
                            spent, guessed = spent + seconds, guessed + cell.cost
                        rest = [*waiting, *running.values()]
                        ahead = sum(cell.cost for cell in rest)
                        ahead *= spent / guessed if guessed else 1.0
                        ahead /= min(self._jobs, len(rest) or 1)
                        done = len(left) - len(rest)
                        line = (
                            f"cell {done}/{len(left)} · {cell.name} · {self._outcome(cell, error)}"
                        )
                        self._console.write_line(
                            f"{line} · {duration(seconds)}"
                            + (f" · {duration(ahead)} left" * bool(rest))
                        )
                        status.update(f"{done} of {len(left)} cells done")
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self._stop()
                raise
        return failed

    def _outcome(self, cell: Cell, error: str) -> str:
        if error:
            return f"failed: {error}"
        result = read_run_file(results.run_dir(self._out, cell.name))
        name, value = results.score(result)
        return f"{name} {value:.3f}" if name else "done"

    def _cell(self, cell: Cell) -> tuple[float, str]:
        """Run a cell; return its seconds and, if it failed, the reason."""
        started = time.monotonic()
        try:
            error = self._run(cell)
        except OSError as failed:
            error = f"{type(failed).__name__}: {failed}"
        return time.monotonic() - started, error

    def _run(self, cell: Cell) -> str:
        """Run a cell; return the reason if it failed.

        Raises:
            OSError: If its files cannot be written.
        """
        directory = results.run_dir(self._out, cell.name)
        threads = cell.config.engine.threads
        cores = processors.count() // (self._jobs * threads)
        workers = cell.config.engine.workers or max(1, cores)
        arguments = ["run", "--set", f"engine.workers={workers}", "--json"]
        arguments += ["--engine", self._kind(cell, workers)]
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
            args=(
                self._execute,
                arguments,
                log,
                workers * threads,
                self._parent,
                _InheritedFile(self._lock),
            ),
        )
        process.start()
        self._running.add(process)
        if self._stopped.is_set():
            _end([process])
        process.join()
        self._running.discard(process)
        return "" if process.exitcode == 0 else _reason(log, process.exitcode)

    def _kind(self, cell: Cell, workers: int) -> str:
        if self._engine != "auto":
            return self._engine
        several = min(workers, cell.institutions) > 1 and cell.config.federation.rounds
        return "ray" if several else "inline"

    def _stop(self) -> None:
        """End all running cells; a second interrupt kills them, for the pool waits for each."""
        self._stopped.set()
        try:
            _end(list(self._running))
        except BaseException:
            for process in list(self._running):
                _send(process, signal.SIGKILL)
            raise


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
    threads: int,
    parent: str,
    _lock: _InheritedFile,
) -> None:
    """Run `fedlora run` in the process of a cell, with its errors in a file."""
    os.setsid()
    threading.Thread(target=_end_with_the_sweep, daemon=True).start()
    if parent:
        os.environ[tracking.SWEEP] = parent
    for descriptor, path in ((0, os.devnull), (1, os.devnull), (2, log)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(opened, descriptor)
        os.close(opened)
    import torch

    torch.set_num_threads(threads)
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
