"""CSV files in other delimiters and encodings, and errors that name the wrong one."""

from pathlib import Path

import pytest

from fedlora.config.config import from_flat
from fedlora.data import csv_files, sources
from fedlora.data.csv_files import DELIMITERS, CsvForm
from fedlora.errors import InputError

WANTED = {"text": "data.text", "label": "data.label"}


def written(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.write_bytes(text.encode(encoding))
    return str(path)


@pytest.mark.parametrize("delimiter", DELIMITERS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "cp1252", "utf-16"])
def test_a_file_in_its_own_form_is_read_as_it_was_written(tmp_path, delimiter, encoding) -> None:
    between = DELIMITERS[delimiter]
    text = f'text{between}label\n"été, {between} ""x""\ny"{between}a\nü{between}b\n'
    source = written(tmp_path / "a.csv", text, encoding)
    read = sources.read(source, WANTED, form=CsvForm(delimiter=delimiter, encoding=encoding))
    assert read == {"text": [f'été, {between} "x"\ny', "ü"], "label": ["a", "b"]}


@pytest.mark.parametrize("real", DELIMITERS)
@pytest.mark.parametrize("given", DELIMITERS)
def test_a_wrong_delimiter_is_named_as_the_cause_with_the_right_one(tmp_path, real, given) -> None:
    source = written(tmp_path / "a.csv", DELIMITERS[real].join(["text", "label"]) + "\n")
    if real == given:
        with pytest.raises(InputError, match="has no row below"):
            sources.read(source, WANTED, form=CsvForm(delimiter=given))
        return
    with pytest.raises(InputError) as error:
        sources.read(source, WANTED, form=CsvForm(delimiter=given))
    assert f"data.delimiter is {given!r}" in str(error.value)
    assert f"set data.delimiter to {real!r}" in str(error.value)


def test_a_missing_column_under_the_right_delimiter_is_a_missing_column(tmp_path) -> None:
    source = written(tmp_path / "a.csv", "body,label;x\na,b\n")
    with pytest.raises(InputError, match=r"data.text is 'text', but .* columns body, label;x"):
        sources.read(source, WANTED)


@pytest.mark.parametrize("rows_before", [0, 40])
@pytest.mark.parametrize(
    ("real", "given", "suggested"),
    [
        ("latin-1", "utf-8", "latin-1"),
        ("cp1252", "utf-8", "cp1252"),
        ("utf-16", "utf-8", "utf-16"),
        ("utf-8", "ascii", "utf-8"),
        ("utf-8", "latin-1", "utf-8"),
        ("utf-8", "cp1252", "utf-8"),
    ],
)
def test_a_wrong_encoding_is_named_as_the_cause_with_a_better_one(
    tmp_path, real, given, suggested, rows_before
) -> None:
    letters = "für “5 €”" if real == "cp1252" else "für"
    text = "text,label\n" + "plain,a\n" * rows_before + f"{letters},secret\n"
    source = written(tmp_path / "a.csv", text, real)
    with pytest.raises(InputError) as error:
        sources.read(source, WANTED, form=CsvForm(encoding=given))
    said = str(error.value)
    assert "data.encoding" in said and f"'{suggested}'" in said and "\n" not in said
    assert "secret" not in said
    if real in ("latin-1", "cp1252"):
        assert f"line {rows_before + 2} " in said
    sources.read(source, WANTED, form=CsvForm(encoding=suggested))  # the remedy works


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ('good,a\n"Happy" days,b\nbad,a\n', 3),
        ('good,a\nline\n"unclosed,b\nbad,a\n', 3),
        ('"two\nlines",a\n"so ""called"" news" today,b\n', 4),
        ('good,a\n"he said \\"no\\"",b\n', 3),
    ],
)
def test_quotes_that_would_swallow_rows_are_refused_with_their_line(tmp_path, rows, line) -> None:
    source = written(tmp_path / "a.csv", "text,label\n" + rows)
    with pytest.raises(InputError, match=f"from line {line}.*quote") as error:
        sources.read(source, WANTED)
    assert not {"Happy", "unclosed", "news", "said"} & set(str(error.value).split())


@pytest.mark.parametrize(("first", "delimiter"), [("\n", ","), ("sep=;\n", ";"), ("sep=,\n", ",")])
def test_what_stands_before_the_header_is_left_out(tmp_path, first, delimiter) -> None:
    content = first + f"text{delimiter}label\na{delimiter}b\n\n"
    source = written(tmp_path / "a.csv", content)
    assert csv_files.suspected_delimiter(source, Path(source), "utf-8") == delimiter
    read = sources.read(source, WANTED, form=CsvForm(delimiter=delimiter))
    assert read == {"text": ["a"], "label": ["b"]}


def test_blanks_around_the_names_of_columns_are_no_part_of_them(tmp_path) -> None:
    source = written(tmp_path / "a.csv", "id, text , label\n1, a, b\n")
    assert csv_files.header(source, Path(source), csv_files.PLAIN) == ["id", "text", "label"]
    assert sources.read(source, WANTED) == {"text": [" a"], "label": [" b"]}
    assert sources.read(source, {" text": "data.text"}) == {" text": [" a"]}  # an older way
    source = written(tmp_path / "b.csv", "text, text,label\na,b,c\n")
    with pytest.raises(InputError, match="two columns 'text'"):
        sources.read(source, WANTED)


@pytest.mark.parametrize("encoding", ["utf-9", "base64", "", "rot13", "hex"])
def test_an_encoding_that_is_none_of_text_is_refused(encoding) -> None:
    with pytest.raises(InputError, match=r"data\.encoding is .*no encoding of text"):
        from_flat({"data.encoding": encoding})


def test_an_unknown_delimiter_is_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"data\.delimiter is .comma.; it must be one of"):
        from_flat({"data.delimiter": "comma"})


def test_the_form_of_a_file_is_suspected_from_its_bytes(tmp_path) -> None:
    source = written(tmp_path / "a.csv", "t\tl\nfür,a\t1\n", "latin-1")
    encoding = csv_files.suspected_encoding((tmp_path / "a.csv").read_bytes())
    assert encoding == "latin-1"
    assert csv_files.suspected_delimiter(source, tmp_path / "a.csv", encoding) == "tab"


def test_a_letter_that_was_cut_in_two_makes_no_other_encoding_of_utf_8(tmp_path) -> None:
    """Read as cp1252, every letter beyond ASCII would be two others."""
    content = "text,label\n" + "Überweisung für Müller,a\n" * 20
    (tmp_path / "a.csv").write_bytes(content.encode() + b"geh\xc3,b\n")
    assert csv_files.suspected_encoding((tmp_path / "a.csv").read_bytes()) == "utf-8"
    with pytest.raises(InputError, match=r"line 22 holds other bytes; mend this line"):
        sources.read(str(tmp_path / "a.csv"), WANTED, form=CsvForm())
