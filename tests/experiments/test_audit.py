"""Audits: the bound by hand and by simulation, attacks on runs with and without privacy."""

import dataclasses
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

from cli.main import app
from experiments.audit import bound
from experiments.audit.bound import audit, largest, lower_bound, p_value
from experiments.audit.canaries import plant
from experiments.audit.findings import (
    ALL_BUT_HONEST,
    ALL_BUT_ONE,
    FINAL,
    SERVER,
    VIEWS,
    facts,
    verdict,
)
from experiments.audit.observed import (
    Transcript,
    scores,
    views,
)
from experiments.audit.run import check
from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models import trainable
from fedlora.privacy import discrete_gaussian
from fedlora.wire import wire
from simulation.run import load, open_engine, run_rounds

# The tiny encoder's gradients lie in few dimensions: with few records canaries can be told apart.
FEW = {
    "run-dir": "",
    "data.test-fraction": 0.8,
    "training.sample-rate": 1.0,
    "federation.rounds": 12,
}
FEWER = {"data.test-fraction": 0.9, "federation.rounds": 24}  # for sums of four institutions
SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "federation.weighting": "public-size",
}


def test_a_hundred_right_guesses_of_a_hundred_show_what_the_formula_gives():
    # q^100 = 0.05 at q = 0.97049, and ln(q / (1 - q)) = 3.493
    found = lower_bound(guesses=100, right=100, canaries=100, delta=0.0, confidence=0.95)
    assert found == pytest.approx(math.log(0.05**0.01 / (1 - 0.05**0.01)), abs=1e-6)
    assert found == pytest.approx(3.493, abs=1e-3)


def test_half_of_the_guesses_right_shows_nothing():
    assert lower_bound(guesses=100, right=50, canaries=100, delta=0.0, confidence=0.95) == 0.0


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


