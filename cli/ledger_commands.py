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
    from client.ledger import Ledger

    if path.is_dir():
        _show_all(path, as_json=as_json)
        return
    with Ledger.open(path) as opened:
        shown = opened.show()
    if as_json:
        print(json.dumps(shown))
        return
    entries = shown.pop("entries")
    for key, value in shown.items():
        said = "not known before the first run" if value is None else value
        if isinstance(value, float) and (bound := _BOUNDS.get(key)):
            said = bound(value)
        Terminal().write_line(f"{key.replace('_', ' '):14} {said}")
    columns = ("run", "round", "noise", "shares", "sample rate", "steps", "charged")
    lines = Table(*(Column(column, overflow="fold") for column in columns))
    for entry in entries:
        lines.add_row(
            str(entry["run"]),
            str(entry["round"]),
            f"{entry['noise_multiplier']:.4f}",
            str(entry["shares"] or ""),
            f"{entry['sample_rate']:.4g}",
            str(entry["steps"]),
            str(entry["at"])[:16].replace("T", " "),
        )
    Terminal().print(lines)


def _show_all(directory: Path, *, as_json: bool) -> None:
    """Show limit and spending of each ledger in a directory."""
    from client.ledger import Ledger

    files = ledgers(directory)
    if not files:
        raise InputError(f"{directory} has no ledger (*.db); give the directory of ledgers")
    shown: dict[str, dict[str, Any]] = {}
    for file in files:
        with Ledger.open(file) as opened:
            said = opened.show()
            entries = said.pop("entries")
            shown[file.stem] = {**said, "runs": len({e["run"] for e in entries})}
    if as_json:
        print(json.dumps(shown))
        return
    shared = any(said["epsilon_alone"] != said["epsilon"] for said in shown.values())
    totals = [key for key in _TOTALS if shared or key != "epsilon_alone"]
    columns = ("ledger", *(key.replace("_", " ") for key in totals), "runs")
    lines = Table(*(Column(name, overflow="fold") for name in columns))
    for name, said in shown.items():
        figures = (_BOUNDS.get(key, "{:.4g}".format)(float(said[key])) for key in totals)
        lines.add_row(name, *figures, str(said["runs"]))
    Terminal().print(lines)


@ledger.command("verify")
@clean_errors
def ledger_verify(
    path: Annotated[Path, typer.Argument(help="A ledger.")], as_json: Json = False
) -> None:
    """Verify that a ledger is whole; exit with code 1 if it is not."""
    from client.ledger import Ledger

    problems: list[str] = []
    try:
        Ledger.open(path).close()  # opening verifies the whole ledger
    except Refusal as refusal:
        if refusal.code != "ledger-corrupt":
            raise
        problems = [refusal.detail]
    if as_json:
        print(json.dumps({"ok": not problems, "problems": problems}))
    else:
        for problem in problems or ["ledger is whole"]:
            Terminal().write_line(problem)
    if problems:
        raise typer.Exit(1)
