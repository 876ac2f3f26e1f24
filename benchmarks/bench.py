"""The table of docs/performance.md: fedlora beside its rivals, both sides in turn.

Usage: python -m benchmarks.bench [--only ROW ...] [--smollm2 DIR] [--repeats 3]

Each row is a ratio within one run on one machine. The command prints median, lowest and highest
value over the repeats as a Markdown table, and exits with 1 where a rival's accuracy differs by
more than a seed does. Run it on an idle machine.
"""

import argparse
import functools
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import measure, work

ROOT = Path(__file__).resolve().parents[1]
MAX_ACCURACY_GAP = 0.10
"""A seed moves an accuracy by some 0.04 on either side."""


@dataclass(frozen=True)
class Row:
    """A line of the table: its words, the bound, and whether the bound is an upper one."""

    what: str
    target: float
    most: bool


ROWS = {
    "flower": Row("plain Flower's wall time over ours, without DP", 5.5, False),
    "flower-dp": Row("plain Flower with Opacus over ours, DP", 6, False),
    "dp": Row("time of a DP step (MiniLM, 64 x 40) over the same step without DP", 1.1, True),
    "opacus": Row("time of a DP step over Opacus' hooks on a float32 base", 0.45, True),
    "smollm2": Row("time of a SmolLM2 DP step (16 x 64) over plain PEFT's in float32", 0.5, True),
}


def rival(private: bool, repeats: int) -> list[float]:
    """Ten institutions, three rounds of five steps of 64, in plain Flower over in fedlora.

    Raises:
        SystemExit: If the accuracies of both sides differ by more than `MAX_ACCURACY_GAP`.
    """
    ratios: list[float] = []
    gaps: list[float] = []
    for turn in range(repeats):
        todo = work.Work(private=private, seed=turn + 1)
        with tempfile.TemporaryDirectory() as name:
            here = Path(name)
            run = functools.partial(measure.run, environment=work.environment(), cwd=here)
            ours = run(todo.fedlora(here / "run"))
            theirs = run(work.rival("flower", Path(sys.executable), todo.write(here)))
        ratios.append(theirs.seconds / ours.seconds)
        gaps.append(float(theirs.said["accuracy"]) - float(ours.said["accuracy"]))
    if abs(statistics.fmean(gaps)) > MAX_ACCURACY_GAP:
        raise SystemExit(f"Flower's accuracies differ from ours by {gaps}: no comparison")
    return ratios


def step(repeats: int, *arguments: str) -> list[float]:
    """The ratios of `benchmarks.dp_step`, each from a process of its own."""
    command = [sys.executable, "-m", "benchmarks.dp_step", *arguments]
    return [float(measure.run(command, cwd=ROOT).said["time_ratio"]) for _ in range(repeats)]


def shown(row: Row, values: Sequence[float]) -> str:
    """The line of a row."""
    middle = statistics.median(values)
    met = middle <= row.target if row.most else middle >= row.target
    bound = f"at {'most' if row.most else 'least'} {row.target:g}"
    spread = f"{middle:.2f} ({min(values):.2f} to {max(values):.2f})"
    return f"| {row.what} | {bound} | {spread}{'' if met else ', missed'} |"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--smollm2", default="", help="directory of ../shared/tools/get-smollm2")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    count = given.repeats
    small = ["--against", "peft", "--model", given.smollm2, "--rows", "16", "--tokens", "64"]
    measurements: dict[str, Callable[[], list[float]]] = {
        "flower": lambda: rival(False, count),
        "flower-dp": lambda: rival(True, count),
        "dp": lambda: step(count),
        "opacus": lambda: step(count, "--against", "opacus"),
        "smollm2": lambda: step(count, *small, "--turns", "5"),
    }
    print(f"{platform.processor() or platform.machine()}, Python {platform.python_version()}\n")
    print("| what | target | measured |\n| --- | --- | --- |")
    for name in given.only:
        if name != "smollm2" or given.smollm2:
            print(shown(ROWS[name], measurements[name]()), flush=True)


if __name__ == "__main__":
    main()
