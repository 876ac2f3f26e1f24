"""`fedlora compare`: two runs side by side."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from tests.samples import compared

runner = CliRunner()


@pytest.fixture
def two_runs(tmp_path, tiny_config, simulate_run):
    paths = []
    for name, rank in (("small", 2), ("large", 4)):
        config = tiny_config(
            **{"run-dir": str(tmp_path / name), "adapter.rank": rank, "federation.rounds": 1}
        )
        simulate_run(config)
        paths.append(str(tmp_path / name))
    return paths


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_directory_of_fedlora_home_is_no_run(tmp_path, command):
    (tmp_path / "result.json").write_text("{}")
    (tmp_path / "home.toml").touch()
    said = runner.invoke(app, [command, *[str(tmp_path)] * (2 if command == "compare" else 1)])
    assert said.exit_code == 2
    assert "holds an institution's own model and no run" in " ".join(said.stderr.split())


def test_only_what_differs_is_compared(two_runs, tmp_path):
    page = tmp_path / "page.html"
    result = runner.invoke(app, ["compare", *two_runs, "--out", str(page), "--json"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["runs"] == ["small", "large"]
    assert said["settings"] == {"adapter.rank": [2, 4]}
    assert {"accuracy", "macro_f1", "epsilon", "seconds", "bytes"} <= said["results"].keys()
    small, large = said["results"]["bytes"]
    assert small < large
    text = page.read_text()
    assert "adapter.rank" in text and text.count("<svg") == 4
    shown = runner.invoke(app, ["compare", *two_runs, "--out", str(page)])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    assert "adapter.rank" in shown.stdout and "large" in shown.stdout


def test_other_rows_code_and_void_results_are_told(two_runs, tmp_path):
    command = ["compare", *two_runs, "--out", str(tmp_path / "page.html"), "--json"]
    told = {"void, because", "held-out rows", "commit", "code", "base model", "dtype"}
    assert not told & json.loads(runner.invoke(app, command).stdout)["results"].keys()
    result, about = (Path(two_runs[1]) / name for name in ("result.json", "environment.json"))
    changed = json.loads(result.read_text())
    changed["n"] += 1
    changed["base"]["dtype"] = "float16"
    changed["findings"] = [{"name": "labels", "text": "two classes are one", "voids": True}]
    result.write_text(json.dumps(changed))
    about.write_text(json.dumps(json.loads(about.read_text()) | {"code": "f" * 64}))
    found = json.loads(runner.invoke(app, command).stdout)["results"]
    assert found["void, because"] == ["", "two classes are one"]
    assert found["held-out rows"] == [changed["n"] - 1, changed["n"]]
    assert found["code"][1] == "f" * 12 and found["dtype"][1] == "float16"
    assert not {"commit", "base model"} & found.keys()


def test_the_gain_of_joining_is_compared_where_all_runs_have_it(two_runs, tmp_path):
    page = tmp_path / "page.html"
    command = ["compare", *two_runs, "--out", str(page), "--json"]
    for number, run in enumerate(two_runs):
        before = json.loads(runner.invoke(app, command).stdout)["results"]
        assert "gain of joining" not in before and "own, accuracy" not in before
        file = Path(run) / "result.json"
        joining = compared(["Alpha"], better=6 + 2 * number)
        file.write_text(json.dumps(json.loads(file.read_text()) | {"joining": joining}))
    found = json.loads(runner.invoke(app, command).stdout)["results"]
    assert found["gain of joining"] == pytest.approx([4 / 22, 6 / 22])
    assert found["alone, accuracy"] == pytest.approx([16 / 22, 14 / 22])
    assert "gain of joining" in page.read_text()


def test_epsilon_is_compared_with_earlier_runs_and_delta_and_a_seed_is_named(two_runs, tmp_path):
    page = tmp_path / "page.html"
    command = ["compare", *two_runs, "--out", str(page)]
    file = Path(two_runs[1]) / "privacy.json"
    privacy = json.loads(file.read_text())
    before = json.loads(runner.invoke(app, [*command, "--json"]).stdout)["results"]
    assert before["noise"] == ["from a seed, so epsilon protects nobody"] * 2
    assert "epsilon with earlier runs" not in before and None not in before["delta"]
    next(iter(privacy["institutions"].values()))["ledger_epsilon"] = 11.19
    file.write_text(json.dumps(privacy))
    found = json.loads(runner.invoke(app, [*command, "--json"]).stdout)["results"]
    assert found["epsilon with earlier runs"] == [before["epsilon"][0], 11.19]
    assert "11.19" in runner.invoke(app, command).stdout


def test_a_file_that_is_no_such_page_is_not_replaced(two_runs):
    file = Path(two_runs[0]) / "result.json"
    before = file.read_bytes()
    done = runner.invoke(app, ["compare", *two_runs, "--out", str(file)])
    assert done.exit_code == 2 and "is no page of this command" in done.stderr
    assert file.read_bytes() == before


def test_one_run_or_none_is_refused(two_runs, tmp_path):
    for runs, words in (
        (two_runs[:1], ["at least 2"]),
        ([two_runs[0], str(tmp_path / "none")], ["none", "result.json"]),
    ):
        result = runner.invoke(app, ["compare", *runs, "--out", str(tmp_path / "page.html")])
        assert result.exit_code == 2 and all(word in result.stderr for word in words)
        assert not (tmp_path / "page.html").exists()
