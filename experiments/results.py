"""Results of a sweep: a line for each arm and point of the grid, aggregated over seeds.

Reads the sweep's manifest and the run directories of its cells. Incomplete cells are left out.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig, load
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models import metrics
from fedlora.rounding import at_most
from fedlora.runs import joining_verdict
from fedlora.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    RESULT,
    ROUNDS,
    finite,
    read_records,
    read_run_file,
)

MANIFEST = "cells.json"
EPSILON = "privacy.epsilon"
GAIN_SEEDS = ("gain_over_local_n", "gain_over_local_dp_n")
"""Columns that no file has: the number of seeds behind each gain."""
COLUMNS = (
    "arm", "institution", "seeds", "accuracy", "accuracy_ci95", "macro_f1", "macro_f1_ci95",
    "worst_accuracy", "worst_accuracy_ci95", "gain_over_local", "gain_over_local_ci95",
    "gain_over_local_dp", "gain_over_local_dp_ci95", *GAIN_SEEDS, "bytes", "seconds", "epsilon",
    "delta", "same_as",
)  # fmt: skip
"""Columns of a line, beside the axes of the grid."""
JOINING_HEADS = {
    "alone": "alone, %", "shared": "shared, %", "own": "own, %", "gain": "gain of joining",
    "gain_shared": "shared over alone",
}  # fmt: skip
"""Column -> its head in tables."""
JOINING_COLUMNS = (
    *(f"{key}{end}" for key in JOINING_HEADS for end in ("", "_ci95")),
    "institutions",
    "records",
    "not_compared",
)
"""Further columns where institutions trained at home."""
ALL = "(all)"
"""The institution's name in lines on the held-out rows of all institutions together.

No institution has this name: `fedlora.data.partition.file_names` makes none with brackets."""
CONFIDENCE = 0.95
CAPTION = (
    "Means over seeds ± half the 95 % confidence interval (Student's t; where each seed draws its "
    "held-out rows from the same records, widened by Nadeau and Bengio 2003; where all seeds have "
    "one test file, of other partitions and noise only, not of other test rows), in percent of "
    "held-out rows; gains are percentage points against each institution alone, seed by seed. "
    "Worst institution: the lowest accuracy of each seed. Settings without effect in an arm stand "
    "once."
)
"""Explains the tables."""


@dataclass(frozen=True)
class Results:
    """A sweep's manifest and what its cells wrote.

    Attributes:
        about: ``name``, ``command`` and ``cases``, each with ``arm``, ``axes``, ``seed`` and
            ``cells`` (institution, or "" for all -> cell).
        cells: Cell -> file -> content, of the cells whose result counts; ``bytes`` moved instead of
            the rounds.
    """

    about: dict[str, Any]
    cells: dict[str, dict[str, Any]]

    @property
    def axes(self) -> list[str]:
        """The axes of the grid."""
        return list(dict.fromkeys(axis for case in self.about["cases"] for axis in case["axes"]))

    @property
    def configs(self) -> dict[str, RunConfig]:
        """Cell -> configuration."""
        return {name: files[CONFIG] for name, files in self.cells.items()}

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The cases of which every cell counts."""
        return [
            case
            for case in self.about["cases"]
            if case["cells"] and all(cell in self.cells for cell in case["cells"].values())
        ]

    @property
    def missing(self) -> int:
        """The number of cases that are not complete."""
        return len(self.about["cases"]) - len(self.complete)


def read(out: Path) -> Results:
    """Read the manifest and the cells of a sweep's directory.

    Raises:
        InputError: If it has no manifest that can be read.
    """
    about = manifest(out)
    names = dict.fromkeys(cell for case in about["cases"] for cell in case["cells"].values())
    cells: dict[str, dict[str, Any]] = {}
    for name in names:
        files, unreadable = contents(run_dir(out, name))
        if not unreadable:
            files["bytes"] = bytes_moved(files.pop(ROUNDS))
            cells[name] = files
    return Results(about, cells)


def run_dir(out: Path, cell: str) -> Path:
    """Return the run directory of a cell."""
    return out / "cells" / cell


def manifest(out: Path) -> dict[str, Any]:
    """Read a sweep's manifest.

    Raises:
        InputError: If it does not exist or cannot be read.
    """
    try:
        return json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{out} holds no sweep that can be read ({type(error).__name__}: {MANIFEST}); give the "
            "directory that `fedlora sweep` printed"
        ) from None


