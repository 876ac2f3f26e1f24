"""Accuracy of every strategy on Financial PhraseBank, without DP and at epsilon 8.

Usage: python -m benchmarks.strategies [--seeds 1 2 3] [--only fedavg ffa ...] [--epsilons inf 8]
           [--jobs 2]

Each run is `fedlora run experiments/configs/fpb.toml` with the settings below; a seed decides
split, shards, start and (without DP) all other draws. Each run is a line of
benchmarks/strategies.jsonl and is not repeated while settings and the strategy's own file stay the
same. The table goes into docs/strategies.md. Settings were tuned on seed 11, which the table leaves
out.
"""

import argparse
import hashlib
import itertools
import json
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "strategies.jsonl"
DOCUMENT = HERE.parent / "docs" / "strategies.md"
TUNING_SEED = 11
BEGIN, END = "<!-- table: python -m benchmarks.strategies -->", "<!-- end of table -->"

# Settings of a strategy that replace those of fpb.toml: at every epsilon, without DP, at epsilon 8.
ADAM = {
    "inf": {"federation.server-learning-rate": "0.008", "federation.average-last": "0.5"},
    "8": {},
}
PLAIN_MEAN = {  # the step of a strategy with residuals is set at the institution
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": "1",
    "federation.average-last": "0",
}
SGD = {**PLAIN_MEAN, "training.learning-rate": "3"}
LOCAL_ADAM = {**PLAIN_MEAN, "training.optimizer": "adam", "training.learning-rate": "0.012"}
SETTINGS: dict[str, dict[str, dict[str, str]]] = {
    "fedavg": ADAM,
    "ffa": {**ADAM, "8": {"federation.server-learning-rate": "0.03"}},
    "rolora": ADAM,
    "svd": ADAM,
    "pad": ADAM,
    "fedsa": {e: {**values, "federation.average-last": "0"} for e, values in ADAM.items()},
    "stack": {"inf": SGD, "8": SGD},
    "exact": {"inf": LOCAL_ADAM, "8": {**PLAIN_MEAN, "training.learning-rate": "1"}},
}
SHARED_SETTINGS = {"federation.evaluate-every": "0"}
STRATEGY_SETTINGS = {"pad": {"adapter.ranks": "8,8,4,4"}}


def settings(strategy: str, epsilon: str) -> dict[str, str]:
    """The settings of a run that differ from fpb.toml, except the seed."""
    return {
        **SHARED_SETTINGS,
        **STRATEGY_SETTINGS.get(strategy, {}),
        **SETTINGS[strategy][epsilon],
        "federation.strategy": strategy,
        "privacy.epsilon": epsilon,
    }


def run(
    strategy: str, epsilon: str, seed: int, data: str, runs: Path, more: dict[str, str]
) -> dict[str, Any]:
    """One line of the results."""
    values = {**settings(strategy, epsilon), "seed": str(seed), **more}
    name = "-".join([strategy, epsilon, str(seed), *(f"{k}={v}" for k, v in more.items())])
    command = [str(Path(sys.executable).with_name("fedlora")), "run"]
    command += [str(HERE.parent / "experiments" / "configs" / "fpb.toml")]
    values_and_data = {**values, "data.source": data, "engine.workers": "1"}  # changes no result
    command += [word for k, v in values_and_data.items() for word in ("--set", f"{k}={v}")]
    done = subprocess.run(
        [*command, "--out", str(runs / name), "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result = json.loads(done.stdout)
    environment = json.loads((runs / name / "environment.json").read_text(encoding="utf-8"))
    kept = ("accuracy", "macro_f1", "epsilon_max", "rounds", "seconds")
    return {
        "strategy": strategy,
        "epsilon": epsilon,
        "seed": seed,
        "settings": values,
        **{key: result[key] for key in kept},
        "processor": environment["processor"],
        "git_sha": environment["git_sha"],
        "code": code(strategy),
    }


def code(strategy: str) -> str:
    """SHA-256 of the strategy's file."""
    return hashlib.sha256((HERE.parent / "strategies" / f"{strategy}.py").read_bytes()).hexdigest()


def lines() -> list[dict[str, Any]]:
    """The measurements so far with the present settings and strategies."""
    if not RESULTS.exists():
        return []
    found = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    return [
        line
        for line in found
        if line["code"] == code(line["strategy"])
        and line["settings"]
        == settings(line["strategy"], line["epsilon"]) | {"seed": str(line["seed"])}
    ]


def table(found: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over the seeds, accuracy and macro-F1 in percent."""
    rows = ["| strategy | no DP: accuracy | macro-F1 | epsilon 8: accuracy | macro-F1 | seeds |"]
    rows += ["| --- | --- | --- | --- | --- | --- |"]
    for strategy in SETTINGS:
        cells, seeds = [f"`{strategy}`"], list[str]()
        for epsilon in ("inf", "8"):
            chosen = [r for r in found if (r["strategy"], r["epsilon"]) == (strategy, epsilon)]
            seeds.append(str(len(chosen)))
            for key in ("accuracy", "macro_f1"):
                values = [100 * r[key] for r in chosen]
                spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "not run")
        rows.append("| " + " | ".join([*cells, ", ".join(dict.fromkeys(seeds))]) + " |")
    return "\n".join(rows)


def write(found: list[dict[str, Any]]) -> None:
    """Replace the table in the document."""
    before, _, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = f"{before}{BEGIN}\n{table(found)}\n{END}{after}"
    DOCUMENT.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--epsilons", nargs="+", choices=["inf", "8"], default=["inf", "8"])
    parser.add_argument("--data", default="../shared/data/fpb/fpb.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/strategies"))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one worker each")
    parser.add_argument("--tune", nargs="+", default=[], help="KEY=VALUE; printed, not kept")
    arguments = parser.parse_args()
    more = dict(item.split("=", 1) for item in arguments.tune)
    done = {(r["strategy"], r["epsilon"], r["seed"]) for r in lines()}
    wanted = itertools.product(arguments.epsilons, arguments.seeds, arguments.only)

    def measure(cell: tuple[str, int, str]) -> None:
        epsilon, seed, strategy = cell
        line = run(strategy, epsilon, seed, arguments.data, arguments.runs, more)
        with lock:
            print(json.dumps(line), flush=True)
            if not more and seed != TUNING_SEED:
                with RESULTS.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                write(lines())

    lock = threading.Lock()
    with ThreadPoolExecutor(arguments.jobs) as pool:
        cells = [(e, s, name) for e, s, name in wanted if more or (name, e, s) not in done]
        for _ in pool.map(measure, cells):
            pass


if __name__ == "__main__":
    main()
