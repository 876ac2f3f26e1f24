"""Seconds of each part of one run, from the command to its end, as one line of JSON.

Usage: python -m benchmarks.timeline [--config benchmarks/work.toml | --private] [--cached]

The run is the usual command in its own process, with Ray; without ``--cached`` there is no cache of
another run. A part ends where the next one begins.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import work

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import json, os, sys, time
from cli.main import app
from simulation import run

def note(name):
    with open(os.environ["FEDLORA_TIMELINE"], "a") as file:
        file.write(json.dumps([name, time.time()]) + "\\n")

def noted(owner, name, after="", before=""):
    inner = getattr(owner, name)
    def outer(*args, **kwargs):
        if before:
            note(before)
        result = inner(*args, **kwargs)
        if after:
            note(after)
        return result
    setattr(owner, name, outer)

noted(run, "prepare", "read and tokenise")
noted(run, "_forks", "import, load, fork")
engine = run.open_engine

def noted_engine(*arguments):
    note("start Ray")
    from simulation.engines.ray import RayGrid  # forks come before it

    noted(RayGrid, "push_messages", before="wait for the next messages")
    noted(RayGrid, "_collect", after="institutions' work")
    return engine(*arguments)

run.open_engine = noted_engine
from experiments import report
noted(report, "write", before="stop Ray", after="write the report")
app()
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", default="benchmarks/work.toml")
    parser.add_argument("--private", action="store_true", help="the work of `make bench` under DP")
    parser.add_argument(
        "--cached", action="store_true", help="make a first run that is not counted"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        for turn in range(1 + arguments.cached):
            notes = here / f"notes-{turn}"
            out = here / f"run-{turn}"
            words = ["run", str(Path(arguments.config).resolve()), "--out", str(out)]
            if arguments.private:
                words = work.Work(private=True).fedlora(out)[1:]
            started = time.time()
            subprocess.run(
                [sys.executable, "-c", RUN, *words, "--quiet"],
                env={**work.environment(here / "cache"), "FEDLORA_TIMELINE": str(notes)},
                cwd=ROOT,
                check=True,
            )
            ended = time.time()
        spans: dict[str, float] = {}
        before = started
        lines = [json.loads(line) for line in notes.read_text().splitlines()]
        for what, moment in [*lines, ("end the process", ended)]:
            spans[what] = spans.get(what, 0.0) + moment - before
            before = moment
    print(
        json.dumps({k: round(v, 2) for k, v in spans.items()} | {"all": round(ended - started, 2)})
    )


if __name__ == "__main__":
    main()
