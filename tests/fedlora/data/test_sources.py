import importlib.util
import json
import math
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from fedlora.data import sources
from fedlora.data.csv_files import PLAIN
from fedlora.data.rows import read_table
from fedlora.errors import InputError
from tests.conftest import shared_data

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


def test_csv_rows_may_span_more_than_a_read_block(tmp_path: Path) -> None:
    long = "line\n" * 500_000
    source = write(tmp_path / "a.csv", f'text,label\n"{long}",a\nb,c\n')
    assert sources.read(source, TEXT_LABEL)["text"] == [long, "b"]


def test_a_ragged_csv_is_refused_without_quoting_the_private_row(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "text,label\nfine,a\nsecret,b,c\n")
    with pytest.raises(
        InputError, match="has 3 values in the row from line 3, but 2 columns"
    ) as error:
        sources.read(source, TEXT_LABEL)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; give one that has rows"),
        (b"text,label", "names its columns, but has no row"),
        (b"text,label\n\n", "names its columns, but has no row"),
        (b"text,text,label\na,b,c\n", "has two columns 'text'"),
        (b"text,label\n\xff\xfe,a\n", "cannot be read"),
        (b"\xff\xfet\x00e\x00", "cannot be read"),
    ],
)
def test_an_unusable_csv_is_one_line_of_error(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        sources.read(write(tmp_path / "a.csv", content), TEXT_LABEL)
    assert "\n" not in str(error.value)


def test_jsonl_takes_numbers_and_nulls_and_skips_blank_lines(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": 1}, {"text": None, "label": True}, {"label": 0.5}]
    rows += [{"text": math.nan, "label": "nan"}]  # as a data frame's missing value is written
    source = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, rows)) + "\n")
    assert sources.read(source, TEXT_LABEL) == {
        "text": ["a", "", "", ""],
        "label": ["1", "true", "0.5", "nan"],
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a", "label": "b"}\n\n{"text": \n', "line 3: Expecting value"),
        ('{"text": "a", "label": "b"}\n[1]\n', "line 2 is not an object"),
        ("\n", "is empty; give one that has rows"),
        ('{"text": "a", "label": ["b"]}\n', "column 'label' .* holds a list"),
    ],
)
def test_a_bad_jsonl_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        sources.read(write(tmp_path / "a.jsonl", content), TEXT_LABEL)


