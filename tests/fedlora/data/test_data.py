import dataclasses
import hashlib
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.config.sections import DataConfig
from fedlora.data import data
from fedlora.data.encoding import Encoded
from fedlora.data.partition import normalise
from fedlora.data.shards import Federation, Shard
from fedlora.errors import InputError
from tests.conftest import shared_data

COLUMNS = ("text", "label", "bank", "customer")


def encode(texts: list[str], answers: list[str], labels: tuple[str, ...]) -> Encoded:
    """A tokeniser that can be read back: a token is a character, at most 60 of them."""
    return Encoded(
        ids=[[ord(c) for c in text[:60]] for text in texts],
        targets=[labels.index(a) if labels else len(a) for a in answers],
        truncated=[len(text) > 60 for text in texts],
    )


def read_back(shard: Shard) -> list[str]:
    return ["".join(map(chr, shard.row(i))) for i in range(len(shard))]


def write(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = COLUMNS) -> str:
    lines = (json.dumps(dict(zip(columns, row, strict=False))) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def prepare(tmp_path: Path, source: str, **changes: Any) -> Federation:
    values: dict[str, Any] = {
        "source": source,
        "partition": "natural:bank",
        "unit": "record",
        "seed": 0,
        "task": "classification",
        "encode": encode,
    }
    values |= changes
    names = {field.name for field in dataclasses.fields(DataConfig)} & set(values)
    settings = DataConfig(**{name: values.pop(name) for name in names})
    return data.prepare(settings, **values)


def fixed(
    tmp_path: Path, train: list[tuple[str, ...]], test: list[tuple[str, ...]], **changes: Any
):
    """Prepare rows whose sides are given."""
    source, test_source = write(tmp_path / "a.jsonl", train), write(tmp_path / "b.jsonl", test)
    return prepare(tmp_path, source, test_source=test_source, **changes)


TRAIN = [
    ("up", "good", "North", "1"),
    ("down", "bad", "South", "2"),
    ("flat", "good", "South", "1"),
    ("dip", "bad", "South", "2"),
]
TEST = [("rise", "good", "South", "3")]


def where_rows_went(counts: Any) -> int:
    missing = ("without_text", "without_label", "without_institution")
    kept_and_dropped = ("train", "held_out", "duplicates_removed", "rows_dropped")
    return sum(counts[name] for name in (*missing, *kept_and_dropped))


def test_rows_reach_their_institution_with_target_and_unit(tmp_path: Path) -> None:
    fed = fixed(tmp_path, TRAIN, [("rise", "good", "South")], unit="customer")
    assert (fed.names, fed.labels) == (("North", "South"), ("bad", "good"))
    assert read_back(fed.train(0)) == ["up"]
    assert read_back(fed.train(1)) == ["down", "flat", "dip"]
    assert fed.train(1).targets.tolist() == [0, 1, 0]
    assert fed.train(0).units.tolist() == [0]
    assert fed.train(1).units.tolist() == [1, 0, 1]  # customers 2, 1, 2, numbered within South
    assert read_back(fed.held_out(0)) == []
    assert read_back(fed.held_out(1)) == ["rise"]
    assert (fed.counts["rows"], fed.counts["test_rows"]) == (4, 1)


def test_institutions_with_more_records_keep_a_part_and_all_held_out_rows(tmp_path: Path) -> None:
    train = [(f"text {i}", ("good", "bad")[i % 2], "North", "1") for i in range(40)]
    train += [("dip", "bad", "South", "2")]
    test = [("rise", "good", "North", "3"), ("sink", "bad", "North", "3")]
    fed, whole = (fixed(tmp_path, train, test, max_records=most) for most in (10, 0))
    assert [len(fed.train(i)) for i in (0, 1)] == [10, 1]
    assert [len(whole.train(i)) for i in (0, 1)] == [40, 1]  # another entry of the cache
    assert set(read_back(fed.train(0))) < set(read_back(whole.train(0)))
    assert read_back(fed.held_out(0)) == read_back(whole.held_out(0)) == ["rise", "sink"]
    assert fed.counts["rows_dropped"] == 30
    assert where_rows_went(fed.counts) == fed.counts["rows"] + fed.counts["test_rows"]


SPELLINGS = ("Jos\u00e9 M\u00fcller", "JOSE\u0301 MU\u0308LLER", "jos\u00e9\u00a0\u2003m\u00fcller",
             "Jos\u00e9\u200b M\u00fcller", "\uff2aos\u00e9 M\u00fcller")  # fmt: skip


def test_a_customer_is_one_unit_in_whatever_case_and_unicode_form(tmp_path: Path) -> None:
    names = (*SPELLINGS, "Josef M\u00fcller")
    train = [(f"text {i}", ("good", "bad")[i % 2], "North", n) for i, n in enumerate(names)]
    shard = fixed(tmp_path, train, TEST, unit="customer").train(0)
    assert shard.num_units == 2 and len(set(shard.units[:-1].tolist())) == 1

    plain = [(*row[:3], SPELLINGS[0] if row[3] in SPELLINGS else row[3]) for row in train]
    same = fixed(tmp_path, plain, TEST, unit="customer").train(0)
    assert same.fingerprint == shard.fingerprint  # a ledger knows who has which records


def test_an_institution_is_one_in_whatever_case_and_unicode_form(tmp_path: Path) -> None:
    banks = ("SOCI\u00c9T\u00c9", "soci\u00e9te\u0301", "Soci\u00e9t\u00e9 ", "\u200b")
    train = [(f"text {i}", ("good", "bad")[i % 2], bank) for i, bank in enumerate(banks)]
    fed = fixed(tmp_path, train, [("rise", "good", "Soci\u00e9t\u00e9")])
    assert fed.names == ("SOCIETE",)  # the spelling that comes first
    assert (len(fed.train(0)), len(fed.held_out(0))) == (3, 1)
    assert fed.counts["without_institution"] == 1


def test_training_rows_whose_text_is_tested_on_are_removed_and_counted(tmp_path: Path) -> None:
    train = [
        *TRAIN,
        ("RISE!", "good", "North"),
        (" rise", "bad", "South"),
        ("rises", "bad", "South"),
    ]
    fed = fixed(tmp_path, train, [("rise", "good", "South")])
    assert fed.counts["duplicates_removed"] == 2
    assert read_back(fed.all_train) == ["up", "down", "flat", "dip", "rises"]
    assert read_back(fed.all_held_out) == ["rise"]


def test_rows_without_text_label_or_institution_are_dropped_and_counted(tmp_path: Path) -> None:
    train = [*TRAIN, (" ", "good", "North"), ("x", "", "North"), ("y", "bad", " ")]
    fed = fixed(
        tmp_path, train, [("rise", "good", ""), ("", "bad", "South"), ("z", "bad", "South")]
    )
    assert {k: v for k, v in fed.counts.items() if v} == {
        "rows": 7,
        "test_rows": 3,
        "without_text": 2,
        "without_label": 1,
        "without_institution": 2,
        "train": 4,
        "held_out": 1,
    }


def test_small_institutions_go_with_their_held_out_rows(tmp_path: Path) -> None:
    fed = fixed(tmp_path, TRAIN, [("rise", "good", "South"), ("z", "bad", "North")], min_records=2)
    assert fed.names == ("South",)
    assert (fed.counts["institutions_dropped"], fed.counts["rows_dropped"]) == (1, 2)
    assert fed.counts["test_rows_dropped"] == 1
    assert read_back(fed.all_held_out) == ["rise"]


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    fed = fixed(tmp_path, TRAIN, [("x" * 61, "good", "South"), ("x" * 60, "bad", "South")])
    assert fed.counts["truncated"] == 1
    assert fed.all_held_out.lengths.tolist() == [60, 60]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"partition": "natural:town"}, "data.partition is 'town', .*it has text, label"),
        ({"label": "mood"}, "data.label is 'mood', but .* text, label, bank, customer"),
        ({"text": "text,title"}, "data.text is 'title'"),
        ({"text": "text, label"}, "data.text is 'text, label', of which 'label' is data.label too"),
        ({"unit": "person"}, "privacy.unit is 'person'"),
        ({"unit": "customer"}, "privacy.unit is 'customer', but 1 training rows have nothing in"),
        ({"labels": ("good", "fine")}, r"label 'bad' \(2 rows of .*a.jsonl\) is none of good"),
        ({"labels": ("good", "bad", "good")}, "each once; set data.label"),
        ({"label": "same"}, "the labels are x, but"),
        ({"partition": "iid", "institutions": 6}, "institutions is 6, but there are only 5"),
        ({"institutions": 3}, "data.institutions is 3, but only 2 of 2 values of 'bank'"),
        ({"partition": "by-size"}, "data.partition is 'by-size'; it must be iid, "),
        ({"source": "gone.csv"}, "'gone.csv' is not a file"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_anything_is_tokenised_or_written(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    def never(*_: object) -> Encoded:
        raise AssertionError("tokenised")

    rows = [(*row, "x") for row in TRAIN] + [("more", "good", "South", "", "x")]
    source = write(tmp_path / "a.jsonl", rows, (*COLUMNS, "same"))
    other = write(tmp_path / "b.jsonl", [("zz", "good", "South", "x")], (*COLUMNS[:3], "same"))
    with pytest.raises(InputError, match=message) as error:
        prepare(
            tmp_path,
            **{"source": source, "test_source": other, "encode": never, **changes},
        )
    assert "\n" not in str(error.value)


ROWS = st.lists(
    st.tuples(
        st.sampled_from(["", "a", "A ", "b", "c", "d!", "d", "e", "f", "g", "h", "i"]),
        st.sampled_from(["yes", "no", ""]),
        st.sampled_from(["North", "South", "West", ""]),
        st.sampled_from(["1", "2", "3"]),
    ),
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS,
    test=st.none() | ROWS,
    seed=st.integers(0, 3),
    unit=st.sampled_from(["record", "customer"]),
    partition=st.sampled_from(["natural:bank", "iid", "dirichlet:1", "pathological:1"]),
)
def test_no_text_is_on_both_sides_and_every_row_is_accounted_for(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, ...]],
    test: list[tuple[str, ...]] | None,
    seed: int,
    unit: str,
    partition: str,
) -> None:
    tmp_path = tmp_path_factory.mktemp("rows")
    start = [(f"{y} {i}", y, "North", str(i)) for y in ("yes", "no") for i in range(10)]
    source = write(tmp_path / "a.jsonl", [*start, *rows])
    test_source = (
        "" if test is None else write(tmp_path / "b.jsonl", [("stop", "no", "West"), *test])
    )
    fed, again = (
        prepare(
            tmp_path,
            source,
            test_source=test_source,
            unit=unit,
            partition=partition,
            institutions=0 if partition.startswith("natural") else 2,
            test_fraction=0.3,
            seed=seed,
        )
        for _ in range(2)
    )
    train, held_out = read_back(fed.all_train), read_back(fed.all_held_out)
    assert set(map(normalise, train)).isdisjoint(map(normalise, held_out))
    assert fed.counts["rows"] + fed.counts["test_rows"] == where_rows_went(fed.counts)
    assert (len(train), len(held_out)) == (fed.counts["train"], fed.counts["held_out"])
    assert not Counter(train) - Counter(text.strip() for text, *_ in [*start, *rows])
    for index in range(len(fed.names)):
        shard = fed.train(index)
        assert len(shard) >= 1
        assert set(shard.units.tolist()) == set(range(shard.units.max() + 1))
        assert shard.fingerprint == again.train(index).fingerprint
        assert read_back(fed.held_out(index)) == read_back(again.held_out(index))


