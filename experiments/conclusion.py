"""The conclusion of a sweep in words: is the federation worth it, and are there seeds to say so?"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from experiments.pages import Section
from experiments.results import CONFIDENCE, text_of
from fedlora.runs.joining_verdict import MIN_CLASS_TEXTS

Lines = Sequence[Mapping[str, Any]]

MIN_SEEDS = 3
"""With fewer seeds Student's t makes intervals 13 times as wide as the error, or there are none."""


def of(pooled: Lines, axes: Sequence[str], data_sets: Sequence[str] = ()) -> Section:
    """Say whether the federation is worth it, and whether there are seeds enough to say so.

    Args:
        pooled: Lines of `experiments.results.summary` on all rows together.
        axes: The axes of the grid.
        data_sets: Those of them whose values are different data sets. Each data set then has a best
            setting of its own; the settings in which joining pays are counted over all together.
    """
    if compared := [line for line in pooled if line.get("gain") is not None]:
        return _of_joining(compared, axes)
    if data_sets:
        return _of_each(pooled, axes, data_sets)
    line, key, against, settings = _headline(pooled)
    if line is None:
        return Section(title="Conclusion", note="Nothing was measured.", bad=True)
    setting = setting_of(line, axes)
    said = f"{line['arm']}{f' ({setting})' if setting else ''}"
    reached = f"{said} is right on {100 * line['accuracy']:.1f} % of held-out rows"
    few = min(one["seeds"] for one in pooled) < MIN_SEEDS
    words: list[str] = []
    if not key:
        note, caution, bad = f"The best setting, {reached}.", few, False
    else:
        gain, half = line[key], _widened(line, key, settings)
        interval = "" if half is None else f", 95 % interval ± {100 * half:.1f}"
        if interval and settings > 1:
            interval += f"; its level allows for the choice among {settings} settings"
        clear = half is not None and abs(gain) > half
        start = (
            "Joining makes no difference that these seeds can show"
            if not clear
            else ("Joining pays" if gain > 0 else "Joining does not pay")
        )
        note = f"{start}: {reached}, {100 * gain:+.1f} points against {against}{interval}."
        caution, bad = few or not clear, clear and gain < 0
    if (free := _without_dp(line, pooled, axes)) is not None:
        words.append(
            f"Without differential privacy the same setting is right on {100 * free:.1f} % of "
            f"them: {100 * (free - line['accuracy']):+.1f} points (means, without an interval)."
        )
    if few:
        words.append(_too_few(pooled))
    if len({setting_of(one, axes) for one in pooled if one["arm"] == line["arm"]}) > 1:
        words.append(
            "The setting was chosen as the best of several on the rows that it is measured on, so "
            "its figure is somewhat too good."
        )
    return Section(title="Conclusion", note=note, bad=bad, caution=caution and not bad, words=words)


def _of_each(pooled: Lines, axes: Sequence[str], data_sets: Sequence[str]) -> Section:
    """Conclude each data set by itself."""
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for line in pooled:
        lines.setdefault(setting_of(line, data_sets), []).append(line)
    others = [axis for axis in axes if axis not in data_sets]
    each = {name: of(own, others) for name, own in lines.items()}
    return Section(
        title="Conclusion",
        note="The data sets differ; each has a conclusion of its own.",
        words=[" ".join([f"{name}: {own.note}", *own.words]) for name, own in each.items()],
        bad=any(own.bad for own in each.values()),
        caution=any(own.caution for own in each.values()),
    )


def _too_few(lines: Lines) -> str:
    least = min(one["seeds"] for one in lines)
    return (
        f"Too few seeds: {'one seed gives' if least == 1 else f'{least} seeds give'} "
        f"{'no interval' if least == 1 else 'intervals too wide to tell settings apart'}, and "
        f"a difference may be chance. Use {MIN_SEEDS} or more."
    )


