"""Progress of a run on the terminal, and the table at its end. Reads the run directory only."""

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.styled import Styled
from rich.table import Table

from fedlora.config.config import RunConfig
from fedlora.models import metrics
from fedlora.rounding import at_most, number
from fedlora.runs import joining_verdict
from fedlora.runs.joining_verdict import Outcome
from fedlora.runs.run_files import (
    CONFIG,
    PRIVACY,
    ROUNDS,
    GrowingLines,
    ledger_alone,
    link_latest,
    read_records,
    read_run_file,
    said_of_head,
    void,
)
from fedlora.terminal import Terminal
from server.privacy_statement import with_earlier_runs

if TYPE_CHECKING:
    from simulation.engines.grid import SimulationGrid

MEANINGS = {
    "alone": "each institution by itself",
    "shared": "the federation's adapter",
    "own": "made from the shared adapter at home, or alone where better",
}
"""The models that a run compares."""
VERDICT_STYLES = {Outcome.GAIN: "green", Outcome.UNCLEAR: "yellow", Outcome.LOSS: "bold red"}


@contextlib.contextmanager
def progress(config: RunConfig, grid: "SimulationGrid", console: Terminal) -> Iterator[None]:
    """Show round, institutions done, accuracy, epsilon and seconds left until the block ends.

    On a terminal one line is redrawn; elsewhere a line is printed each tenth of the run, one after
    the last round, one when institutions begin to train at home, and one for each tenth of them
    that has done so. The run's directory is named, and `link_latest` points at it, once the run is
    accepted, which is when its configuration is written.
    """
    from fedlora.wire import wire  # loads torch, which this module's other functions do without

    done = threading.Event()
    started = time.monotonic()
    run_dir = Path(config.run_dir)
    lines = GrowingLines(run_dir / ROUNDS)
    resumed_at = len(lines.read())
    homes = bool(config.at_home(len(list(grid.get_node_ids()))))

    def line() -> tuple[int, str]:
        records = lines.read()
        return len(records), describe(
            config,
            records,
            grid.answered,
            grid.pushed,
            time.monotonic() - started,
            len(records) - resumed_at,
            at_home=grid.pushed_type == wire.HOME,
            homes=homes,
        )

    def redraw() -> None:
        named = False
        with Live(console=console, refresh_per_second=4, transient=True) as live:
            while not done.wait(0.25):
                named = name_place(named)
                live.update(line()[1])
        name_place(named)

    def report() -> None:
        every, shown = max(1, config.federation.rounds // 10), resumed_at
        home_shown = -1  # institutions with models at home in the last line on them
        named, last = False, False
        while not last:
            last = done.wait(0.25)
            named = name_place(named)
            at_home, answered, pushed = grid.pushed_type == wire.HOME, grid.answered, grid.pushed
            finished, text = line()
            end = finished == config.federation.rounds and finished > shown
            due = finished >= shown + every or (finished and not shown) or end
            if at_home:
                more = answered >= home_shown + max(1, pushed // 10) or answered == pushed
                due = home_shown < 0 or (more and answered > home_shown)
                home_shown = answered if due else home_shown
            if due:
                console.write_line(text)
                shown = finished

    def name_place(named: bool) -> bool:
        if not named and (run_dir / CONFIG).exists():
            console.write_line(f"results in {run_dir}")
            link_latest(run_dir)
            return True
        return named

    thread = threading.Thread(target=redraw if console.is_terminal else report, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def describe(
    config: RunConfig,
    records: list[dict[str, Any]],
    answered: int,
    pushed: int,
    elapsed: float,
    fresh: int,
    *,
    at_home: bool = False,
    homes: bool = False,
) -> str:
    """Describe the progress of a run in one line.

    Args:
        config: The run.
        records: The records of its finished rounds.
        answered: Institutions that have replied in the current exchange.
        pushed: Institutions that the server asked in the current exchange.
        elapsed: Seconds since this process started the run.
        fresh: Rounds that this process has finished.
        at_home: Whether the current exchange asks for models that institutions train at home.
        homes: Whether such models follow the rounds.
    """
    if at_home:
        return f"models at home: institutions {answered}/{pushed} ({elapsed:.0f} s)"
    total = config.federation.rounds
    if not records:
        return f"starting: base model and {pushed or 'the'} institutions ({elapsed:.0f} s)"
    parts = [f"round {min(len(records) + 1, total)}/{total}"]
    if answered:
        parts.append(f"institutions {answered}/{pushed}")
    since, measured = next(
        (
            (n, records[n - 1]["metrics"])
            for n in range(len(records), 0, -1)
            if records[n - 1]["metrics"]
        ),
        (0, {}),
    )
    for key in ("accuracy", "token_loss"):
        if isinstance(measured.get(key), float):  # otherwise not finite
            after = "" if since == total else f" after round {since}"
            parts.append(f"{key.replace('_', ' ')} {measured[key]:.3f}{after}")
    spent = records[-1]["epsilon_max"]
    if (level := records[-1].get("institution_epsilon")) is not None:
        parts.append(f"institution epsilon {at_most(level, 3)}")
    elif spent is not None:  # None: no institution reported yet
        parts.append("no DP (epsilon inf)" if spent == "inf" else f"epsilon {at_most(spent, 3)}")
    if fresh > 1 and len(records) < total:
        pace = sum(r["seconds"] for r in records[-fresh:]) / fresh
        left = f"{pace * (total - len(records)):.0f} s left"
        parts.append(left + " for the rounds, then models at home" * homes)
    return " · ".join(parts)


def add_quality(table: Table, config: RunConfig, result: Mapping[str, Any]) -> None:
    """Add the figures of quality, below a word on a void result."""
    if because := void(result):
        said = f"the result is void, and the run accepted it: {'; '.join(because)}"
        table.add_row("", Styled(said, "bold red"))
    for name in ("accuracy", "macro_f1", "token_loss", "perplexity", "exact_match", "unparseable"):
        if name in result:
            value = result[name]
            said = str(value) if isinstance(value, int) else number(value)
            table.add_row(name.replace("_", " "), said)
    for name in config.federation.metric_names:
        if name in result:
            table.add_row(name, number(result[name]))


def add_baseline(table: Table, result: Mapping[str, Any]) -> None:
    """Add the majority baseline, and a warning about a model that predicts one class only.

    Rows of sft have references, not classes, and no baseline.
    """
    if classes := metrics.classes_of(result):
        name, share = metrics.majority(classes)
        table.add_row("always the most frequent", f"{share:.4f} ({name})")
        if only := metrics.only_prediction(classes):
            said = f"the model predicts {only} for every row: it has learned nothing yet"
            table.add_row("", Styled(said, "yellow"))


def add_joining(table: Table, result: Mapping[str, Any]) -> None:
    """Add the three models of institutions, the gain of joining, and the verdict."""
    if failed := joining_verdict.not_compared(result.get("joining", {})):
        table.add_row("not compared", failed)
    joining = joining_verdict.comparison(result)
    if joining is None:
        return
    for model, meaning in MEANINGS.items():
        quality = joining[model]
        table.add_row(
            model,
            f"accuracy {quality['accuracy']:.4f}, macro-F1 {quality['macro_f1']:.4f} ({meaning})",
        )
    if on_new := joining_verdict.on_new_kinds(joining):
        table.add_row("new kinds", on_new)
    table.add_row("", joining_verdict.movers(joining))
    style = VERDICT_STYLES[joining_verdict.outcome(joining)]
    if void(result) and style == "green":
        style = "yellow"  # said above of all figures
    table.add_row("", Styled(joining_verdict.verdict(joining), style))


def add_rounds(
    table: Table,
    config: RunConfig,
    result: Mapping[str, Any],
    records: Sequence[Mapping[str, Any]],
) -> None:
    """Add the number of rounds and their time, and a warning about rounds that are lost."""
    table.add_row("rounds", f"{result['rounds']} in {result['seconds']:.0f} s")
    if lost := lost_rounds(config, result, records):
        table.add_row("", Styled(lost, "yellow"))


def lost_rounds(
    config: RunConfig, result: Mapping[str, Any], records: Sequence[Mapping[str, Any]]
) -> str:
    """Which rounds of a complete run changed nothing or were not played; empty without any.

    Args:
        config: The run.
        result: The content of its result.json.
        records: The lines of its rounds.jsonl.
    """
    done, planned, said = result["rounds"], config.federation.rounds, list[str]()
    if skipped := skipped_rounds(records):
        said.append(
            f"{skipped} of {done} rounds changed nothing: too few updates counted, or together "
            "they were refused."
        )
    if done < planned:
        said.append(
            f"The run ended after {done} of {planned} rounds: too few institutions were left to "
            "ask."
        )
    return " ".join(said)


def skipped_rounds(records: Sequence[Mapping[str, Any]]) -> int:
    """The number of rounds that changed nothing.

    Args:
        records: The lines of a run's rounds.jsonl.
    """
    return sum(record.get("skipped", False) for record in records)


def longer(truncated: int, max_length: int) -> str:
    """The number of truncated texts, in words."""
    return f"{truncated} text{'s' * (truncated != 1)} longer than {max_length} tokens"


def add_privacy(
    table: Table, config: RunConfig, result: Mapping[str, Any], privacy: Mapping[str, Any]
) -> None:
    """Add the promise: its epsilons, the institutions that must be trusted, and words."""
    if config.privacy.enabled:
        delta = "by size class" if result["delta"] is None else f"{result['delta']:g}"
        secret = ", were the noise secret" if config.privacy.noise == "seeded" else ""
        table.add_row(
            "privacy",
            f"epsilon {at_most(result['epsilon_max'])}{secret} at delta {delta}, per "
            f"{config.privacy.unit}, each institution",
        )
        if (most := with_earlier_runs(config, privacy)) is not None:
            table.add_row(
                "with earlier runs",
                f"epsilon {at_most(most['ledger_epsilon'])} at delta {most['ledger_delta']:g}, of "
                f"{most['ledger_limit']:g} in an institution's ledger",
            )
            if (alone := ledger_alone(privacy)) is not None:
                table.add_row(
                    "", f"epsilon {at_most(alone)} if all others collude in secure aggregation"
                )
    if "secure_aggregation" in privacy:
        trusted, alone = privacy["secure_aggregation"], result.get("epsilon_alone_max", "inf")
        table.add_row(
            "trust",
            f"{trusted['honest']} honest institutions in every sum, of "
            f"{trusted['institutions']}; holds against the server with {trusted['colluding']} "
            "others. If all others collude: epsilon " + at_most(float(alone)),
        )
    if "institution_level" in privacy:
        level = privacy["institution_level"]
        table.add_row(
            "",
            f"epsilon {at_most(level['epsilon'])} at delta {level['delta']:g}, per institution, "
            "against those who see global adapters only",
        )
    style = "bold red" if config.privacy.protects_nobody else "green"
    table.add_row("protects", Styled(privacy["protects"], style))


def summary(config: RunConfig, result: Mapping[str, Any], console: Terminal) -> None:
    """Print the results of a run as a table, and the paths of its files."""
    run_dir = Path(config.run_dir)
    privacy = read_run_file(run_dir, PRIVACY)
    table = Table(title="Federated run", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    add_quality(table, config, result)
    add_baseline(table, result)
    if "n" in result:
        table.add_row("held-out rows", f"{result['n']} (pooled, never trained on)")
    if missing := result.get("not_evaluated"):
        table.add_row("not evaluated", joining_verdict.with_codes(missing))
    institutions = result["institutions"]
    if institutions:
        low, high = min(institutions, key=institutions.get), max(institutions, key=institutions.get)
        table.add_row(
            "institutions",
            f"{len(institutions)}: worst {low} {institutions[low]:.3f}, "
            f"best {high} {institutions[high]:.3f}",
        )
    add_joining(table, result)
    add_rounds(table, config, result, read_records(run_dir))
    table.add_row(
        "trained",
        f"{result['trained_parameters']:,} parameters "
        f"({config.adapter.method}, rank {config.adapter.rank}"
        f"{f'; {head}' if (head := said_of_head(result)) else ''})",
    )
    truncated = result["counts"]["truncated"]
    if truncated:
        table.add_row("cut to length", longer(truncated, config.training.max_length))
    add_privacy(table, config, result, privacy)
    console.print(table)
    adapter = run_dir / "adapter"
    if config.federation.traits.local_parts:
        adapter = run_dir / "institutions" / "NAME" / "adapter"
    console.write_line(f"adapter        {adapter}")
    if "joining" in result:
        own = run_dir / "institutions" / "NAME" / "own"
        protected = "epsilon" in result["joining"] and config.privacy.noise != "seeded"
        stays = "" if protected else " (no DP: they must not leave)"
        console.write_line(f"own adapters   {own}{stays}")
    console.write_line(f"report         {run_dir / 'report.html'}")
    console.write_line(f"privacy        {run_dir / 'privacy.json'}")
    console.write_line(f"every round    {run_dir / 'rounds.jsonl'}")
