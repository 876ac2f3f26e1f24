"""A simulated run and its adapter: run, evaluate, predict, merge, config."""

import json
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.padding import Padding
from rich.table import Table

from cli.errors import draw_report, one_line_errors
from fedlora.config import ready
from fedlora.config.config import RunConfig, describe, load, parse_overrides
from fedlora.errors import InputError
from fedlora.runs.run_files import CONFIG, finite
from fedlora.terminal import ERRORS, Json, Overrides, Terminal, clean_errors

app = typer.Typer()
Assign = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE; data.text or model.name, for one.")
]
RunDirectory = Annotated[Path, typer.Argument(help="A complete run directory.")]
Institution = Annotated[
    str,
    typer.Option(help="The institution whose adapter is used, where each institution has its own."),
]
Own = Annotated[
    bool,
    typer.Option(
        "--own", help="The model that --institution made at home after the run, not the released."
    ),
]


@app.command()
@clean_errors
def run(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; `fedlora config` lists its keys.")
    ] = None,
    assign: Overrides = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; by default runs/NAME-TIME.")
    ] = None,
    engine: Annotated[
        Literal["ray", "inline"], typer.Option(help="Worker processes, or this process.")
    ] = "ray",
    resume: Annotated[Path | None, typer.Option(help="Continue the run in this directory.")] = None,
    as_json: Json = False,
) -> None:
    """Run a federation on this machine or on a Ray cluster."""
    resolved = _resolve(config, parse_overrides(assign or []), out, resume)
    console = Terminal(quiet=as_json)
    if not resolved.privacy.enabled:
        console.print(
            "privacy.epsilon is inf: no record is protected by differential privacy",
            style="red",
            soft_wrap=True,
        )
    from experiments import report
    from simulation import progress
    from simulation.run import simulate

    place = Path(resolved.run_dir)
    with one_line_errors(place, "fedlora run --resume"), report.live(place):
        result = simulate(resolved, engine, console)
    draw_report(place)
    if as_json:
        print(json.dumps(result))
    else:
        progress.summary(resolved, result, console)


