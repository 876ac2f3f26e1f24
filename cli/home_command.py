"""``fedlora home``: an institution's own models after a run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from cli.errors import one_line_errors
from fedlora.errors import InputError
from fedlora.terminal import ERRORS, Json, Terminal, clean_errors

app = typer.Typer()


@app.command()
@clean_errors
def home(
    settings: Annotated[Path, typer.Argument(help="The institution's settings, a TOML file.")],
    run: Annotated[str, typer.Option(help="The run's name at the operator, or its identity.")] = "",
    adapter: Annotated[
        Path | None,
        typer.Option(help="A released adapter from the operator, if none arrived at this node."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Steps at home; wins over the run's home.steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Train an institution's own models after a run, and compare them. Nothing is sent."""
    from client import home_command
    from client.settings import absolute, in_own_keys, load

    own = load(str(absolute(settings)))
    if steps is not None and steps < 1:
        raise InputError(f"--steps is {steps}; it must be at least 1")
    choices = home_command.Choices(run=run, adapter=adapter, steps=steps or 0)
    with one_line_errors(Path(own.state)):
        try:
            result = home_command.train(own, choices, say=ERRORS.write_line)
        except InputError as error:
            raise InputError(in_own_keys(str(error))) from None
    if as_json:
        print(json.dumps(result))
    else:
        for line in home_command.report(result):
            Terminal().write_line(line)
        Terminal().write_line(f"written to {result['directory']}")
