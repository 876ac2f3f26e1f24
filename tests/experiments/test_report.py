"""Pages of runs, sweeps and audits: what they hold, complete and in progress."""

import json
import re
import time

import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments import report
from fedlora.errors import InputError


@pytest.fixture
def finished(tmp_path, tiny_config, simulate_run):
    def make(**values):
        config = tiny_config(**{"run-dir": str(tmp_path / "run"), **values})
        simulate_run(config)
        return tmp_path / "run"

    return make


def test_a_page_is_self_contained_and_escapes_what_is_not_ours(finished):
    run = finished(**{"home.method": "interpolate", "home.steps": 2})
    result = json.loads((run / "result.json").read_text())
    result["findings"] = [{"name": "rare", "text": "<script>", "voids": False}]
    (run / "result.json").write_text(json.dumps(result))
    page = report.write(run).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert not re.search(r"(src|href)=", page) and "http-equiv" not in page
    for model in ("alone", "shared", "own"):
        assert f"{100 * result['joining'][model]['accuracy']:.1f} %" in page
    for name in result["institutions"]:
        assert f"<td>{name}</td>" in page


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"gain": {"mean": 0.1, "low": 0.05, "high": 0.2, "texts": 50}}, "gain"),
        ({"gain": {"mean": -0.1, "low": -0.2, "high": -0.05, "texts": 50}}, "loss"),
        ({"gain": {"mean": 0.1, "low": -0.05, "high": 0.2, "texts": 50}}, "unclear"),
        ({"gain": {"mean": 0.1, "low": 0.05, "high": 0.2, "texts": 9}}, "unclear"),
    ],
)
def test_the_verdict_follows_the_interval_of_the_gain(finished, change, kind):
    run = finished(**{"home.method": "interpolate", "home.steps": 2})
    result = json.loads((run / "result.json").read_text())
    result["joining"]["gain"] |= change["gain"]
    result["per_class"] = {}
    (run / "result.json").write_text(json.dumps(result))
    assert report.of_run(run)["kind"] == kind


def test_a_run_in_progress_has_a_page_that_reloads(finished):
    run = finished()
    assert report.of_run(run)["refresh"] == 0
    (run / "result.json").unlink()
    (run / "privacy.json").unlink()
    values = report.of_run(run)
    assert (values["kind"], values["refresh"]) == ("running", 3) and not values["promise"]
    assert 'http-equiv="refresh"' in report.write(run).read_text()


def test_a_seeded_run_says_that_it_protects_nobody(finished):
    run = finished()
    assert report.of_run(run)["bad_promise"]
    assert 'class="verdict loss"' in report.write(run).read_text()


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InputError):
        report.write(tmp_path)
    done = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert done.exit_code == 2


def test_the_page_of_a_live_run_is_written_while_it_runs(finished, monkeypatch):
    run = finished()
    (run / "result.json").unlink()
    (run / "report.html").unlink(missing_ok=True)
    monkeypatch.setattr(report, "LIVE_SECONDS", 0.01)
    with report.live(run):
        for _ in range(500):
            if (run / "report.html").exists():
                break
            time.sleep(0.02)
    assert (run / "report.html").exists()
