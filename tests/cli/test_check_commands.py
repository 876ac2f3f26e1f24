"""`fedlora init` and `fedlora check` on a messy file, ready configurations, and the schema."""

import json
import tomllib
from pathlib import Path

import pytest
from setuptools import Distribution

from fedlora.config import ready, starter
from fedlora.config.config import load
from tests.cli.test_main import invoke, refused
from tests.messy import TINY, write_messy

ROOT = Path(__file__).parents[2]


@pytest.fixture
def messy(tmp_path, tiny_config):
    """The messy file, a configuration for it that knows nothing of its form, and the counts."""
    lacks = write_messy(tmp_path / "messy.csv")
    values = {
        "run-dir": "",
        "data.source": str(tmp_path / "messy.csv"),
        "data.text": "narrative",
        "data.label": "kind",
        "data.partition": "natural:bank",
        "data.min-records": 8,
        "federation.rounds": 1,
        "privacy.delta": 0.0,
    }
    (tmp_path / "messy.toml").write_text(tiny_config(**values).to_toml())
    return tmp_path / "messy.toml", lacks


def test_check_describes_the_file(messy) -> None:
    file, lacks = messy
    done = invoke("check", file)
    assert done.exit_code == 0, done.output
    for words in (
        f"{lacks['read']} rows",
        f"{lacks['no text']} left out: no text",
        f"{lacks['no label']} left out: no label",
        f"{lacks['no institution']} left out: no institution",
        "4 classes",
        "3 institutions",
        f"{len(TINY)} institutions left out",
        "signal to noise",
        "adapter:",
        "minutes",
        "nothing stops this run",
    ):
        assert words in done.stdout, words
    said = json.loads(invoke("check", file, "--json").stdout)
    assert said["rows"]["read"] == lacks["read"] and said["refused"] == []


def test_a_void_run_is_refused_by_check_and_run_until_it_is_accepted(messy, tmp_path) -> None:
    file, _ = messy
    quiet = ("--set", "privacy.epsilon=0.01")
    said = invoke("check", file, *quiet)
    assert said.exit_code == 2 and "nothing can be learned" in said.stdout
    out = tmp_path / "out"
    where = ("--out", out, "--engine", "inline")
    refused("run", file, *quiet, *where, words=["nothing can be learned", "--set accept=noise"])
    assert not out.exists() and "results in" not in invoke("run", file, *quiet, *where).output
    refused("check", file, *quiet, "--set", "accept=nose", words=["accept has 'nose'", "noise"])
    assert invoke("check", file, *quiet, "--set", "accept=noise").exit_code == 0

    done = invoke("run", file, *quiet, *where, "--set", "accept=noise")
    assert done.exit_code == 0, done.output
    assert "warning: noise (accepted)" in done.stdout
    page = (out / "report.html").read_text()
    assert "The result is void" in page
    assert load(out / "config.toml").accept == ("noise",)
    found = json.loads((out / "result.json").read_text())["findings"]
    assert {"noise"} <= {finding["name"] for finding in found}


def test_init_writes_a_configuration_that_check_and_run_take(
    messy, tmp_path, tiny_encoder, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "messy.toml").unlink()
    done = invoke("init", "messy.csv")
    assert done.exit_code == 0 and "fedlora check messy.toml" in done.stdout, done.output
    made = load(Path("messy.toml"))
    assert (made.data.text, made.data.label) == ("narrative", "kind")
    assert made.data.partition == "natural:bank"
    lines = Path("messy.toml").read_text().splitlines()
    keys = [i for i, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) > 10 and all(lines[i - 1].startswith("#") for i in keys)
    refused("init", "messy.csv", words=["messy.toml exists"])
    small = ("--set", f"model.name={tiny_encoder}", "--set", "training.max-length=16")
    small += ("--set", "federation.rounds=1", "--set", "home.method=none")
    assert invoke("check", "messy.toml", *small).exit_code == 0
    done = invoke("run", "messy.toml", *small, "--out", "out", "--engine", "inline")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "text\nlong words\n", ["none looks like a label"]),
        ("a.csv", "", ["cannot be read"]),
        ("a.csv", "text,label,bank\n", ["has no row"]),
        ("a.xlsx", "x", ["'.xlsx'"]),
        ("a.jsonl", "[]\n", ["a line is not an object"]),
    ],
)
def test_init_refuses_a_file_in_which_it_finds_no_label(tmp_path, name, content, words) -> None:
    (tmp_path / name).write_text(content)
    refused("init", tmp_path / name, "--out", tmp_path / "a.toml", words=words)
    assert not (tmp_path / "a.toml").exists()


