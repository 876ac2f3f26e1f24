"""The two kinds of error that people and machines act on."""


class InputError(ValueError):
    """A value that the user can mend. One line: name, value, bound, remedy. The command exits 2."""


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
