"""The tables "by what an institution holds" of docs/results.md, and averages over their settings.

Usage: python -m benchmarks.holdings SWEEP...

Each SWEEP is the directory of a `fedlora sweep` of joining.toml or a joining-fpb file, or of a part
of one; its complete cells are read, whatever its file says. A setting has three seeds. The interval
of a setting's gain is that of a sweep (`experiments.results`). That of an average over settings is
Student's t over the seeds' averages, widened and no narrower than runs' own in the same way, as if
all settings had the same held-out rows.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import results
from fedlora.config.config import load
from fedlora.runs.joining_verdict import comparison
from fedlora.runs.run_files import CONFIG, is_complete, read_run_file

Joining = Mapping[str, Any]
Setting = tuple[int, int]
"""Records that an institution holds, and institutions."""
SEEDS = {1, 2, 3}


def read(sweeps: Sequence[Path]) -> tuple[dict[float, dict[Setting, dict[int, Joining]]], float]:
    """``joining`` of cells by epsilon, setting and seed, and the share drawn as held-out rows."""
    found: dict[float, dict[Setting, dict[int, Joining]]] = {}
    drawn = 0.0
    for cell in (cell for sweep in sweeps for cell in sorted((sweep / "cells").iterdir())):
        joining = comparison(read_run_file(cell)) if is_complete(cell) else None
        if joining is None:
            continue
        config = load(cell / CONFIG)
        setting = (config.data.max_records, config.data.institutions)
        seeds = found.setdefault(config.privacy.epsilon, {}).setdefault(setting, {})
        if config.seed in seeds:
            raise SystemExit(
                f"{cell}: another cell has its epsilon, setting and seed; leave it out"
            )
        seeds[config.seed] = joining
        drawn = results.drawn_share(config)
    for epsilon, settings in found.items():
        for setting, seeds in list(settings.items()):
            if set(seeds) != SEEDS:
                print(f"left out, with the seeds {sorted(seeds)}: epsilon {epsilon:g}, {setting}")
                del settings[setting]
    return found, drawn


def percent(runs: Sequence[Joining], model: str) -> str:
    return f"{100 * statistics.fmean(run[model]['accuracy'] for run in runs):.1f}"


def of_setting(runs: Sequence[Joining], drawn: float) -> str:
    """Accuracies and the gain of one setting, its seeds together."""
    gains = [run["gain"] for run in runs]
    accuracies = ", ".join(percent(runs, model) for model in ("alone", "shared", "own"))
    return f"{accuracies} | {with_interval([gain['mean'] for gain in gains], gains, drawn)}"


def average(
    settings: Mapping[Setting, Mapping[int, Joining]],
    key: str,
    drawn: float,
) -> str:
    """The average over settings of each seed, and its interval over seeds."""
    of_seeds = {seed: [runs[seed][key] for runs in settings.values()] for seed in sorted(SEEDS)}
    each = [statistics.fmean(one["mean"] for one in gains) for gains in of_seeds.values()]
    bounds = [{end: statistics.fmean(one[end] for one in gains) for end in ("low", "high")}
              for gains in of_seeds.values()]  # fmt: skip
    splits = ", ".join(f"{100 * value:+.1f}" for value in each)
    return f"{with_interval(each, bounds, drawn)} ({splits})"


def with_interval(values: Sequence[float], gains: Sequence[Joining], drawn: float) -> str:
    """The mean gain in points and half the width of its interval."""
    found = results.gain_mean("gain", values, gains, drawn)
    return f"{100 * (found['gain'] or 0):+.1f} ± {100 * (found['gain_ci95'] or 0):.1f}"


def counts(runs: Sequence[Joining]) -> str:
    """How many single institutions gain, lose, and keep the model alone."""
    each = [of for run in runs for of in run["institutions"].values()]
    gaining, losing = (sum(run["gain"][key] for run in runs) for key in ("gaining", "losing"))
    keeping = sum(of["keeps_alone"] for of in each)
    return f"of {len(each)} institutions {gaining} gain, {losing} lose, {keeping} keep alone"


def main() -> None:
    """Print the table of each epsilon, and averages over settings."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sweeps", nargs="+", type=Path)
    found, drawn = read(parser.parse_args().sweeps)
    for epsilon, settings in sorted(found.items(), reverse=True):
        print(f"\nepsilon {epsilon:g}\n\n| records | institutions | alone, shared, own | gain |")
        print("| --- | --- | --- | --- |")
        for (records, institutions), seeds in sorted(settings.items()):
            print(f"| {records} | {institutions} | {of_setting(list(seeds.values()), drawn)} |")
        groups = {
            "all": settings,
            "80 records and more": {s: r for s, r in settings.items() if s[0] >= 80},
        }
        for name, group in groups.items():
            for key in ("gain", "gain_macro_f1") if group else ():
                print(f"{name}, {len(group)} settings, {key}: {average(group, key, drawn)}")
        print(counts([run for seeds in settings.values() for run in seeds.values()]))


if __name__ == "__main__":
    main()
