"""Text from outside: from data, model directories and other machines."""

import re
import unicodedata

_CONTROL = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029"  # C0 and C1 control characters, line and paragraph ends
    r"\u202a-\u202e\u2066-\u2069"  # the direction of what follows
    r"\ud800-\udfff]"  # halves of pairs, which no encoding can write
)

_IGNORABLE = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u3164\ufe00-\ufe0f\uffa0\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    r"""Return the text, each control character and lone surrogate as Python writes it: ``\x1b``.

    So a terminal takes no part of it as a command, and a log no part of it as a line of its own.
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def is_unicode(text: str) -> bool:
    """Whether UTF-8 can write the text, which it cannot where a surrogate stands alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def folded(name: str) -> str:
    """Return the form in which names of customers and institutions are compared.

    NFKC, case folded, without invisible characters, each run of white space one space, none at the
    ends: spellings that a reader takes for one name are one. The form of a form is the form itself.
    """
    before, after = None, name
    while before != after:  # an invisible character may keep two others from composing
        before = after
        shown = "".join(char for char in before if not _invisible(char))
        after = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", shown).casefold())
    return " ".join(after.split())


def _invisible(char: str) -> bool:
    """Whether Unicode shows nothing for the character (Default_Ignorable_Code_Point)."""
    return unicodedata.category(char) == "Cf" or bool(_IGNORABLE.match(char))
