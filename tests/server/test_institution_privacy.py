import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from client.institution import Institution
from fedlora.data import records
from fedlora.errors import InputError, Refusal
from fedlora.models.adapters import AdapterState
from fedlora.privacy import accounting, composition
from fedlora.privacy.composition import Event
from fedlora.runs.run_files import read_records
from fedlora.wire.messages import ClientUpdate
from server import institution_privacy, privacy_statement
from server.run_directory import RunDirectory
from strategies.base import Round


def test_the_plan_fits_the_budget_and_counts_what_was_asked(tiny_config):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0, "federation.rounds": 12})
    mechanism = institution_privacy.plan(config, 20, participations=12)
    assert mechanism.delta == 1e-3
    assert 4.9 < mechanism.spent([12, 3]) <= 5.0
    assert mechanism.spent([]) == 0.0
    event = Event(noise_multiplier=mechanism.noise_multiplier, sample_rate=1.0, steps=3)
    assert mechanism.spent([3, 1]) == composition.epsilon((event,), 1e-3)


def test_weights_other_than_uniform_are_refused(tiny_config):
    with pytest.raises(InputError, match="weighting is 'public-size'"):
        tiny_config(**{"privacy.institution-epsilon": 5.0, "federation.weighting": "public-size"})


@pytest.mark.parametrize("epsilon", ["8.0", "inf"])
def test_it_composes_with_example_level_dp_and_is_stated(tiny_config, simulate_run, epsilon):
    values = {"privacy.institution-epsilon": 5.0, "privacy.delta": 0.0, "accept": ["delta"]}
    config = tiny_config(**values, **{"privacy.epsilon": epsilon})
    result = simulate_run(config)
    fewest = min(records.load(config).train(i).num_units for i in range(4))
    largest = accounting.public_delta(accounting.most_of_class(fewest))
    assert result["delta"] == (largest if epsilon == "8.0" else None)
    directory = Path(config.run_dir)
    stated = json.loads((directory / "privacy.json").read_text())
    level = stated["institution_level"]
    assert level["steps"] == 3 and 4.9 < level["epsilon"] <= 5.0
    assert level["noise"] == "seeded" and "protects nobody" in stated["protects"]
    delta = config.privacy.delta or privacy_statement.BY_SIZE_CLASS
    bound = {"rounds_asked": 3, "epsilon_at_most": 8.0, "delta": delta}
    assert stated["institutions"] == {}
    assert list(stated.get("without_report", {}).values()) == [bound] * 4 * (epsilon == "8.0")
    rounds = [json.loads(line) for line in (directory / "rounds.jsonl").read_text().splitlines()]
    assert rounds[0]["institution_epsilon"] < rounds[-1]["institution_epsilon"] == level["epsilon"]
    assert all(not r["reported"] for r in rounds)  # exact losses would bypass the noise


@pytest.mark.parametrize("seed", [None, 3])
def test_a_round_has_fresh_noise_of_the_planned_deviation(seed):
    """Two updates of zeros; the noise's variance within 5 standard errors: false alarms 6e-7."""
    zeros = AdapterState({"a.lora_A.weight": torch.zeros(200, 300)})
    update = ClientUpdate(institution="bank", round=1, adapter=zeros)
    mechanism = institution_privacy.InstitutionMechanism(
        noise_multiplier=2.0, max_norm=3.0, delta=1e-5, seed=seed
    )

    def noise(number):
        this_round = Round(number=number, asked=3, before=zeros, parts=("A",))
        return mechanism.aggregate(this_round, [update, update], 3)["a.lora_A.weight"]

    first, again, second = noise(1), noise(1), noise(2)
    assert torch.equal(first, again) == (seed is not None)
    assert not torch.equal(first, second)
    n = first.numel()
    spread = float(first.double().square().mean()) / (2.0 * 3.0 / 3) ** 2
    assert abs(spread - 1) < 5 * math.sqrt(2 / n)


@pytest.mark.parametrize("code", ["", "guard", "failed", "timed-out"])
def test_an_invalid_update_counts_as_one_of_zero_and_is_not_named(
    tiny_config, simulate_run, monkeypatch, code
):
    """Whether an update is valid may follow from records: neither skipping nor names may tell."""
    answer = Institution.answer

    def spoiled(who, order):
        update = answer(who, order)
        if who.name != "Beta":
            return update
        if code:
            raise Refusal(code, "the reason")
        broken = {n: torch.full_like(t, torch.nan) for n, t in update.adapter.items()}
        return dataclasses.replace(update, adapter=AdapterState(broken))

    monkeypatch.setattr(Institution, "answer", spoiled)
    config = tiny_config(
        **{
            "privacy.institution-epsilon": 5.0,
            "privacy.epsilon": 8.0,
        }
    )
    simulate_run(config)
    for record in read_records(Path(config.run_dir)):
        assert record["updates"] == 4 and not record["skipped"]
        assert record["aggregation"] == {"rejected": {}}
        said = [{**one, "accuracy": None} for one in record["institutions"].values()]
        assert all(one == said[0] for one in said)
    stated = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    assert stated["institutions"] == {}
    said = list(stated["without_report"].values())
    assert len(said) == 4 and all(one == said[0] for one in said)


def test_a_damaged_newest_checkpoint_is_replaced_only_where_no_round_is_released_twice(
    tiny_config, simulate_run
):
    config = tiny_config()
    simulate_run(config)
    directory = RunDirectory(Path(config.run_dir))
    older, newest = sorted((directory.path / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:100])
    with pytest.raises(InputError, match="no checkpoint"):
        directory.latest(newest_only=True)
    state = directory.latest()
    assert state is not None and state.round == 2 and older.exists()


def test_a_run_that_has_begun_does_not_begin_anew_without_its_checkpoints(
    tiny_config, simulate_run, tmp_path
):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0})
    simulate_run(config)
    directory = RunDirectory(Path(config.run_dir))
    for file in (directory.path / "checkpoints").iterdir():
        file.unlink()
    with pytest.raises(InputError, match="can be read, but the run has begun; restore it"):
        directory.latest()
    (tmp_path / "new").mkdir()
    assert RunDirectory(tmp_path / "new").latest() is None  # killed before its first round


def test_with_institution_level_dp_a_resume_takes_the_newest_checkpoint_or_none(
    tiny_config, simulate_run
):
    config = tiny_config(**{"privacy.institution-epsilon": 5.0})
    simulate_run(config)
    run = Path(config.run_dir)
    (run / "result.json").unlink()
    newest = sorted((run / "checkpoints").iterdir())[-1]
    newest.write_bytes(b"damaged")
    with pytest.raises(InputError, match="no checkpoint"):
        simulate_run(config)
