"""Whether joining pays, in words. Reads the key ``joining`` of a result.json and loads no torch."""

import enum
from collections.abc import Mapping
from typing import Any

MODELS = ("alone", "shared", "own")
"""The models of an institution, as keys of ``joining``."""
MAX_SCARCE_RECORDS = 5
"""A class is scarce at an institution with at most so many training records of it."""
NO_ROWS = "no-held-out-rows"
"""Why an institution was not compared although it answered."""
MIN_TEXTS = 10
"""A gain has an interval, and an institution may count as gaining or losing, with at least so many
different held-out texts. With fewer the bootstrap's interval is too narrow: of five texts, one gain
in 16 may lie above 0 by chance; of ten to some twenty one in 17 at worst, which is where the models
differ on nearly every text, else about one in 40."""
MIN_CLASS_TEXTS = 8
"""Macro-F1 has a verdict where each of its classes has at least so many different held-out texts.
With fewer the 95 % interval is none: simulated with one rare class in four, which gains 40 points,
it missed in half of the cases with one text, in 13 % with four and in some 7 % with six or more."""


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
ONE_RUN = "One run's interval leaves out its noise: rely on a sweep over seeds."
"""What the interval of one run leaves out. Of ten splits of the demo at epsilon 8 some 17 % of such
intervals would have missed their mean (Cochran's Q 18.3 on 9 degrees of freedom)."""
ALL_KEEP = "Joining brings nothing: the model alone was clearly better, and stays"
"""The finding where every institution keeps the model alone, so that own and alone are one."""


