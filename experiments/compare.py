"""`fedlora compare`: the differences between runs, in settings and results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import figures, report, results
from experiments.pages import Page, Section, Table, render
from fedlora.config.config import ENGINE_ONLY, load
from fedlora.errors import InputError
from fedlora.files import existing_parent, write_atomic
from fedlora.rounding import at_most
from fedlora.runs import joining_verdict
from fedlora.runs.run_files import (
    CONFIG,
    ENVIRONMENT,
    PRIVACY,
    commit,
    finite,
    read_records,
    read_run_file,
    void,
)
from server.privacy_statement import with_earlier_runs

TITLE = "Runs compared"
GAIN = "gain of joining"
OF_ALL_RUNS = "epsilon with earlier runs"
METRICS = ("accuracy", "macro_f1", "exact_match", "token_loss")


def write(runs: Sequence[Path], out: Path) -> dict[str, Any]:
    """Compare complete runs, and write a page on it.

    Returns:
        ``runs``: names. ``settings``: each key whose values differ -> its value in each run.
        ``results``: metric -> its value in each run, or None. ``page``: the path of the page.

    Raises:
        InputError: If fewer than two runs are given, a run is not complete, or ``out`` cannot be
            written.
    """
    if len(runs) < 2:
        raise InputError(f"{len(runs)} run was given; give at least 2 to compare")
    if out.is_dir():
        raise InputError(f"--out {out} is a directory; give a file, such as compare.html")
    if out.exists() and TITLE.encode() not in out.read_bytes():
        raise InputError(f"--out {out} exists and is no page of this command; give another")
    try:
        existing_parent(out.absolute().parent)
    except OSError as error:
        raise InputError(f"--out has no place to write to: {error}; give another") from None
    loaded = [read_run_file(run) for run in runs]
    promises = [read_run_file(run, PRIVACY) for run in runs]
    configs = [load(run / CONFIG) for run in runs]
    flats = [config.flat() for config in configs]
    records = [read_records(run) for run in runs]
    figures_of: dict[str, list[Any]] = {
        name: [result.get(name) for result in loaded]
        for name in METRICS
        if any(name in result for result in loaded)
    }
    figures_of["worst institution"] = [
        min(result["institutions"].values(), default=None) for result in loaded
    ]
    compared_at_home = [joining_verdict.comparison(result) for result in loaded]
    joinings = [joining for joining in compared_at_home if joining is not None]
    if len(joinings) == len(loaded):
        for model in joining_verdict.MODELS:
            figures_of[f"{model}, accuracy"] = [joining[model]["accuracy"] for joining in joinings]
        figures_of[GAIN] = [joining["gain"]["mean"] for joining in joinings]
    figures_of["epsilon"] = [result["epsilon_max"] for result in loaded]
    figures_of["delta"] = [result["delta"] for result in loaded]
    whole = [*map(with_earlier_runs, configs, promises)]
    if any(whole):
        figures_of[OF_ALL_RUNS] = [
            result["epsilon_max"] if most is None else most["ledger_epsilon"]
            for result, most in zip(loaded, whole, strict=True)
        ]
    seeded = [
        privacy.under_dp and privacy.noise == "seeded"
        for privacy in (config.privacy for config in configs)
    ]
    if any(seeded):
        words = "from a seed, so epsilon protects nobody"
        figures_of["noise"] = [words if one else "" for one in seeded]
    about = [read_run_file(run, ENVIRONMENT) for run in runs]
    for name, values in {
        "void, because": ["; ".join(void(result)) for result in loaded],
        "held-out rows": [result.get("n") for result in loaded],
        "commit": [commit(one) for one in about],
        "code": [one.get("code", "")[:12] for one in about],
        "base model": [result["base"]["digest"][:12] for result in loaded],
        "dtype": [result["base"].get("dtype", "") for result in loaded],
    }.items():
        if len(set(values)) > 1 or (name.startswith("void") and any(values)):
            figures_of[name] = values
    figures_of["rounds"] = [result["rounds"] for result in loaded]
    figures_of["seconds"] = [result["seconds"] for result in loaded]
    figures_of["bytes"] = [results.bytes_moved(lines) for lines in records]
    compared = {
        "runs": _names(runs),
        "settings": {
            key: [flat[key] for flat in flats]
            for key in flats[0]
            if not key.startswith(ENGINE_ONLY) and len({str(flat[key]) for flat in flats}) > 1
        },
        "results": figures_of,
        "page": str(out),
    }
    write_atomic(out, render(_page(compared, loaded, records)))
    return finite(compared)


def _names(runs: Sequence[Path]) -> list[str]:
    """Return the directories' names, or their paths where names are equal."""
    short = [run.resolve().name for run in runs]  # the run's own name where runs/latest is given
    return [
        name if short.count(name) == 1 else str(run) for name, run in zip(short, runs, strict=True)
    ]


def rows(compared: Mapping[str, Any]) -> list[list[str]]:
    """Return the table's rows as text: results, then the settings that differ."""
    found = {**compared["results"], **compared["settings"]}
    return [
        [name, *("" if value is None else _text(value, name) for value in values)]
        for name, values in found.items()
    ]


def _text(value: Any, name: str) -> str:
    if name in ("epsilon", OF_ALL_RUNS):
        return at_most(float(value))
    if name == GAIN:
        return f"{100 * value:+.1f} points"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.4f}" if not value or abs(value) >= 1e-3 else f"{value:g}"


def _page(
    compared: Mapping[str, Any],
    loaded: Sequence[Mapping[str, Any]],
    records: Sequence[Sequence[Mapping[str, Any]]],
) -> Page:
    names: list[str] = compared["runs"]
    shown: dict[str, str] = {}
    lines: dict[str, dict[int, float]] = {}
    for name, lines_of in zip(names, records, strict=True):
        measured = [{"round": r["round"], **r["metrics"]} for r in lines_of]
        if points := figures.last_of(measured, "accuracy"):
            lines[name] = points
    if lines:
        title = "Accuracy by round"
        if len(lines) > figures.MAX_SERIES:
            title += f", the first {figures.MAX_SERIES} of {len(lines)} runs"
            lines = dict(list(lines.items())[: figures.MAX_SERIES])
        shown[title] = figures.by_round("rounds", title, lines, label="accuracy", shares=True)
    groups = {n: r["institutions"] for n, r in zip(names, loaded, strict=True) if r["institutions"]}
    everyone = {name for values in groups.values() for name in values}
    if groups and len(everyone) <= report.MAX_BARS and len(groups) <= figures.MAX_SERIES:
        title = "Accuracy by institution"
        shown[title] = figures.bars("institutions", title, groups, label="accuracy")
    lengths = compared["results"]
    for key, title, unit in (("seconds", "Seconds", 1.0), ("bytes", "Megabytes moved", 1e6)):
        values = {n: v / unit for n, v in zip(names, lengths[key], strict=True)}
        shown[title] = figures.bars(key, title, {key: values}, label=title.lower(), shares=False)
    heads = ["", *names]
    both = rows(compared)
    cut = len(compared["results"])
    return Page(
        title=TITLE,
        opening=(),
        tiles={},
        sections=[
            Section(
                title="Results",
                words=[", ".join(names) + "."],
                figures=shown,
                tables=[Table(rows=[heads, *both[:cut]])],
            ),
            Section(
                title="Settings that differ",
                words=() if both[cut:] else ["None."],
                tables=[Table(rows=[heads, *both[cut:]])] if both[cut:] else (),
            ),
        ],
    )
