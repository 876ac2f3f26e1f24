"""The table of docs/performance.md: every row measured against its rival, both sides in turn.

Usage: python -m benchmarks.bench [--only ROW ...] [--smollm2 DIR] [--mpnet DIR] [--repeats 3]
           [--quick]

Each row is a ratio within one run on one machine, or a figure with a bound. The command prints the
median and the spread (lowest to highest) over the repeats. It writes
benchmarks/results/PROCESSOR.json, one file for each processor, and the table in
docs/performance.md.

A row that is over 20 % worse than in the last committed result of the same processor fails the
command, and so does a rival whose final accuracy differs from fedlora's. A missed target does not
fail it; the table marks the row. Run the command on an idle machine. ``--quick`` only checks that
everything runs: with the least work, without comparisons and files.
"""

import argparse
import contextlib
import functools
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import measure, work
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models.models import fast_bf16
from fedlora.runs.run_files import environment

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
BUILD = ROOT / "build" / "bench"
BEGIN, END = "<!-- table: make bench -->", "<!-- end of table -->"
MAX_SLOWDOWN = 1.2
"""A figure this many times worse than the last one is a regression."""
MAX_ACCURACY_GAP = {False: 0.05, True: 0.10}
"""Largest difference of mean accuracies without and with DP, where noise is not seeded.

Each repeat has another seed, since a seed moves an accuracy by about 0.04 on any side.
"""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the table.

    Args:
        what: The comparison, in words.
        target: The bound.
        most: Whether the bound is an upper one.
        unit: The unit of figure and bound; ``x`` for a plain ratio.
    """

    what: str
    target: float
    most: bool
    unit: str = "x"

    def met(self, value: float) -> bool:
        """Whether a figure keeps the bound."""
        return value <= self.target if self.most else value >= self.target

    def worse(self, value: float, before: float) -> float:
        """The factor by which a figure is worse than another."""
        return value / before if self.most else before / value

    def shown(self, value: float) -> str:
        """A figure with its unit."""
        return f"{value:.{0 if value >= 100 else 2}f} {self.unit}"


ROWS = {
    "flower": Row(what="plain Flower's wall time over ours, no DP", target=5.5, most=False),
    "pfl": Row(what="the same against pfl in one process", target=3, most=False),
    "flower-memory": Row(
        what="our process tree's peak memory over plain Flower's, two workers",
        target=0.5,
        most=True,
    ),
    "flower-dp": Row(
        what="wall time of plain Flower with Opacus over ours, DP", target=6, most=False
    ),
    "flower-dp-rounds": Row(what="the same, 20 rounds of one step", target=7, most=False),
    "dp-time": Row(what="time of a DP step over the same step without", target=1.1, most=True),
    "dp-memory": Row(what="its memory, likewise", target=1.15, most=True),
    "opacus": Row(
        what="time of a DP step over Opacus' hooks on a float32 base", target=0.45, most=True
    ),
    "rate-fp32": Row(
        what="rate of a MiniLM step (64 x 40) over bare products', float32", target=0.7, most=False
    ),
    "rate-bf16": Row(what="the same, bf16", target=0.45, most=False),
    "smollm2": Row(
        what="time of a SmolLM2 DP step (16 x 64) over plain PEFT's in float32",
        target=0.5,
        most=True,
    ),
    "smollm2-sft": Row(what="the same for sft, responses of 32", target=0.5, most=True),
    "mpnet": Row(
        what="time of an mpnet DP step (64 x 40) over Opacus' hooks in float32",
        target=0.35,
        most=True,
    ),
    "share": Row(
        what="share of a DP step's time in products with the base", target=65, most=False, unit="%"
    ),
    "worker": Row(
        what="memory that a second worker adds, SmolLM2 base", target=350, most=True, unit="MiB"
    ),
    "empty": Row(
        what="1,000 institutions, empty client: time of an institution-round",
        target=2,
        most=True,
        unit="ms",
    ),
    "empty-memory": Row(
        what="its driver's memory after 50 rounds", target=1024, most=True, unit="MiB"
    ),
    "empty-growth": Row(what="that over its memory after 5 rounds", target=1.05, most=True),
    "start": Row(what="second run: time to the first training step", target=4, most=True, unit="s"),
    "deployed": Row(
        what="deployed round, a fresh process per message over a resident base, SmolLM2",
        target=3,
        most=False,
    ),
    "server-memory": Row(
        what="server's memory for a round of ten updates of 205 MB, beyond its start",
        target=1000,
        most=True,
        unit="MB",
    ),
    "sweep": Row(what="sweep of 69 cells (epsilon.toml)", target=9, most=True, unit="min"),
}


@dataclass(kw_only=True)
class Outcome:
    """The measurement of a row.

    Args:
        values: One figure for each repeat.
        details: The figures behind it, for the result file.
        skipped: The reason why there is no figure.
        problem: The reason why the figures do not count.
    """

    values: list[float] = field(default_factory=list)
    details: Mapping[str, Any] = field(default_factory=dict)
    skipped: str = ""
    problem: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a measurement: the models' directories (or ""), repeats, and ``--quick``."""

    smollm2: str
    mpnet: str
    repeats: int
    quick: bool


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory below the build folder, for as long as the block runs."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BUILD) as name:
        yield Path(name)


