"""Errors for users and for machines, and the form of any other error in a log."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """A value that the user can correct. One line: name, value, bound, remedy. Exit code 2."""


class RecordError(InputError):
    """An `InputError` whose text quotes a record: for a terminal, not for a log."""


class Refusal(RuntimeError):
    """A refusal of an institution, or a guard that tripped.

    Only ``code`` leaves the institution; ``detail`` may quote private facts and stays in its own
    log.

    Args:
        code: A short fixed word such as ``budget-exhausted``.
        detail: The cause and the remedy, for the institution's own staff.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def place(error: BaseException) -> str:
    """The type of an error and its place in the code, without its text, which may quote data.

    Of a failed import also the package's name, which quotes none.
    """
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-6:])
    package = f" (import of {error.name})" if isinstance(error, ImportError) and error.name else ""
    return f"{type(error).__name__} at {where or 'an unknown place'}{package}"
