"""Progress of a run on the terminal, and the table at its end. Reads the run directory only."""

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.styled import Styled
from rich.table import Table

from fedlora.config.config import RunConfig
from fedlora.models import metrics
from fedlora.rounding import at_most, number
from fedlora.runs import joining_verdict
from fedlora.runs.run_files import (
    CONFIG,
    PRIVACY,
    ROUNDS,
    GrowingLines,
    link_latest,
    read_records,
    read_run_file,
    void,
)
from fedlora.terminal import Terminal

if TYPE_CHECKING:
    from simulation.engines.grid import SimulationGrid


@contextlib.contextmanager
def progress(config: RunConfig, grid: "SimulationGrid", console: Terminal) -> Iterator[None]:
    """Print a line for each tenth of the rounds, and of the institutions that train at home.

    The run's directory is named, and `link_latest` points at it, once the run is accepted, which is
    when its configuration is written.
    """
    from fedlora.wire import wire  # loads torch, which this module's other functions do without

    done = threading.Event()
    run_dir = Path(config.run_dir)
    lines = GrowingLines(run_dir / ROUNDS)
    resumed_at = len(lines.read())
    every = max(1, config.federation.rounds // 10)

    def report() -> None:
        shown, at_home, named, last = resumed_at, -1, False, False
        while not last:
            last = done.wait(0.25)
            if not named and (run_dir / CONFIG).exists():
                named = True
                console.write_line(f"results in {run_dir}")
                link_latest(run_dir)
            records, answered, pushed = lines.read(), grid.answered, grid.pushed
            end = len(records) == config.federation.rounds
            if len(records) >= shown + every or (end and len(records) > shown):
                shown = len(records)
                console.write_line(describe(config, records, shown - resumed_at))
            if grid.pushed_type == wire.HOME and answered >= at_home + max(1, pushed // 10):
                at_home = answered
                console.write_line(f"models at home: institutions {answered}/{pushed}")

    thread = threading.Thread(target=report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(config: RunConfig, records: Sequence[Mapping[str, Any]], fresh: int) -> str:
    """Describe the progress of a run in one line.

    Args:
        config: The run.
        records: The records of its finished rounds, at least one.
        fresh: Rounds that this process has finished.
    """
    done, total, parts = len(records), config.federation.rounds, [""]
    parts = [f"round {done}/{total}"]
    since, measured = next(
        ((one["round"], one["metrics"]) for one in reversed(records) if one["metrics"]), (0, {})
    )
    for key in ("accuracy", "token_loss"):
        if isinstance(measured.get(key), float):  # otherwise not finite
            after = "" if since == done else f" after round {since}"
            parts.append(f"{key.replace('_', ' ')} {measured[key]:.3f}{after}")
    spent = records[-1]["epsilon_max"]
    if (level := records[-1].get("institution_epsilon")) is not None:
        parts.append(f"institution epsilon {at_most(level, 3)}")
    elif spent is not None:  # None: no institution reported yet
        parts.append("no DP (epsilon inf)" if spent == "inf" else f"epsilon {at_most(spent, 3)}")
    if fresh > 1 and done < total:
        pace = sum(r["seconds"] for r in records[-fresh:]) / fresh
        parts.append(f"{pace * (total - done):.0f} s of rounds left")
    return " · ".join(parts)


def summary(config: RunConfig, result: Mapping[str, Any], console: Terminal) -> None:
    """Print the results of a run as a table, and the paths of its files."""
    run_dir = Path(config.run_dir)
    table = Table(title="Federated run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows = [
        *_quality(result),
        *_joining(result),
        *_rounds(config, result, read_records(run_dir)),
        *_privacy(config, result, read_run_file(run_dir, PRIVACY)),
    ]
    for name, value, style in rows:
        table.add_row(name, Styled(value, style) if style else value)
    console.print(table)
    adapter = run_dir / "adapter"
    if config.federation.traits.local_parts:
        adapter = run_dir / "institutions" / "NAME" / "adapter"
    console.write_line(f"adapter        {adapter}")
    if "joining" in result:
        own = run_dir / "institutions" / "NAME" / "own"
        console.write_line(f"own adapters   {own} (no DP: they must not leave)")
    for name, file in (("report", "report.html"), ("privacy", PRIVACY), ("every round", ROUNDS)):
        console.write_line(f"{name:<14} {run_dir / file}")


Row = tuple[str, str, str]
"""Name, value and style of a row."""


def _quality(result: Mapping[str, Any]) -> Iterator[Row]:
    """The figures of quality, below a word on a void result."""
    if because := void(result):
        said = f"the result is void, and the run accepted it: {'; '.join(because)}"
        yield "", said, "bold red"
    for name in ("n", "accuracy", "macro_f1", "token_loss", "exact_match", "unparseable"):
        if name in result:
            value = result[name]
            shown = str(value) if isinstance(value, int) else number(value)
            yield "held-out rows" if name == "n" else name.replace("_", " "), shown, ""
    yield from baseline(result)
    if missing := result.get("not_evaluated"):
        yield "not evaluated", joining_verdict.with_codes(missing), ""
    if institutions := result["institutions"]:
        low, high = min(institutions, key=institutions.get), max(institutions, key=institutions.get)
        said = f"worst {low} {institutions[low]:.3f}, best {high} {institutions[high]:.3f}"
        yield "institutions", f"{len(institutions)}: {said}", ""


def baseline(result: Mapping[str, Any]) -> Iterator[Row]:
    """The majority baseline, and a warning about a model that predicts one class only.

    Rows of sft have references, not classes, and no baseline.
    """
    if classes := metrics.classes_of(result):
        name, share = metrics.majority(classes)
        yield "always the most frequent", f"{share:.4f} ({name})", ""
        if only := metrics.only_prediction(classes):
            yield "", f"the model predicts {only} for every row: it has learned nothing", "yellow"


def _joining(result: Mapping[str, Any]) -> Iterator[Row]:
    """The three models of institutions, and the gain of joining."""
    if missing := result.get("joining", {}).get("not_compared"):
        yield "not compared", joining_verdict.with_codes(missing), ""
    joining = joining_verdict.comparison(result)
    if joining is None:
        return
    for model in joining_verdict.MODELS:
        quality = joining[model]
        said = f"accuracy {quality['accuracy']:.4f}, macro-F1 {quality['macro_f1']:.4f}"
        yield model, said, ""
    outcome = joining_verdict.outcome(joining).value
    style = {"gain": "green", "loss": "bold red"}.get(outcome, "yellow")
    said = joining_verdict.interval(joining["gain"])
    yield "gain of joining", f"{said}, {len(joining['institutions'])} institutions", style


def _rounds(
    config: RunConfig, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> Iterator[Row]:
    yield "rounds", f"{result['rounds']} in {result['seconds']:.0f} s", ""
    if skipped := sum(record["skipped"] for record in records):
        yield "", f"{skipped} of {result['rounds']} rounds changed nothing", "yellow"
    if result["rounds"] < (planned := config.federation.rounds):
        yield "", f"the run ended before its {planned} rounds: too few are left to ask", "yellow"
    trained = f"{result['trained_parameters']:,} parameters"
    yield "trained", f"{trained} ({config.adapter.method}, rank {config.adapter.rank})", ""
    if truncated := result["counts"]["truncated"]:
        yield "cut to length", longer(truncated, config.training.max_length), ""


def longer(truncated: int, max_length: int) -> str:
    """The number of truncated texts, in words."""
    return f"{truncated} text{'s' * (truncated != 1)} longer than {max_length} tokens"


def _privacy(
    config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]
) -> Iterator[Row]:
    """The promise: its epsilons, the institutions that must be trusted, and words."""
    if config.privacy.enabled:
        delta = "by size class" if result["delta"] is None else f"{result['delta']:g}"
        secret = ", were the noise secret" if config.privacy.noise == "seeded" else ""
        said = f"epsilon {at_most(result['epsilon_max'])}{secret} at delta {delta}"
        yield "privacy", f"{said}, per {config.privacy.unit}, each institution", ""
    if trusted := privacy.get("secure_aggregation"):
        alone = at_most(float(result.get("epsilon_alone_max", "inf")))
        said = f"{trusted['honest']} honest institutions in every sum, of "
        said += f"{trusted['institutions']}; epsilon {alone} if all others collude"
        yield "trust", said, ""
    if level := privacy.get("institution_level"):
        said = f"epsilon {at_most(level['epsilon'])} at delta {level['delta']:g}"
        yield "", f"{said}, per institution, against those who see global adapters only", ""
    style = "bold red" if config.privacy.protects_nobody else "green"
    yield "protects", privacy["protects"], style