def in_turn(
    sides: Mapping[str, Callable[[int], measure.Measured]], repeats: int
) -> dict[str, list[measure.Measured]]:
    """Run all sides, then all again, so that changes over time affect all sides equally.

    Each side gets the number of its turn, from 0.
    """
    found: dict[str, list[measure.Measured]] = {name: [] for name in sides}
    for turn in range(repeats):
        for name, side in sides.items():
            done = side(turn)
            found[name].append(done)
            say(f"  {turn + 1}/{repeats} {name}: {done.seconds:.1f} s, {done.peak_mib:.0f} MiB")
    return found


def rivals(todo: work.Work, names: Sequence[str], options: Options) -> dict[str, Outcome]:
    """Wall time, memory and accuracy of the same work with fedlora and with its rivals.

    Returns:
        For each rival the ratio of wall times, and for Flower that of peak memories, as
        ``NAME-memory``.
    """
    pythons = {"flower": Path(sys.executable)}
    if "pfl" in names:
        pythons["pfl"] = work.pfl_python(BUILD / "pfl")
    with scratch() as here:
        works = [replace(todo, seed=1 + turn) for turn in range(options.repeats)]

        def fedlora(turn: int) -> measure.Measured:
            return measure.run(
                works[turn].fedlora(here / f"run-{turn}"),
                environment=work.environment(here / f"cache-{turn}"),  # nothing is cached
                cwd=here,
            )

        def other(name: str, turn: int) -> measure.Measured:
            place = here / f"{name}-{turn}"
            place.mkdir()
            command = work.rival(name, pythons[name], works[turn].write(place))
            return measure.run(command, environment=work.environment(place), cwd=place)

        sides: dict[str, Callable[[int], measure.Measured]] = {"fedlora": fedlora}
        sides |= {name: functools.partial(other, name) for name in names}
        found = in_turn(sides, options.repeats)
    details = {
        name: {
            "seconds": [round(m.seconds, 2) for m in runs],
            "peak_mib": [round(m.peak_mib) for m in runs],
            "accuracy": [round(float(m.said["accuracy"]), 4) for m in runs],
        }
        for name, runs in found.items()
    }
    outcomes: dict[str, Outcome] = {}
    for name in names:
        pairs = list(zip(found[name], found["fedlora"], strict=True))
        both = {side: details[side] for side in ("fedlora", name)}
        problem = "" if options.quick else _other_accuracy(both, MAX_ACCURACY_GAP[todo.private])
        outcomes[name] = Outcome(
            values=[theirs.seconds / ours.seconds for theirs, ours in pairs],
            details=both,
            problem=problem,
        )
        outcomes[f"{name}-memory"] = Outcome(
            values=[ours.peak_mib / theirs.peak_mib for theirs, ours in pairs],
            details=both,
            problem=problem,
        )
    return outcomes


def _other_accuracy(sides: Mapping[str, Mapping[str, Any]], tolerance: float) -> str:
    means = {name: statistics.fmean(side["accuracy"]) for name, side in sides.items()}
    if max(means.values()) - min(means.values()) <= tolerance:
        return ""
    return "accuracies differ: " + ", ".join(f"{n} {value:.3f}" for n, value in means.items())


