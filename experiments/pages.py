"""A page that needs no other file: words, figures and tables, filled into one template."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import jinja2

import fedlora

NUMBER = re.compile(r"[+-]?(inf|[\d,.]+(e[+-]?\d+)?)( ± [\d.]+)?( [%s]| MB)?")


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under heads, which are the first row; folded ones open with a click."""

    rows: Sequence[Sequence[str]]
    title: str = ""
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; ``bad`` makes its note a warning, ``text`` stays as it is spaced."""

    title: str
    words: Sequence[str] = ()
    note: str = ""
    bad: bool = False
    figures: Mapping[str, str] = field(default_factory=dict[str, str])
    tables: Sequence[Table] = ()
    text: str = ""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page; tiles are label -> value."""

    title: str
    words: Sequence[str]
    tiles: Mapping[str, str]
    sections: Sequence[Section]
    foot: str = f"Written by fedlora {fedlora.__version__}. This page loads nothing from elsewhere."


def render(page: Page) -> bytes:
    """The page as HTML. Everything but the figures is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["numeric"] = _numeric
    shown = dataclasses.replace(page, sections=[s for s in page.sections if _filled(s)])
    return environment.get_template("report.html").render(page=shown).encode()


def _numeric(rows: Sequence[Sequence[str]]) -> list[bool]:
    """Which columns hold nothing but numbers."""
    return [
        any(column) and all(NUMBER.fullmatch(cell) for cell in column if cell)
        for column in zip(*rows[1:], strict=True)
    ]


def _filled(section: Section) -> bool:
    return bool(section.words or section.note or section.figures or section.tables or section.text)
