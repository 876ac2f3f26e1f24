"""Whether joining pays, in words. Reads the key ``joining`` of a result.json and loads no torch."""

import enum
from collections.abc import Mapping
from typing import Any

MODELS = ("alone", "shared", "own")
"""The models of an institution, as keys of ``joining``."""
FEW = 5
"""An institution has few of a class with at most so many training records of it."""
NO_ROWS = "no-held-out-rows"
"""Why an institution was not compared although it answered."""
MIN_TEXTS = 10
"""A gain has an interval, and an institution may count as gaining or losing, with at least so many
different held-out texts. With fewer the bootstrap's interval is too narrow: of five texts, one gain
in 16 may lie above 0 by chance; of ten to some twenty one in 17 at worst, which is where the models
differ on nearly every text, else about one in 40."""


class Outcome(enum.Enum):
    """What the 95 % interval of the gain says."""

    GAIN = "gain"
    UNCLEAR = "unclear"
    LOSS = "loss"


FINDINGS = {
    Outcome.GAIN: "Joining pays",
    Outcome.LOSS: "Joining does not pay: an institution does better alone",
    Outcome.UNCLEAR: "Joining makes no difference that these rows can show",
}


def comparison(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return ``joining`` of a result, if it compares at least one institution's models."""
    joining = result.get("joining", {})
    return joining if "gain" in joining else None


def outcome(joining: Mapping[str, Any]) -> Outcome:
    """Return what the interval of the gain in accuracy says."""
    gain = joining["gain"]
    if gain["texts"] < MIN_TEXTS or gain["low"] <= 0 <= gain["high"]:
        return Outcome.UNCLEAR
    return Outcome.GAIN if gain["low"] > 0 else Outcome.LOSS


def verdict(joining: Mapping[str, Any]) -> str:
    """One sentence: whether joining pays in this run."""
    keeping = sum(of["keeps_alone"] for of in joining["institutions"].values())
    kept = f"; {keeping} of {len(joining['institutions'])} keep the model alone" * bool(keeping)
    return f"{FINDINGS[outcome(joining)]}: {interval(joining['gain'])}{kept}."


def movers(joining: Mapping[str, Any]) -> str:
    """How many institutions gain and how many lose by more than their own interval."""
    gain = joining["gain"]
    return (
        f"{gain['gaining']} of {len(joining['institutions'])} institutions gain, "
        f"{gain['losing']} lose, by more than their own interval"
    )


def not_compared(joining: Mapping[str, Any]) -> str:
    """The institutions whose models at home were not compared, each with the reason."""
    return with_codes(joining.get("not_compared", {}))


def with_codes(refused: Mapping[str, str]) -> str:
    """Institutions whose replies were refused, each with the reason."""
    return ", ".join(f"{name} ({code})" for name, code in refused.items())


def on_new_kinds(joining: Mapping[str, Any]) -> str:
    """The models on classes of which their institution has no record; empty without such rows."""
    new = joining["new"]
    if not new["rows"]:
        return ""
    each = ", ".join(f"{model} {new[model]:.4f}" for model in MODELS)
    return f"{each} on {new['rows']:,} rows; {interval({**new, 'mean': new['gain']})}"


def interval(gain: Mapping[str, Any]) -> str:
    """A gain with its interval, in points; without, where it has too few texts."""
    if gain["texts"] < MIN_TEXTS:
        return f"{100 * gain['mean']:+.1f} points, of {gain['texts']} texts too few to tell"
    return (
        f"{100 * gain['mean']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to "
        f"{100 * gain['high']:+.1f}"
    )
