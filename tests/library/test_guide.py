"""The guide and the notebooks run as they stand."""

import json
import re
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from fedlora.config import plugins

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))


def test_a_strategy_and_a_metric_written_by_the_guide_run_from_a_directory_of_their_own(
    tmp_path, monkeypatch, tiny_config
):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    (written,) = [block for block in blocks if "def masked_mean" in block]
    (tmp_path / "mine.py").write_text(written)
    (tmp_path / "own.toml").write_text(tiny_config(**{"run-dir": ""}).to_toml())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    values = {"aggregate": "mine:masked_mean", "metrics": "mine:missed_fraud"}
    given = [f"--set=federation.{name}={value}" for name, value in values.items()]
    try:
        command = ["run", "own.toml", "--engine=inline", "--json", "--out=run", *given]
        done = CliRunner().invoke(app, command)
        assert done.exit_code == 0, done.output
        result = json.loads(done.stdout)
        assert 0 <= result["missed_fraud"] <= 1
        privacy = json.loads((tmp_path / "run" / "privacy.json").read_text())
        assert [one["file"] for one in privacy["plug_ins"]] == ["mine.py"] * 2
        lines = (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()
        assert all("missed_fraud" in json.loads(line)["metrics"] for line in lines)
        refused = CliRunner().invoke(app, [*command[:-3], "--out=other", given[0] + "s"])
        assert refused.exit_code == 2 and "did you mean masked_mean?" in refused.stderr
        assert not (tmp_path / "other").exists()
    finally:
        sys.modules.pop("mine", None)
        plugins.forget()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_runs_as_it_stands(notebook, tmp_path, run_script):
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    run_script("\n\n".join(code))
    runs = sorted((tmp_path / "runs").iterdir())
    assert runs and all((run / "result.json").exists() for run in runs)


def test_there_are_two_notebooks_without_errors_in_their_outputs():
    assert len(NOTEBOOKS) == 2
    for file in NOTEBOOKS:
        text = file.read_text()
        assert '"output_type": "error"' not in text
        assert "/tmp/" not in text and "/home/" not in text


def test_the_configurations_that_the_guide_makes_are_made(monkeypatch):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.S)
    (written,) = [block for block in blocks if "RunConfig(" in block]
    monkeypatch.chdir(ROOT)
    made = {}
    exec(written, made)
    assert made["config"].privacy.epsilon == 3.0
    assert made["other"].federation.rounds == 10 and made["other"].data.institutions == 39
