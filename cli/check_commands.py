"""``fedlora init | check``: from a file of records to a run that is known before it starts."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from cli.simulation_commands import Accept
from fedlora.config import ready
from fedlora.config.config import accepting, load, parse_overrides
from fedlora.rounding import at_least
from fedlora.runs.run_files import finite, said_of_head
from fedlora.terminal import Json, Overrides, Terminal, clean_errors

app = typer.Typer()
MAX_ROWS = 40
"""The most rows of a table on the terminal; ``--json`` has them all."""


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
    console.write_line(
        f"{place}: text {guessed.text!r}, label {guessed.label!r}, institutions "
        + (f"from {guessed.institution!r}" if guessed.institution else "drawn at random")
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
    accept: Accept = None,
    as_json: Json = False,
) -> None:
    """Describe a run before it starts: records, budgets, cost. Exit code 2 if it would be refused.

    Nothing is trained and no budget is spent.
    """
    from simulation import check as checking

    resolved = load(ready.locate(config), parse_overrides(assign or []))
    console = Terminal(quiet=as_json)
    with console.status("reading records, loading the base model"):
        described = checking.describe(accepting(resolved, accept or []))
    if as_json:
        print(json.dumps(finite(described)))
    else:
        _show(described, console)
    if described["refused"]:
        raise typer.Exit(2)


def _show(described: dict[str, Any], console: Terminal) -> None:
    rows = described["rows"]
    console.write_line(
        f"{rows['read']:,} rows: {rows['train']:,} to train on, {rows['held_out']:,} held out"
    )
    for reason, count in rows["dropped"].items():
        console.write_line(f"  {count:,} left out: {reason}")
    if rows["cut"]:
        console.write_line(f"  {rows['cut']:,} texts are cut to {rows['max_length']} tokens")
    if described["classes"]:
        heads = ("class", "train", "held out")
        body = [[k, v["train"], v["held_out"]] for k, v in described["classes"].items()]
        _table(f"{len(body)} classes", heads, body, console)
    _institutions(described, console)
    if left_out := described["left_out"]:
        body = [[name, count] for name, count in left_out.items()]
        _table(f"{len(body):,} institutions left out", ("institution", "train"), body, console)
    _ledgers(described["ledgers"], console)
    _model(described, console)
    for finding in described["findings"]:
        kind = "voids the result" if finding["voids"] else "warning"
        style = "bold red" if finding["voids"] else "yellow"
        console.print(f"{kind}: {finding['name']}: {finding['text']}", style=style, soft_wrap=True)
    for reason in described["refused"]:
        console.print(f"`fedlora run` refuses this: {reason}", style="bold red", soft_wrap=True)
    if not described["refused"]:
        console.write_line("nothing stops this run")


def _institutions(described: dict[str, Any], console: Terminal) -> None:
    private = any("delta" in said for said in described["institutions"].values())
    heads = ["institution", "train", "units", "size class", "held out"]
    heads += ["delta", "noise", "batch"] if private else []
    body = [
        [name, said["train"], said["units"], said["size_class"], said["held_out"]]
        + (
            [
                f"{said['delta']:g}",
                f"{said['noise_multiplier']:.3g}",
                f"{said['expected_batch_size']:.3g}",
            ]
            if private
            else []
        )
        for name, said in sorted(
            described["institutions"].items(), key=lambda item: -item[1]["train"]
        )
    ]
    _table(f"{len(body)} institutions", heads, body, console)


def _ledgers(ledgers: dict[str, dict[str, Any]], console: Terminal) -> None:
    if not ledgers:
        return
    body = [
        [name, said["problem"], "", ""]
        if "problem" in said
        else [
            name,
            f"{at_least(said['left'], 3)} of {said['limit']:g}",
            f"{said['delta']:g}",
            "yes" if said["fits"] else "no",
        ]
        for name, said in ledgers.items()
    ]
    heads = ("ledger", "epsilon left", "delta", "run fits")
    _table(f"{len(body)} ledgers", heads, body, console)


def _model(described: dict[str, Any], console: Terminal) -> None:
    model, cost, privacy = described["model"], described["cost"], described["privacy"]
    if "reach" in privacy:
        console.write_line(
            f"privacy: epsilon {privacy['epsilon']:g} per {privacy['unit']}, "
            f"{privacy['participations']} rounds of an institution; signal to noise at most "
            f"{privacy['reach']:.3g}"
        )
    if not model:
        return
    console.write_line(
        f"model: {model['name']}, {model['parameters'] / 1e6:.1f} M parameters, "
        f"{model['bytes'] / 1e6:.0f} MB; adapter: {model['trained_parameters']:,} parameters, "
        f"{model['adapter_bytes'] / 1e6:.2f} MB"
        f"{f'; {head}' if (head := said_of_head(model)) else ''}"
    )
    seconds = ", ".join(
        f"{part} {'at most ' * (part == 'home')}{value:.0f} s"
        for part, value in cost["seconds"].items()
        if value
    )
    grows = "at least " * cost["bytes_grow"]
    console.write_line(
        f"expected: about {cost['minutes']:.1f} minutes with {cost['workers']} workers ({seconds}; "
        f"from a measured step of {1000 * cost['seconds_per_record']:.0f} ms a record), "
        f"{grows}{cost['bytes_moved'] / 1e6:.1f} MB moved, "
        f"{cost['peak_bytes'] / 1e6:.0f} MB of memory in a process"
    )


def _table(title: str, heads: Any, body: list[list[Any]], console: Terminal) -> None:
    first = Column(heads[0], overflow="fold")
    table = Table(first, *(Column(head, justify="right") for head in heads[1:]))
    console.write_line(title)  # a table's own title is folded to its width
    for row in body[:MAX_ROWS]:
        table.add_row(*map(str, row))
    console.print(table)
    if len(body) > MAX_ROWS:
        console.write_line(f"  and {len(body) - MAX_ROWS:,} more, which --json lists")
