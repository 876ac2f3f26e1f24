"""The command line of a simulation and, from ``experiments.deploy``, of a deployment.

Exit codes: 0 done, 1 failed midway (what was finished is kept), 2 bad input (nothing was written),
3 an audit's promise is broken.
"""

import atexit
import contextlib
import functools
import gc
import json
import logging
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, ParamSpec, TypeVar

import typer
from rich import box
from rich.table import Column, Table

import fedlora
from experiments import simulate
from experiments.deploy import cli as deployment
from experiments.terminal import Terminal
from fedlora import config as configuration
from fedlora import logs
from fedlora.errors import InputError, Refusal

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Federated LoRA under differential privacy, "
    "for institutions that may not share their data.",
)
ledger_app = typer.Typer(no_args_is_help=True, help="An institution's privacy ledger.")
app.add_typer(ledger_app, name="ledger")

P = ParamSpec("P")
T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Whose = Annotated[
    str, typer.Option("--institution", help="Whose adapter, where each institution has its own.")
]
atexit.register(gc.freeze)  # else the interpreter looks for garbage for a second before it ends
ERRORS = Terminal(stderr=True)


def _clean(command: Callable[P, T]) -> Callable[P, T]:
    """Bad input is one line on stderr and exit code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except InputError as error:
            ERRORS.line(f"error: {error}")
            raise typer.Exit(2) from None
        except Refusal as refusal:
            ERRORS.line(f"error: {refusal}")
            raise typer.Exit(2) from None

    return wrapped


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Federated LoRA under differential privacy."""
    simulate.quiet_libraries()
    if logging.lastResort is not None:  # what is warned of while no log is kept
        logging.lastResort.setFormatter(logs.OneLine("%(message)s"))
    if version:
        print(fedlora.__version__)
        raise typer.Exit


@app.command()
@_clean
def run(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; `fedlora config` lists its keys.")
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE; wins over the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/NAME-TIME.")
    ] = None,
    engine: Annotated[
        Literal["ray", "inline"], typer.Option(help="Worker processes, or this process.")
    ] = "ray",
    ray_address: Annotated[str, typer.Option(help="A Ray cluster to join.")] = "",
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    max_epsilon: Annotated[
        float | None, typer.Option(help="Lifetime limit of ledgers that this simulation creates.")
    ] = None,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print only errors.")] = False,
) -> None:
    """Run a federation on this machine or on a Ray cluster."""
    overrides: dict[str, Any] = dict(configuration.parse_overrides(assign or []))
    if ray_address:
        overrides["engine.ray-address"] = ray_address
    if max_epsilon is not None:
        overrides["privacy.max-epsilon"] = max_epsilon
    resolved = _resolve(config, overrides, out, resume)
    console = Terminal(quiet=quiet or as_json)
    if not resolved.privacy.enabled:
        console.print(
            "privacy.epsilon is inf: no record is protected by differential privacy",
            style="red",
            soft_wrap=True,
        )
    result = _simulate(resolved, engine, console)
    from experiments import report

    _draw(report.write, Path(resolved.run_dir))
    if as_json:
        print(json.dumps(result))
    elif not quiet:
        from experiments import live

        live.summary(resolved, result, console)