def module(name: str, *arguments: str) -> Mapping[str, Any]:
    """The output of a benchmark in its own module."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    done = measure.run(command, cwd=ROOT)
    say(f"  {name} {' '.join(arguments)}: {done.seconds:.0f} s")
    return done.said


def repeated(
    options: Options, keys: Mapping[str, str], name: str, *arguments: str
) -> dict[str, Outcome]:
    """Figures of a benchmark in its own module, which itself runs its sides in turn.

    Args:
        options: The options of the measurement.
        keys: Row -> key of the module's output.
        name: The module's name.
        arguments: The module's arguments.
    """
    said = [module(name, *arguments) for _ in range(options.repeats)]
    return {
        row: Outcome(values=[float(one[key]) for one in said], details=said[-1])
        for row, key in keys.items()
    }


def no_dp(options: Options) -> dict[str, Outcome]:
    """10 institutions x 3 rounds x 5 steps of 64."""
    found = rivals(_little(options, work.Work()), ["flower", "pfl"], options)
    return {name: found[name] for name in ("flower", "pfl", "flower-memory")}


def with_dp(options: Options) -> dict[str, Outcome]:
    """The same under DP."""
    todo = _little(options, work.Work(private=True))
    return {"flower-dp": rivals(todo, ["flower"], options)["flower"]}


def many_rounds(options: Options) -> dict[str, Outcome]:
    """10 institutions x 20 rounds x 1 step of 64 under DP."""
    todo = _little(options, work.Work(rounds=20, steps=1, private=True), rounds=2)
    return {"flower-dp-rounds": rivals(todo, ["flower"], options)["flower"]}


def dp_step(options: Options) -> dict[str, Outcome]:
    """A DP step against the same step without."""
    keys = {"dp-time": "time_ratio", "dp-memory": "memory_ratio"}
    return repeated(options, keys, "dp_step", *_brief(options, "--rows", "16"))


def against_hooks(options: Options, row: str, *arguments: str) -> dict[str, Outcome]:
    """A DP step on a bf16 base against Opacus' hooks on a float32 one."""
    if not fast_bf16("cpu"):
        return {row: Outcome(skipped=NO_BF16)}
    return repeated(options, {row: "time_ratio"}, "dp_step", "--against", "opacus", *arguments)


def opacus(options: Options) -> dict[str, Outcome]:
    """MiniLM against Opacus' hooks."""
    return against_hooks(options, "opacus", *_brief(options, "--rows", "16"))


def rate(options: Options) -> dict[str, Outcome]:
    """A step's rate against that of bare matrix products."""
    found: dict[str, Outcome] = {}
    for dtype in ("fp32", "bf16"):
        if dtype == "bf16" and not fast_bf16("cpu"):
            found["rate-bf16"] = Outcome(skipped=NO_BF16)
            continue
        arguments = ["--dtype", dtype, *_brief(options, "--rows", "32")]
        found |= repeated(options, {f"rate-{dtype}": "share"}, "flop_rate", *arguments)
    return found


def smollm2(options: Options) -> dict[str, Outcome]:
    """A causal model's DP step against plain PEFT's in float32, as a classifier and for sft."""
    tasks = {"smollm2": "classification", "smollm2-sft": "sft"}
    if not options.smollm2:
        return {row: Outcome(skipped=NO_SMOLLM2) for row in tasks}
    size = ["--rows", "16", "--tokens", "64", "--turns", "5"]
    if options.quick:
        size = ["--rows", "2", "--tokens", "16", "--physical-batch", "2", "--turns", "2"]
    arguments = ["--against", "peft", "--model", options.smollm2, *size]
    found: dict[str, Outcome] = {}
    for row, task in tasks.items():
        found |= repeated(options, {row: "time_ratio"}, "dp_step", *arguments, "--task", task)
    return found


def mpnet(options: Options) -> dict[str, Outcome]:
    """An encoder of 110 million parameters against Opacus' hooks."""
    if not options.mpnet:
        return {"mpnet": Outcome(skipped="needs --mpnet DIR")}
    arguments = ["--model", options.mpnet, "--turns", "5", *_brief(options, "--rows", "4")]
    return against_hooks(options, "mpnet", *arguments)


