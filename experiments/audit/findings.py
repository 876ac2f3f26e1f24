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
FINAL = "the final adapter"
SERVER = "every round, as the server sees it"
ALL_BUT_HONEST = "every round, by a server that knows all vectors but those of h institutions"
ALL_BUT_ONE = "every round, by a server that knows all vectors but one"
PROMISED = (FINAL, SERVER, ALL_BUT_HONEST)
"""The views that the promise covers. The last exists under secure aggregation only."""
VIEWS = (*PROMISED, ALL_BUT_ONE)
"""All views of an audit. What `ALL_BUT_ONE` sees has a promise of its own, ``epsilon_alone``."""


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


def of_run(run_dir: Path) -> str:
    """What an audit found of a run, as a sentence for the run's report."""
    folder = run_dir.absolute().parent
    if run_dir.absolute().name != "run" or not (folder / FILE).is_file():
        return (
            'This run was not attacked as a test. The command "fedlora audit" attacks one of the '
            "same configuration."
        )
    found = read(folder)
    said = f"An audit attacked this run: the promise {verdict(found)}."
    if found["refuted"]:
        said = f"An audit attacked this run: the promise IS BROKEN, for {broken_by(found)}."
    elif not promises(found):
        said = f"An audit attacked this run; {verdict(found)}."
    return (
        f"{said} Its attacks show epsilon {at_least(shown(found), 3)} at least; its report is "
        "beside the run's directory."
    )


def promises(result: Mapping[str, Any]) -> bool:
    """Whether the audited run promised anything: noise that a seed repeats protects nobody."""
    return math.isfinite(float(result["epsilon"])) and not is_seeded(result)


def is_seeded(result: Mapping[str, Any]) -> bool:
    """Whether the audited run was under DP with noise from a seed."""
    return math.isfinite(float(result["epsilon"])) and result["noise"]["source"] == "seeded"


def of_one(result: Mapping[str, Any]) -> str:
    """What the epsilon of an institution's own share of the noise is called."""
    if is_seeded(result):
        return "epsilon if all others collude, were the noise secret"
    return "promised if all others collude"


def limit(result: Mapping[str, Any], view: str) -> float:
    """The epsilon that a bound from this view is compared with."""
    return float(result["epsilon_alone" if view == ALL_BUT_ONE else "epsilon"])


def can_refute(result: Mapping[str, Any]) -> bool:
    """Whether the canaries could show more than what was promised."""
    return result["canaries"]["most they can show"] > float(result["epsilon"])


def broken_by(result: Mapping[str, Any]) -> str:
    """What refuted a promise, with its figures."""
    noise, canaries = result["noise"], result["canaries"]
    found = [
        f"attacks from {view} show epsilon {at_least(canaries[view]['epsilon'], 3)} at least, and "
        f"{at_most(limit(result, view))} was promised"
        for view in VIEWS
        if view in canaries and canaries[view]["epsilon"] > limit(result, view)
    ]
    if (noise.get("cosine") or 0.0) > noise["bound"]:
        found.append(
            f"two updates share their noise (cosine {noise['cosine']:.2f}; above "
            f"{noise['bound']:g} it was used twice)"
        )
    return "; ".join(found)


def shown(found: Mapping[str, Any]) -> float:
    """The largest epsilon that attacks show against the promise."""
    canaries = found["canaries"]
    return max(canaries[view]["epsilon"] for view in PROMISED if view in canaries)


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return an audit's findings as pairs of texts; the last pair is the verdict."""
    promised, canaries = float(result["epsilon"]), result["canaries"]
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in canaries["kinds"].items())
    said = "nothing (epsilon inf)"
    if math.isfinite(promised):
        said = f"epsilon {at_most(promised)} at delta {result['delta']:g}"
    if is_seeded(result):
        said = f"nothing: the noise came from a seed ({said} with such noise drawn in secret)"
    found = [
        ("promised", said),
        ("canaries", f"{canaries['planted']:,} of {canaries['in all']:,} planted ({kinds})"),
    ]
    if "epsilon_alone" in result:
        alone = f"epsilon {at_most(float(result['epsilon_alone']))}: the vector's own noise"
        found.append((of_one(result), alone))
    for view in (view for view in VIEWS if view in canaries):
        attack = canaries[view]
        text = (
            f"epsilon at least {at_least(attack['epsilon'], 3)} ({100 * attack['confidence']:g} % "
            f"confidence), from {view}: {attack['right']} of {attack['guesses']} guesses right"
        )
        found.append(("shown by canaries", text))
    if math.isfinite(promised):
        found.append(("noise", _noise(result["noise"])))
    if result["accuracy"] is not None:
        found.append(("accuracy of the audited run", f"{result['accuracy']:.3f}"))
    return [*found, ("the promise", verdict(result))]


def verdict(result: Mapping[str, Any]) -> str:
    """Return the verdict on the privacy promise in words."""
    canaries = result["canaries"]
    if result["refuted"]:
        return "IS BROKEN"
    if not promises(result):
        return "nothing was promised" + ", as the noise came from a seed" * is_seeded(result)
    most = at_least(canaries["most they can show"], 3)
    can = f"{canaries['in all']:,} canaries show epsilon {most}"
    if not can_refute(result):
        return f"is not refuted; {can} at most, so they could not have refuted it: see --canaries"
    return f"is not refuted; {can} at most"


def _noise(noise: Mapping[str, Any]) -> str:
    """State whether noise was used twice."""
    if noise["cosine"] is None:
        text = "not compared: no two updates were sent, or records could move them as far as noise"
    else:
        said = "independent" if noise["cosine"] <= noise["bound"] else "USED TWICE"
        text = f"{said} (largest cosine of two updates {noise['cosine']:.3f})"
        if noise["left_out"]:
            both = noise["institutions"] + noise["left_out"]
            text += f"; compared at {noise['institutions']} of {both} institutions"
    return text + "; from a seed, so it gives no protection" * (noise["source"] == "seeded")