def comparison(result: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return ``joining`` of a result, if it compares at least one institution's models."""
    joining = result.get("joining", {})
    return joining if "gain" in joining else None


def outcome(joining: Mapping[str, Any]) -> Outcome:
    """Return what the interval of the gain in accuracy says."""
    return _outcome(joining["gain"])


def overall(joining: Mapping[str, Any]) -> Outcome:
    """Return what accuracy and macro-F1 say together: a gain that costs rare classes is unclear."""
    macro_f1, found = joining["gain_macro_f1"], outcome(joining)
    costs = not _few_texts(macro_f1) and _outcome(macro_f1) is Outcome.LOSS
    return Outcome.UNCLEAR if found is Outcome.GAIN and costs else found


def has_interval(gain: Mapping[str, Any]) -> bool:
    """Whether a gain is that of enough texts for an interval."""
    return gain.get("texts", MIN_TEXTS) >= MIN_TEXTS  # that in macro-F1 does not say


def _outcome(gain: Mapping[str, Any]) -> Outcome:
    if not has_interval(gain):
        return Outcome.UNCLEAR
    if gain["low"] > 0:
        return Outcome.GAIN
    return Outcome.LOSS if gain["high"] < 0 else Outcome.UNCLEAR


def verdict(joining: Mapping[str, Any]) -> str:
    """One sentence: whether joining pays in this run."""
    gain, each = joining["gain"], joining["institutions"]
    count, keeping = len(each), len(keepers(joining))
    return (
        f"{ALL_KEEP if keeping == count else FINDINGS[outcome(joining)]}: own models are right on "
        f"{100 * joining['own']['accuracy']:.1f} % of {sum(of['rows'] for of in each.values()):,} "
        f"held-out rows, models trained alone on {100 * joining['alone']['accuracy']:.1f} % "
        f"({interval(gain)}); of {count} institution{'s' * (count != 1)} {movers(gain)} by more "
        f"than their own interval{_too_small(joining)}.{_keeping(keeping)}{_classes(joining)}"
    )


def compared(joining: Mapping[str, Any], institutions: int) -> str:
    """How many institutions a verdict is about; empty where it is all of them.

    Args:
        joining: A comparison.
        institutions: The number of institutions in the run.
    """
    counted, missing = len(joining["institutions"]), [*joining.get("not_compared", {}).values()]
    if counted == institutions:
        return ""
    said = f"Compared were {counted} of {institutions} institutions"
    if without := missing.count(NO_ROWS):
        said += f"; {without} {'have' if without > 1 else 'has'} no held-out rows"
    if failed := len(missing) - without:
        said += f"; {failed} {'replies were' if failed > 1 else 'reply was'} refused"
    return f"{said}."


def not_compared(joining: Mapping[str, Any]) -> str:
    """The institutions whose models at home were not compared, each with the reason."""
    missing = joining.get("not_compared", {})
    refused = set(missing.values()) - {NO_ROWS}
    where = "; institutions.log, or the output of the run, has the reasons"
    return with_codes(missing) + where * bool(refused)


def with_codes(refused: Mapping[str, str]) -> str:
    """Institutions whose replies were refused, each with the reason."""
    return ", ".join(f"{name} ({code})" for name, code in refused.items())


def size_range(size: str) -> str:
    """The numbers of records of a size class, which its least one names."""
    return f"{int(size):,} to {2 * int(size) - 1:,}"


def one_run(joining: Mapping[str, Any]) -> str:
    """What the verdict of one run leaves out; empty where it has no interval."""
    return ONE_RUN if has_interval(joining["gain"]) else ""


def movers(gain: Mapping[str, Any]) -> str:
    """How many institutions gain and how many lose."""
    gaining, losing = gain["gaining"], gain["losing"]
    return f"{gaining} gain{'s' * (gaining == 1)} and {losing} lose{'s' * (losing == 1)}"


def _too_small(joining: Mapping[str, Any]) -> str:
    """How many institutions have too few held-out texts to count as gaining or losing."""
    few = sum(not has_interval(of) for of in joining["institutions"].values())
    if not few:
        return ""
    return (
        f" ({few} with fewer than {MIN_TEXTS} different held-out texts "
        f"count{'s' * (few == 1)} as neither)"
    )


def keepers(joining: Mapping[str, Any]) -> list[str]:
    """The institutions that keep the model alone as their own."""
    return [name for name, of in joining["institutions"].items() if of["keeps_alone"]]


def _keeping(count: int) -> str:
    """A further sentence where institutions keep the model alone as their own."""
    if not count:
        return ""
    verb, whose = ("keeps", "its") if count == 1 else ("keep", "their")
    return f" {count} {verb} the model alone as {whose} own."


def _classes(joining: Mapping[str, Any]) -> str:
    """A further sentence where macro-F1 does not say the same as the accuracy, or cannot tell."""
    alone, own = joining["alone"]["macro_f1"], joining["own"]["macro_f1"]
    gain = joining["gain_macro_f1"]
    if few := _few_texts(gain):
        return f" Macro-F1 cannot tell: {few}."
    if _outcome(gain) is outcome(joining):
        return ""
    return (
        f" In macro-F1, which counts rare classes as much as others, own models reach "
        f"{100 * own:.1f} % and models alone {100 * alone:.1f} % ({interval(gain)})."
    )


def macro_f1_gain(gain: Mapping[str, Any]) -> str:
    """The gain in macro-F1 with its interval; without, where some classes have too few texts.

    Args:
        gain: ``gain_macro_f1`` of a comparison.
    """
    if few := _few_texts(gain):
        return f"{100 * gain['mean']:+.1f} points, without an interval: {few}"
    return interval(gain)


def _few_texts(gain: Mapping[str, Any]) -> str:
    """How many classes have too few held-out texts for macro-F1; empty where none has."""
    if not (few := gain["classes_with_few_texts"]):
        return ""
    return (
        f"{few} {'class has' if few == 1 else 'classes have'} fewer than {MIN_CLASS_TEXTS} "
        "different held-out texts"
    )


def scarce_gain(joining: Mapping[str, Any]) -> str:
    """The gain on classes that are scarce at their institution; empty without such rows."""
    scarce = joining["scarce"]
    return interval({**scarce, "mean": scarce["gain"]}) if "low" in scarce else ""


def interval(gain: Mapping[str, Any]) -> str:
    """A gain with its interval, in points; without, where it has too few texts."""
    if not has_interval(gain):
        few = f"{gain['texts']} different held-out text{'s are' if gain['texts'] > 1 else ' is'}"
        return f"{100 * gain['mean']:+.1f} points, without an interval: {few} too few"
    return (
        f"{100 * gain['mean']:+.1f} points, 95 % interval {100 * gain['low']:+.1f} to "
        f"{100 * gain['high']:+.1f}"
    )
