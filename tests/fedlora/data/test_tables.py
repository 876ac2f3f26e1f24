"""Tables that a process holds as sources."""

import datetime
import decimal

import datasets
import numpy as np
import pandas
import pytest

from fedlora.data import sources, tables
from fedlora.errors import InputError

WANTED = {"text": "data.text", "label": "data.label"}
COLUMNS = {"text": ["lost card", "late fee", ""], "label": ["card", "fee", "card"]}


def read(table, wanted=WANTED):
    with tables.hold(table, wanted, "data") as source:
        return source, sources.read(source, wanted)


@pytest.mark.parametrize(
    "table",
    [
        COLUMNS,
        pandas.DataFrame({"other": [1, 2, 3], **COLUMNS}),
        pandas.DataFrame(COLUMNS).astype("category"),
        datasets.Dataset.from_dict(COLUMNS),
        datasets.Dataset.from_dict({"text": COLUMNS["text"], "label": [0, 1, 0]}).cast_column(
            "label", datasets.ClassLabel(names=["card", "fee"])
        ),
    ],
    ids=["columns", "frame", "categories", "dataset", "class label"],
)
def test_every_kind_of_table_gives_the_same_rows_under_the_same_name(table):
    source, rows = read(table)
    assert rows == COLUMNS
    assert source == read(COLUMNS)[0]


def test_columns_may_be_series_and_arrays():
    series = pandas.Series(["a", pandas.NA, "c"], dtype="string")
    _, rows = read({"text": series, "label": np.array([1, 2, 3])})
    assert rows == {"text": ["a", "", "c"], "label": ["1", "2", "3"]}
    _, rows = read({"text": ["a", pandas.NA], "label": ["x", "y"]})
    assert rows["text"] == ["a", ""]


def test_missing_values_are_empty_texts_and_numbers_are_texts():
    frame = pandas.DataFrame({"text": ["a", None, np.nan], "label": [1.5, np.nan, 2]})
    assert read(frame)[1] == {"text": ["a", "", ""], "label": ["1.5", "", "2.0"]}
    frame = pandas.DataFrame({0: ["a"], "label": np.array([7])})
    assert read(frame, {"0": "data.text", "label": "data.label"})[1] == {"0": ["a"], "label": ["7"]}


def test_decimals_and_dates_are_texts_and_those_that_are_none_are_missing():
    day = datetime.date(2024, 2, 3)
    table = {
        "text": [day, pandas.Timestamp("2024-02-03 04:05"), pandas.NaT],
        "label": [decimal.Decimal("1.50"), decimal.Decimal("NaN"), datetime.datetime(2024, 2, 3)],
    }
    for one in (table, pandas.DataFrame(table, dtype=object)):
        assert read(one)[1] == {
            "text": ["2024-02-03", "2024-02-03T04:05:00", ""],
            "label": ["1.50", "", "2024-02-03T00:00:00"],
        }


def test_a_dictionary_of_tables_names_the_institution_of_each_row():
    table = {"north": pandas.DataFrame(COLUMNS), "south": {"text": ["x"], "label": ["y"]}}
    _, rows = read(table, {**WANTED, "institution": "data.partition"})
    assert rows["institution"] == ["north"] * 3 + ["south"]
    assert rows["text"] == [*COLUMNS["text"], "x"]


@pytest.mark.parametrize(
    "table",
    [
        [1, 2],
        {},
        {"text": ["a"], "label": ["b", "c"]},
        {"text": ["a"]},
        {"north": {"text": ["a"]}},
        {"north": 7},
        {"North Bank": COLUMNS, "north  bank": COLUMNS},
        {1: COLUMNS, "1": COLUMNS},
        {"north": {"text": [], "label": []}},
        object(),
        {"text": [["a"]], "label": ["b"]},
        pandas.DataFrame({"text": [np.ones(1)], "label": ["b"]}),
        datasets.DatasetDict(train=datasets.Dataset.from_dict(COLUMNS)),
        {"text": [], "label": []},
        pandas.DataFrame([["a", "b", "c"]], columns=["text", "label", "label"]),
    ],
)
def test_a_table_that_is_none_is_refused(table):
    with pytest.raises(InputError):
        read(table)


def test_rows_are_gone_after_the_block():
    source, _ = read(COLUMNS)
    with pytest.raises(InputError, match=r"another Python process.*data="):
        sources.read(source, WANTED)


def test_files_of_a_directory_or_glob_are_institutions(tmp_path):
    (tmp_path / "north.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "south.jsonl").write_text('{"text": "c", "label": "z"}\n')
    (tmp_path / "notes.txt").write_text("no records")
    wanted = {**WANTED, "institution": "data.partition"}
    for source in (str(tmp_path), f"{tmp_path}/*.[cj]s*"):
        assert sources.read(source, wanted) == {
            "text": ["a", "b", "c"],
            "label": ["x", "y", "z"],
            "institution": ["north", "north", "south"],
        }
    (tmp_path / "empty.csv").write_text("text,label\n")
    with pytest.raises(InputError, match=r"'empty' of .* has no row"):
        sources.read(str(tmp_path), wanted)
    (tmp_path / "empty.csv").unlink()
    with pytest.raises(InputError, match="has no file"):
        sources.read(f"{tmp_path}/*.parquet", wanted)
    (tmp_path / "north.jsonl").write_text('{"text": "c", "label": "z"}\n')
    with pytest.raises(InputError, match="two files of one institution, 'north'"):
        sources.read(str(tmp_path), wanted)
