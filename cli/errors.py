"""One-line errors of long commands, with the command that continues the work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import typer

from fedlora.errors import InputError, Refusal
from fedlora.terminal import ERRORS


@contextlib.contextmanager
def one_line_errors(directory: Path, resume: str = "") -> Iterator[None]:
    """Print a failure inside the block as one line and exit with code 1.

    Args:
        directory: The run's directory.
        resume: The command that continues a run; empty if nothing continues it.
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
    with contextlib.suppress(PermissionError):  # of a directory that this user may not enter
        if (directory / "institutions.log").exists():
            ERRORS.write_line(f"log of the institutions: {directory / 'institutions.log'}")
        if resume and (directory / "checkpoints").exists():
            ERRORS.write_line(f"every finished round is kept; continue with: {resume} {directory}")
    raise typer.Exit(1)


def draw_report(directory: Path) -> None:
    """Write the report of a complete run or sweep. A failure is a warning: the results exist.

    So is Ctrl-C, which should not take the summary of the results with it.
    """
    try:
        from experiments import report

        report.write(directory)
    except InputError as error:
        ERRORS.write_line(f"warning: report.html was not written: {error}")
    except (Exception, KeyboardInterrupt) as error:
        why = f"{type(error).__name__}: {error}".removesuffix(": ")
        ERRORS.write_line(
            f"warning: report.html was not written ({why}); try: fedlora report {directory}"
        )
