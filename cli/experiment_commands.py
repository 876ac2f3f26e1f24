"""``fedlora sweep | audit | report | plan``: experiments with privacy budgets."""

import json
import time
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import box
from rich.table import Table

from cli.errors import draw_report, one_line_errors
from fedlora.config import ready
from fedlora.config.config import load, parse_overrides
from fedlora.terminal import ERRORS, Json, Overrides, Terminal, clean_errors

app = typer.Typer()
FOR_FILES = ("macro-F1, %", "MB moved", "seconds", "seeds", "delta")
"""Columns of a sweep's results that the screen leaves to the report and results.csv."""


@app.command("sweep")
@clean_errors
def run_sweep(
    sweep: Annotated[Path, typer.Argument(help="A TOML file; see docs/experiments.md.")],
    out: Annotated[
        Path | None, typer.Option(help="The sweep's directory; by default runs/sweeps/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time; they share the cores.")] = 1,
    engine: Annotated[
        Literal["auto", "ray", "inline"],
        typer.Option(
            help="Engine of the cells; auto: ray, but inline with one worker or one institution."
        ),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Run a grid of configurations, or the cells that are left of one."""
    from cli.simulation_commands import execute
    from experiments import cells, results

    sweep = ready.locate(sweep, "sweeps")
    place = (out or Path("runs/sweeps") / sweep.stem).absolute()
    console = Terminal(quiet=as_json)
    try:
        done = cells.run(sweep, place, jobs=jobs, engine=engine, execute=execute, console=console)
    except (KeyboardInterrupt, OSError) as error:  # a full disk, for one
        what = "interrupted" if isinstance(error, KeyboardInterrupt) else str(error)
        ERRORS.write_line(f"error: {what}; finished cells are kept; the same command continues")
        raise typer.Exit(1) from None
    draw_report(place)
    if as_json:
        print(json.dumps(done))
    elif done["results"]:
        found = results.read(place)
        (heads, *body), _ = results.tables(results.summary(found), found.axes)
        shown = [i for i, head in enumerate(heads) if head not in FOR_FILES]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for i in shown:
            widest = max((len(row[i]) for row in body), default=0)
            table.add_column(heads[i], overflow="fold", min_width=min(widest, 12))  # 80 columns
        for row in body:
            table.add_row(*(row[i] for i in shown))
        console.print(table)
        console.write_line(f"report         {place / 'report.html'}")
        console.write_line(f"results        {place / 'results.csv'}")
    for name, why in done["failed"].items():
        ERRORS.write_line(f"error: cell {name} failed: {why}")
    if done["failed"]:
        raise typer.Exit(1)


@app.command("report")
@clean_errors
def write_report(
    directory: Annotated[Path, typer.Argument(help="A complete run, a sweep or an audit.")],
) -> None:
    """Write report.html into the directory of a run, a sweep or an audit: one self-contained page.

    Its first sheet is for a file: print the page, or save it as PDF, from any browser.
    """
    from experiments import report

    Terminal().write_line(str(report.write(directory)))


@app.command()
@clean_errors
def plan(
    records: Annotated[int, typer.Option(help="Records, or units, of an institution.")],
    steps: Annotated[int, typer.Option(help="Steps of the whole plan, all rounds together.")],
    batch_size: Annotated[float, typer.Option(help="As training.batch-size; below 1 a share.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Budget; yields the noise multiplier.")
    ] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise; yields epsilon.")] = None,
    delta: Annotated[
        float | None, typer.Option(help="The delta; by default that of a run.")
    ] = None,
    institutions: Annotated[
        int | None, typer.Option(help="Secure aggregation: the institutions of the run.")
    ] = None,
    honest: Annotated[
        int | None, typer.Option(help="Secure aggregation: those whose noise is in every sum.")
    ] = None,
    colluding: Annotated[
        int | None, typer.Option(help="Secure aggregation: those that may collude; by default 1.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compute noise for a budget, or epsilon for noise."""
    from experiments import planning

    result = planning.plan(
        records=records,
        sample_rate=planning.rate_of(records, batch_size),
        steps=steps,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        delta=delta,
        trust=planning.trust_of(institutions, honest, colluding),
    )
    if as_json:
        print(json.dumps(result))
        return
    planning.show(result, Terminal())


@app.command()
@clean_errors
def audit(
    config: Annotated[Path, typer.Argument(help="The configuration of the run to audit.")],
    assign: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; by default runs/audit-NAME-TIME.")
    ] = None,
    canaries: Annotated[
        int, typer.Option(help="Rows that the auditor plants; 1,000 can show epsilon 5.2 at most.")
    ] = 1000,
    engine: Annotated[
        Literal["ray", "inline"], typer.Option(help="Worker processes, or this process.")
    ] = "ray",
    as_json: Json = False,
) -> None:
    """Train with canaries among the records, attack the run; exit 3 if the promise is broken."""
    from experiments.audit.findings import FILE
    from experiments.audit.run import check, run, show

    config = ready.locate(config)
    loaded = load(config, parse_overrides(assign or []))
    place = out or Path(f"runs/audit-{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    check(loaded, place, canaries, engine)
    console = Terminal(quiet=as_json)
    console.write_line(f"auditing; results in {place}")
    with one_line_errors(place / "run"):
        result = run(loaded, out=place, canaries=canaries, engine=engine, console=console)
    draw_report(place)
    draw_report(place / "run")  # with what the audit found
    if as_json:
        print(json.dumps(result))
    else:
        show(result, console)
        console.write_line(f"audit          {place / FILE}")
        console.write_line(f"report         {place / 'report.html'}")
    if result["refuted"]:
        raise typer.Exit(3)