def test_the_fingerprint_of_an_institution_outlives_a_change_of_tokeniser(tmp_path: Path) -> None:
    def other(texts: list[str], answers: list[str], labels: tuple[str, ...]) -> Encoded:
        return encode([text[::-1] for text in texts], answers, labels)

    source = write(tmp_path / "a.jsonl", TRAIN)
    one = prepare(tmp_path, source)
    two = prepare(tmp_path, source, encode=other)
    assert read_back(one.train(1)) != read_back(two.train(1))
    assert one.train(1).fingerprint == two.train(1).fingerprint != one.train(0).fingerprint


def test_one_source_can_be_read_for_evaluation(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [*TRAIN, ("", "good"), ("up " * 30, "good")])
    settings = DataConfig()
    known, counts = data.load_shard(settings, source, labels=("good", "bad"), encode=encode)
    assert read_back(known) == ["up", "down", "flat", "dip", "up " * 20]
    assert (known.targets.tolist(), counts["truncated"]) == ([0, 1, 0, 1, 0], 1)
    more = write(tmp_path / "c.jsonl", [*TRAIN, ("", "good"), (" ", "bad"), ("so", "")])
    _, counts = data.load_shard(settings, more, labels=("good", "bad"), encode=encode)
    assert counts == {"truncated": 0, "without_text": 2, "without_label": 1}
    with pytest.raises(InputError, match=r"label 'bad' \(2 rows of .* is none of good; the model"):
        data.load_shard(settings, source, labels=("good",), encode=encode)
    with pytest.raises(InputError, match="has no row with a text and a label"):
        empty = write(tmp_path / "b.jsonl", [("", "good")])
        data.load_shard(settings, empty, labels=(), encode=encode)