def _resolve(
    path: Path | None, overrides: dict[str, Any], out: Path | None, resume: Path | None
) -> configuration.RunConfig:
    """This run's configuration; its run directory is absolute, and free or the one to resume."""
    if resume is not None:
        if out is not None:
            raise InputError(
                "--out and --resume exclude each other; a resumed run stays where it is"
            )
        if not (resume / "config.toml").exists():
            raise InputError(
                f"{resume} holds no run (no config.toml); give the directory that a run printed"
            )
        path = path or resume / "config.toml"
    elif path is None:
        raise InputError("no config was given; try `fedlora run experiments/configs/demo.toml`")
    loaded = configuration.load(path, overrides)
    name = path.parent.name if path.name == "config.toml" else path.stem
    chosen = (
        resume or out or Path(loaded.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    )
    if resume is None and (chosen / "config.toml").exists():
        raise InputError(
            f"{chosen} holds another run; give another --out, or continue it with --resume {chosen}"
        )
    if resume is not None and (resume / "result.json").exists():
        raise InputError(f"{resume} is complete; there is nothing to resume (see its result.json)")
    values: dict[str, Any] = {"run-dir": str(chosen.absolute())}
    if loaded.privacy.ledger:
        values["privacy.ledger"] = str(Path(loaded.privacy.ledger).absolute())
    for key in ("data.source", "data.test-source", "model.name"):
        value = str(loaded.flat()[key])
        if value and Path(value).exists():
            values[key] = str(Path(value).absolute())
    resolved = loaded.replace(values)
    from server.run_directory import RunDirectory

    RunDirectory(chosen.absolute()).check(resolved)
    return resolved


def _simulate(config: configuration.RunConfig, kind: str, console: Terminal) -> dict[str, Any]:
    """Run to the end; a failure midway exits 1 and says how to go on."""
    from experiments import live

    with console.status("reading records"):
        records = simulate.prepare(config)
    console.line(
        f"{len(records.names)} institutions, {records.counts['rows']:,} rows; "
        f"results in {config.run_dir}"
    )
    with (
        _one_line(Path(config.run_dir), "fedlora run --resume"),
        contextlib.ExitStack() as stack,
    ):
        with console.status("loading the base model, starting workers"):
            ready = stack.enter_context(simulate.ready(kind, config))
            grid = stack.enter_context(simulate.engine(kind, config, ready))
        with live.progress(config, grid, console):
            simulate.run(config, grid)
    return json.loads((Path(config.run_dir) / "result.json").read_text(encoding="utf-8"))


@contextlib.contextmanager
def _one_line(directory: Path, resume: str = "") -> Iterator[None]:
    """What goes wrong in a run becomes one line, where to read more, and exit code 1.

    Args:
        directory: Of the run.
        resume: The command that goes on with one, if there is any.
    """
    try:
        yield
        return
    except (InputError, Refusal):
        raise
    except KeyboardInterrupt:
        what = "interrupted"
    except Exception as error:
        name = type(error).__name__
        what = str(error) if name == "RunFailed" else f"{name}: {error}"
    ERRORS.line(f"error: {what}")
    if (directory / "institutions.log").exists():
        ERRORS.line(f"what institutions logged: {directory / 'institutions.log'}")
    if resume and (directory / "checkpoints").exists():
        ERRORS.line(f"every finished round is kept; continue with: {resume} {directory}")
    raise typer.Exit(1)


@app.command("sweep")
@_clean
def run_sweep(
    sweep: Annotated[Path, typer.Argument(help="A TOML file; see docs/experiments.md.")],
    out: Annotated[
        Path | None, typer.Option(help="The sweep's directory; by default runs/sweeps/NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Cells at a time; they share the cores.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the sweep in the directory.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Also if it has over 1,000 cells.")] = False,
    engine: Annotated[
        Literal["auto", "ray", "inline"],
        typer.Option(help="Of the cells; auto: ray, but inline where one core is all it gets."),
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Run a grid of configurations, each also locally, centrally or without training."""
    from experiments import cells, report, results

    place = (out or Path("runs/sweeps") / sweep.stem).absolute()
    console = Terminal(quiet=as_json)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends its cells
    try:
        done = cells.run(
            sweep, place, jobs=jobs, resume=resume, yes=yes, engine=engine, console=console
        )
    except KeyboardInterrupt:
        ERRORS.line("error: interrupted; finished cells are kept, continue with --resume")
        raise typer.Exit(1) from None
    finally:
        signal.signal(signal.SIGTERM, before)
    _draw(report.write, place)
    if as_json:
        print(json.dumps(done))
    elif done["results"]:
        pooled, _ = results.tables(place, results.summary(place))
        # Not on the screen, but in results.md.
        left = {"macro-F1, %", "gain over local-dp", "MB moved", "seconds", "seeds", "delta"}
        left |= {"epsilon"} if "privacy.epsilon" in pooled[0] else set()
        columns = [column for column in zip(*pooled, strict=True) if column[0] not in left]
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for head, *body in columns:
            widest = max(map(len, body), default=0)
            table.add_column(head, overflow="fold", min_width=min(widest, 12))  # rows fit into 80
        for row in list(zip(*columns, strict=True))[1:]:
            table.add_row(*row)
        console.print(table)
        console.line(f"report         {place / 'report.html'}")
        console.line(f"results        {place / 'results.csv'}")
    for name, why in done["failed"].items():
        ERRORS.line(f"error: cell {name} failed: {why}")
    if done["failed"]:
        raise typer.Exit(1)


@app.command("report")
@_clean
def write_report(
    directory: Annotated[Path, typer.Argument(help="A complete run, or a sweep.")],
    as_json: Json = False,
) -> None:
    """Write report.html into a run's or a sweep's directory: one page that needs no other file."""
    from experiments import report

    path = report.write(directory)
    if as_json:
        print(json.dumps({"report": str(path)}))
    else:
        Terminal().line(str(path))


@app.command("compare")
@_clean
def compare_runs(
    runs: Annotated[list[Path], typer.Argument(help="Two or more complete runs.")],
    out: Annotated[Path, typer.Option(help="The page with figures.")] = Path("compare.html"),
    as_json: Json = False,
) -> None:
    """What differs between runs: settings, accuracy, privacy, seconds, bytes."""
    from experiments import compare

    compared = compare.write(runs, out)
    if as_json:
        print(json.dumps(compared))
        return
    heads = ["", *compared["runs"]]
    table = Table(*(Column(head, overflow="fold") for head in heads))
    for row in compare.rows(compared):
        table.add_row(*row)
    console = Terminal()
    console.print(table)
    console.line(f"page           {out}")


def _draw(write: Callable[[Path], Path], directory: Path) -> None:
    """Draw a report; a failure to is said, and fails nothing."""
    try:
        write(directory)
    except Exception as error:
        ERRORS.line(
            f"warning: report.html was not written ({type(error).__name__}: {error}); "
            f"try: fedlora report {directory}"
        )


@app.command()
@_clean
def evaluate(
    run_dir: Annotated[Path, typer.Argument(help="A complete run directory.")],
    data: Annotated[str, typer.Option(help="A source, as in data.source.")],
    institution: Whose = "",
    as_json: Json = False,
) -> None:
    """Measure a run's adapter on other data.

    Whether it was trained on some of these rows is not known here.
    """
    from experiments import live, released

    result = released.evaluate(run_dir, data, institution)
    if as_json:
        print(json.dumps(result))
        return
    table = Table(show_header=False)
    truncated, max_length = result.pop("truncated"), result.pop("max_length")
    for key, value in result.items():
        if key != "per_class":
            table.add_row(
                key.replace("_", " "), f"{value:.4f}" if isinstance(value, float) else str(value)
            )
    live.add_baseline(table, result)
    if truncated:
        table.add_row("cut to length", live.longer(truncated, max_length))
    for label, counts in result.get("per_class", {}).items():
        table.add_row(
            label,
            f"{counts['correct']} of {counts['truth']} right, {counts['predicted']} predicted",
        )
    Terminal().print(table)


@app.command()
@_clean
def predict(
    run_dir: Annotated[Path, typer.Argument(help="A complete run directory.")],
    text: Annotated[list[str], typer.Argument(help="One or more texts.")],
    institution: Whose = "",
    as_json: Json = False,
) -> None:
    """Say what a run's adapter makes of a text."""
    from experiments import live, released

    result = released.predict(run_dir, text, institution)
    if as_json:
        print(json.dumps(result))
        return
    for one in result["answers"]:
        Terminal().line(one["answer"], one["text"])
    if result["truncated"]:
        ERRORS.line(f"cut to length: {live.longer(result['truncated'], result['max_length'])}")


@app.command()
@_clean
def merge(
    run_dir: Annotated[Path, typer.Argument(help="A complete run directory.")],
    out_dir: Annotated[Path, typer.Argument(help="Where the merged model goes; must not exist.")],
    institution: Whose = "",
) -> None:
    """Fold a run's adapter into its base: one safetensors model directory."""
    from experiments import released

    released.merge(run_dir, out_dir, institution)
    Terminal().line(f"merged model in {out_dir}")


@app.command("config")
@_clean
def show_config(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; without one, all keys.")
    ] = None,
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE; wins over the file.")
    ] = None,
    as_json: Json = False,
) -> None:
    """All keys with types, defaults and meaning; or what a file resolves to."""
    if config is not None:
        resolved = configuration.load(config, configuration.parse_overrides(assign or []))
        print(
            json.dumps(resolved.flat()) if as_json else resolved.to_toml(),
            end="" if not as_json else "\n",
        )
        return
    if assign:
        raise InputError("--set changes a file's values; give a CONFIG too")
    rows = configuration.describe()
    if as_json:
        print(
            json.dumps(
                [dict(zip(("key", "type", "default", "help"), row, strict=True)) for row in rows]
            )
        )
        return
    others = (Column(name, overflow="fold") for name in ("type", "default", "what it is"))
    table = Table(Column("key", no_wrap=True), *others)
    for row in rows:
        table.add_row(*row)
    Terminal().print(table)


@app.command()
@_clean
def plan(
    records: Annotated[int, typer.Option(help="Records, or units, of the institution.")],
    batch_size: Annotated[int, typer.Option(help="Expected records a step.")],
    steps: Annotated[int, typer.Option(help="Steps of the whole plan, all rounds together.")],
    epsilon: Annotated[
        float | None, typer.Option(help="Budget; gives the noise multiplier.")
    ] = None,
    noise_multiplier: Annotated[float | None, typer.Option(help="Noise; gives epsilon.")] = None,
    delta: Annotated[float | None, typer.Option(help="By default 1 / (10 x records).")] = None,
    accountant: Annotated[Literal["prv", "rdp"], typer.Option(help="Opacus accountant.")] = "prv",
    table: Annotated[
        bool, typer.Option("--table", help="Epsilon against noise and against steps.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Noise for a budget over a whole plan, or the budget that a noise spends."""
    from experiments import planning

    result = planning.plan(
        records=records,
        batch_size=batch_size,
        steps=steps,
        epsilon=epsilon,
        noise_multiplier=noise_multiplier,
        delta=delta,
        accountant=accountant,
    )
    if table:
        result["table"] = planning.table(result)
    if as_json:
        print(json.dumps(result))
        return
    planning.show(result, Terminal())


@app.command()
@_clean
def audit(
    config: Annotated[Path, typer.Argument(help="The configuration of the run to audit.")],
    assign: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE; wins over the file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory; by default runs/audit-NAME-TIME.")
    ] = None,
    canaries: Annotated[
        int, typer.Option(help="Rows of the auditor's own; 1,000 can show epsilon 5.3 at most.")
    ] = 1000,
    shadows: Annotated[
        int, typer.Option(help="Further runs, for LiRA on real rows; 8 or more say something.")
    ] = 0,
    engine: Annotated[
        Literal["ray", "inline"], typer.Option(help="Worker processes, or this process.")
    ] = "ray",
    as_json: Json = False,
) -> None:
    """Train with canaries among the records and attack the result; exit 3 if a promise breaks."""
    from experiments import live
    from experiments.audit import run as auditing

    loaded = configuration.load(config, configuration.parse_overrides(assign or []))
    place = out or Path(f"runs/audit-{config.stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    if shadows < 0:
        raise InputError(f"--shadows is {shadows}; it must be at least 0, which leaves LiRA out")
    auditing.check(loaded, place)
    console = Terminal(quiet=as_json)
    console.line(f"auditing; results in {place}")
    with _one_line(place / "run"):
        result = auditing.run(
            loaded,
            out=place,
            canaries=canaries,
            shadows=shadows,
            engine=engine,
            console=console,
            progress=lambda config, grid: live.progress(config, grid, console),
        )
    if as_json:
        print(json.dumps(result))
    else:
        auditing.show(result, console)
        console.line(f"audit          {place / 'audit.json'}")
    if failed := result.get("lira failed"):
        ERRORS.line(f"error: the shadow runs of LiRA failed: {failed}")
    if result["refuted"] or failed:
        raise typer.Exit(3 if result["refuted"] else 1)


@ledger_app.command("init")
@_clean
def ledger_init(
    path: Annotated[Path, typer.Argument(help="File to create; it must not exist.")],
    max_epsilon: Annotated[
        float, typer.Option(help="Lifetime limit over all runs on these records.")
    ],
    delta: Annotated[float, typer.Option(help="The delta at which the limit holds.")],
    accountant: Annotated[Literal["prv", "rdp"], typer.Option(help="Opacus accountant.")] = "prv",
) -> None:
    """Create a ledger with a limit that no server can raise."""
    from client.ledger import Ledger

    Ledger.create(path, max_epsilon=max_epsilon, delta=delta, accountant=accountant)
    Terminal().line(f"{path}: limit epsilon {max_epsilon:g} at delta {delta:g}, nothing spent")


@ledger_app.command("show")
@_clean
def ledger_show(
    path: Annotated[Path, typer.Argument(help="A ledger.")], as_json: Json = False
) -> None:
    """What a ledger has spent."""
    from client.ledger import Ledger

    with Ledger.open(path) as ledger:
        shown = ledger.show()
    if as_json:
        print(json.dumps(shown))
        return
    entries = shown.pop("entries")
    for key, value in shown.items():
        Terminal().line(f"{key:12} {f'{value:.4f}' if key in ('epsilon', 'left') else value}")
    columns = ("run", "round", "noise", "sample rate", "steps", "charged")
    lines = Table(*(Column(column, overflow="fold") for column in columns))
    for entry in entries:
        lines.add_row(
            str(entry["run"])[:12],
            str(entry["round"]),
            f"{entry['noise_multiplier']:.4f}",
            f"{entry['sample_rate']:.4f}",
            str(entry["steps"]),
            str(entry["at"])[:16].replace("T", " "),
        )
    Terminal().print(lines)


@ledger_app.command("verify")
@_clean
def ledger_verify(
    path: Annotated[Path, typer.Argument(help="A ledger.")], as_json: Json = False
) -> None:
    """Whether a ledger is whole; exit code 1 when it is not."""
    from client.ledger import Ledger

    problems: list[str] = []
    try:
        Ledger.open(path).close()  # opening checks all of it
    except Refusal as refusal:
        if refusal.code != "ledger-corrupt":
            raise
        problems = [refusal.detail]
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    else:
        for problem in problems or ["ledger is whole"]:
            Terminal().line(problem)
    if problems:
        raise typer.Exit(1)


deployment.add_to(app, _clean)

if __name__ == "__main__":
    sys.exit(app())
