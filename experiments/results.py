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
MEANS = {
    "accuracy": "accuracy, %",
    "macro_f1": "macro-F1, %",
    "worst_accuracy": "worst institution, %",
    "alone": "alone, %",
    "shared": "shared, %",
    "own": "own, %",
    "gain": "gain of joining",
    "gain_shared": "shared over alone",
}
"""Figure -> its head in tables. The last five are of institutions that trained at home."""
COLUMNS = (
    *("arm", "institution", "seeds", *MEANS, *(f"{name}_ci95" for name in MEANS)),
    *("bytes", "seconds", "epsilon", "delta", "same_as"),
)
"""Columns of a line, beside the axes of the grid."""
ALL = "(all)"
"""The institution's name in lines on the held-out rows of all institutions together.

No institution has this name: `fedlora.data.partition.file_names` makes none with brackets."""
CONFIDENCE = 0.95
CAPTION = (
    "Means over seeds ± half the 95 % confidence interval (Student's t; where each seed draws its "
    "held-out rows from the same records, widened by Nadeau and Bengio 2003; where all seeds have "
    "one test file, of other partitions and noise only, not of other test rows), in percent of "
    "held-out rows; gains are percentage points. Worst institution: the lowest accuracy of each "
    "seed. Settings without effect in an arm stand once."
)
"""Explains the tables."""


@dataclass(frozen=True)
class Results:
    """A sweep's manifest and what its cells wrote.

    Attributes:
        about: ``name``, ``command`` and ``cases``, each with ``arm``, ``axes``, ``seed``, ``cell``.
        cells: Cell -> file -> content, of the cells whose result counts.
    """

    about: dict[str, Any]
    cells: dict[str, dict[str, Any]]

    @property
    def axes(self) -> list[str]:
        """The axes of the grid."""
        return list(dict.fromkeys(axis for case in self.about["cases"] for axis in case["axes"]))

    @property
    def complete(self) -> list[dict[str, Any]]:
        """The cases whose cell counts."""
        return [case for case in self.about["cases"] if case["cell"] in self.cells]

    @property
    def missing(self) -> int:
        """The number of cases that are not complete."""
        return len(self.about["cases"]) - len(self.complete)


def read(out: Path) -> Results:
    """Read the manifest and the cells of a sweep's directory.

    Raises:
        InputError: If it has no manifest that can be read.
    """
    try:
        about = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{out} holds no sweep that can be read ({type(error).__name__}: {MANIFEST}); give the "
            "directory that `fedlora sweep` printed"
        ) from None
    cells: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(case["cell"] for case in about["cases"]):
        files, unreadable = contents(run_dir(out, name))
        if not unreadable:
            cells[name] = files
    return Results(about, cells)


def run_dir(out: Path, cell: str) -> Path:
    """Return the run directory of a cell."""
    return out / "cells" / cell


def score(result: Mapping[str, Any]) -> tuple[str, float]:
    """Return name and value of a result's main metric; ("", nan) if nothing was measured.

    The main metric is the share of exact matches under sft, else accuracy.
    """
    name = next((key for key in ("exact_match", "accuracy") if key in result), "")
    value = result.get(name)
    return name, math.nan if value is None else float(value)


def bytes_moved(records: Sequence[Mapping[str, Any]]) -> int:
    """Return the bytes sent to institutions and received from them."""
    return sum(i["sent"] + i["received"] for r in records for i in r["institutions"].values())


def contents(directory: Path) -> tuple[dict[str, Any], str]:
    """Read the files of a cell without which its result does not count.

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


def measured(arm: str, files: Mapping[str, Any]) -> dict[str, Any]:
    """The figures of one case with one seed: of all rows, and ``by``: institution -> figures."""
    result = files[RESULT]
    accuracies = {} if arm.startswith("central") else result["institutions"]
    joining = joining_verdict.comparison(result)
    found: dict[str, Any] = {
        "accuracy": score(result)[1],
        "macro_f1": result.get("macro_f1", math.nan),
        "worst_accuracy": min(accuracies.values(), default=math.nan),
        "by": {name: {"accuracy": value} for name, value in accuracies.items()},
        "halves": {},
        "epsilon": float(result["epsilon_max"]),
        "delta": result.get("delta"),
        "seconds": result["seconds"],
        "bytes": 0 if arm.startswith("central") else bytes_moved(files[ROUNDS]),
        "drawn": drawn_share(files[CONFIG]),
    }
    if joining is not None:
        for name in joining_verdict.MODELS:
            found[name] = joining[name]["accuracy"]
        for name in ("gain", "gain_shared"):
            found[name] = joining[name]["mean"]
            found["halves"][name] = (joining[name]["high"] - joining[name]["low"]) / 2
        for name, of in joining["institutions"].items():
            found["by"].setdefault(name, {})
            found["by"][name] |= {key: of.get(key) for key in (*joining_verdict.MODELS, "gain")}
    return found


def summary(sweep: Results) -> list[dict[str, Any]]:
    """Aggregate a sweep's results over seeds.

    Returns:
        For each arm and point of the grid a line with `ALL` as ``institution``, then a line for
        each institution: `COLUMNS`. ``seeds`` is the number of seeds behind the figures. Each mean
        has a ``_ci95``: the half width of its 95 % confidence interval by Student's t, None for one
        seed. Seeds that draw held-out rows from the same records share most of them: intervals are
        then widened (Nadeau and Bengio 2003, "Inference for the Generalization Error").
        ``same_as`` names the first setting with the same runs, if several settings share them.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for case in sweep.complete:
        groups.setdefault(case_key(case["arm"], case["axes"]), []).append(case)
    lines: list[dict[str, Any]] = []
    first: dict[str, Mapping[str, Any]] = {}
    for cases in groups.values():
        arm, axes = cases[0]["arm"], cases[0]["axes"]
        known = first.setdefault(repr((arm, sorted(case["cell"] for case in cases))), axes)
        same_as = ", ".join(text_of(v) or "empty" for k, v in known.items() if v != axes[k])
        found = [measured(arm, sweep.cells[case["cell"]]) for case in cases]
        for name in (ALL, *sorted({name for one in found for name in one["by"]})):
            line = {"arm": arm, **axes, **_line(name, found), "same_as": same_as}
            lines.append(line)
    return lines