def _of_joining(compared: Lines, axes: Sequence[str]) -> Section:
    """Count the settings in which joining pays, and those in which it does not: under DP first."""
    each = [line for line in compared if not line["same_as"] and line["gain_ci95"] is not None]
    if not each:
        note = "One seed cannot show whether joining pays. Use three or more."
        if any(line["not_compared"] and line["accuracy_ci95"] is not None for line in compared):
            note = (
                "At most one seed of a setting has a comparison, which cannot show whether joining "
                "pays: elsewhere models at home could not be made or measured."
            )
        return Section(title="Conclusion", note=note, caution=True)
    least = min(line["seeds"] for line in each)
    said: list[str] = []
    counted: list[tuple[int, int, int]] = []
    for private, where in ((True, "under differential privacy"), (False, "without it")):
        lines = [line for line in each if under_dp(line) == private]
        pays, costs = _clear(lines, "gain")
        if lines:
            counted.append((pays, costs, len(lines)))
            where = where if said or private else "without differential privacy"
            said.append(
                f"{where[0].upper()}{where[1:]} in {pays} of {len(lines)} settings, and in "
                f"{costs} it costs"
            )
    note = (
        f"Where joining pays: {'. '.join(said)}. It pays where institutions' own models are ahead "
        "of models trained alone by more than the 95 % interval over seeds, and costs where they "
        "are behind by more than that."
    )
    intervals = [line for line in each if line["gain_macro_f1_ci95"] is not None]
    both = [line for line in intervals if not line["classes_with_few_texts"]]
    pays, costs = _clear(both, "gain_macro_f1")
    ends = [choose(each, key=lambda line: line["gain"]) for choose in (max, min)]
    words = [
        f"{word} gain: {100 * line['gain']:+.1f} ± {100 * line['gain_ci95']:.1f} points, "
        + line["arm"]
        + (f" ({setting})" if (setting := setting_of(line, axes)) else "")
        + f", with {100 * line['alone']:.1f} % alone, {100 * line['shared']:.1f} % shared and "
        f"{100 * line['own']:.1f} % own."
        for word, line in zip(("Largest", "Smallest"), ends, strict=True)
    ]
    words.append(
        f"These are gains in accuracy. In macro-F1, which counts each class alike, joining pays in "
        f"{pays} of {len(both)} settings and costs in {costs}."
        if both
        else "These are gains in accuracy."
    )
    if rare := len(intervals) - len(both):
        words[-1] += (
            f" In {rare} of the settings a class has fewer than {MIN_CLASS_TEXTS} different "
            "held-out texts in some split, so that macro-F1 cannot tell there."
        )
    words.append(
        "Where joining makes no difference, chance still counts at most about one setting in forty "
        "as paying and as many as costing; several at once, because settings share records, and "
        "more where all seeds have one test file. The largest and the smallest gain are picked "
        "from many, so they are further from 0 than the same settings would be again."
    )
    if least < MIN_SEEDS:
        words.append(_too_few(each))
    ahead, behind, settings = counted[0]  # under DP where a setting is: that is what banks ask
    bad = behind > max(ahead, _by_chance(settings))
    doubtful = least < MIN_SEEDS or ahead <= _by_chance(settings)
    caution = not bad and (doubtful or costs + sum(one[1] for one in counted) > 0)
    return Section(title="Conclusion", note=note, bad=bad, caution=caution, words=words)


def _by_chance(settings: int) -> int:
    """So many settings, or fewer, pay, or cost, in 19 of 20 sweeps where nothing differs.

    This is of settings that share no records. Those that do pay together, more often than that.
    """
    from scipy import stats

    return int(stats.binom.ppf(CONFIDENCE, settings, (1 - CONFIDENCE) / 2))


def _clear(lines: Lines, key: str) -> tuple[int, int]:
    """The numbers of lines whose gain is above 0, and below, by more than its interval."""
    gains = [line[key] for line in lines if abs(line[key]) > line[f"{key}_ci95"]]
    pays = sum(gain > 0 for gain in gains)
    return pays, len(gains) - pays


def _headline(pooled: Lines) -> tuple[Mapping[str, Any] | None, str, str, int]:
    """The line that the conclusion is about, the key of its gain, and what the gain is against.

    It is the best setting of the federation, under DP if there is one; else the best of all. Last
    is the number of settings of which it is the best.
    """
    known = [line for line in pooled if line["accuracy"] is not None]
    together = [line for line in known if line["arm"].startswith("federated")]
    chosen = [line for line in together if under_dp(line)] or together or known
    if not chosen:
        return None, "", "", 0
    settings = sum(not line["same_as"] for line in chosen)
    best = max(chosen, key=lambda line: line["accuracy"])
    for key, against in (
        ("gain_over_local", "each institution alone"),
        ("gain_over_local_dp", "each institution alone under differential privacy"),
    ):
        if together and best.get(key) is not None:
            return best, key, against, settings
    return best, "", "", settings


def _widened(line: Mapping[str, Any], key: str, settings: int) -> float | None:
    """Half the 95 % interval of the best of several settings' gain; None for one seed.

    The best of k settings is ahead by chance as often as any of them, so each side of its interval
    has an error of 2.5 % / k (Bonferroni).
    """
    half = line[f"{key}_ci95"]
    if half is None or settings < 2:
        return half
    from scipy import stats

    tail, degrees = (1 - CONFIDENCE) / 2, line[f"{key}_n"] - 1
    wide, plain = stats.t.isf([tail / settings, tail], degrees)
    return float(half * wide / plain)


def _without_dp(line: Mapping[str, Any], pooled: Lines, axes: Sequence[str]) -> float | None:
    """The accuracy of the federation without DP in the setting of a line under DP.

    Settings of privacy are no part of it. None if it is unknown, or over another number of seeds.
    """
    others = [axis for axis in axes if not axis.startswith("privacy.")]
    for free in pooled:
        same = all(free[axis] == line[axis] for axis in (*others, "seeds"))
        if f"{free['arm']}-dp" == line["arm"] and same and free["accuracy"] is not None:
            return free["accuracy"]
    return None


def under_dp(line: Mapping[str, Any]) -> bool:
    """Whether a line's arm is under DP."""
    return line["arm"].endswith("-dp")


def setting_of(line: Mapping[str, Any], axes: Iterable[str]) -> str:
    """Name a line's setting by its values on these axes."""
    parts = [_short(axis, line[axis]) for axis in axes]
    return ", ".join(parts)


def _short(axis: str, value: Any) -> str:
    """Return the label of an axis value; numbers are labelled with the axis."""
    text = text_of(value)
    number = isinstance(value, int | float) or text == "inf"
    return f"{axis.rpartition('.')[2]} {text}" if number else text