def score(result: Mapping[str, Any]) -> tuple[str, float]:
    """Return name and value of a result's main metric; ("", nan) if nothing was measured.

    The main metric is the share of exact matches under sft, else accuracy. An evaluation under sft
    may have an accuracy too, but another one of the same rows none: it needs few, short references.
    """
    name = next((key for key in ("exact_match", "accuracy") if key in result), "")
    value = result.get(name)
    return name, math.nan if value is None else float(value)


def bytes_moved(records: Sequence[Mapping[str, Any]]) -> int:
    """Return the bytes sent to institutions and received from them."""
    return sum(i["sent"] + i["received"] for r in records for i in r["institutions"].values())


def measured(case: Mapping[str, Any], cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Measure one complete case with one seed.

    For local arms, the metrics pool the rows of all institutions, each under its own adapter.
    """
    of_cells = [cells[cell] for cell in case["cells"].values()]
    found = [files[RESULT] for files in of_cells]
    result = found[0] if "" in case["cells"] else metrics.pooled(found)
    kind = case["arm"].removesuffix("-dp")
    institutions: dict[str, float] = {}
    if kind != "central":  # the one institution holds all records
        for one in found:
            institutions |= one["institutions"]
    return {
        "score": score(result)[1],
        "macro_f1": result.get("macro_f1", math.nan),
        "institutions": institutions,
        "population": found[0].get("population", len(institutions)),
        "epsilon": max(float(one["epsilon_max"]) for one in found),
        "delta": max((d for one in found if (d := one.get("delta")) is not None), default=None),
        "seconds": sum(one["seconds"] for one in found),
        "bytes": sum(files["bytes"] for files in of_cells) if kind in ("federated", "base") else 0,
        "joining": joining_verdict.comparison(found[0]),
        "not_compared": len(found[0].get("joining", {}).get("not_compared", {})),
        "drawn": drawn_share(of_cells[0][CONFIG]),
    }


def contents(directory: Path) -> tuple[dict[str, Any], str]:
    """Read the files of a cell without which its result does not count.

    A result counts with the settings and the code that it is of.

    Returns:
        File -> content, and the file that cannot be read; that is empty if the result counts.
    """
    found: dict[str, Any] = {}
    for file, reader in (
        (RESULT, read_run_file),
        (ENVIRONMENT, lambda path: read_run_file(path, ENVIRONMENT)),
        (CONFIG, lambda path: load(path / CONFIG)),
        (ROUNDS, read_records),
    ):
        try:
            found[file] = reader(directory)
        except InputError:
            return found, file
    return found, ""


def drawn_share(config: RunConfig) -> float:
    """The share of records that a run's seed draws as held-out rows; 0 of a separate test file."""
    return 0.0 if config.data.test_source else config.data.test_fraction


def summary(sweep: Results) -> list[dict[str, Any]]:
    """Aggregate a sweep's results over seeds.

    Returns:
        For each arm and point of the grid a line with `ALL` as ``institution``, then a line for
        each institution. ``seeds`` is the number of seeds behind each figure, the least where they
        differ; those of gains end in ``_n``. ``accuracy``, ``macro_f1``,
        ``worst_accuracy`` (the lowest institution of each seed), ``gain_over_local`` and
        ``gain_over_local_dp`` (differences within a seed) are means. Each has a ``_ci95``: the half
        width of its 95 % confidence interval by Student's t, None for one seed. Seeds that draw
        held-out rows from the same records share most of them: intervals are then widened (Nadeau
        and Bengio 2003, "Inference for the Generalization Error"). ``bytes``,
        ``seconds``, ``epsilon`` and ``delta`` follow (None without DP). ``same_as`` names the first
        setting with the same runs, if several settings share them. Where institutions trained at
        home, ``alone``, ``shared``, ``own`` (accuracies) and ``gain`` (own minus alone) follow; on
        all rows only ``gain_shared`` (shared minus alone), the number of institutions of a run, the
        mean number of training records of those compared, and the
        number of institutions of all seeds whose models could not be compared.
    """
    groups: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {}
    by_key: dict[str, dict[str, Any]] = {}
    for case in sweep.complete:
        found = measured(case, sweep.cells)
        groups.setdefault(case_key(case["arm"], case["axes"]), []).append((case, found))
        by_key[case_key(case["arm"], case["axes"], case["seed"])] = found
    lines: list[dict[str, Any]] = []
    first: dict[str, Mapping[str, Any]] = {}
    for group in groups.values():
        case = group[0][0]
        runs = repr(
            (case["arm"], sorted((c["seed"], sorted(c["cells"].items())) for c, _ in group))
        )
        axes = first.setdefault(runs, case["axes"])
        same_as = ", ".join(text_of(v) or "empty" for k, v in axes.items() if v != case["axes"][k])
        names = sorted({name for _, found in group for name in found["institutions"]})
        for name in (ALL, *names):
            line = {"arm": case["arm"], **case["axes"]} | _line(name, group, by_key)
            lines.append(line | {"same_as": same_as})
    return lines


def case_key(arm: str, axes: Mapping[str, Any], seed: int | None = None) -> str:
    """The same for cases of one arm and setting, and of one seed where that is given."""
    return repr((arm, sorted(axes.items()), seed))


def _of(found: Mapping[str, Any], institution: str) -> float:
    value = found["score"] if institution == ALL else found["institutions"].get(institution)
    return math.nan if value is None else float(value)


def _line(
    institution: str,
    group: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    by_key: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    gains: dict[str, list[float]] = {"local": [], "local-dp": []}
    for case, found in group:
        free = {k: "inf" if k == EPSILON else v for k, v in case["axes"].items()}
        for arm, axes in (("local", free), ("local-dp", case["axes"])):
            other = by_key.get(case_key(arm, axes, case["seed"]))
            comparable = arm == "local" or case["arm"].endswith("-dp")
            if other is not None and comparable and arm != case["arm"]:
                gains[arm].append(_of(found, institution) - _of(other, institution))
    results = [found for _, found in group]
    drawn = max(found["drawn"] for found in results)
    compared = [found for found in results if found["joining"] is not None]
    accuracies = [_of(found, institution) for found in results]
    behind = [len(_finite(values)) for values in (accuracies, *gains.values())]
    # one whose models could not be compared at a seed has no gain there
    behind.append(
        sum(institution in (ALL, *found["joining"]["institutions"]) for found in compared)
    )
    seeds = min(filter(None, behind), default=len(group))
    line: dict[str, Any] = {"institution": institution, "seeds": seeds}
    line |= mean("accuracy", accuracies, drawn)
    if institution == ALL:
        line |= mean("macro_f1", [found["macro_f1"] for found in results], drawn)
        least = [min(found["institutions"].values(), default=math.nan) for found in results]
        line |= mean("worst_accuracy", least, drawn)
    else:
        nothing: dict[str, None] = dict.fromkeys(("macro_f1", "worst_accuracy"))
        line |= nothing | {f"{key}_ci95": None for key in nothing}
    if compared:
        line |= _joining(institution, compared, drawn)
    refused = sum(found["not_compared"] for found in results)
    if compared or refused:
        line["not_compared"] = refused if institution == ALL else None
    for arm, values in gains.items():
        key = f"gain_over_{arm.replace('-', '_')}"
        line |= mean(key, values, drawn) | {f"{key}_n": len(_finite(values))}
    for key in ("bytes", "seconds"):
        line[key] = (
            statistics.fmean(found[key] for found in results) if institution == ALL else None
        )
    line["epsilon"] = max(found["epsilon"] for found in results)
    deltas = [found["delta"] for found in results if found["delta"] is not None]
    line["delta"] = max(deltas, default=None)
    return line


def _finite(values: Sequence[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _joining(
    institution: str, runs: Sequence[Mapping[str, Any]], drawn: float
) -> dict[str, float | None]:
    """Return the columns of `JOINING_COLUMNS` for one institution or all, over seeds."""
    compared = [found["joining"] for found in runs]
    by_seed = [joining["institutions"] for joining in compared]
    line: dict[str, float | None] = {}
    for key in JOINING_HEADS:
        gains: list[Mapping[str, Any]] = []
        if institution != ALL:
            values = [one.get(institution, {}).get(key, math.nan) for one in by_seed]
            gains = [one[institution] for one in by_seed if institution in one] * (key == "gain")
        elif key.startswith("gain"):
            gains = [joining[key] for joining in compared]
            values = [gain["mean"] for gain in gains]
        else:
            values = [joining[key]["accuracy"] for joining in compared]
        line |= gain_mean(key, values, gains, drawn) if gains else mean(key, values, drawn)
    everyone = institution == ALL
    # all that train together: with home.institutions some of them train no models at home
    line["institutions"] = (
        statistics.fmean(found["population"] for found in runs) if everyone else None
    )
    held = [
        of["records"] for one in by_seed for name, of in one.items() if institution in (ALL, name)
    ]
    line["records"] = statistics.fmean(held) if held else None
    return line


def mean(name: str, values: Sequence[float], drawn: float) -> dict[str, float | None]:
    """Return the mean of the finite values and half the width of its confidence interval.

    Args:
        name: The mean's name.
        values: One of each seed.
        drawn: The share of records that each seed draws as held-out rows.
    """
    known = _finite(values)
    half = None
    if len(known) > 1:
        from scipy import stats

        t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
        half = t * statistics.stdev(known) * math.sqrt(1 / len(known) + drawn / (1 - drawn))
    return {name: statistics.fmean(known) if known else None, f"{name}_ci95": half}


def gain_mean(
    name: str, values: Sequence[float], gains: Sequence[Mapping[str, Any]], drawn: float
) -> dict[str, float | None]:
    """Return `mean` of gains, with an interval that is no narrower than its runs' own allow.

    Two or three seeds often agree by chance. What single runs do not know cannot be known by their
    mean alone.

    Args:
        name: The mean's name.
        values: The gain of each seed.
        gains: ``low`` and ``high`` of each seed's 95 % interval, a bootstrap over held-out texts.
        drawn: The share of records that each seed draws as held-out rows. Where it is 0, all seeds
            are compared on the same rows, and the spread over seeds stands as it is.
    """
    found = mean(name, values, drawn)
    half = found[f"{name}_ci95"]
    if half is not None and drawn:
        one = statistics.fmean((gain["high"] - gain["low"]) / 2 for gain in gains)
        half = max(half, one * math.sqrt(1 / len(gains) + drawn / (1 - drawn)))
    return found | {f"{name}_ci95": half}


def write(out: Path) -> list[dict[str, Any]]:
    """Write ``results.csv`` and ``results.json``; return the lines of `summary`.

    While no case is complete, such files and a page are of an earlier grid, and are removed.
    """
    import pandas as pd

    sweep = read(out)
    lines = summary(sweep)
    if not lines:
        for name in ("results.csv", "results.json", "report.html"):
            (out / name).unlink(missing_ok=True)
        return []
    kept = [{k: v for k, v in line.items() if k not in GAIN_SEEDS} for line in lines]
    write_atomic(out / "results.csv", pd.DataFrame(kept).to_csv(index=False).encode())
    write_atomic(out / "results.json", f"{json.dumps(finite(kept), indent=1)}\n".encode())
    return lines


def percent(line: Mapping[str, Any], key: str, *, signed: bool = False) -> str:
    """Format a share as percent with its confidence interval; "" for a missing value."""
    value, half = line.get(key), line.get(f"{key}_ci95")
    if value is None:
        return ""
    return f"{100 * value:{'+' if signed else ''}.1f}" + (
        "" if half is None else f" ± {100 * half:.1f}"
    )


def tables(
    lines: Sequence[Mapping[str, Any]], axes: Sequence[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return two tables as rows of text, heads first: all held-out rows, and by institution.

    Settings with the same runs share one row, under the first of them. Empty columns are left out.
    """
    lines = [line for line in lines if not line["same_as"]]
    own = [line for line in lines if line["institution"] == ALL]
    pooled = [
        [
            "arm",
            *axes,
            "accuracy, %",
            "macro-F1, %",
            "worst institution, %",
            "gain over local",
            "gain over local-dp",
            *JOINING_HEADS.values(),
            "not compared",
            "epsilon",
            "delta",
            "MB moved",
            "seconds",
            "seeds",
        ]
    ]
    for line in own:
        pooled.append(
            [
                line["arm"],
                *(text_of(line[axis]) for axis in axes),
                percent(line, "accuracy"),
                percent(line, "macro_f1"),
                percent(line, "worst_accuracy"),
                percent(line, "gain_over_local", signed=True),
                percent(line, "gain_over_local_dp", signed=True),
                *(percent(line, key, signed=key.startswith("gain")) for key in JOINING_HEADS),
                str(line.get("not_compared") or ""),
                at_most(line["epsilon"]),
                "" if line["delta"] is None else text_of(line["delta"]),
                f"{line['bytes'] / 1e6:.1f}",
                f"{line['seconds']:.0f}",
                str(line["seeds"]),
            ]
        )
    each = [
        ["arm", *axes, "institution", "accuracy, %", "gain over local", *JOINING_HEADS.values()]
    ]
    each += [
        [
            line["arm"],
            *(text_of(line[axis]) for axis in axes),
            line["institution"],
            percent(line, "accuracy"),
            percent(line, "gain_over_local", signed=True),
            *(percent(line, key, signed=key.startswith("gain")) for key in JOINING_HEADS),
        ]
        for line in lines
        if line["institution"] != ALL
    ]
    return _filled(pooled), _filled(each)


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows] if len(rows) > 1 else [list(rows[0])]


def text_of(value: Any) -> str:
    """An axis value as tables and words show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
