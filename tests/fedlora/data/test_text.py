"""Names that a reader takes for one are one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.text import folded


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("e\u200d\u0301", "\u00e9"),  # a joiner between a letter and its accent
        ("\u1100\u200b\u1161", "\uac00"),  # a zero width space in a Hangul syllable
        ("Ada\ufe0f", "ada"),  # a variation selector
        ("A\u034fda", "ada"),  # a grapheme joiner
        ("Ada\u3164", "ada"),  # a filler that NFKC turns into another one
        ("  Ada\u00a0 L ", "ada l"),
    ],
)
def test_spellings_that_look_alike_are_one_name(one, other):
    assert folded(one) == folded(other)


@given(st.text())
def test_the_form_of_a_form_is_the_form_itself(name):
    assert folded(folded(name)) == folded(name)


def test_names_that_differ_for_a_reader_stay_apart():
    assert len({folded(name) for name in ("Ada", "Ad\u00e1", "A da", "Adam", "")}) == 5