def share(options: Options) -> dict[str, Outcome]:
    """The operators of a DP step, from torch's profiler."""
    arguments = ["--private", *(["--institutions", "1"] if options.quick else [])]
    said = [module("profile_step", *arguments) for _ in range(options.repeats)]
    shares = [float(one["shares"]["products with the base"]) for one in said]
    return {"share": Outcome(values=[100 * value for value in shares], details=said[-1])}


def workers(options: Options) -> dict[str, Outcome]:
    """Peak memory of the same run with two workers and with one."""
    if not options.smollm2:
        return {"worker": Outcome(skipped=NO_SMOLLM2)}
    values = {
        "model.name": options.smollm2,
        "data.institutions": 2 if options.quick else 4,
        "federation.rounds": 1 if options.quick else 2,
        "training.local-steps": 1,
        "training.batch-size": 2 if options.quick else 16,
        "training.physical-batch": 16,
        "training.max-length": 128,  # the prompt alone has 73 tokens
    }
    with scratch() as here:

        def of(count: int, turn: int) -> measure.Measured:
            pairs = {**values, "engine.workers": count}.items()
            assigned = [word for key, value in pairs for word in ("--set", f"{key}={value}")]
            command = [str(Path(sys.executable).with_name("fedlora")), "run", str(work.CONFIG)]
            return measure.run(
                [*command, *assigned, "--out", str(here / f"run-{count}-{turn}"), "--json"],
                environment=work.environment(here / "cache"),
                cwd=here,
            )

        sides = {"one": functools.partial(of, 1), "two": functools.partial(of, 2)}
        found = in_turn(sides, options.repeats)
    pairs = list(zip(found["two"], found["one"], strict=True))
    return {
        "worker": Outcome(
            values=[two.peak_mib - one.peak_mib for two, one in pairs],
            details={n: {"peak_mib": [round(m.peak_mib) for m in f]} for n, f in found.items()},
        )
    }


def empty(options: Options) -> dict[str, Outcome]:
    """The engine's own cost."""
    keys = {
        "empty": "milliseconds_per_institution_round",
        "empty-memory": "driver_mib_last",
        "empty-growth": "driver_growth",
    }
    size = ["--institutions", "4", "--rounds", "6"] if options.quick else ["--rounds", "50"]
    return repeated(options, keys, "engine_overhead", *size)


def start(options: Options) -> dict[str, Outcome]:
    """The demo once more."""
    turns = "1" if options.quick else "3"
    return repeated(options, {"start": "seconds"}, "start", "--turns", turns)


def deployed(options: Options) -> dict[str, Outcome]:
    """Three institutions in namespaces, with a resident base and with a process per message."""
    if not options.smollm2:
        return {"deployed": Outcome(skipped=NO_SMOLLM2)}
    from tests.deployment import harness

    if reason := harness.unavailable():
        return {"deployed": Outcome(skipped=reason)}
    arguments = ["--model", options.smollm2, "--rounds", "2" if options.quick else "6"]
    said = [
        (module("deployment", *arguments, "--fresh"), module("deployment", *arguments))
        for _ in range(options.repeats)
    ]
    return {
        "deployed": Outcome(
            values=[fresh["round_median_s"] / kept["round_median_s"] for fresh, kept in said],
            details=dict(zip(("fresh", "resident"), said[-1], strict=True)),
        )
    }


def server_memory(options: Options) -> dict[str, Outcome]:
    """The program whose bound is a test (tests/server/test_memory.py), with larger updates."""
    found: list[Mapping[str, Any]] = []
    for _ in range(options.repeats):
        with scratch() as here:
            layers = "20" if options.quick else "196"
            program = ["-m", "tests.server.memory_of_a_round", str(here), "10", "streams", layers]
            found.append(measure.run([sys.executable, *program], cwd=ROOT).said)
    return {
        "server-memory": Outcome(
            values=[one["adapters"] * one["megabytes"] for one in found], details=found[-1]
        )
    }


