"""What joining gives: the part of a run's page and of a sweep's page, with its figures."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from experiments import figures
from experiments.conclusion import under_dp
from experiments.figures import DASHES, INK, MARKERS, MAX_SERIES, MUTED, SERIES
from experiments.pages import Section, Table
from fedlora.config.config import RunConfig
from fedlora.runs import joining_verdict
from fedlora.runs.joining_verdict import MAX_SCARCE_RECORDS, MIN_TEXTS, MODELS, has_interval

TITLE = "What joining gives"
MAX_ROWS = 40  # institutions in the figure of a run
POINTS = "own minus alone, percentage points"
MEANINGS = (
    "Each institution compared has three models, all measured on its own held-out records. Alone: "
    "trained at the institution on its own records, as if there were no federation. Shared: the "
    "adapter that the federation released. Own: made from the shared adapter at the institution, "
    "or the model alone where that is kept. The gain of joining is own minus alone."
)
STAYS = (
    "Alone and own have no differential privacy: such a model may reveal records, so it stays at "
    "its institution and must not be passed on. What this page says of privacy is said of the "
    "shared adapter only, not of these models and their figures."
)
PRIVATE = (
    "Alone has no differential privacy: such a model may reveal records, so it stays at its "
    "institution and must not be passed on. Own models were trained from the shared adapter under "
    "differential privacy of their own, with epsilon {epsilon:g} on top of the run's: each card "
    "states the promise of that training, and each ledger was charged for it. They took all steps, "
    "and no record chose a setting for them. What this page says of privacy elsewhere is said of "
    "the shared adapter only, not of these models and their figures."
)
BARS = (
    "Bars in the picture are 95 % intervals over seeds. Seeds are splits of the same records, or "
    "partitions of them with one test file, so another set of records could differ by more."
)
INTERVALS = (
    "An interval says how far the gain could differ with other held-out records of the same kind. "
    "It does not cover the noise of training: another run of this configuration has other noise. "
    "Where joining makes no difference at all, other held-out records alone let about one "
    "institution in forty count as gaining and as many as losing (where models differ on nearly "
    "every text, of ten to some twenty texts at worst one in 17); with the noise of training it is "
    "more. With fewer than "
    f"{MIN_TEXTS} different held-out texts there is no interval, and an institution counts as "
    "neither."
)


def home_promise(config: RunConfig) -> str:
    """What DP says of the models that institutions trained at home."""
    return STAYS


def section(result: Mapping[str, Any], config: RunConfig) -> list[Section]:
    """Return the section on what joining gave in a run; nothing where nothing was compared.

    Args:
        result: The run's ``result.json``.
        config: Its configuration.
    """
    if "joining" not in result:
        return []
    failed = joining_verdict.not_compared(result["joining"])
    missing = [f"Not compared: {failed}."] if failed else []
    joining = joining_verdict.comparison(result)
    if joining is None:
        return [Section(title=TITLE, note="No institution was compared.", bad=True, words=missing)]
    return [
        Section(
            title=TITLE,
            words=[
                MEANINGS,
                home_promise(config),
                *_keeping(joining),
                INTERVALS,
                "In macro-F1, which counts each class alike, the gain is "
                f"{joining_verdict.macro_f1_gain(joining['gain_macro_f1'])}; one record of a rare "
                "class can move it by points.",
                *_shared(joining),
                _scarce(joining),
                *missing,
            ],
            figures=_figure(joining["institutions"]),
            tables=[
                _institutions(joining["institutions"]),
            ],
        )
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    return f"{100 * share:+.1f}"


def _shared(joining: Mapping[str, Any]) -> list[str]:
    """The gain of the shared model; nothing in runs of earlier versions."""
    if "gain_shared" not in joining:
        return []
    return [
        "The shared model, which an institution has too, over models alone: "
        f"{joining_verdict.interval(joining['gain_shared'])}."
    ]


def _scarce(joining: Mapping[str, Any]) -> str:
    scarce = joining["scarce"]
    few = f"a class of which its institution has at most {MAX_SCARCE_RECORDS} training records"
    if not scarce["rows"]:
        return f"Scarce classes: no held-out record is of {few}."
    right = ", ".join(f"{model} on {_percent(scarce[model])} %" for model in MODELS)
    return (
        f"Scarce classes: {scarce['rows']:,} held-out records are of {few}. On these, models are "
        f"right as follows: {right}."
        + (f" The gain is {gain}." if (gain := joining_verdict.scarce_gain(joining)) else "")
    )


def _keeping(joining: Mapping[str, Any]) -> list[str]:
    """Which institutions keep the model alone, and by what rule."""
    names, count = joining_verdict.keepers(joining), len(joining["institutions"])
    said = f"{len(names)} of {count} institutions keep the model alone as their own"
    return [said + (f": {', '.join(names)}. Their gain is 0." if names else ".")]


_MODEL_HEADS = (*(f"{model}, %" for model in MODELS), "gain, points")


def _accuracies(of: Mapping[str, Any]) -> list[str]:
    return [*(_percent(of[model]) for model in MODELS), _points(of["gain"])]


def _interval(of: Mapping[str, Any]) -> list[str]:
    """The bounds of a gain; empty where it has too few texts for an interval."""
    return [_points(of["low"]), _points(of["high"])] if has_interval(of) else ["", ""]


def _institutions(institutions: Mapping[str, Mapping[str, Any]]) -> Table:
    head = ["institution", "training records", "held-out records", *_MODEL_HEADS]
    head += ["95 % from", "to", "steps alone", "steps own", "weight"]
    rows = [
        [
            name,
            f"{of['records']:,}",
            f"{of['rows']:,}",
            *_accuracies(of),
            *_interval(of),
            *(str(of[key]) for key in ("alone_steps", "own_steps")),
            "alone" if of["keeps_alone"] else str(of["weight"]),
        ]
        for name, of in institutions.items()
    ]
    title = (
        "By institution (weight: share of the adapter trained at home in the own model; the rest "
        "is the shared adapter; alone: the own model is the model alone)"
    )
    return Table(rows=[head, *rows], title=title, folded=True)


def _figure(institutions: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """Draw each institution's step from alone to own, the largest gain first."""
    order = sorted(institutions, key=lambda name: (-institutions[name]["gain"], name))
    title = "Accuracy of each institution: from alone to own"
    if len(order) > MAX_ROWS:
        title += f", the {MAX_ROWS} lowest gains"
    ends = {
        name: (institutions[name]["alone"], institutions[name]["own"]) for name in order[-MAX_ROWS:]
    }
    return {title: arrows(title, ends)}


