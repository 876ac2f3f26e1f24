"""How much runs of one configuration differ: by held-out rows, and by different held-out texts.

Usage: python -m benchmarks.draws RUN...

Each RUN is the directory of a complete simulation of one configuration and seed, so that all have
the same held-out rows; noise from the operating system makes them differ. A text that many
institutions have is right or wrong for all of its rows together.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedlora.arrays import Floats
from fedlora.config.config import RunConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.runs import finished_run
from fedlora.runs.comparison import text_numbers

SHOWN = 8
"""Texts that are listed."""


def right(run: Path, config: RunConfig, held_out: Shard) -> Floats:
    """Whether a run's adapter is right on each held-out row ``(n,)``."""
    work = finished_run.open_model(run, config, "")
    answers, _ = work.task.predict(work.model, held_out, work.labels)
    pairs = zip(answers, held_out.targets.tolist(), strict=True)
    return np.array([float(answer == work.labels[target]) for answer, target in pairs])


def spread(name: str, values: Floats) -> str:
    """Accuracies of runs in words."""
    each = ", ".join(f"{100 * value:.1f}" for value in values)
    deviation = 100 * statistics.stdev(values.tolist())
    return (
        f"by {name}: mean {100 * values.mean():.1f} %, standard deviation {deviation:.1f}, from "
        f"{100 * values.min():.1f} to {100 * values.max():.1f} ({each})"
    )


def by_text(found: Floats, texts: Sequence[int]) -> Floats:
    """The share of right rows of each text in each run ``(runs, texts)``."""
    counts = np.bincount(texts)
    return np.stack([np.bincount(texts, row) / counts for row in found])


def main() -> None:
    """Print both spreads, and the texts that make the most of the first."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    runs: list[Path] = parser.parse_args().runs
    configs = [finished_run.configuration(run, {}) for run in runs]
    if len(runs) < 2 or len({(one.seed, str(one.data)) for one in configs}) > 1:
        raise SystemExit("give two or more runs with the same seed and [data]")
    held_out = records.load(configs[0]).all_held_out
    found = np.stack([right(run, one, held_out) for run, one in zip(runs, configs, strict=True)])
    texts = text_numbers(held_out)
    shares, counts = by_text(found, texts.tolist()), np.bincount(texts)
    print(spread(f"{found.shape[1]:,} rows", found.mean(1)))
    print(spread(f"{len(counts)} texts", shares.mean(1)))
    moved = shares.std(0) * counts
    for text in np.argsort(-moved)[:SHOWN]:
        said = " ".join(f"{share:.0f}" for share in shares[:, text])
        print(f"a text of {counts[text]} rows: right in {said}")


if __name__ == "__main__":
    main()
