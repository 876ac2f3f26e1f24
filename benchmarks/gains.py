"""README's picture of what joining gives, drawn from the tables of README and docs/results.md.

Usage: python -m benchmarks.gains

Run it after a change of these tables; a test compares both.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter

from benchmarks.results import DOCUMENT, PICTURES, standing_alone
from experiments import figures
from fedlora.errors import InputError
from fedlora.files import write_atomic

README = DOCUMENT.parents[1] / "README.md"
PICTURE = PICTURES / "what-joining-gives.svg"
TITLE = "What joining gives, by what an institution holds"


class Gain(NamedTuple):
    """Own minus alone in percentage points, with its 95 % interval."""

    budget: str
    mean: float
    low: float
    high: float


NO_DP, EIGHT, ONE, SECURE = "no DP", "epsilon 8", "epsilon 1", "secure aggregation"
BUDGETS = (NO_DP, EIGHT, SECURE, ONE)
COLUMNS = {"without DP": NO_DP, "epsilon 8": EIGHT, "epsilon 1": ONE}
NOISES = {"inf": NO_DP, "none": NO_DP, "8": EIGHT, "local-8": EIGHT, "1": ONE, "shared-8": SECURE}
AS_THEY_ARE = {
    "demo": "demo,\n39 industries",
    "unequal": "FPB,\n4 institutions",
    "complaints": "complaints,\n10 companies",
}
"""A word of a row of README -> what the picture calls it."""


def tables(text: str) -> Iterator[list[list[str]]]:
    """The tables of a document, each as rows of cells, the head first."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        lines = [line.strip("|").split("|") for line in block.splitlines()]
        yield [[cell.strip(" *") for cell in line] for line in (lines[0], *lines[2:])]


def part(text: str, begin: str) -> str:
    """The text from a line on to the next heading or end of a sweep.

    Raises:
        InputError: If no line begins so.
    """
    found = re.search(rf"^{re.escape(begin)}\n(.*?)(?=^#|^<!-- end)", text, re.M | re.S)
    if found is None:
        raise InputError(f"no line is {begin!r}; the picture is drawn from the table after it")
    return found[1]


def _plus_minus(budget: str, cell: str) -> Gain:
    mean, half = (float(value) for value in cell.replace("*", "").split(" ± "))
    return Gain(budget, mean, mean - half, mean + half)


def by_holdings(text: str) -> dict[int, list[Gain]]:
    """Records held -> gains of a table by holdings; "own minus alone" follows its budget."""
    found: dict[int, list[Gain]] = {}
    head, *rows = next(table for table in tables(text) if table[0][0] == "records")
    for row in rows:
        if row[0].isdigit():
            for before, name, cell in zip(head, head[1:], row[1:], strict=False):
                budget = COLUMNS.get(before.partition(":")[0])
                if budget and name == "own minus alone":
                    found.setdefault(int(row[0]), []).append(_plus_minus(budget, cell))
    return found


def by_sweep(text: str) -> dict[int, list[Gain]]:
    """Records held -> gains of a sweep whose holdings are called ``16-hold-80``."""
    found: dict[int, list[Gain]] = {}
    head, *rows = next(tables(text))
    for row in (dict(zip(head, cells, strict=True)) for cells in rows):
        records = int(row["holdings"].rpartition("-")[2])
        budget = NOISES[row.get("noise") or row["privacy.epsilon"]]
        found.setdefault(records, []).append(_plus_minus(budget, row["gain of joining"]))
    return found


def as_they_are(text: str) -> dict[str, list[Gain]]:
    """Institutions -> gains of README's rows on records that are divided as they occur."""
    found: dict[str, list[Gain]] = {}
    name = ""
    for row in next(table for table in tables(text) if table[0][0] == "records")[1:]:
        if not row[0].startswith("the same"):
            name = next((called for word, called in AS_THEY_ARE.items() if word in row[0]), "")
        if name:
            words = {"without DP": NO_DP, SECURE: SECURE}
            budget = next((words[word] for word in words if word in row[0]), EIGHT)
            mean, low, high = map(float, re.findall(r"[-+]?\d+\.\d+", row[-1])[:3])
            found.setdefault(name, []).append(Gain(budget, mean, low, high))
    return found


