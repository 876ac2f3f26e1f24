import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.partition import (
    by_column,
    by_scheme,
    file_names,
    hold_out,
    normalise,
)
from fedlora.errors import InputError

SCHEMES = ["iid", "dirichlet:0.5", "pathological:2"]
CLASSES = np.repeat(np.arange(3), [60, 90, 30])


def test_texts_that_differ_in_case_space_or_punctuation_count_as_equal() -> None:
    assert normalise(" Net\tINCOME,  2019! ") == normalise("net income 2019") == "net income 2019"
    assert normalise("\ufb01nance") == "finance"
    assert normalise("re\xadpay\u200bment") == "repayment"  # as a PDF hyphenates
    assert normalise("loss") != normalise("loss 1")
    assert len({normalise(text) for text in ("कि", "की", "का")}) == 3  # vowels are marks
    assert normalise("é, (naïve_1) – 北京!") == "é naïve_1 北京"
    assert normalise("?!") != normalise("!")


@given(
    st.lists(st.tuples(st.sampled_from("abcdefghij"), st.sampled_from("xyz")), max_size=40),
    st.floats(0, 0.99),
    st.integers(0, 5),
)
def test_equal_texts_share_a_side_and_every_label_keeps_a_training_row(
    rows: list[tuple[str, str]], fraction: float, seed: int
) -> None:
    texts = [text.upper() if i % 2 else text + " " for i, (text, _) in enumerate(rows)]
    labels = [label for _, label in rows]
    held = hold_out(texts, fraction=fraction, seed=seed, labels=labels).tolist()
    train_texts = {normalise(t) for t, h in zip(texts, held, strict=True) if not h}
    assert train_texts.isdisjoint(normalise(t) for t, h in zip(texts, held, strict=True) if h)
    assert {y for y, h in zip(labels, held, strict=True) if not h} == set(labels)


def test_the_held_out_share_of_many_texts_is_the_fraction_and_the_seed_chooses_them() -> None:
    # 10,000 fixed texts: a share outside 0.2 +- 0.02 (5 deviations) has probability 6e-7.
    texts = [f"text {i}" for i in range(10_000)]
    one, two = (hold_out(texts, fraction=0.2, seed=seed, labels=None) for seed in (0, 1))
    assert abs(one.mean() - 0.2) < 0.02
    # Independent choices agree with probability 0.2^2 + 0.8^2 = 0.68.
    assert abs((one == two).mean() - 0.68) < 0.03


def test_natural_institutions_are_the_values_with_enough_training_rows() -> None:
    train = ["b"] * 3 + ["a"] * 2 + ["c"] + ["b"]
    held_out = ["a", "d", "c", "b"]
    dealt = by_column("who", train, held_out, institutions=0, min_records=2)
    assert dealt.names == ("a", "b")
    assert dealt.train.tolist() == [1, 1, 1, 0, 0, -1, 1]
    assert dealt.held_out.tolist() == [0, -1, -1, 1]
    assert dealt.left_out == {"c": 1, "d": 0}


def test_file_names_are_safe_short_and_unique_where_case_is_ignored() -> None:
    values = ["CITIBANK, N.A.", "citibank n a", "../etc", "Société", "株式", "x" * 200, "Ab", "aB"]
    names = file_names(values)
    assert names["../etc"] == "etc"
    assert names["Société"] == "Societe"
    assert names["株式"] == "institution"
    assert len({name.casefold() for name in names.values()}) == len(values)
    assert all(len(name) <= 80 and name.replace("-", "").isalnum() for name in names.values())
    assert file_names(["CITIBANK, N.A."]) == {"CITIBANK, N.A.": "CITIBANK-N-A"}


@given(st.lists(st.text("ab-/ _\u00e9A", max_size=6), unique=True, max_size=30))
def test_file_names_are_injective(values: list[str]) -> None:
    names = file_names(values)
    assert len({name.casefold() for name in names.values()}) == len(values) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", name) for name in names.values())


@pytest.mark.parametrize("spec", SCHEMES)
def test_every_row_goes_to_one_institution_and_the_seed_decides(spec: str) -> None:
    def deal(seed: int):
        return by_scheme(spec, CLASSES, CLASSES[::4], institutions=4, min_records=5, seed=seed)

    one, again, other = deal(0), deal(0), deal(1)
    assert one.names == ("institution-00", "institution-01", "institution-02", "institution-03")
    assert one.train.tolist() == again.train.tolist() != other.train.tolist()
    assert one.held_out.tolist() == again.held_out.tolist()
    assert set(one.train) - {-1} == {0, 1, 2, 3}
    assert np.bincount(one.train[one.train >= 0]).min() >= 5
    assert (one.train >= 0).all()
    assert (one.held_out >= 0).all()


@pytest.mark.parametrize("spec", SCHEMES)
def test_rows_of_one_unit_of_privacy_stay_together(spec: str) -> None:
    customers = [f"{'Customer' if i % 2 else ' customer'} {i // 4}" for i in range(len(CLASSES))]
    dealt = by_scheme(
        spec, CLASSES, CLASSES, institutions=3, min_records=5, seed=0, units=customers
    )
    for first in range(0, len(CLASSES), 4):
        assert len(set(dealt.train[first : first + 4])) == 1
    assert set(dealt.train) == {0, 1, 2}
    with pytest.raises(InputError, match="only 45 training units of privacy"):
        by_scheme(spec, CLASSES, 0, institutions=46, min_records=1, seed=0, units=customers)


def test_sizes_are_equal_under_iid() -> None:
    iid = by_scheme("iid", 61, 0, institutions=3, min_records=1, seed=0)
    assert sorted(np.bincount(iid.train)) == [20, 20, 21]


def test_an_institution_is_tested_on_the_classes_that_it_trains_on() -> None:
    dealt = by_scheme("pathological:1", CLASSES, CLASSES, institutions=3, min_records=1, seed=0)
    assert [set(CLASSES[dealt.train == i]) for i in range(3)] == [{0}, {1}, {2}]
    assert [set(CLASSES[dealt.held_out == i]) for i in range(3)] == [{0}, {1}, {2}]
    skewed = by_scheme("dirichlet:0.3", CLASSES, CLASSES, institutions=3, min_records=1, seed=0)
    for target in range(3):
        train, held = (
            np.bincount(owner[target == CLASSES], minlength=3)
            for owner in (skewed.train, skewed.held_out)
        )
        assert np.abs(train - held).max() <= 1


@pytest.mark.parametrize(
    ("spec", "institutions", "min_records", "message"),
    [
        ("iid", 181, 1, "data.institutions is 181, but there are only 180 training rows"),
        ("iid", 90, 3, "partition iid cannot give 90 institutions 3 or more"),
        ("dirichlet:0.01", 60, 3, "partition dirichlet:0.01 cannot give 60 institutions 3 or more"),
        ("pathological:4", 2, 1, "greater than the number of unique classes"),
    ],
)
def test_a_partition_that_the_rows_cannot_fill_is_an_error(
    spec: str, institutions: int, min_records: int, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        by_scheme(
            spec, CLASSES, CLASSES, institutions=institutions, min_records=min_records, seed=0
        )
    assert "\n" not in str(error.value)
