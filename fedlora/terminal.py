"""Parts that all commands share: safe output to a terminal, one-line errors, ``--json``."""

# pyright: reportUnknownMemberType=false

import functools
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.text import Text

from fedlora.data.text import visible
from fedlora.errors import InputError, Refusal

P = ParamSpec("P")
T = TypeVar("T")
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="KEY=VALUE; wins over the file.")
]


class Terminal(Console):
    """A console that prints text literally.

    Labels, names and predicted texts come from data and model directories. None of these texts may
    move the cursor, change a colour or begin a line: control characters are printed as Python
    escapes them, and ``[red]`` and ``:warning:`` have no meaning.

    Args:
        stderr: Write to standard error.
        quiet: Write nothing.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(
            stderr=stderr,
            quiet=quiet,
            markup=False,
            emoji=False,
            highlight=False,
            force_jupyter=False,  # lines in a notebook; rich's display there needs ipywidgets
        )

    def write_line(self, *texts: str) -> None:
        """Print one line, however narrow the terminal is, with a tab between texts."""
        self.print(*texts, sep="\t", soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        """Escape control characters. Rich turns every string into `Text` here, also in tables."""
        return super().render_str(visible(text), **options)


ERRORS = Terminal(stderr=True)


def clean_errors(command: Callable[P, T]) -> Callable[P, T]:
    """Print bad input as one line on stderr and exit with code 2; a file's error, with code 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return command(*args, **kwargs)
        except (InputError, Refusal) as error:
            ERRORS.write_line(f"error: {error}")
            raise typer.Exit(2) from None
        except BrokenPipeError:  # the reader of the output has ended
            raise
        except OSError as error:  # no permission, a full disk
            ERRORS.write_line(f"error: {error}")
            raise typer.Exit(1) from None

    return wrapped
