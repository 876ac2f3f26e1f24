"""A self-contained page: text, figures and tables in one template."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

import fedlora

FOOT = f"Written by fedlora {fedlora.__version__}. This page loads nothing from elsewhere."
NUMBER = re.compile(r"[+-]?(inf|[\d,.]+(e[+-]?\d+)?)( ± [\d.]+)?( [%s]| MB)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text; the first row is the head.

    A folded table opens with a click. A reader may sort the rows unless they are ``fixed``, as
    where each row is another figure.
    """

    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False
    fixed: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page.

    ``bad`` makes its note a warning, ``caution`` a milder one; ``points`` are a list; ``text``
    keeps its white space.
    """

    title: str
    words: Sequence[str] = ()
    note: str = ""
    bad: bool = False
    caution: bool = False
    points: Sequence[str] = ()
    figures: Mapping[str, str] = field(default_factory=dict[str, str])
    tables: Sequence[Table] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page; tiles are label -> value.

    ``opening`` comes first, and on paper it is a sheet of its own with title, ``about`` and tiles.
    """

    title: str
    about: str = ""
    opening: Sequence[Section]
    tiles: Mapping[str, str]
    sections: Sequence[Section]


def render(page: Page) -> bytes:
    """Render the page as HTML. All text but the figures is escaped."""
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    templates.filters["numeric"] = _numeric
    shown = dataclasses.replace(
        page,
        opening=[s for s in page.opening if _filled(s)],
        sections=[s for s in page.sections if _filled(s)],
    )
    return templates.get_template("report.html").render(page=shown, foot=FOOT).encode()


def number(value: Any) -> str:
    """Format a number; inf, which JSON holds as text, stays."""
    return f"{value:.3f}" if isinstance(value, float) and math.isfinite(value) else str(value)


def environment(found: Mapping[str, Any]) -> Section:
    """Return the section on versions, commit and machine of a run."""
    dirty = " with changes that are not committed" if found.get("git_dirty") else ""
    rows = [
        ["what", "which"],
        ["command", " ".join(found["command"])],
        ["commit", f"{found['git_sha'] or 'unknown'}{dirty}"],
        ["machine", f"{found['platform']}, {found['cores']} cores, {found['processor']}"],
        ["GPUs", ", ".join(found["gpus"]) or "none"],
        ["Python", found["python"]],
        *([name, version] for name, version in found["versions"].items()),
    ]
    return Section(title="Environment", tables=[Table(rows=rows)])


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Return for each column whether it holds numbers only."""
    return [
        any(column) and all(NUMBER.fullmatch(cell) for cell in column if cell)
        for column in zip(*rows[1:], strict=True)
    ]


def _filled(section: Section) -> bool:
    return bool(
        section.words
        or section.note
        or section.points
        or section.figures
        or section.tables
        or section.text
    )