def case_key(arm: str, axes: Mapping[str, Any], seed: int | None = None) -> str:
    """The same for cases of one arm and setting, and of one seed where that is given."""
    return repr((arm, sorted(axes.items()), seed))


def _line(institution: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    everyone = institution == ALL
    drawn = max(one["drawn"] for one in found)
    of = [one if everyone else one["by"].get(institution, {}) for one in found]
    line: dict[str, Any] = {"institution": institution}
    behind = [1]
    for name in MEANS:
        values = [math.nan if (v := one.get(name)) is None else float(v) for one in of]
        halves = [one["halves"][name] for one in found if everyone and name in one["halves"]]
        line |= mean(name, values, drawn, halves)
        behind.append(sum(map(math.isfinite, values)))
    return line | {
        "seeds": max(behind),
        "bytes": statistics.fmean(one["bytes"] for one in found) if everyone else None,
        "seconds": statistics.fmean(one["seconds"] for one in found) if everyone else None,
        "epsilon": max(one["epsilon"] for one in found),
        "delta": max((one["delta"] for one in found if one["delta"] is not None), default=None),
    }


def mean(
    name: str, values: Sequence[float], drawn: float, halves: Sequence[float] = ()
) -> dict[str, float | None]:
    """Return the mean of the finite values and half the width of its confidence interval.

    Args:
        name: The mean's name.
        values: One of each seed.
        drawn: The share of records that each seed draws as held-out rows.
        halves: Half of each seed's own interval, a bootstrap over held-out texts. Where seeds draw
            their rows, the interval is no narrower than these allow: a few seeds may agree by
            chance, and what single runs do not know cannot be known by their mean alone.
    """
    known = [value for value in values if math.isfinite(value)]
    half = None
    if len(known) > 1:
        from scipy import stats

        wider = math.sqrt(1 / len(known) + drawn / (1 - drawn))
        t = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(known) - 1))
        half = t * statistics.stdev(known) * wider
        if halves and drawn:
            half = max(half, statistics.fmean(halves) * wider)
    return {name: statistics.fmean(known) if known else None, f"{name}_ci95": half}


def write(out: Path) -> list[dict[str, Any]]:
    """Write ``results.csv`` and ``results.json``; return the lines of `summary`."""
    import pandas as pd

    lines = summary(read(out))
    if lines:
        write_atomic(out / "results.csv", pd.DataFrame(lines).to_csv(index=False).encode())
        write_atomic(out / "results.json", f"{json.dumps(finite(lines), indent=1)}\n".encode())
    return lines


def percent(line: Mapping[str, Any], key: str) -> str:
    """Format a share as percent with its confidence interval; "" for a missing value."""
    value, half = line.get(key), line.get(f"{key}_ci95")
    if value is None:
        return ""
    sign = "+" if key.startswith("gain") else ""
    return f"{100 * value:{sign}.1f}" + ("" if half is None else f" ± {100 * half:.1f}")


def tables(
    lines: Sequence[Mapping[str, Any]], axes: Sequence[str]
) -> tuple[list[list[str]], list[list[str]]]:
    """Return two tables as rows of text, heads first: all held-out rows, and by institution.

    Settings with the same runs share one row, under the first of them. Empty columns are left out.
    """
    everyone = [["arm", *axes, *MEANS.values(), "epsilon", "delta", "MB moved", "seconds", "seeds"]]
    each = [["arm", *axes, "institution", *MEANS.values()]]
    for line in lines:
        if line["same_as"]:
            continue
        start = [line["arm"], *(text_of(line[axis]) for axis in axes)]
        figures = [percent(line, name) for name in MEANS]
        if line["institution"] != ALL:
            each.append([*start, line["institution"], *figures])
            continue
        delta = "" if line["delta"] is None else text_of(line["delta"])
        cost = [f"{line['bytes'] / 1e6:.1f}", f"{line['seconds']:.0f}", str(line["seeds"])]
        everyone.append([*start, *figures, at_most(line["epsilon"]), delta, *cost])
    return _filled(everyone), _filled(each)


def _filled(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    kept = [i for i in range(len(rows[0])) if any(row[i] for row in rows[1:])]
    return [[row[i] for i in kept] for row in rows] if len(rows) > 1 else [list(rows[0])]


def text_of(value: Any) -> str:
    """An axis value as tables and words show it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
