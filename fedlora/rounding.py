"""Figures as text; bounds are rounded to the side on which they stay bounds."""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal


def at_most(value: float, digits: int = 4) -> str:
    """An upper bound in so many significant digits, rounded up; "inf" stays."""
    return _rounded(value, digits, ROUND_CEILING)


def at_least(value: float, digits: int = 4) -> str:
    """A lower bound in so many significant digits, rounded down; "inf" stays."""
    return _rounded(value, digits, ROUND_FLOOR)


def number(value: float | str | None) -> str:
    """A figure with four digits; "inf" stays, and a dash stands for one that is no number."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Seconds as text, in minutes from two on."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _rounded(value: float, digits: int, how: str) -> str:
    if not value or not math.isfinite(value):
        return f"{value:g}"
    exact = Decimal(repr(float(value)))
    last = Decimal(1).scaleb(exact.adjusted() - digits + 1)
    return f"{float(exact.quantize(last, rounding=how)):.{digits}g}"