def sweep(options: Options) -> dict[str, Outcome]:
    """A ready sweep, two cells at a time, once."""
    if options.quick:
        return {"sweep": Outcome(skipped="not a part of --quick")}
    file = ROOT / "experiments" / "sweeps" / "epsilon.toml"
    if not DATA.exists():
        return {"sweep": Outcome(skipped=f"needs {DATA.relative_to(ROOT.parent)}")}
    with scratch() as here:
        command = [str(Path(sys.executable).with_name("fedlora")), "sweep", str(file)]
        done = measure.run(
            [*command, "--jobs", "2", "--out", str(here / "sweep"), "--json"],
            environment=work.environment(here / "cache"),
            cwd=ROOT,
        )
    return {"sweep": Outcome(values=[done.seconds / 60], details={"peak_mib": done.peak_mib})}


DATA = ROOT.parent / "shared" / "data" / "fpb" / "fpb.csv"
NO_SMOLLM2 = "needs --smollm2 DIR"
NO_BF16 = "needs native bf16 products"
MEASUREMENTS: dict[Callable[[Options], dict[str, Outcome]], tuple[str, ...]] = {
    no_dp: ("flower", "pfl", "flower-memory"),
    with_dp: ("flower-dp",),
    many_rounds: ("flower-dp-rounds",),
    dp_step: ("dp-time", "dp-memory"),
    opacus: ("opacus",),
    rate: ("rate-fp32", "rate-bf16"),
    smollm2: ("smollm2", "smollm2-sft"),
    mpnet: ("mpnet",),
    share: ("share",),
    workers: ("worker",),
    empty: ("empty", "empty-memory", "empty-growth"),
    start: ("start",),
    deployed: ("deployed",),
    server_memory: ("server-memory",),
    sweep: ("sweep",),
}
"""The rows of each measurement."""


def _little(options: Options, todo: work.Work, rounds: int = 1) -> work.Work:
    return replace(todo, institutions=2, rounds=rounds, steps=1) if options.quick else todo


def _brief(options: Options, *smaller: str) -> list[str]:
    return [*smaller, "--turns", "2"] if options.quick else []


def machine() -> dict[str, Any]:
    """The machine and the code of the figures."""
    known = environment()
    info = Path("/proc/cpuinfo").read_text()
    name = re.search(r"^model name\s*: (.*)$", info, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "processor": f"{' '.join((name[1] if name else platform.machine()).split())}, "
        f"{known['processor']}{', native bf16' if fast_bf16('cpu') else ''}",
        "cores": known["cores"],
        "memory_gib": round(memory),
        "platform": known["platform"],
        "python": known["python"],
        "versions": known["versions"],
    }


def result_file(on: Mapping[str, Any]) -> Path:
    """The file of this processor's results."""
    name = re.sub(r"[^a-z0-9]+", "-", f"{on['processor']} {on['cores']} cores".lower())
    return RESULTS / f"{name.strip('-')}.json"


def committed(file: Path) -> dict[str, Any]:
    """The last committed result in a file; without one, no rows."""
    path = file.relative_to(ROOT)
    done = subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else {"rows": {}}


def record(outcome: Outcome, sha: str) -> dict[str, Any]:
    """A row of the result file."""
    if outcome.skipped:
        return {"skipped": outcome.skipped}
    return {
        "value": round(statistics.median(outcome.values), 4),
        "low": round(min(outcome.values), 4),
        "high": round(max(outcome.values), 4),
        "values": [round(value, 4) for value in outcome.values],
        "problem": outcome.problem,
        "commit": sha,
        "details": outcome.details,
    }


