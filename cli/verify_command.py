"""``fedlora verify``: whether a run's privacy.json is true of the run's files."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.styled import Styled
from rich.table import Column, Table

from fedlora.terminal import Json, Terminal, clean_errors

app = typer.Typer()
STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


@app.command()
@clean_errors
def verify(
    run_dir: Annotated[Path, typer.Argument(help="A complete run directory.")],
    ca: Annotated[
        Path | None,
        typer.Option(
            help="The ca.crt of a deployment's federation; by default that in FEDLORA_KEYS."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check privacy.json against its run and compute epsilon anew; exit 3 if a check fails."""
    from server import verification

    checks = verification.verify(run_dir, ca)
    failed = [check.name for check in checks if check.state == "failed"]
    if as_json:
        print(
            json.dumps(
                {"verified": not failed, "checks": [dataclasses.asdict(check) for check in checks]}
            )
        )
    else:
        table = Table(Column(style="bold"), "", Column(overflow="fold"), show_header=False)
        for check in checks:
            table.add_row(check.name, Styled(check.state, STYLES[check.state]), check.detail)
        console = Terminal()
        console.print(table)
        skipped = [check.name for check in checks if check.state == "skipped"]
        verdict = f"NOT VERIFIED: {', '.join(failed)}" if failed else "verified"
        if skipped:
            verdict += f"; not checked: {', '.join(skipped)}"
        console.write_line(verdict)
    if failed:
        raise typer.Exit(3)
