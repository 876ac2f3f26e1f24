"""An audit's findings in words, from ``audit.json``. This module loads no torch."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.errors import InputError
from fedlora.rounding import at_least, at_most

FILE = "audit.json"
"""In an audit's directory: its findings. The audited run is the directory ``run`` beside it."""


def read(directory: Path) -> dict[str, Any]:
    """Read the findings of an audit's directory.

    Raises:
        InputError: If they cannot be read.
    """
    try:
        return json.loads((directory / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{directory} holds no audit that can be read ({type(error).__name__}: {FILE})"
        ) from None


def promises(result: Mapping[str, Any]) -> bool:
    """Whether the audited run promised anything: noise that a seed repeats protects nobody."""
    return math.isfinite(float(result["epsilon"])) and result["noise"] == "secure"


def can_refute(result: Mapping[str, Any]) -> bool:
    """Whether the canaries could show more than what was promised."""
    return result["most_they_can_show"] > float(result["epsilon"])


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an audit's findings as pairs of texts; the last pair is the verdict."""
    shown, said = result["shown"], "nothing (epsilon inf)"
    if math.isfinite(float(result["epsilon"])):
        said = f"epsilon {at_most(float(result['epsilon']))} at delta {result['delta']:g}"
        said += ", were the noise secret: it came from a seed" * (not promises(result))
    found = [
        ("promised", said),
        ("canaries", f"{result['planted']:,} of {shown['canaries']:,} planted"),
        (
            "shown by canaries",
            f"epsilon at least {at_least(shown['epsilon'], 3)} ({100 * shown['confidence']:g} % "
            f"confidence): {shown['right']} of {shown['guesses']} guesses right",
        ),
    ]
    if result["accuracy"] is not None:
        found.append(("accuracy of the audited run", f"{result['accuracy']:.3f}"))
    return [*found, ("the promise", verdict(result))]


def verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict on the privacy promise in words."""
    if result["refuted"]:
        return "IS BROKEN"
    if not promises(result):
        return "nothing was promised"
    most = at_least(result["most_they_can_show"], 3)
    can = f"is not refuted; so many canaries show epsilon {most} at most"
    return can if can_refute(result) else f"{can}, so they could not have refuted it: --canaries"