def _resolve(
    path: Path | None, overrides: dict[str, str], out: Path | None, resume: Path | None
) -> RunConfig:
    """Resolve a run's configuration. Its run directory is absolute, and free or to be resumed."""
    if resume is not None:
        if out is not None:
            raise InputError(
                "--out and --resume exclude each other; a resumed run stays where it is"
            )
        if not (resume / CONFIG).exists():
            raise InputError(
                f"{resume} holds no run (no {CONFIG}); give the directory that a run printed"
            )
        resume = resume.resolve()  # runs/latest will point elsewhere
        path = path or resume / CONFIG
    elif path is None:
        raise InputError("no config was given; try `fedlora run demo`")
    path = ready.locate(path)
    loaded = load(path, overrides)
    name = path.parent.name if path.name == CONFIG else path.stem
    default = Path(loaded.run_dir or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    from simulation.place import placed

    return placed(loaded, resume or out or default, resume=resume is not None)


@app.command()
@clean_errors
def evaluate(
    run_dir: RunDirectory,
    data: Annotated[str, typer.Option(help="A source, as in data.source.")],
    assign: Assign = None,
    institution: Institution = "",
    own: Own = False,
    as_json: Json = False,
) -> None:
    """Measure a run's adapter on other data.

    The command does not know whether the run trained on some of these rows.
    """
    from fedlora.runs import finished_run
    from simulation import progress

    overrides = parse_overrides(assign or [])
    result = finished_run.evaluate(run_dir, data, institution, overrides, own_model=own)
    if as_json:
        print(json.dumps(finite(result)))
        return
    table = Table(show_header=False)
    truncated, max_length = result.pop("truncated"), result.pop("max_length")
    left_out = {key: result.pop(key) for key in ("without_text", "without_label")}
    for key, value in result.items():
        if key != "per_class":
            name = "rows" if key == "n" else key.replace("_", " ")
            table.add_row(name, f"{value:.4f}" if isinstance(value, float) else str(value))
    for name, value, _ in progress.baseline(result):
        table.add_row(name, value)
    if truncated:
        table.add_row("cut to length", progress.longer(truncated, max_length))
    for key, count in left_out.items():
        if count:
            table.add_row("left out", f"{count} row{'s' * (count != 1)} {key.replace('_', ' ')}")
    for label, counts in result.get("per_class", {}).items():
        right, predicted = f"{counts['correct']} of {counts['truth']}", counts["predicted"]
        table.add_row(label, f"{right} right, {predicted} predicted")
    Terminal().print(table)


@app.command()
@clean_errors
def predict(
    run_dir: RunDirectory,
    text: Annotated[list[str] | None, typer.Argument(help="One or more texts.")] = None,
    data: Annotated[
        str,
        typer.Option(
            help="A .csv, .jsonl or .parquet file, or - for a text a line of standard input."
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(help="A file of these kinds for the rows with columns answer and score."),
    ] = None,
    assign: Assign = None,
    institution: Institution = "",
    own: Own = False,
    as_json: Json = False,
) -> None:
    """Answer texts with a run's adapter; files are read by the run's own columns.

    A line is the answer, its probability where there are classes, and the text.
    """
    from fedlora.data import answer_files
    from fedlora.runs import finished_run
    from simulation import progress

    if bool(text) == bool(data):
        raise InputError("give texts or --data with a file of texts, and not both")
    overrides = parse_overrides(assign or [])
    if data:
        config = finished_run.configuration(run_dir, overrides)
        given = answer_files.read(data, config.data.text)
    else:
        given = answer_files.of(text or [])
    if out is not None:
        answer_files.check_out(out, given)
    count = len(given.texts)
    with ERRORS.status("loading the model") as status:
        result = finished_run.predict(
            run_dir,
            given.texts,
            institution,
            overrides,
            own_model=own,
            all_scores=as_json,
            show=lambda done: status.update(f"{done} of {count} texts answered"),
        )
    if out is not None:
        answer_files.write(out, given, result["answers"])
    if as_json:
        print(json.dumps(finite(result)))
        return
    if out is not None:
        Terminal().write_line(f"{count} answers in {out}")
    for one in result["answers"] if out is None else ():
        score = [f"{one['score']:.4f}"] if "score" in one else []
        Terminal().write_line(one["answer"], *score, one["text"])
    if result["truncated"]:
        longer = progress.longer(result["truncated"], result["max_length"])
        ERRORS.write_line(f"cut to length: {longer}")


@app.command()
@clean_errors
def merge(
    run_dir: RunDirectory,
    out_dir: Annotated[
        Path, typer.Argument(help="Directory of the merged model; it must not exist.")
    ],
    assign: Assign = None,
    institution: Institution = "",
    own: Own = False,
) -> None:
    """Fold a run's adapter into its base: one safetensors model directory."""
    from fedlora.runs import finished_run

    overrides = parse_overrides(assign or [])
    finished_run.merge(run_dir, out_dir, institution, overrides, own_model=own)
    Terminal().write_line(f"merged model in {out_dir}")


@app.command("config")
@clean_errors
def show_config(
    config: Annotated[
        Path | None, typer.Argument(help="A TOML file; without a file, all keys.")
    ] = None,
    assign: Overrides = None,
    as_json: Json = False,
) -> None:
    """Print all keys with types, defaults and meaning, or the resolved keys of a file."""
    rows = describe()
    if config is not None:
        resolved = load(ready.locate(config), parse_overrides(assign or []))
        lists = {name for name, kind, *_ in rows if kind.startswith("list of")}
        flat = {k: json.loads(str(v)) if k in lists else v for k, v in resolved.flat().items()}
        print(json.dumps(finite(flat)) if as_json else resolved.to_toml().rstrip("\n"))
        return
    if assign:
        raise InputError("--set changes a file's values; give a CONFIG too")
    if as_json:
        columns = ("type", "default", "help")
        named: dict[str, Any] = {
            key: dict(zip(columns, about, strict=True)) for key, *about in rows
        }
        print(json.dumps(named))
        return
    console = Terminal()
    for key, kind, default, meaning in rows:
        console.write_line(f"{key} = {default}")
        console.print(Padding(f"{kind}: {meaning}", (0, 0, 0, 4)))


def execute(arguments: list[str]) -> None:
    """Run one of these commands in this process and end the process with its exit code."""
    app(arguments)