needs_edgartools = pytest.mark.skipif(
    not importlib.util.find_spec("edgar"), reason="edgartools is not installed"
)


@needs_edgartools
def test_us_gaap_concepts_are_partitioned_by_industry(tmp_path: Path) -> None:
    fed = prepare(tmp_path, "package:edgartools", partition="natural:industry", min_records=50)
    assert len(fed.names) >= 35
    assert where_rows_went(fed.counts) == fed.counts["rows"] == 10_073
    train, held_out = (Counter(read_back(s)) for s in (fed.all_train, fed.pooled_held_out()[0]))
    whole = {text for text in train if len(text) < 60}  # the fake tokeniser cuts at 60
    assert len(whole) > 400
    assert not whole & set(held_out)
    assert max(held_out.values()) > 5  # concepts that industries share, held out in all of them


def test_fpb_is_dealt_to_four_institutions(tmp_path: Path) -> None:
    fed = prepare(
        tmp_path, str(shared_data("fpb/fpb.csv")), partition="dirichlet:0.5", institutions=4
    )
    assert (len(fed.names), fed.labels) == (4, ("negative", "neutral", "positive"))
    assert fed.counts["train"] + fed.counts["held_out"] == 4846
    assert abs(fed.counts["held_out"] / 4846 - 0.2) < 0.02


