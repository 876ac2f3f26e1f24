"""The two kinds of error that people and machines act on, and how a log names any other."""

import traceback
from pathlib import Path


class InputError(ValueError):
    """A value that the user can mend. One line: name, value, bound, remedy. The command exits 2."""


class RecordError(InputError):
    """One whose text quotes a record: for a terminal, not for a log."""


class Refusal(RuntimeError):
    """An institution says no, or one of its guards tripped.

    Only ``code`` leaves the institution; ``detail`` may quote private facts and stays in its own
    log.

    Args:
        code: A short fixed word such as ``budget-exhausted``.
        detail: What happened and what to do, for the institution's operator.
    """

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail


def place(error: BaseException) -> str:
    """What kind of error this is and where it was raised, without its text: that may quote data."""
    frames = traceback.extract_tb(error.__traceback__)
    where = " > ".join(f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-6:])
    return f"{type(error).__name__} at {where or 'an unknown place'}"
