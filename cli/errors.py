"""Errors of commands that run for long: one line, and how to continue."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import typer

from fedlora.errors import InputError, Refusal
from fedlora.terminal import ERRORS


@contextlib.contextmanager
def one_line_errors(directory: Path, resume: str = "") -> Iterator[None]:
    """Print a failure inside the block as one line and exit with code 1.

    Args:
        directory: The run's directory.
        resume: The command that continues a run, if there is one.
    """
    try:
        yield
        return
    except (InputError, Refusal):
        raise
    except KeyboardInterrupt:
        what = "interrupted"
    except Exception as error:
        name = type(error).__name__
        what = str(error) if name == "RunFailed" else f"{name}: {error}"
    ERRORS.write_line(f"error: {what}")
    if (directory / "institutions.log").exists():
        ERRORS.write_line(f"what institutions logged: {directory / 'institutions.log'}")
    if resume and (directory / "checkpoints").exists():
        ERRORS.write_line(f"every finished round is kept; continue with: {resume} {directory}")
    raise typer.Exit(1)


def draw_report(write: Callable[[Path], Path], directory: Path) -> None:
    """Write a report. A failure is a warning: the run itself is complete."""
    try:
        write(directory)
    except Exception as error:
        ERRORS.write_line(
            f"warning: report.html was not written ({type(error).__name__}: {error}); "
            f"try: fedlora report {directory}"
        )
