"""Metrics against scikit-learn and by hand."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from fedlora.models import metrics

LABELS = ("negative", "neutral", "positive")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["a", "b", "d", None]))))
def test_macro_f1_is_that_of_scikit_learn_over_the_classes_that_occur(
    rows: list[tuple[str, str | None]],
) -> None:
    truth, predicted = [t for t, _ in rows], [p for _, p in rows]
    if not rows:
        assert math.isnan(metrics.macro_f1(truth, predicted))
        return
    occurring = sorted({*truth, *predicted} - {None})
    expected = f1_score(
        truth, [p or "none" for p in predicted], labels=occurring, average="macro", zero_division=0
    )
    assert metrics.macro_f1(truth, predicted) == pytest.approx(expected)


def test_an_unparseable_answer_is_wrong_and_no_class() -> None:
    result = metrics.classification(["a", "a", "b"], ["a", None, None], ("a", "b", "c"))
    assert result["accuracy"] == pytest.approx(1 / 3)
    assert result["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)  # a: P 1, R 1/2; c never occurs
    assert result["per_class"] == {
        "a": {"truth": 2, "predicted": 1, "correct": 1},
        "b": {"truth": 1, "predicted": 0, "correct": 0},
        "c": {"truth": 0, "predicted": 0, "correct": 0},
    }


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("positive", "positive"),
        (" Positive. It rose", "positive"),
        ("positively", None),
        ("it is positive", None),
        ("neutral positive", "neutral positive"),
        ("", None),
        ("12 million", "12"),
        ("12, or so.", "12"),
        ("12.75 million", None),
        ("12,750", None),
    ],
)
def test_an_answer_is_read_only_where_the_response_begins_with_it(
    text: str, expected: str | None
) -> None:
    assert (
        metrics.leading_answer(text, [*["positive", "neutral", "12"], "neutral positive"])
        == expected
    )


def test_what_accuracy_has_to_beat_and_a_model_that_says_one_thing_only():
    classes = metrics.per_class(["a", "b", "b"], ["b", "b", "b"], ("a", "b", "c"))
    assert metrics.majority(classes) == ("b", 2 / 3)
    assert metrics.only_prediction(classes) == "b"
    assert metrics.only_prediction(metrics.per_class(["a", "b"], ["a", "b"])) is None
    assert metrics.majority_macro_f1(classes) == metrics.macro_f1(["a", "b", "b"], ["b"] * 3) == 0.4
    for known in ((), ("a", "b")):  # rows of one class show nothing
        assert metrics.only_prediction(metrics.per_class(["a"], ["a"], known)) is None