def arrows(title: str, ends: Mapping[str, tuple[float, float]]) -> str:
    """Draw an arrow for each institution, from its accuracy alone to that of its own model.

    Directions and colours say the same, so that the figure needs no colours.

    Args:
        title: Its heading.
        ends: Institution -> the two accuracies, in the order of rows.
    """
    kinds = (
        ("own, better", ">", SERIES[0]),
        ("own, worse", "<", SERIES[1]),
        ("own, the same", "D", MUTED),
    )

    def plot(axes: Axes) -> None:
        drawn: set[int] = set()
        for place, (alone, own) in enumerate(ends.values()):
            kind = 0 if own > alone else 1 if own < alone else 2
            _, marker, colour = kinds[kind]
            drawn.add(kind)
            axes.plot([alone, own], [place, place], color=colour, lw=1.8)
            axes.plot([alone], [place], color=INK, marker="o", ms=3.5, ls="")
            axes.plot([own], [place], color=colour, marker=marker, ms=6 - kind // 2 * 2, ls="")
        axes.set_yticks(range(len(ends)), figures.shortened(list(ends)))
        axes.set_ylim(len(ends) - 0.5, -0.5)
        axes.tick_params(axis="y", labelsize=9)
        axes.set_xlabel("accuracy on its own held-out records")
        figures.percent_axis(axes, "x")
        handles = [Line2D([], [], color=INK, marker="o", ms=3.5, ls="", label="alone")]
        handles += [
            Line2D([], [], color=colour, marker=marker, ms=6, ls="", label=label)
            for i, (label, marker, colour) in enumerate(kinds)
            if i in drawn
        ]
        figure: Any = axes.figure
        figure.legend(handles=handles, loc="outside lower center", ncols=2)

    words = ", ".join(
        f"{who} {_percent(alone)} % alone and {_percent(own)} % own"
        for who, (alone, own) in ends.items()
    )
    height = 1.3 + max(1.2, 0.2 * len(ends))
    return figures.draw("joining", title, f"Accuracy alone and own. {words}.", plot, height)


def by_records(lines: Sequence[Mapping[str, Any]], epsilon: str, budget: float) -> dict[str, str]:
    """Draw the gain of a sweep's settings against the records that an institution holds.

    Panels are budgets, lines are numbers of institutions. Settings of one budget may differ in what
    institutions hold and in nothing else. Nothing is drawn of a single number and holding.

    Args:
        lines: Lines of `experiments.results.summary` on all rows together.
        epsilon: The name of the axis of budgets.
        budget: The budget under DP where the sweep has no such axis. (Spent epsilons differ by size
            class.)
    """
    known = [line for line in lines if line.get("gain") is not None]
    if len({(round(line["institutions"]), round(line["records"])) for line in known}) < 2:
        return {}
    budgets: dict[float, list[Mapping[str, Any]]] = {}
    for line in sorted(known, key=lambda p: (p["institutions"], p["records"])):
        of = float(line.get(epsilon, budget)) if under_dp(line) else math.inf
        budgets.setdefault(of, []).append(line)
    panels = {
        "no DP" if of == math.inf else f"epsilon {of:g}": budgets[of] for of in sorted(budgets)
    }
    counts = sorted({round(line["institutions"]) for line in known})
    title = BY_RECORDS
    if len(counts) > MAX_SERIES:
        title += f" (the {MAX_SERIES} smallest of {len(counts)} numbers of institutions)"
    return {title: _gains(title, panels, counts[:MAX_SERIES])}


BY_RECORDS = "Gain of joining by records held"


def _gains(
    title: str, panels: Mapping[str, Sequence[Mapping[str, Any]]], counts: Sequence[int]
) -> str:
    """Draw gains against records, a line for each number of institutions."""
    everything = [point for points in panels.values() for point in points]
    ticks: list[int] = []
    for held in sorted(round(point["records"]) for point in everything):
        if not ticks or held > 1.2 * ticks[-1]:  # closer labels would overlap
            ticks.append(held)

    def plot(only: Axes) -> None:
        figure: Any = only.figure
        only.remove()
        grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)
        for axes, (budget, points) in zip(grid[:, 0], panels.items(), strict=True):
            axes.axhline(0, color=MUTED, lw=1.2)
            for i, count in enumerate(counts):
                line = [p for p in points if round(p["institutions"]) == count]
                if not line:
                    continue
                aside = 1.02 ** (i - (len(counts) - 1) / 2)  # separates overlapping intervals
                axes.errorbar(
                    [p["records"] * aside for p in line],
                    [100 * p["gain"] for p in line],
                    yerr=[100 * (math.nan if (h := p["gain_ci95"]) is None else h) for p in line],
                    color=SERIES[i],
                    ls=DASHES[i],
                    marker=MARKERS[i],
                    ms=5,
                    capsize=2,
                    label=f"{count} institutions",
                )
            axes.set_title(budget, fontsize=10, loc="left")
            axes.set_xscale("log")
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.xaxis.set_minor_formatter(NullFormatter())
            axes.minorticks_off()
        grid[-1, 0].set_xlabel("training records of an institution")
        figure.supylabel(POINTS, fontsize=10, color=INK)
        shown = {
            label: handle
            for axes in grid[:, 0]
            for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(shown.values(), shown, loc="outside lower center", ncols=2)

    words = "; ".join(
        f"{budget}, {p['institutions']:.0f} institutions of {p['records']:.0f} records: "
        f"{_points(p['gain'])}"
        for budget, points in panels.items()
        for p in points
    )
    says = f"{POINTS}, against records. {words}."
    return figures.draw("joining", title, says, plot, 1.4 + 1.9 * len(panels))
