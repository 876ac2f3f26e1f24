"""Runs under secure aggregation, the whole path: the step, both epsilons, dropouts."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from client.dp_sgd import SLACK
from client.ledger import Ledger
from experiments import report
from fedlora.data import records
from fedlora.gradients import lora_layers
from fedlora.models import trainable
from fedlora.models.adapters import PARTS, kind
from fedlora.privacy import accounting, composition, discrete_gaussian
from fedlora.privacy.budget import plan_run
from fedlora.privacy.streams import RandomSource
from fedlora.rounding import at_most
from fedlora.runs.run_files import read_records
from fedlora.secure import noise_shares
from fedlora.terminal import Terminal
from server import roster
from server.roster import Roster, RunFailed
from server.rounds import Federation
from simulation import progress
from tests.samples import final_adapter, same_adapters

SECURE = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
    "federation.weighting": "public-size",
    "federation.server-optimizer": "none",
    "federation.server-learning-rate": 1.0,
}
BANKS = ("Alpha", "Beta", "Delta", "Gamma")


def _key(config, name: str, number: int) -> RandomSource:
    return RandomSource.seeded("privacy", config.seed, number, name)


def _clipped_sum(config, name: str, number: int) -> tuple[np.ndarray, int]:
    """One institution's sum of clipped gradients at the first adapter, and its size class.

    The rows are those that the run samples; each gradient is computed, clipped and added by itself.
    """
    federation = records.load(config)
    work = trainable.load(config, federation.labels)
    shard = federation.train(federation.names.index(name))
    work.train_only(PARTS)
    work.start.load_into(work.model)
    parameters = [p for _, p in sorted(lora_layers.parameters(work.model).items())]
    drawn = _key(config, name, number).child("sampling").uniform(len(shard))
    rows = np.flatnonzero(drawn < config.training.batch_size)
    total = np.zeros(sum(p.numel() for p in parameters))
    for row in rows:
        batch = work.task.collate(shard, [int(row)])
        loss = work.task.losses(work.model, batch, work.labels).sum()
        gradients = torch.autograd.grad(loss, parameters)
        flat = torch.cat([g.double().flatten() for g in gradients]).numpy()
        total += flat * min(1.0, config.privacy.max_grad_norm / (1 + SLACK) / np.linalg.norm(flat))
    assert len(rows) > 10
    return total, accounting.public_size(len(shard))


def test_a_round_is_one_step_of_dp_sgd_on_the_union_of_all_records(tiny_config, simulate_run):
    """The noise is drawn again from the seeded keys, so that only rounding is left."""
    config = tiny_config(**SECURE, **{"federation.rounds": 1})
    simulate_run(config)
    found = final_adapter(config)
    start = trainable.load(config, records.load(config).labels).start
    sums, sizes = zip(*(_clipped_sum(config, name, 1) for name in BANKS), strict=True)
    plan = plan_run(config, 100, 1)
    scale = plan.share_scale(len(sums[0]))
    sources = [_key(config, name, 1).child("noise-share") for name in BANKS]
    noise = sum(discrete_gaussian.draw(source, scale, len(sums[0])) for source in sources)
    expected = sum(sums) + noise * noise_shares.grid(config.privacy.max_grad_norm)
    expected /= config.training.batch_size * sum(sizes)
    moved = torch.cat([(start[name].double() - found[name].double()).flatten() for name in found])
    np.testing.assert_allclose(moved.numpy(), expected, rtol=0, atol=2e-7)
    assert np.abs(expected).max() > 0.01  # rounding of the adapter to float32 is far below


def test_the_noise_of_the_sum_is_the_promised_one_over_the_shares_that_must_be_there(tiny_config):
    plan = plan_run(tiny_config(**SECURE), 100, 3)
    local = plan_run(tiny_config(), 100, 3)
    assert plan.noise_multiplier == pytest.approx(local.noise_multiplier, rel=0.01)
    assert composition.epsilon(plan.events, plan.delta) <= 8.0
    steps_of_the_grid = plan.share_scale(10_000) * math.sqrt(plan.honest)
    in_bounds = steps_of_the_grid * noise_shares.grid(plan.max_grad_norm) / plan.max_grad_norm
    margin = 1 + 2**-9  # for noise multipliers 0.1 % apart and sums in float64
    assert in_bounds == pytest.approx(plan.noise_multiplier * margin, rel=1e-8)
    assert in_bounds > plan.noise_multiplier * margin  # the sum is rounded, which moves it a little


def test_a_run_states_both_epsilons_and_whom_to_trust(tiny_config, simulate_run):
    config = tiny_config(**SECURE, **{"privacy.noise": "secure"})
    result = simulate_run(config)
    run = Path(config.run_dir)
    said = json.loads((run / "privacy.json").read_text())
    assert said["secure_aggregation"] == {
        "honest": 2,
        "colluding": 1,
        "institutions": 4,
        "least_survivors": 3,
    }
    assert "up to 1 institutions" in said["adversary"] and "2 other" in said["adversary"]
    for name in BANKS:
        one = said["institutions"][name]
        with Ledger.open(run / "ledgers" / f"{name}.db") as ledger:
            shown = ledger.show()
        assert one["epsilon"] == shown["epsilon"] == result["epsilon_max"] <= 8.0
        assert one["epsilon_alone"] == shown["epsilon_alone"] == result["epsilon_alone_max"] > 8.0
        assert [entry["shares"] for entry in shown["entries"]] == [2, 2, 2]
        assert one["share_noise_multiplier"] == one["noise_multiplier"] / math.sqrt(2)
    terminal = Terminal()
    terminal.width = 500
    with terminal.capture() as table:
        progress.summary(config, result, terminal)
    for shown in (report.write(run).read_text(), table.get()):
        assert "2 honest institutions" in shown and "others collude" in shown
        assert at_most(result["epsilon_alone_max"]) in shown
    for record in read_records(run):
        assert record["updates"] == 4 and not record["skipped"]
        assert record["aggregation"] == {"rejected": {}}  # no figure of a single vector


def _poor(config, *names: str) -> None:
    """Give institutions a ledger that no round fits."""
    folder = Path(config.run_dir) / "ledgers"
    folder.mkdir(mode=0o700, parents=True)
    for name in names:
        Ledger.create(folder / f"{name}.db", max_epsilon=0.01, delta=1e-4, accountant="rdp")


def test_a_round_goes_on_without_an_institution_that_does_not_answer(tiny_config, simulate_run):
    config = tiny_config(**SECURE)
    _poor(config, "Beta")
    simulate_run(config)
    records = read_records(Path(config.run_dir))
    assert [r["updates"] for r in records] == [3, 3, 3]
    assert not any(r["skipped"] for r in records)
    assert records[0]["aggregation"]["rejected"] == {"Beta": "budget-exhausted"}


def test_with_too_few_survivors_a_round_changes_nothing(tiny_config, simulate_run, monkeypatch):
    config = tiny_config(**SECURE)
    play_round = Federation.play_round

    def without_two(self, names):
        for name in ("Beta", "Gamma"):
            (Path(config.run_dir) / "ledgers" / f"{name}.db").unlink(missing_ok=True)
        return play_round(self, names)

    monkeypatch.setattr(Federation, "play_round", without_two)
    simulate_run(config)
    rounds = read_records(Path(config.run_dir))
    assert [(r["updates"], r["skipped"]) for r in rounds] == [(2, True)] * 3
    start = trainable.load(config, records.load(config).labels).start
    assert same_adapters(final_adapter(config), start)


def test_a_killed_round_is_the_same_release_when_the_run_is_resumed(
    tiny_config, simulate_run, tmp_path, monkeypatch
):
    calm = tiny_config(**SECURE, **{"run-dir": str(tmp_path / "calm")})
    simulate_run(calm)
    config = tiny_config(**SECURE)
    step = Federation.step

    def killed(self, orders, outcome):
        if orders.this_round.number == 2:
            raise RuntimeError("the server died after the vectors arrived")
        return step(self, orders, outcome)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="the server died"):
        patch.setattr(Federation, "step", killed)
        simulate_run(config)
    simulate_run(config)
    assert same_adapters(final_adapter(config), final_adapter(calm))
    for name in BANKS:
        with Ledger.open(Path(config.run_dir) / "ledgers" / f"{name}.db") as ledger:
            assert len(ledger.show()["entries"]) == 3


def test_too_few_institutions_online_end_a_run_before_anybody_pays(
    tiny_config, simulate_run, monkeypatch
):
    config = tiny_config(**SECURE)
    online = Roster.online

    def two(self):
        return dict(list(online(self).items())[:2])

    monkeypatch.setattr(Roster, "online", two)
    monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
    with pytest.raises(RunFailed, match="institutions-missing: 2 of 4 institutions are online"):
        simulate_run(config)
    for file in (Path(config.run_dir) / "ledgers").glob("*.db"):
        with Ledger.open(file) as ledger:
            assert ledger.history() == ()


@pytest.mark.parametrize("strategy", ["ffa", "rolora"])
def test_strategies_that_send_a_part_run_and_freeze_the_rest(tiny_config, simulate_run, strategy):
    config = tiny_config(**SECURE, **{"federation.strategy": strategy, "federation.rounds": 2})
    simulate_run(config)
    start, found = trainable.load(config, ("card", "fraud", "loan")).start, final_adapter(config)
    moved = {kind(name) for name in found if not torch.equal(found[name], start[name])}
    assert moved == ({"B", "head"} if strategy == "ffa" else {"A", "B", "head"})


def test_inline_and_ray_give_the_same_bits(tiny_config, simulate_run, simulate_on_ray, tmp_path):
    def made(name, simulate):
        values = {"run-dir": str(tmp_path / name)}
        config = tiny_config(**SECURE, **values, **{"adapter.dropout": 0.1})
        simulate(config)
        return final_adapter(config)

    assert same_adapters(made("inline", simulate_run), made("ray", simulate_on_ray))
