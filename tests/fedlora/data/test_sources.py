import json
import math
from pathlib import Path

import pytest

from fedlora.data import sources
from fedlora.errors import InputError

TEXT_LABEL = {"text": "data.text", "label": "data.label"}


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_csv_values_stay_text_whatever_they_look_like(tmp_path: Path) -> None:
    source = write(
        tmp_path / "a.csv",
        '\ufefflabel,text,id\n007,"two\nlines, a ""quote""",1\nNA,,2\ntrue,1.50,3\n',
    )
    assert sources.read(source, TEXT_LABEL) == {
        "text": ['two\nlines, a "quote"', "", "1.50"],
        "label": ["007", "NA", "true"],
    }


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("a.csv", b""),
        ("a.csv", b"text,label"),
        ("a.csv", b"text,label\n\n"),
        ("a.csv", b"text,text,label\na,b,c\n"),
        ("a.csv", b"text,label\n\xff\xfesecret,a\n"),
        ("a.csv", b"\xff\xfet\x00e\x00"),
        ("a.csv", b"text,label\nfine,a\nsecret,b,c\n"),
        ("a.csv", b"text,label\nsecret,b,c\n"),
        ("a.csv", b'text,label\n"secret,a\nb,c\n'),
        ("a.csv", b"headline,label\nsecret,b\n"),
        ("a.jsonl", b'{"text": "secret", "label": "b"}\n\n{"text": \n'),
        ("a.jsonl", b'{"text": "secret", "label": "b"}\n[1]\n'),
        ("a.jsonl", b"\n"),
        ("a.jsonl", b'{"text": "a", "label": ["secret"]}\n'),
        ("a.jsonl", b'{"text": "\\ud800", "label": "secret"}\n'),
        ("a.jsonl", b'{"text": "a", "label": "\xed\xa0\x80"}\n'),
        ("a.jsonl", b'{"text": "a", "text ": "c", "label": "b"}\n'),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000),
        ("a.parquet", b"no parquet"),
        ("a.xlsx", b"secret"),
    ],
)
def test_an_unusable_file_is_one_line_that_quotes_no_record(
    tmp_path: Path, file: str, content: bytes
) -> None:
    with pytest.raises(InputError) as error:
        sources.read(write(tmp_path / file, content), TEXT_LABEL)
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("delimiter", [",", ";", "|", "\t"])
def test_the_delimiter_is_the_one_that_parts_the_header(tmp_path: Path, delimiter: str) -> None:
    source = write(tmp_path / "a.csv", f'text{delimiter} label\n"a,b;c|d\te"{delimiter}x\n')
    assert sources.read(source, TEXT_LABEL) == {"text": ["a,b;c|d\te"], "label": ["x"]}


def test_jsonl_takes_numbers_and_nulls_and_skips_blank_lines(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": None, "label": True}, {"label": 0.5}]
    rows += [{"text": math.nan, "label": "nan"}]  # as a data frame's missing value is written
    source = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert sources.read(source, TEXT_LABEL) == {
        "text": ["a", "", "", ""],
        "label": ["1", "true", "0.5", "nan"],
    }


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.csv", "'nowhere.csv' is not a file"),
        ("package:no_such_package/a.csv", "pip install no_such_package"),
        ("package:fedlora/no.csv", "is not there"),
        ("package:fedlora", "write package:NAME/FILE"),
        ("package:../x/a.csv", "is not there"),
        ("package:__main__/a.csv", "is not there"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_do(source: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources.read(source, TEXT_LABEL)


def test_a_file_in_a_package_is_found_without_importing_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "shipping_pkg" / "data").mkdir(parents=True)
    write(tmp_path / "shipping_pkg/__init__.py", "raise RuntimeError('imported')")
    write(tmp_path / "shipping_pkg/data/a.csv", "text,label\na,b\n")
    monkeypatch.syspath_prepend(tmp_path)
    read = sources.read("package:shipping-pkg/data/a.csv", TEXT_LABEL)
    assert read == {"text": ["a"], "label": ["b"]}


def test_us_gaap_has_a_row_for_each_concept_and_industry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "edgar/xbrl/standardization"
    folder.mkdir(parents=True)
    write(tmp_path / "edgar/__init__.py", "raise RuntimeError('imported')")
    mapping = {
        "_metadata": {"version": "3"},
        "NetIncomeLossUSGovernment1": {
            "statement": "IncomeStatement",
            "industry_overrides": {"Oil": {}, "Banks": {}},
        },
        "Nowhere": {"statement": None, "industry_overrides": {"Oil": {}}},
        "Unused": {"statement": "BalanceSheet", "industry_overrides": {}},
    }
    write(folder / "gaap_mappings.json", json.dumps(mapping))
    monkeypatch.syspath_prepend(tmp_path)
    assert sources.read(sources.US_GAAP, {**TEXT_LABEL, "industry": "data.partition"}) == {
        "text": ["Net Income Loss US Government 1"] * 2,
        "label": ["IncomeStatement"] * 2,
        "industry": ["Banks", "Oil"],
    }


def test_a_hub_data_set_gives_the_names_of_its_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["down", "up"])
    )
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [1, -1, 0]}, features)
    asked: list[object] = []

    def load(name: str, config: str | None, split: str) -> datasets.Dataset:
        asked.append((name, config, split))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = sources.read("hub:owner/news:small", TEXT_LABEL, "test")
    assert rows == {"text": ["a", "b", "c"], "label": ["up", "", "down"]}
    sources.read("hub:owner/news", TEXT_LABEL)
    assert asked == [("owner/news", "small", "test"), ("owner/news", None, "train")]