def panels(document: str, readme: str) -> dict[str, Mapping[Any, Sequence[Gain]]]:
    """Title -> records held or name -> gains."""
    by = "### By what an institution holds"
    intents: dict[int, list[Gain]] = {}
    for sweep in ("joining-banking77", "joining-banking77-more", "joining-banking77-larger"):
        for records, gains in by_sweep(part(document, f"<!-- Sweep {sweep} -->")).items():
            intents.setdefault(records, []).extend(gains)
    return {
        "us-gaap concepts at random": by_holdings(part(document, by)),
        "FPB sentences at random": by_holdings(part(document, f"{by}: sentences")),
        "77 intents, of which each holds a few": intents,
        "institutions as they are": as_they_are(readme),
    }


def says(drawn: Mapping[str, Mapping[Any, Sequence[Gain]]]) -> str:
    """The picture in words."""
    return " ".join(
        f"{title}: "
        + "; ".join(
            f"{str(place).replace(chr(10), ' ')}{' records' * isinstance(place, int)}, "
            f"{gain.budget} {gain.mean:+.1f} ({gain.low:.1f} to {gain.high:.1f})"
            for place, gains in sorted(places.items(), key=lambda item: str(item[0]).zfill(4))
            for gain in gains
        )
        + "."
        for title, places in drawn.items()
    )


def draw(drawn: Mapping[str, Mapping[Any, Sequence[Gain]]]) -> str:
    """The picture as an ``<svg>`` element: a panel for each kind of records."""

    def plot(only: Axes) -> None:
        figure: Any = only.figure
        only.remove()
        figure.set_size_inches(9, 6.2)
        grid = figure.subplots(2, 2, sharey=True)
        for axes, (title, places) in zip(grid.flat, drawn.items(), strict=True):
            axes.axhline(0, color=figures.MUTED, lw=1.2)
            numbers = all(isinstance(place, int) for place in places)
            named = sorted(places) if numbers else list(places)
            ticks = named if numbers else list(range(len(named)))
            for i, budget in enumerate(BUDGETS):
                found = [
                    (tick, count, gain)
                    for tick, place in zip(ticks, named, strict=True)
                    for count, gain in enumerate(g for g in places[place] if g.budget == budget)
                ]
                aside = [0.09 * (i - 1.5) + 0.02 * count for _, count, _ in found]
                axes.errorbar(
                    [t * (1 + a) if numbers else t + 2 * a
                     for (t, _, _), a in zip(found, aside, strict=True)],
                    [gain.mean for *_, gain in found],
                    yerr=[[gain.mean - gain.low for *_, gain in found],
                          [gain.high - gain.mean for *_, gain in found]],
                    color=figures.SERIES[i], marker=figures.MARKERS[i], ls="none", ms=5, lw=1,
                    label=budget,
                )  # fmt: skip
            axes.set_title(title, fontsize=10, loc="left")
            if numbers:
                axes.set_xscale("log")
                axes.set_xlabel("training records of an institution")
                axes.xaxis.set_minor_formatter(NullFormatter())
                axes.minorticks_off()
                axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            else:
                axes.set_xticks(ticks, named)
                axes.set_xlim(-0.5, len(named) - 0.5)
        figure.supylabel("own minus alone, percentage points", fontsize=10, color=figures.INK)
        handles, labels = grid[1, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(BUDGETS))

    return figures.draw("gains", TITLE, says(drawn), plot)


def main() -> None:
    """Draw README's picture anew."""
    drawn = panels(DOCUMENT.read_text("utf-8"), README.read_text("utf-8"))
    write_atomic(PICTURE, f"{standing_alone(draw(drawn))}\n".encode())


if __name__ == "__main__":
    main()
