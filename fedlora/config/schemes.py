"""The values of ``data.partition``, checked before any data are read. No heavy imports."""

import math

from fedlora.errors import InputError

USAGE = (
    "iid, dirichlet:ALPHA, natural:COLUMN, pathological:CLASSES or python:MODULE:FUNCTION; with "
    "pooled: before it, one institution holds the records of all"
)
POOLED = "pooled:"
"""Begins a partition whose institutions' records all lie with one, as no bank may do."""
PYTHON = "python:"
"""Begins a source or partition that a function of one's own gives (`fedlora.config.plugins`)."""
BY_VALUE = ("natural", "python")
"""Schemes under which each value names an institution; the rows give the number of them."""


def parse(spec: str, *, institutions: int, has_classes: bool) -> tuple[str, str]:
    """Split a partition into scheme and argument.

    Args:
        spec: ``data.partition``.
        institutions: The value of ``data.institutions``, which `BY_VALUE` take from the rows.
        has_classes: Whether rows have classes; those of sft have none.

    Raises:
        InputError: If the scheme is unknown, its argument is missing or out of bounds, or it needs
            a number of institutions or classes that is missing.
    """
    spec = inner(spec)
    scheme, _, argument = spec.partition(":")
    valid = {
        "iid": spec == "iid",
        "natural": argument != "",
        "python": argument != "",
        "dirichlet": _is_positive(argument),
        # int() refuses 5,000 digits
        "pathological": argument.isdecimal() and len(argument) < 20 and int(argument) > 0,
    }
    if not valid.get(scheme, False):
        raise InputError(f"data.partition is {spec!r}; it must be {USAGE}; ALPHA > 0, CLASSES >= 1")
    if scheme not in BY_VALUE and institutions < 1:
        raise InputError(
            f"data.institutions is {institutions}, but partition {spec} needs their number; "
            "set data.institutions to 1 or more"
        )
    if scheme in ("dirichlet", "pathological") and not has_classes:
        raise InputError(
            f"data.partition is {spec!r}, which assigns classes, but model.task is 'sft', which "
            "has none; use iid or natural:COLUMN"
        )
    return scheme, argument


def inner(spec: str) -> str:
    """A partition without the prefix `POOLED`."""
    return spec.removeprefix(POOLED)


def is_drawn(scheme: str, institutions: int) -> bool:
    """Whether flwr-datasets assigns the rows: one institution gets all rows of ``iid`` without it.

    Deployed institutions read their records as one institution, and need no flwr-datasets.
    """
    return scheme not in BY_VALUE and not (scheme == "iid" and institutions == 1)


def _is_positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False
