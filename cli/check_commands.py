"""``fedlora init | check``: from a file of records to a run that is known before it starts."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from fedlora.config import ready
from fedlora.config.config import load, parse_overrides
from fedlora.runs.run_files import finite, said_of_head
from fedlora.terminal import Json, Overrides, Terminal, clean_errors

app = typer.Typer()
MAX_ROWS = 40
"""The most rows of a table on the terminal; ``--json`` has them all."""
COLUMNS = {
    "train": "{}",
    "units": "{}",
    "size_class": "{}",
    "held_out": "{}",
    "delta": "{:g}",
    "noise_multiplier": "{:.3g}",
    "expected_batch_size": "{:.3g}",
}
"""The figures of an institution and their forms; the last three exist under DP."""


@app.command()
@clean_errors
def init(
    source: Annotated[str, typer.Argument(help="A .csv, .jsonl or .parquet file of records.")],
    out: Annotated[
        Path | None, typer.Option(help="The configuration; by default NAME.toml here.")
    ] = None,
) -> None:
    """Write a commented configuration for a file of records."""
    from fedlora.config import starter

    place = out or Path(f"{Path(source).stem}.toml")
    guessed = starter.write(source, place)
    console = Terminal()
    drawn = f"from {guessed.institution!r}" if guessed.institution else "drawn at random"
    console.write_line(
        f"{place}: text {guessed.text!r}, label {guessed.label!r}, institutions {drawn}"
    )
    if guessed.customer:
        console.write_line(
            f"unit record: each record is protected by itself; {guessed.customer!r} looks like "
            f"customers, all of whose records privacy.unit = {guessed.customer!r} protects"
        )
    if guessed.empty:
        console.write_line(
            f"{guessed.empty:,} rows have nothing in {guessed.text!r} and would be left out"
        )
    console.write_line(f"these are guesses; next: fedlora check {place}")


@app.command()
@clean_errors
def check(
    config: Annotated[Path, typer.Argument(help="A TOML file, or a ready configuration's name.")],
    assign: Overrides = None,
    as_json: Json = False,
) -> None:
    """Describe a run before it starts: records, budgets, cost. Exit code 2 if it would be refused.

    Nothing is trained and no budget is spent.
    """
    from simulation import check as checking

    resolved = load(ready.locate(config), parse_overrides(assign or []))
    console = Terminal(quiet=as_json)
    with console.status("reading records, loading the base model"):
        described = checking.describe(resolved)
    if as_json:
        print(json.dumps(finite(described)))
    else:
        _show(described, console)
    if described["refused"]:
        raise typer.Exit(2)


def _show(described: Mapping[str, Any], console: Terminal) -> None:
    for line in _rows(described["rows"]):
        console.write_line(line)
    if classes := described["classes"]:
        body = [[name, said["train"], said["held_out"]] for name, said in classes.items()]
        _table(f"{len(body)} classes", ("class", "train", "held out"), body, console)
    institutions = sorted(described["institutions"].items(), key=lambda item: -item[1]["train"])
    shown = [key for key in COLUMNS if institutions and key in institutions[0][1]]
    body = [
        [name, *(COLUMNS[key].format(said[key]) for key in shown)] for name, said in institutions
    ]
    heads = ("institution", *(key.replace("_", " ") for key in shown))
    _table(f"{len(body)} institutions", heads, body, console)
    if left_out := described["left_out"]:
        body = [[name, count] for name, count in left_out.items()]
        _table(f"{len(body):,} institutions left out", ("institution", "train"), body, console)
    for line in _expected(described):
        console.write_line(line)
    for finding in described["findings"]:
        kind = "voids the result" if finding["voids"] else "warning"
        style = "bold red" if finding["voids"] else "yellow"
        console.print(f"{kind}: {finding['name']}: {finding['text']}", style=style, soft_wrap=True)
    for reason in described["refused"]:
        console.print(f"`fedlora run` refuses this: {reason}", style="bold red", soft_wrap=True)
    if not described["refused"]:
        console.write_line("nothing stops this run")


def _rows(rows: Mapping[str, Any]) -> Iterator[str]:
    yield f"{rows['read']:,} rows: {rows['train']:,} to train on, {rows['held_out']:,} held out"
    for reason, count in rows["dropped"].items():
        yield f"  {count:,} left out: {reason}"
    if rows["cut"]:
        yield f"  {rows['cut']:,} texts are cut to {rows['max_length']} tokens"


def _expected(described: Mapping[str, Any]) -> Iterator[str]:
    """Budget, model and cost in a line each."""
    model, cost, privacy = described["model"], described["cost"], described["privacy"]
    if "reach" in privacy:
        yield (
            f"privacy: epsilon {privacy['epsilon']:g} per {privacy['unit']}, "
            f"{privacy['participations']} rounds of an institution; signal to noise at most "
            f"{privacy['reach']:.3g}"
        )
    if not model:
        return
    head = said_of_head(model)
    yield (
        f"model: {model['name']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['bytes'] / 1e6:.0f} MB; adapter: {model['trained_parameters']:,} parameters, "
        f"{model['adapter_bytes'] / 1e6:.2f} MB" + f"; {head}" * bool(head)
    )
    seconds = ", ".join(f"{part} {value:.0f} s" for part, value in cost["seconds"].items() if value)
    yield (
        f"expected: about {cost['minutes']:.1f} minutes with {cost['workers']} workers ({seconds}; "
        f"from a measured step of {1000 * cost['seconds_per_record']:.0f} ms a record), "
        f"{'at least ' * cost['bytes_grow']}{cost['bytes_moved'] / 1e6:.1f} MB moved, "
        f"{cost['peak_bytes'] / 1e6:.0f} MB of memory in a process"
    )


def _table(title: str, heads: Sequence[str], body: list[list[Any]], console: Terminal) -> None:
    first = Column(heads[0], overflow="fold")
    table = Table(first, *(Column(head, justify="right") for head in heads[1:]))
    console.write_line(title)  # a table's own title is folded to its width
    for row in body[:MAX_ROWS]:
        table.add_row(*map(str, row))
    console.print(table)
    if len(body) > MAX_ROWS:
        console.write_line(f"  and {len(body) - MAX_ROWS:,} more, which --json lists")
