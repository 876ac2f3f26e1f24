"""Figures of a report: SVG with the page's colours and a description for screen readers.

matplotlib draws in placeholder colours, which become the page's CSS variables. One figure then
works in light mode, in dark mode and on paper. Text stays text.
"""

import html
import io
import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    MaxNLocator,
    NullFormatter,
    PercentFormatter,
    StrMethodFormatter,
)

from fedlora.rounding import at_most

INK, MUTED, GRID, BAD = "#010203", "#020304", "#030405", "#040506"
SERIES = tuple(f"#0{c}0{c}0{c}" for c in "6789abcd")
VARIABLES = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
    BAD: "--bad",
    **{colour: f"--series-{i}" for i, colour in enumerate(SERIES, 1)},
}
MARKERS = "osD^vPX*"
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (6, 2, 2, 2)))
MAX_SERIES = len(SERIES)
MAX_COLUMN_CHARACTERS = 24  # of a label in a legend of two columns
MAX_NAME = 26  # characters of a name beside a bar; longer ones would leave the bars no room
MAX_WHOLE = 12  # bars up to which longer names take further lines instead of being cut

Line = tuple[str, Sequence[float], Sequence[float], Sequence[float | None]]
"""Name, x, y, and half the width of the confidence interval of each y."""

STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name from data may have dollar signs
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def draw(
    name: str, title: str, says: str, plot: Callable[[Axes], None], height: float = 3.1
) -> str:
    """Draw one figure as an ``<svg>`` element.

    Args:
        name: Unique on its page.
        title: The figure's heading.
        says: The figure in words, for screen readers.
        plot: Draws on the axes.
        height: The height in inches; the width is 4.5.
    """
    style: Any = {**STYLE, "svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.5, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        plot(axes)
        figure.patch.set_alpha(0)
        for each in figure.axes:
            each.patch.set_alpha(0)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _inline(file.getvalue(), name, title, says)


def _inline(svg: str, name: str, title: str, says: str) -> str:
    """Turn a matplotlib document into an element of a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    box = re.search(r'viewBox="[^"]*"', svg)
    head = (
        f'<svg xmlns:xlink="http://www.w3.org/1999/xlink" {box[0] if box else ""} role="img" '
        f'aria-labelledby="{name}-title {name}-desc"><title id="{name}-title">{html.escape(title)}'
        f'</title><desc id="{name}-desc">{html.escape(says)}</desc>'
    )
    return head + svg[svg.index(">") + 1 :]


def percent_axis(axes: Axes, along: str = "y") -> None:
    """Label an axis in percent and cut it at 0 and 100 %, also where an interval goes beyond."""
    axis = axes.yaxis if along == "y" else axes.xaxis
    low, high = axis.get_view_interval()
    axis.set_view_interval(max(low, -0.02), min(high, 1.02), ignore=True)
    axis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    most = 6 if along == "y" else 4  # below narrow axes beside long names more would overlap
    axis.set_major_locator(MaxNLocator(most, steps=[1, 2, 5, 10], min_n_ticks=3))


def legend_below(axes: Axes) -> None:
    """Add a legend below the axes: two columns, or one in a higher figure for long labels."""
    handles, labels = axes.get_legend_handles_labels()
    figure: Any = axes.figure
    is_wide = max(map(len, labels), default=0) > MAX_COLUMN_CHARACTERS
    if is_wide:
        figure.set_figheight(figure.get_figheight() + 0.1 * len(labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if is_wide else 2)


def by_round(
    name: str,
    title: str,
    lines: Mapping[str, Mapping[int, float]],
    *,
    label: str,
    epsilons: Mapping[int, float] | None = None,
    shares: bool = False,
    from_zero: bool = False,
) -> str:
    """Draw lines against rounds.

    Args:
        name: Unique on its page.
        title: Its heading.
        lines: Name of a line -> round -> value.
        label: The label of the value axis.
        epsilons: Round -> epsilon spent, for a second axis above.
        shares: Whether values are shares, to be shown as percent.
        from_zero: Whether the value axis begins at 0, so that heights can be compared.
    """
    rounds = {number for points in lines.values() for number in points}
    known = [value for points in lines.values() for value in points.values()]

    def plot(axes: Axes) -> None:
        for i, (of, points) in enumerate(list(lines.items())[:MAX_SERIES]):
            marker = MARKERS[i] if len(points) <= 12 else ""
            x, y = list(points), list(points.values())
            axes.plot(x, y, color=SERIES[i], ls=DASHES[i], marker=marker, ms=4, label=of)
        axes.set_xlabel("round")
        axes.set_ylabel(label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(rounds) == 1:
            axes.set_xlim(min(rounds) - 1, min(rounds) + 1)
        if known and not shares and 0 < 20 * min(known) < max(known):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))  # the default writes math
            axes.yaxis.set_minor_formatter(NullFormatter())
        elif known and from_zero and max(known) > 0:
            axes.set_ylim(0, 1.08 * max(known))
        if shares:
            percent_axis(axes)
        if len(lines) > 1:
            legend_below(axes)
        if epsilons:
            _epsilon_axis(axes, epsilons)

    ends = {of: max(points) for of, points in lines.items() if points}
    last = ", ".join(f"{of}: {lines[of][end]:.4g} at round {end}" for of, end in ends.items())
    return draw(name, title, f"{label} by round. Last values: {last}.", plot)


def _epsilon_axis(axes: Axes, epsilons: Mapping[int, float]) -> None:
    low, high = axes.get_xlim()
    rounds = sorted(r for r in epsilons if low <= r <= high)
    count = min(5, len(rounds))
    places = sorted(
        {rounds[round(i * (len(rounds) - 1) / max(1, count - 1))] for i in range(count)}
    )
    above = axes.secondary_xaxis("top")
    above.set_xticks(places, [at_most(epsilons[r], 3) for r in places])
    above.set_xlabel("epsilon spent")


def against_epsilon(title: str, lines: Sequence[Line], levels: Mapping[str, float]) -> str:
    """Draw accuracy against epsilon with confidence bands; ``levels`` are horizontal lines."""
    finite = sorted({x for _, xs, _, _ in lines for x in xs if math.isfinite(x)})
    without = max(finite) * 3 if finite else 10.0  # the position of "no DP"

    def plot(axes: Axes) -> None:
        axes.set_xscale("log")
        for i, (of, xs, ys, halves) in enumerate(lines[:MAX_SERIES]):
            places = [x if math.isfinite(x) else without for x in xs]
            axes.plot(places, ys, color=SERIES[i], ls=DASHES[i], marker=MARKERS[i], ms=5, label=of)
            bands = [(x, y, h) for x, y, h in zip(places, ys, halves, strict=True) if h is not None]
            if bands:
                x, y, h = zip(*bands, strict=True)
                low = [max(0.0, a - b) for a, b in zip(y, h, strict=True)]
                high = [min(1.0, a + b) for a, b in zip(y, h, strict=True)]
                axes.fill_between(x, low, high, color=SERIES[i], alpha=0.18, lw=0)
        for i, (of, y) in enumerate(sorted(levels.items(), key=lambda level: level[1])):
            axes.axhline(y, color=MUTED, ls=DASHES[(i + 1) % len(DASHES)], lw=1.2)
            axes.annotate(
                of,
                (0.99 if i % 2 else 0.01, y),  # two close ones at different ends
                ha="right" if i % 2 else "left",
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                fontsize=8.5,
                color=INK,
            )
        ticks = [*finite, without]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [*(f"{x:g}" for x in finite), "no DP"], minor=False)
        axes.minorticks_off()
        axes.set_xlabel("epsilon (smaller is more private)")
        axes.set_ylabel("accuracy")
        axes.margins(x=0.08)
        percent_axis(axes)
        legend_below(axes)

    words = [
        f"{of}: "
        + ", ".join(
            f"{100 * y:.1f} % at {'no DP' if math.isinf(x) else f'epsilon {x:g}'}"
            for x, y in zip(xs, ys, strict=True)
        )
        for of, xs, ys, _ in lines
    ] + [f"{of}: {100 * y:.1f} %" for of, y in levels.items()]
    return draw("epsilon", title, "accuracy against epsilon. " + "; ".join(words) + ".", plot, 3.6)


def against(name: str, title: str, lines: Sequence[Line], axis: str) -> str:
    """Draw accuracy against a number that the grid varies."""

    def plot(axes: Axes) -> None:
        ticks = sorted({x for _, xs, _, _ in lines for x in xs})
        far = ticks[0] > 0 and ticks[-1] / ticks[0] >= 8
        if far:
            axes.set_xscale("log")
        shown = lines[:MAX_SERIES]
        for i, (of, xs, ys, halves) in enumerate(shown):
            aside = 0.012 * (i - (len(shown) - 1) / 2)  # separates overlapping intervals
            axes.errorbar(
                [
                    x * (ticks[-1] / ticks[0]) ** aside
                    if far
                    else x + aside * (ticks[-1] - ticks[0])
                    for x in xs
                ],
                ys,
                yerr=[math.nan if h is None else h for h in halves],  # no interval: no bar
                color=SERIES[i],
                ls=DASHES[i],
                marker=MARKERS[i],
                ms=5,
                capsize=2,
                label=of,
            )
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
        axes.margins(x=0.08)
        axes.set_xlabel(axis)
        axes.set_ylabel("accuracy")
        percent_axis(axes)
        legend_below(axes)

    words = [
        f"{of}: " + ", ".join(f"{100 * y:.1f} % at {x:g}" for x, y in zip(xs, ys, strict=True))
        for of, xs, ys, _ in lines
    ]
    return draw(name, title, f"accuracy against {axis}. " + "; ".join(words) + ".", plot, 3.6)


def shortened(names: Sequence[str]) -> list[str]:
    """Names of at most `MAX_NAME` characters beside bars: begin and end of longer ones.

    The begin is as long as leaves different names different; whole names, if none does.
    """
    for begin in (MAX_NAME - 9, MAX_NAME // 2, 6, 0):
        end = MAX_NAME - 1 - begin
        cut = [n if len(n) <= MAX_NAME else f"{n[:begin]}…{n[-end:]}" for n in names]
        if len(set(cut)) == len(set(names)):
            return cut
    return list(names)


def bars(
    name: str,
    title: str,
    groups: Mapping[str, Mapping[str, float]],
    *,
    label: str,
    worst: str = "",
    errors: Mapping[tuple[str, str], float] | None = None,
    shares: bool = True,
) -> str:
    """Draw horizontal bars: one position for each row, one colour for each group.

    Args:
        name: Unique on its page.
        title: Its heading.
        groups: Group -> row -> value.
        label: The label of the value axis.
        worst: The row to mark.
        errors: (group, row) -> half the width of its confidence interval.
        shares: Whether values are shares, to be shown as percent.
    """
    rows = list(dict.fromkeys(row for values in groups.values() for row in values))
    thick = 0.8 / max(1, len(groups))

    def plot(axes: Axes) -> None:
        for i, (group, values) in enumerate(list(groups.items())[:MAX_SERIES]):
            places = [j + (i - (len(groups) - 1) / 2) * thick for j in range(len(rows))]
            known = [(p, r) for p, r in zip(places, rows, strict=True) if r in values]
            lengths = [values[r] for _, r in known]
            half = [(errors or {}).get((group, r), 0.0) for _, r in known]
            drawn = axes.barh(
                [p for p, _ in known],
                lengths,
                thick * 0.92,
                color=SERIES[i],
                label=group,
                xerr=half if any(half) else None,
                ecolor=INK,
                error_kw={"lw": 1},
            )
            if len(groups) == 1 and worst in rows:
                drawn.patches[[r for _, r in known].index(worst)].set_facecolor(BAD)
        # A setting or a run is known by all of its name, of which there are few.
        few = len(rows) <= MAX_WHOLE
        cut = [textwrap.fill(row, width=MAX_NAME) for row in rows] if few else shortened(rows)
        marked = [
            f"{said} (worst)" if row == worst else said for row, said in zip(rows, cut, strict=True)
        ]
        axes.set_yticks(range(len(rows)), marked)
        axes.grid(False, axis="y")
        axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row is on top
        for tick, row in zip(axes.get_yticklabels(), rows, strict=True):
            tick.set_fontsize(9)
            if row == worst:
                tick.set_color(BAD)
                tick.set_fontweight("bold")
        axes.set_xlabel(label)
        if shares:
            percent_axis(axes, "x")
        if len(groups) > 1:
            legend_below(axes)

    def said(value: float) -> str:
        return f"{100 * value:.1f} %" if shares else f"{value:.4g}"

    words = [
        f"{group}: " + ", ".join(f"{row} {said(v)}" for row, v in values.items())
        for group, values in groups.items()
    ]
    height = 1.0 + max(1.2, len(rows) * max(0.2, 0.13 * len(groups))) + 0.2 * (len(groups) > 1)
    marked = f" The worst is {worst}." if worst else ""
    return draw(name, title, f"{label}. " + "; ".join(words) + "." + marked, plot, height)


def last_of(records: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Return round -> value, for rounds whose value is a number."""
    return {r["round"]: r[key] for r in records if isinstance(r.get(key), int | float)}