def test_cfpb_companies_are_institutions(tmp_path: Path) -> None:
    # Ten companies have 49 rows or more; without held-out rows all of them train.
    fed = prepare(
        tmp_path,
        str(shared_data("cfpb/complaints.csv")),
        text="narrative",
        label="product",
        partition="natural:company",
        min_records=49,
        test_fraction=0.0,
    )
    assert len(fed.names) == 10
    assert "CITIBANK-N-A" in fed.names


def test_banking77_and_tfns_keep_their_own_test_rows(tmp_path: Path) -> None:
    banking = prepare(
        tmp_path,
        str(shared_data("banking77/train.csv")),
        test_source=str(shared_data("banking77/test.csv")),
        label="category",
        partition="iid",
        institutions=8,
    )
    assert (len(banking.labels), banking.counts["held_out"]) == (77, 3080)
    tfns = prepare(
        tmp_path,
        str(shared_data("tfns/train.csv")),
        test_source=str(shared_data("tfns/valid.csv")),
        partition="dirichlet:0.5",
        institutions=8,
    )
    assert (tfns.labels, tfns.counts["held_out"]) == (("0", "1", "2"), 2388)
    assert tfns.counts["duplicates_removed"] >= 12
    for fed in (banking, tfns):
        assert fed.counts["train"] + fed.counts["duplicates_removed"] == fed.counts["rows"]


def test_the_fingerprint_of_records_is_the_digest_of_their_digests(tmp_path: Path) -> None:
    """By hand, so that no change lets a ledger forget whose it is."""
    shard = fixed(tmp_path, TRAIN, TEST).train(1)
    digest = lambda content: hashlib.sha256(content).digest()  # noqa: E731
    rows = [digest(json.dumps([text, label]).encode()) for text, label, *_ in TRAIN[1:]]
    units = sorted(digest(row) for row in rows)
    assert shard.fingerprint == hashlib.sha256(b"".join(units)).hexdigest()
