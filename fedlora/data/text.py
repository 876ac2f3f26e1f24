"""Text from outside: from data, model directories and other machines."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029"  # C0 and C1 controls, line and paragraph separators
    r"\u202a-\u202e\u2066-\u2069"  # writing direction
    r"\ud800-\udfff]"  # surrogates
)

_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)

MISSING = ("", "nan", "none", "null", "na", "n/a", "#n/a", "nat", "-", "?")
"""Labels, folded, with which tables mark a missing value."""


def visible(text: str) -> str:
    r"""Escape each control character and lone surrogate as Python does: ``\x1b``.

    A terminal then reads no part of the text as a command, and a log no part as a new line.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can encode the text. It cannot encode a lone surrogate."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def folded(name: str) -> str:
    """Return the form in which names of customers and institutions are compared.

    The text is NFKC-normalised and case-folded. Invisible characters are removed, and each run of
    white space becomes one space. Spellings that differ in case, width, composition, spaces or
    invisible characters are then equal. Letters of another script that look alike are not. Folding
    a folded name changes nothing.
    """
    if name.isascii():
        return " ".join(name.casefold().split())
    before, after = None, name
    while before != after:  # an invisible character may keep two others from composing
        before = after
        shown = "".join(char for char in before if not _invisible(char))
        after = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", shown).casefold())
    return " ".join(after.split())


def each_folded(values: Sequence[str]) -> list[str]:
    """Return the `folded` form of each value; equal ones are computed once."""
    known = {value: folded(value) for value in set(values)}
    return [known[value] for value in values]


def alike(names: Sequence[str]) -> list[str]:
    """The names of which another one is a spelling; see `folded`."""
    often = Counter(map(folded, names))
    return [name for name in names if often[folded(name)] > 1]


def _invisible(char: str) -> bool:
    """Whether Unicode shows nothing for the character (Default_Ignorable_Code_Point)."""
    return unicodedata.category(char) == "Cf" or bool(_IGNORABLE.match(char))