def kept(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of both, the present ones first; one that was skipped now keeps its figure."""
    new = {name: row for name, row in now.items() if "skipped" not in row or name not in before}
    return {name: row for name, row in {**before, **new}.items() if name in ROWS}


def complaints(rows: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """The reasons to fail the command: rows that do not count, and rows that became worse.

    Args:
        rows: Name -> `record` of the present measurement.
        before: The same for the last committed result on the same processor.
    """
    found: list[str] = []
    for name, now in rows.items():
        if now.get("problem"):
            found.append(f"{name}: {now['problem']}")
        row, old = ROWS[name], before.get(name, {}).get("value")
        if "value" in now and old is not None and row.worse(now["value"], old) > MAX_SLOWDOWN:
            found.append(
                f"{name}: {row.shown(now['value'])} is over {MAX_SLOWDOWN - 1:.0%} worse than "
                f"{row.shown(old)} at {before[name]['commit'][:9]}"
            )
    return found


def table(results: Sequence[Mapping[str, Any]]) -> str:
    """Every row with its bound, and for each processor its figure and spread."""
    names = [result["machine"]["processor"] for result in results]
    lines = ["| what | target | " + " | ".join(names) + " |", "| --- " * (2 + len(names)) + "|"]
    for name, row in ROWS.items():
        bound = f"{'at most' if row.most else 'at least'} {row.target:g} {row.unit}"
        cells = [cell(row, result["rows"].get(name)) for result in results]
        lines.append("| " + " | ".join([row.what, bound, *cells]) + " |")
    for result in results:
        on = result["machine"]
        file = result_file(on).name
        used = ", ".join(f"{name} {version}" for name, version in on["versions"].items())
        lines += [
            "",
            f"{on['processor']}, {on['cores']} cores, {on['memory_gib']} GiB, last measured "
            f"{result['date']}, then with Python {on['python']}; {used}. Each row's commit (its "
            f"constraints.txt has the versions) is in [{file}](../benchmarks/results/{file}).",
        ]
    return "\n".join(lines)


def cell(row: Row, found: Mapping[str, Any] | None) -> str:
    """A row's figure on one processor: median, lowest and highest value."""
    if found is None:
        return "not measured"
    if "skipped" in found:
        return str(found["skipped"])
    spread = f"{row.shown(found['low'])} to {row.shown(found['high'])}"
    times = len(found["values"])
    shown = f"{row.shown(found['value'])} ({'once' if times == 1 else spread})"
    missed = "" if row.met(found["value"]) else ", **missed**"
    return shown + missed + (f"; {found['problem']}" if found["problem"] else "")


def write(result: Mapping[str, Any], file: Path) -> None:
    """The result file, and the table of all processors where the document has it."""
    file.parent.mkdir(exist_ok=True)
    write_atomic(file, f"{json.dumps(result, indent=1)}\n".encode())
    results = [json.loads(each.read_text(encoding="utf-8")) for each in sorted(RESULTS.iterdir())]
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    if END not in rest:
        raise InputError(f"{DOCUMENT} has {BEGIN!r} without {END!r} after it; put it back")
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n{table(results)}\n{END}{after}"
    write_atomic(DOCUMENT, text.encode())


def _edited(*folders: str) -> bool:
    """Whether folders that hold no package of fedlora have uncommitted changes."""
    asked = ["git", "-C", str(DOCUMENT.parent), "status", "--porcelain", "--"]
    root = DOCUMENT.parents[1]
    asked += [str(root / folder) for folder in folders]
    asked += [f":(exclude){RESULTS}", f":(exclude){RESULTS.parent / 'LOG.md'}"]
    return bool(subprocess.run(asked, capture_output=True, text=True, check=False).stdout)


def say(line: str) -> None:
    """To stderr: stdout gets the table."""
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--smollm2", default="", help="its directory (see docs/performance.md)")
    parser.add_argument("--mpnet", default="", help="its directory, likewise")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    options = Options(
        smollm2=arguments.smollm2,
        mpnet=arguments.mpnet,
        repeats=1 if arguments.quick else arguments.repeats,
        quick=arguments.quick,
    )
    on, known = machine(), environment()
    changed = known["git_dirty"] or _edited("benchmarks", "tests")
    sha = f"{known['git_sha'] or 'unknown'}{'+' * bool(changed)}"
    file = result_file(on)
    last = committed(file)["rows"]
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    measured: dict[str, Any] = {}
    result: dict[str, Any] = {"machine": on, "date": time.strftime("%Y-%m-%d"), "rows": {}}
    for measurement, names in MEASUREMENTS.items():
        if set(names) & set(arguments.only):
            say(f"{', '.join(names)}: {(measurement.__doc__ or '').strip()}")
            found = measurement(options)
            measured |= {name: record(outcome, sha) for name, outcome in found.items()}
            rows = kept(rows, measured)
            result["rows"] = measured if options.quick else rows
            if not options.quick:
                write(result, file)  # an interrupted command keeps its figures so far
    print(table([result]))
    if options.quick:
        return
    if not last:
        say(f"no committed result of {on['processor']}: nothing to compare with")
    wrong = complaints(measured, last)
    sys.exit("\n".join(wrong) if wrong else 0)


if __name__ == "__main__":
    main()
