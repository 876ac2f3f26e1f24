"""Tables that a process holds as sources."""

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


def test_missing_values_are_empty_texts_and_numbers_are_texts():
    frame = pandas.DataFrame({"text": ["a", None, np.nan], "label": [1.5, np.nan, 2]})
    assert read(frame)[1] == {"text": ["a", "", ""], "label": ["1.5", "", "2.0"]}
    frame = pandas.DataFrame({0: ["a"], "label": np.array([7])})
    assert read(frame, {"0": "data.text", "label": "data.label"})[1] == {"0": ["a"], "label": ["7"]}


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
