"""What every command of the command line shares: errors as one line, exit codes, ``--json``."""

# pyright: reportUnknownMemberType=false

import functools
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from fedlora.errors import InputError, Refusal

P = ParamSpec("P")
T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ERRORS = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)


def clean_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Print bad input as one line on stderr and exit with code 2."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (InputError, Refusal) as error:
            ERRORS.print(f"error: {error}")
            raise typer.Exit(2) from None

    return wrapped