def test_a_ready_configuration_is_found_by_its_name_from_anywhere(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = invoke("config", "demo")
    assert shown.exit_code == 0
    assert tomllib.loads(shown.stdout)["data"]["institutions"] == 39
    assert "hub/fpb" in ready.names() and "joining" in ready.names("sweeps")
    refused("run", "damo", words=["damo", "demo", "hub/fpb"])
    refused("check", "../configs/demo", words=["there is no such file"])
    (tmp_path / "demo").write_text("seed = 5\n")  # a file wins
    assert "seed = 5" in invoke("config", "demo").stdout


def test_every_ready_file_is_part_of_the_package(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # only the patterns of pyproject.toml count
    packed = set(build.find_data_files("experiments", "experiments"))
    ready_files = [
        path for kind in ("configs", "sweeps") for path in Path("experiments", kind).rglob("*.toml")
    ]
    assert len(ready_files) > 10
    assert {str(path) for path in ready_files} <= packed


@pytest.mark.parametrize(
    ("values", "guessed"),
    [
        ({"bank": "ab", "kind": "wxyz", "note": "n"}, ("note", "kind", "bank", "")),
        ({"bank": "ab", "note": "n"}, ("note", "bank", "", "")),
        ({"x": "ab", "category": "wxyz", "note": "n"}, ("note", "category", "", "")),
        ({"amount, usd": "n", "topic": "ab", "note": "n"}, ("note", "topic", "", "")),
        ({"Client": "abcdefghij", "kind": "xy", "note": "n"}, ("note", "kind", "Client", "")),
        (
            {"bank": "ab", "kind": "wxyz", "customer_id": "abcdefghij", "note": "n"},
            ("note", "kind", "bank", "customer_id"),
        ),
        ({"instruction": "i", "note": "n", "kind": "ab"}, ("note", "kind", "", "")),
        ({"instruction": "ij", "note": "n", "kind": "abc"}, ("note", "kind", "", "")),
        (
            {"Company public response": "abc", "Company": "abcd", "kind": "xy", "note": "n"},
            ("note", "kind", "Company", ""),
        ),
        ({"id": "#", "statement": "st", "kind": "ab"}, ("statement", "kind", "", "")),
        ({"confirmed": "abc", "kind": "xy", "note": "n"}, ("note", "kind", "", "")),
        ({"BankName": "abc", "kind": "xy", "note": "n"}, ("note", "kind", "BankName", "")),
        (
            {"customer_segment": "abc", "customer_id": "abcdefgh", "kind": "xy", "note": "n"},
            ("note", "kind", "", "customer_id"),
        ),
    ],
)
def test_init_guesses_columns_by_their_values_and_then_by_their_names(values, guessed) -> None:
    columns = {
        name: [
            f"a text of words {i}"
            if letters == "n"
            else f"id-{i:030}"
            if letters == "#"
            else letters[i % len(letters)] * (99 if name in ("instruction", "statement") else 1)
            for i in range(80)
        ]
        for name, letters in values.items()
    }
    found = starter.guess("x.csv", columns)
    assert (found.text, found.label, found.institution, found.customer) == guessed


def test_init_says_what_a_label_must_be_and_which_columns_it_could_not_read(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("few.csv").write_text("text,label\na text,x\nanother,y\nthird,x\n")
    refused("init", "few.csv", words=["each in five rows or more", "fedlora config sft"])
    rows = "".join(f"a long text {i},{'ab'[i % 2]},c\n" for i in range(40))
    Path("twice.csv").write_text(f"text,label,label\n{rows}")
    refused("init", "twice.csv", words=["none looks like a label"])
