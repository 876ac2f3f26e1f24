"""The one way by which text reaches a terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from fedlora.text import visible


class Terminal(Console):
    """A console that shows every text as it is.

    Labels, names and predicted texts come from data and model directories. None of it may move the
    cursor, change a colour or begin a line of its own: control characters are shown as Python
    writes them, and neither ``[red]`` nor ``:warning:`` means anything.

    Args:
        stderr: Write to standard error.
        quiet: Write nothing.
    """

    def __init__(self, *, stderr: bool = False, quiet: bool = False) -> None:
        super().__init__(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)

    def line(self, *texts: str) -> None:
        """Print one line, however narrow the terminal is, with a tab between texts."""
        self.print(*texts, sep="\t", soft_wrap=True)

    def render_str(self, text: str, **options: Any) -> Text:
        """As in rich, which turns every string, also one in a table, into `Text` by this method."""
        return super().render_str(visible(text), **options)
