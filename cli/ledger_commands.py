"""``fedlora ledger``: an institution's privacy ledger."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.table import Column, Table

from fedlora.errors import InputError, Refusal
from fedlora.rounding import at_least, at_most
from fedlora.runs.run_files import ledgers
from fedlora.terminal import Json, Terminal, clean_errors

app = typer.Typer()
ledger = typer.Typer(no_args_is_help=True, help="An institution's privacy ledger.")
app.add_typer(ledger, name="ledger")
_TOTALS = ("epsilon", "epsilon_alone", "limit", "left", "delta")
_BOUNDS = {"epsilon": at_most, "epsilon_alone": at_most, "left": at_least}
_ENTRY = {"noise_multiplier": "noise", "sample_rate": "sample rate"}


@ledger.command("init")
@clean_errors
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
    Terminal().write_line(
        f"{path}: limit epsilon {max_epsilon:g} at delta {delta:g}, nothing spent"
    )


@ledger.command("show")
@clean_errors
def ledger_show(
    path: Annotated[Path, typer.Argument(help="A ledger, or a directory of ledgers.")],
    as_json: Json = False,
) -> None:
    """Show the spent budget and the entries of a ledger, or one line for each of a directory."""
    if path.is_dir():
        files = ledgers(path)
        if not files:
            raise InputError(f"{path} has no ledger (*.db); give the directory of ledgers")
        shown: dict[str, Any] = {file.stem: _opened(file) for file in files}
        for said in shown.values():
            said["runs"] = len({entry["run"] for entry in said.pop("entries")})
    else:
        shown = _opened(path)
    if as_json:
        print(json.dumps(shown))
    elif path.is_dir():
        heads = ("ledger", *(key.replace("_", " ") for key in _TOTALS), "runs")
        rows = [[name, *(_said(said, key) for key in _TOTALS), str(said["runs"])]
                for name, said in shown.items()]  # fmt: skip
        _table(heads, rows)
    else:
        entries = shown.pop("entries")
        for key in shown:
            Terminal().write_line(f"{key.replace('_', ' '):14} {_said(shown, key)}")
        columns = ("run", "round", "noise_multiplier", "shares", "sample_rate", "steps", "at")
        heads = tuple(_ENTRY.get(column, column) for column in columns)
        _table(heads, [[_said(entry, column) for column in columns] for entry in entries])


def _opened(file: Path) -> dict[str, Any]:
    from client.ledger import Ledger

    with Ledger.open(file) as opened:
        return opened.show()


def _said(figures: dict[str, Any], key: str) -> str:
    """A figure in words: a bound where it is one, four digits where it is another number."""
    value = figures[key]
    if value is None:
        return "not known before the first run"
    if isinstance(value, float):
        return _BOUNDS[key](value) if key in _BOUNDS else f"{value:.4g}"
    return str(value)


def _table(heads: tuple[str, ...], rows: list[list[str]]) -> None:
    table = Table(*(Column(head, overflow="fold") for head in heads))
    for row in rows:
        table.add_row(*row)
    Terminal().print(table)


@ledger.command("verify")
@clean_errors
def ledger_verify(path: Annotated[Path, typer.Argument(help="A ledger.")]) -> None:
    """Verify that a ledger is whole; exit with code 1 if it is not."""
    try:
        _opened(path)  # opening verifies the whole ledger
    except Refusal as refusal:
        if refusal.code != "ledger-corrupt":
            raise
        Terminal().write_line(refusal.detail)
        raise typer.Exit(1) from None
    Terminal().write_line("ledger is whole")
