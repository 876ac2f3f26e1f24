"""Audits: the bound by hand and by simulation, attacks on runs with and without privacy."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments.audit.bound import audit, lower_bound, p_value
from experiments.audit.canaries import plant
from fedlora.data import records

# The tiny encoder's gradients lie in few dimensions: with few records canaries can be told apart.
FEW = {
    "run-dir": "",
    "data.test-fraction": 0.8,
    "training.batch-size": 10**6,
    "federation.rounds": 12,
}


def test_delta_weakens_the_bound():
    values = {"guesses": 500, "right": 480, "canaries": 1000, "confidence": 0.95}
    bounds = [lower_bound(delta=delta, **values) for delta in (0.0, 1e-5, 1e-3)]
    assert bounds[0] > bounds[1] > bounds[2] > 0


def test_with_delta_zero_the_p_value_is_the_binomial_tail():
    # Bin(2, 1/2) >= 1 has probability 3/4
    assert p_value(guesses=2, right=1, canaries=9, epsilon=0.0, delta=0.0) == pytest.approx(0.75)


def test_randomised_response_at_epsilon_one_is_refuted_as_rarely_as_stated():
    # 100 audits, each wrong with at most 5 %: 15 or more with probability below 2e-4.
    draw = np.random.default_rng(0)
    wrong = 0
    for _ in range(100):
        inside = draw.random(400) < 0.5
        honest = draw.random(400) < math.e / (1 + math.e)
        scores = np.where(honest, inside, ~inside) + 1e-3 * draw.random(400)
        wrong += audit(scores, inside, delta=0.0).epsilon > 1.0
    assert wrong < 15


def test_canaries_are_in_the_records_where_the_coin_said_so_and_nowhere_held_out(
    tiny_config, tmp_path
):
    config = tiny_config()
    audited = plant(config, 40, tmp_path / "audit")
    before, after = records.load(config), records.load(audited.config)
    inside = sum(canary.inside for canary in audited.canaries)
    assert after.names == before.names
    assert len(after.all_train) == len(before.all_train) + inside
    held = (tmp_path / "audit" / "held-out.csv").read_text()
    assert not any(f",{canary.text}," in held for canary in audited.canaries)


@pytest.fixture
def audited(tiny_config, tmp_path, monkeypatch):
    """Runs `fedlora audit` on the tiny federation; gives exit code and audit.json.

    Coins are the same each time, with noise and draws of ``tiny_config`` nothing is left to chance:
    how many canaries the operating system's coins plant moves the bound (75 of 120 once gave 1.9).
    """
    import json

    coins = np.random.default_rng(0)
    fixed = SimpleNamespace(randbits=lambda _: int(coins.integers(2)))
    monkeypatch.setattr("experiments.audit.canaries.secrets", fixed)

    def run(*options, expect=0, **values):
        file = tmp_path / "config.toml"
        values = {"home.method": "interpolate", **FEW, **values}  # audits do not train at home
        file.write_text(tiny_config(**values).to_toml())
        out = tmp_path / "audit"
        command = ["audit", str(file), "--engine", "inline", "--canaries", "120"]
        result = CliRunner().invoke(app, [*command, "--out", str(out), "--json", *options])
        assert result.exit_code in (expect, 3), result.output
        assert json.loads(result.stdout) == json.loads((out / "audit.json").read_text())
        assert "joining" not in json.loads((out / "run" / "result.json").read_text())
        return result.exit_code, json.loads(result.stdout)

    return run


def test_a_run_without_noise_is_caught(audited):
    code, found = audited(**{"privacy.epsilon": float("inf")})
    assert found["shown"]["epsilon"] > 2.0, found
    assert found["shown"]["epsilon"] <= found["most_they_can_show"]
    assert found["most_they_can_show"] == pytest.approx(3.14, abs=0.4)
    assert code == 0  # nothing was promised


def test_a_run_at_epsilon_one_keeps_its_promise(audited, tmp_path):
    code, found = audited(**{"privacy.epsilon": 1.0})
    assert code == 0 and not found["refuted"]
    assert found["epsilon"] <= 1.0
    assert found["shown"]["canaries"] == 120


def test_noise_that_is_smaller_than_promised_breaks_the_promise(audited, monkeypatch):
    from client.dp_sgd import PrivateOptimizer

    draw = PrivateOptimizer._draw
    monkeypatch.setattr(PrivateOptimizer, "_draw", lambda self, count: draw(self, count) * 1e-3)
    monkeypatch.setattr("client.dp_sgd.check_noise", lambda *_: None)  # else the guard ends the run
    code, found = audited(**{"privacy.epsilon": 1.0})
    assert code == 3 and found["refuted"]


def test_what_cannot_be_audited_is_refused_before_anything_is_written(tiny_config, tmp_path):
    file = tmp_path / "config.toml"
    file.write_text(tiny_config(**{"run-dir": ""}).to_toml())
    out = tmp_path / "audit"
    assert not out.exists()


def test_a_run_that_fails_is_not_a_promise_that_is_broken(tiny_config, tmp_path, monkeypatch):
    def fails(*_):
        raise RuntimeError("the disk is full")

    monkeypatch.setattr("experiments.audit.run.run_rounds", fails)
    file = tmp_path / "config.toml"
    file.write_text(tiny_config(**FEW).to_toml())
    command = ["audit", str(file), "--engine", "inline", "--canaries", "120"]
    result = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "audit")])
    assert result.exit_code == 1 and "the disk is full" in result.stderr
    assert not (tmp_path / "audit" / "audit.json").exists()