def test_finlora_rows_are_read_and_recognised_when_the_columns_are_not_set(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", '{"context": "up 5 %", "target": "positive"}\n')
    wanted = {"context": "data.text", "target": "data.label"}
    assert sources.read(source, wanted) == {"context": ["up 5 %"], "target": ["positive"]}
    with pytest.raises(InputError, match=r'FinLoRA rows: set data.text to "context"'):
        sources.read(source, TEXT_LABEL)
    with pytest.raises(
        InputError, match=r"data\.partition is 'bank', .*give rows with that column"
    ):
        sources.read(source, {**wanted, "bank": "data.partition"})


def test_parquet_columns_of_any_plain_type_become_text(tmp_path: Path) -> None:
    table = pa.table(
        {
            "text": pa.array(["a", None, "a"]).dictionary_encode(),
            "label": pa.array([1, 2, None]),
            "more": pa.array([[1], [2], [3]]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    assert sources.read(source, TEXT_LABEL) == {"text": ["a", "", "a"], "label": ["1", "2", ""]}
    with pytest.raises(InputError, match="holds a list"):
        sources.read(source, {"more": "data.text"})
    pyarrow.parquet.write_table(table.slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(InputError, match="has no row"):
        sources.read(str(tmp_path / "none.parquet"), TEXT_LABEL)
    with pytest.raises(InputError, match="cannot be read"):
        sources.read(write(tmp_path / "b.parquet", "no parquet"), TEXT_LABEL)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.csv", b"text,label\na,b\n\xed\xa0\x80,b\n", "cannot be read as utf-8.*line 3 "),
        ("a.csv", b"\xed\xa0\x80,label\na,b\n", "cannot be read"),
        ("a.jsonl", b'{"text": "\\ud800", "label": "b"}\n', "'text' of .* surrogate pair"),
        ("a.jsonl", b'{"text": "a", "label": "b\\udfff"}\n', "'label' of .* surrogate pair"),
        ("a.jsonl", b'{"text": "a", "label": "\xed\xa0\x80"}\n', "cannot be read.*decode"),
        ("a.jsonl", b'{"text": "a"}\n' + b"[" * 100_000, "line 2 is nested too deeply"),
    ],
)
def test_text_that_is_no_unicode_and_nesting_without_end_are_one_line_of_error(
    tmp_path: Path, file: str, content: bytes, message: str
) -> None:
    with pytest.raises(InputError, match=message) as error:
        sources.read(write(tmp_path / file, content), TEXT_LABEL)
    assert "\n" not in str(error.value)


def test_a_date_beyond_those_of_python_is_one_line_that_names_the_column(tmp_path: Path) -> None:
    """Banks write 9999-12-31 for no end; in some time zones that is in the year 10000."""
    late = pa.array([253402300799], pa.timestamp("s", "Europe/Berlin"))
    table = pa.table({"text": late, "label": pa.array(["b"]), "raw": pa.array([b"x"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    source = str(tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"cannot be read: column 'text': .*mend the file$"):
        sources.read(source, TEXT_LABEL)
    assert sources.read(source, {"label": "data.label"}) == {"label": ["b"]}
    with pytest.raises(InputError, match=r"holds a bytes.* write it as text"):
        sources.read(source, {"raw": "data.text"})


def test_blanks_around_names_of_columns_are_no_part_of_them(tmp_path: Path) -> None:
    table = pa.table({"text ": pa.array(["a"]), " label": pa.array(["b"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for source in (
        str(tmp_path / "a.parquet"),
        write(tmp_path / "a.jsonl", '{"text ": "a", " label": "b"}\n'),
    ):
        assert sources.columns(source, PLAIN) == ["text", "label"]
        assert sources.read(source, TEXT_LABEL) == {"text": ["a"], "label": ["b"]}
    twice = write(tmp_path / "b.jsonl", '{"text": "a", "text ": "c", "label": "b"}\n')
    with pytest.raises(InputError, match="line 1 has a name twice"):
        sources.read(twice, TEXT_LABEL)


def test_parquet_text_that_is_no_unicode_is_one_line_of_error(tmp_path: Path) -> None:
    broken = pa.array([b"\xed\xa0\x80"]).view(pa.string())
    table = pa.table({"text": broken, "label": pa.array(["b"])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(InputError, match="cannot be read"):
        sources.read(str(tmp_path / "a.parquet"), TEXT_LABEL)


def test_a_missing_column_is_answered_with_the_ones_that_are_there(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", "headline,label\na,b\n")
    with pytest.raises(InputError, match=r"data.text is 'text', .* the columns headline, label"):
        sources.read(source, TEXT_LABEL)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.csv", "'nowhere.csv' is not a file"),
        ("package:no_such_package/a.csv", "pip install no_such_package"),
        ("package:fedlora/no.csv", "is not there"),
        ("package:fedlora", "names no file"),
        ("package:../x/a.csv", "is not there"),
        ("package:__main__/a.csv", "is not there"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_do(source: str, message: str) -> None:
    for use in (lambda: sources.read(source, TEXT_LABEL), lambda: sources.digest(source)):
        with pytest.raises(InputError, match=message):
            use()


def test_records_that_are_closed_to_this_user_are_one_line_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "a.csv", "text,label\na,b\n")

    def closed(*_: object, **__: object) -> None:  # root may open everything
        raise PermissionError(13, "Permission denied")

    for name, source in (
        ("open", file),
        ("is_file", file),
        ("is_dir", file),
        ("iterdir", tmp_path),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, closed)
            for use in (sources.digest, lambda s: sources.read(s, TEXT_LABEL)):
                with pytest.raises(InputError, match=r"Permission denied; let user \d+, who runs"):
                    use(str(source))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in '.xlsx'; it must be .csv, .jsonl, .parquet"):
        sources.read(write(tmp_path / "a.xlsx", "x"), TEXT_LABEL)


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


def test_without_edgartools_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install edgartools"):
        sources.read(sources.US_GAAP, TEXT_LABEL)


@pytest.mark.skipif(not importlib.util.find_spec("edgar"), reason="edgartools is not installed")
def test_the_installed_us_gaap_mapping_has_the_known_size() -> None:
    rows = sources.read(sources.US_GAAP, {**TEXT_LABEL, "industry": "data.partition"})
    assert len(rows["text"]) == 10_073
    assert len(set(rows["industry"])) == 48
    assert len(set(rows["label"])) == 6
    assert "edgar" not in sys.modules


@pytest.mark.parametrize(
    ("source", "is_path"),
    [
        ("a.csv", True),
        ("folder", True),
        ("folder/*.jsonl", True),
        ("2024:a.csv", True),
        ("hub:bank/own", False),
        ("package:bank/own.csv", False),
        ("python:bank:own", False),
        ("memory:0", False),
    ],
)
def test_a_source_without_a_scheme_is_a_path(source: str, is_path: bool) -> None:
    assert sources.is_path(source) == is_path


def test_the_digest_follows_the_content_and_not_the_place(tmp_path: Path) -> None:
    one = sources.digest(write(tmp_path / "a.csv", "text,label\na,b\n"))
    assert one == sources.digest(write(tmp_path / "b.csv", "text,label\na,b\n"))
    assert one != sources.digest(write(tmp_path / "a.csv", "text,label\na,c\n"))
    assert one != sources.digest(write(tmp_path / "a.jsonl", "text,label\na,b\n"))


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


def test_a_hub_data_set_that_cannot_be_loaded_is_an_input_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import datasets

    def load(name: str, config: str | None, split: str) -> None:
        raise ConnectionError("no\nroute")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match=r"'hub:news' .* ConnectionError: no route; check the"):
        sources.read("hub:news", TEXT_LABEL)


def test_a_hub_digest_follows_the_revision_in_the_local_cache_without_loading_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    loads: list[str] = []

    def load(name: str, config: str | None, split: str) -> None:
        loads.append(name)
        revise("0001")

    def revise(revision: str) -> None:
        folder = tmp_path / "owner___my_news/default/0.0.0" / revision
        folder.mkdir(parents=True)
        write(folder / "dataset_info.json", "{}")

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load)
    first = sources.digest("hub:owner/MyNews")
    assert sources.digest("hub:owner/MyNews") == first
    assert loads == ["owner/MyNews"]
    revise("0002")
    assert sources.digest("hub:owner/MyNews") != first
    assert loads == ["owner/MyNews"]


@pytest.mark.parametrize(
    ("file", "columns", "rows", "classes"),
    [
        ("fpb/fpb.csv", "text label", 4846, 3),
        ("tfns/train.csv", "text label", 9543, 3),
        ("tfns/valid.csv", "text label", 2388, 3),
        ("sentfin/sentfin_long.csv", "text entity label", 14_405, 3),
        ("cfpb/complaints.csv", "narrative company product", 3940, 10),
        ("banking77/train.csv", "text category", 10_003, 77),
        ("banking77/test.csv", "text category", 3080, 77),
        ("fiqa/fiqa.csv", "text target kind label", 1173, 3),
        ("german_credit/germancredit.csv", "purpose creditability", 1000, 2),
    ],
)
def test_real_files_are_read_whole(file: str, columns: str, rows: int, classes: int) -> None:
    table = sources.read(str(shared_data(file)), dict.fromkeys(columns.split(), "data.text"))
    assert {len(values) for values in table.values()} == {rows}
    assert len(set(table[columns.split()[-1]])) == classes
    assert all(value for values in table.values() for value in values)


def test_files_whose_names_differ_in_case_are_not_one_institution(tmp_path: Path) -> None:
    for name in ("Nord.csv", "nord.csv"):
        write(tmp_path / name, "text,label\na,b\n")
    with pytest.raises(
        InputError, match=r"Nord.csv and nord.csv, which are both .* join or rename"
    ):
        sources.institution_files(str(tmp_path))


def test_a_text_whose_name_has_a_comma_must_be_renamed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.csv", '"Complaint, full text",kind\na,b\n')
    with pytest.raises(InputError, match=r"'Complaint, full text' must be renamed to be one"):
        read_table(source, "Complaint, full text", "kind", {}, form=PLAIN)