@pytest.mark.parametrize("canaries", [2, 3, 7, 875])
def test_no_canary_is_guessed_both_ways(canaries, monkeypatch):
    guessed = []
    monkeypatch.setattr(bound, "lower_bound", lambda *, guesses, **_: guessed.append(guesses) or 0)
    audit(np.arange(canaries), np.arange(canaries) % 2 == 0, delta=0.0)
    assert max(guessed) == 2 * (canaries // 2)


def test_the_most_that_canaries_can_show_is_the_bound_of_right_guesses_only():
    inside = np.arange(875) >= 438
    found = audit(np.arange(875), inside, delta=0.0)
    assert found.guesses == found.right == 874
    assert found.epsilon == largest(875, 0.0, 0.95)


def test_a_verdict_says_what_canaries_could_have_shown():
    views = {view: {"epsilon": 0.0} for view in VIEWS}
    result = {"refuted": False, "epsilon": 8.0, "canaries": {"in all": 1000, **views}}
    result["canaries"]["most they can show"] = 5.28
    result["noise"] = {"source": "secure"}
    assert "could not have refuted it" in verdict(result)
    assert "could not" not in verdict(result | {"epsilon": 1.0})
    assert verdict(result | {"epsilon": "inf"}) == "nothing was promised"
    seeded = result | {"noise": {"source": "seeded"}}
    assert verdict(seeded) == "nothing was promised, as the noise came from a seed"
    assert verdict(seeded | {"epsilon": "inf"}) == "nothing was promised"
    assert verdict(seeded | {"refuted": True}) == "IS BROKEN"


def test_canaries_are_in_the_records_where_the_coin_said_so_and_nowhere_held_out(
    tiny_config, tmp_path
):
    config = tiny_config()
    audited = plant(config, 40, tmp_path / "audit")
    before, after = records.load(config), records.load(audited.config)
    inside = sum(canary.inside for canary in audited.canaries)
    assert after.names == before.names
    assert len(after.all_train) == len(before.all_train) + inside
    assert {c.kind for c in audited.canaries} == {"wrong label", "random words"}
    held = (tmp_path / "audit" / "held-out.csv").read_text()
    assert not any(f",{canary.text}," in held for canary in audited.canaries)


def test_canaries_stay_in_records_that_are_a_part_of_an_institutions(tiny_config, tmp_path):
    audited = plant(tiny_config(**{"data.max-records": 20}), 40, tmp_path / "audit")
    inside = sum(canary.inside for canary in audited.canaries)
    assert len(records.load(audited.config).all_train) == 4 * 20 + inside


def test_fewer_canaries_than_institutions_are_refused(tiny_config, tmp_path):
    with pytest.raises(InputError, match="--canaries is 3"):
        plant(tiny_config(), 3, tmp_path / "audit")


def test_an_audit_of_answers_without_held_out_rows_names_the_key(tiny_config, tmp_path):
    values = {"model.task": "sft", "home.method": "none", "data.test-fraction": 0.0}
    with pytest.raises(InputError, match=r"0 held-out rows.*raise data\.test-fraction"):
        plant(tiny_config(**values), 40, tmp_path / "audit")


def test_an_audit_takes_no_directory_that_holds_something(tiny_config, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(InputError, match="holds other files"):
        check(tiny_config(), tmp_path, 100, "inline")


def test_a_promise_to_institutions_alone_is_not_audited(tiny_config, tmp_path):
    values = {"privacy.epsilon": math.inf, "privacy.institution-epsilon": 5.0}
    with pytest.raises(InputError, match="promises to hide institutions, which it does not test"):
        check(tiny_config(**values), tmp_path / "audit", 100, "inline")
    check(tiny_config(**values | {"privacy.epsilon": 8.0}), tmp_path / "audit", 100, "inline")


def test_an_audit_of_sums_refuses_a_run_that_masks_them(tiny_config, tmp_path):
    values = SECURE | {"privacy.protocol": "full"}
    with pytest.raises(InputError, match=r"privacy\.protocol .* use ideal"):
        check(tiny_config(**values), tmp_path / "audit", 100, "inline")


@pytest.mark.parametrize(
    ("values", "canaries", "said"),
    [
        ({"data.view": "pooled"}, 100, r"data\.view is 'pooled'.* use all"),
        ({"data.view": "only:Alpha"}, 100, r"data\.view is 'only:Alpha'"),
        ({}, 9, r"--canaries is 9; it must be at least 10"),
    ],
)
def test_what_cannot_be_audited_is_refused_before_it_is_trained(
    tiny_config, tmp_path, values, canaries, said
):
    with pytest.raises(InputError, match=said):
        check(tiny_config(**values), tmp_path / "audit", canaries, "inline")


def test_a_server_knows_the_sum_of_all_vectors_and_with_others_smaller_sums(tiny_config):
    assert views(tiny_config(**SECURE), 4) == {
        SERVER: ((0, 1, 2, 3),),
        ALL_BUT_HONEST: ((0, 1),),
        ALL_BUT_ONE: ((0,), (1,), (2,), (3,)),
    }
    assert views(tiny_config(), 2) == {SERVER: ((0,), (1,))}


def test_the_scores_of_a_view_depend_on_its_sums_and_on_no_vector_in_them(tiny_config, tmp_path):
    """Alpha and Beta, the first two institutions, exchange a part of their vectors."""
    config = tiny_config(**SECURE, **{"federation.rounds": 2})
    transcript = Transcript(folder=tmp_path / "transcript")
    with (
        load("inline", config),
        open_engine("inline", config) as grid,
    ):
        transcript.watch(grid)
        run_rounds(config, grid)
    federation = records.load(config)
    shard = federation.all_train.select(np.arange(len(federation.all_train))[::10])
    owners = [federation.names[row % 4] for row in range(len(shard))]

    def scored():
        work = trainable.load(config, federation.labels)
        return scores(config, work, transcript, shard, owners)

    before = scored()
    moved = np.random.default_rng(0).integers(2**40, size=len(transcript.update(1, "Alpha").words))
    for name, sign in (("Alpha", 1), ("Beta", -1)):
        update = transcript.update(1, name)
        changed = dataclasses.replace(update, words=update.words + sign * moved)
        (transcript.folder / f"1-{name}").write_bytes(wire.update_to_bytes(changed))
    after = scored()
    for name in (SERVER, ALL_BUT_HONEST):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-3, atol=1e-3)
    hidden = [owner in ("Delta", "Gamma") for owner in owners]
    assert np.isnan(after[ALL_BUT_HONEST]).tolist() == hidden
    shift = np.abs(after[ALL_BUT_ONE] - before[ALL_BUT_ONE])
    assert not shift[hidden].any() and np.median(shift[~np.array(hidden)]) > 0.1


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
    seen = found["canaries"]["every round, as the server sees it"]
    assert seen["epsilon"] > 2.0, found["canaries"]
    assert (
        seen["epsilon"] <= found["canaries"]["most they can show"] == pytest.approx(3.14, abs=0.1)
    )
    assert code == 0  # nothing was promised


def test_a_run_at_epsilon_one_keeps_its_promise(audited, tmp_path):
    code, found = audited(**{"privacy.epsilon": 1.0, "privacy.ledger": str(tmp_path / "ledgers")})
    assert code == 0 and not found["refuted"]
    assert found["epsilon"] <= 1.0
    assert sum(found["canaries"]["kinds"].values()) == 120
    assert (found["noise"]["institutions"], found["noise"]["left_out"]) == (4, 0)
    assert found["noise"]["cosine"] < 0.5
    assert not (tmp_path / "ledgers").exists()  # those are bound to records without canaries


def test_noise_that_is_smaller_than_promised_breaks_the_promise(audited, monkeypatch):
    from client.dp_sgd import PrivateOptimizer

    draw = PrivateOptimizer._draw
    monkeypatch.setattr(PrivateOptimizer, "_draw", lambda self, count: draw(self, count) * 1e-3)
    monkeypatch.setattr("client.dp_sgd.check_noise", lambda *_: None)  # else the guard ends the run
    code, found = audited(**{"privacy.epsilon": 1.0})
    assert code == 3 and found["refuted"]


def test_a_sum_of_noised_vectors_keeps_both_promises(audited):
    code, found = audited(**SECURE, **{"privacy.epsilon": 1.0})
    assert code == 0 and not found["refuted"]
    assert found["epsilon"] <= 1.0 < found["epsilon_alone"] < 3.0
    bounds = {view: found["canaries"][view]["canaries"] for view in VIEWS}
    assert bounds == {FINAL: 120, SERVER: 120, ALL_BUT_HONEST: 60, ALL_BUT_ONE: 120}
    assert {found["canaries"][view]["confidence"] for view in VIEWS} == {1 - 0.05 / 4}
    assert (found["noise"]["institutions"], found["noise"]["left_out"]) == (4, 0)
    assert found["noise"]["cosine"] < 0.5
    shown = dict(facts(found))
    of_one = shown["epsilon if all others collude, were the noise secret"]  # seeded: no promise
    assert of_one.startswith("epsilon ")


@pytest.mark.slow
def test_shares_of_noise_that_cancel_are_found_in_the_sum_alone(audited, monkeypatch):
    """The calls are those of four institutions, then of the next round."""
    draw, shares = discrete_gaussian.draw, []

    def cancelling(source, scale, count):
        if len(shares) % 4 < 3:
            shares.append(draw(source, scale, count))
        else:
            shares.append(-sum(shares[-3:]))
        return shares[-1]

    monkeypatch.setattr("client.noise_share.discrete_gaussian.draw", cancelling)
    monkeypatch.setattr("client.noise_share.check_noise", lambda *_: None)
    code, found = audited(**SECURE, **FEWER, **{"privacy.epsilon": 0.5})
    assert code == 3
    assert found["canaries"][SERVER]["epsilon"] > found["epsilon"]
    assert found["canaries"][ALL_BUT_HONEST]["epsilon"] <= found["epsilon"]
    assert found["canaries"][ALL_BUT_ONE]["epsilon"] <= found["epsilon_alone"]


def test_vectors_without_shares_of_noise_break_both_promises(audited, monkeypatch):
    monkeypatch.setattr(
        "client.noise_share.discrete_gaussian.draw",
        lambda source, scale, count: np.zeros(count, np.int64),
    )
    monkeypatch.setattr("client.noise_share.check_noise", lambda *_: None)
    code, found = audited(**SECURE, **FEWER, **{"privacy.epsilon": 0.5})
    assert code == 3 and found["refuted"]
    assert found["canaries"][SERVER]["epsilon"] > found["epsilon"]
    assert found["canaries"][ALL_BUT_HONEST]["epsilon"] > found["epsilon"]
    assert found["canaries"][ALL_BUT_ONE]["epsilon"] > found["epsilon_alone"]


@pytest.mark.parametrize(
    "source",
    [lambda call: call % 4, lambda call: call // 4],
    ids=["used again in each round", "shared by institutions"],
)
def test_noise_that_is_used_twice_breaks_the_promise(audited, monkeypatch, source):
    """The calls are those of four institutions, then of the next round."""
    draws = np.random.default_rng(0).normal(size=(12, 10_000))
    calls = itertools.count()
    monkeypatch.setattr(
        "client.dp_sgd.PrivateOptimizer._draw",
        lambda _, count: draws[source(next(calls))][:count],
    )
    code, found = audited(**{"privacy.epsilon": 1.0})
    assert code == 3 and found["noise"]["cosine"] > 0.5


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
