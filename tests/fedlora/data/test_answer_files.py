"""Files of texts to answer: every row kept, one clear error for each bad file, no torch."""

import csv
import json

import pandas
import pytest

from fedlora.data import answer_files
from fedlora.errors import InputError

ANSWERS = [
    {"text": "a", "answer": "loan", "score": 0.75, "scores": {}},
    {"text": "b", "answer": "card, or not", "score": 0.5, "scores": {}},
]


def written(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    return str(tmp_path / name)


def test_texts_come_from_the_named_columns_and_other_columns_stay(tmp_path):
    source = written(tmp_path, "in.csv", 'id,subject,story\n007,x,"one\ntwo"\n8,, y \n')
    found = answer_files.read(source, "subject, story")
    assert found.texts == ["x | one\ntwo", "y"]
    out = tmp_path / "out.csv"
    answer_files.check_out(out, found)
    answer_files.write(out, found, ANSWERS)
    with out.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["id", "subject", "story", "answer", "score"],
        ["007", "x", "one\ntwo", "loan", "0.75"],
        ["8", "", " y ", "card, or not", "0.5"],
    ]


def test_json_lines_keep_their_types_and_may_become_a_table(tmp_path):
    source = written(tmp_path, "in.jsonl", '{"text": "á", "n": [1]}\n\n{"text": 2, "m": null}\n')
    found = answer_files.read(source, "text")
    assert found.texts == ["á", "2"]
    answer_files.write(tmp_path / "out.jsonl", found, ANSWERS)
    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"text": "á", "n": [1], "m": None, "answer": "loan", "score": 0.75},
        {"text": 2, "n": None, "m": None, "answer": "card, or not", "score": 0.5},
    ]
    answer_files.write(tmp_path / "out.csv", found, ANSWERS)
    assert (tmp_path / "out.csv").read_text().startswith("text,n,m,answer,score")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_file_of_answers_is_whole_or_absent(tmp_path, kind):
    found = answer_files.of(["a", "b"])
    with pytest.raises(KeyError):
        answer_files.write(tmp_path / f"out.{kind}", found, [ANSWERS[0], {"answer": "card"}])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("in.csv", "text,id\na,1\n ,2\n,3\n", ["row 2", "2 of 3 rows", "drop"]),
        ("in.csv", "story,id\na,1\n", ["data.text is 'text'", "story, id"]),
        ("in.csv", "text\n", ["has no row"]),
        ("in.jsonl", "[" * 100_000, ["cannot be read"]),
        ("in.xlsx", "", [".csv, .jsonl, .parquet"]),
    ],
)
def test_a_file_that_cannot_be_answered_is_one_clear_error(tmp_path, name, content, words):
    source = written(tmp_path, name, content)
    with pytest.raises(InputError) as error:
        answer_files.read(source, "text")
    for word in words:
        assert word in str(error.value)


def test_a_place_for_answers_is_refused_before_any_work(tmp_path):
    found = answer_files.of(["a"])
    taken = written(tmp_path, "taken.csv", "")
    for out, words in (
        (tmp_path / "out.txt", "give a .csv, .jsonl or .parquet file"),
        (tmp_path / "taken.csv", "exists"),
        (tmp_path / "taken.csv" / "out.csv", "give another --out"),
        (tmp_path / f"{'x' * 300}.csv", "File name too long.*give another --out"),
    ):
        with pytest.raises(InputError, match=words):
            answer_files.check_out(out, found)
    assert taken
    with pytest.raises(InputError, match=r"out.csv cannot be written .*give another --out"):
        answer_files.write(tmp_path / "taken.csv" / "out.csv", found, ANSWERS[:1])
    answered = answer_files.Texts(texts=["a"], rows=pandas.DataFrame({"score": [1]}))
    with pytest.raises(InputError, match="column 'score' already"):
        answer_files.check_out(tmp_path / "out.csv", answered)
