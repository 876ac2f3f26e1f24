"""`fedlora check` describes a run before it starts, and what it says is what the run does."""

import json
from pathlib import Path

import pytest

from simulation import check
from tests.messy import LARGE, TINY, WORDS, write_messy

MESSY = {
    "data.text": "narrative",
    "data.label": "kind",
    "data.partition": "natural:bank",
    "privacy.delta": 0.0,
}


@pytest.fixture
def messy(tmp_path, tiny_config):
    """Makes a configuration over the messy file; the counts of its rows."""
    file = tmp_path / "messy.csv"
    lacks = write_messy(file)
    return lambda **values: tiny_config(**{"data.source": str(file), **MESSY, **values}), lacks


def names(described):
    return {finding["name"]: finding for finding in described["findings"]}


def test_the_messy_file_is_described_in_full(messy) -> None:
    make, lacks = messy
    described = check.describe(make(**{"data.min-records": 8}))
    rows = described["rows"]
    assert rows["read"] == lacks["read"]
    for reason in ("no text", "no label", "no institution"):
        assert rows["dropped"][reason] == lacks[reason] > 10
    assert sum(rows["dropped"].values()) + rows["train"] + rows["held_out"] == lacks["read"]

    assert set(described["classes"]) == set(WORDS)
    held = sum(count["held_out"] for count in described["classes"].values())
    trained = sum(count["train"] for count in described["classes"].values())
    assert (trained, held) == (rows["train"], rows["held_out"])

    # accents of the names are lost in file names only
    assert set(described["institutions"]) == {"Credit-Nord", "Sparkasse", "Alpha"}
    assert set(described["left_out"]) == set(TINY)
    for name, said in zip(sorted(LARGE), sorted(described["institutions"]), strict=True):
        one = described["institutions"][said]
        assert one["train"] + one["held_out"] == LARGE[name]
        assert one["size_class"] <= one["units"] < 2 * one["size_class"]
    assert described["refused"] == []
    json.dumps(described)


def test_noise_delta_and_findings_are_those_of_the_run(messy, simulate_run) -> None:
    make, _ = messy
    config = make(**{"data.min-records": 8})
    described = check.describe(config)
    result = simulate_run(config)
    assert result["findings"] == described["findings"]
    privacy = json.loads((Path(config.run_dir) / "privacy.json").read_text())["institutions"]
    assert set(privacy) == set(described["institutions"])
    for name, said in described["institutions"].items():
        assert privacy[name]["noise_multiplier"] == said["noise_multiplier"]
        assert privacy[name]["delta"] == said["delta"]
    assert result["trained_parameters"] == described["model"]["trained_parameters"]
    lines = (Path(config.run_dir) / "rounds.jsonl").read_text().splitlines()
    moved = sum(
        one["sent"] + one["received"]
        for line in lines
        for one in json.loads(line)["institutions"].values()
    )
    assert described["cost"]["bytes_moved"] == moved
    assert described["rows"]["held_out"] == result["n"]


def test_a_check_finds_what_a_run_would_refuse_later(tiny_config, simulate_run, tmp_path) -> None:
    first = tiny_config(**{"privacy.epsilon": float("inf"), "federation.rounds": 1})
    simulate_run(first)
    config = tiny_config(
        **{
            "run-dir": str(tmp_path / "second"),
            "privacy.noise": "secure",
            "adapter.start": first.run_dir,
        }
    )
    described = check.describe(config)
    assert any("adapter.start is" in reason for reason in described["refused"])


@pytest.mark.parametrize("epsilon", [8.0, "inf"])
def test_a_measured_step_leaves_the_adapter_as_it_was(tiny_config, epsilon) -> None:
    from fedlora.data import records
    from fedlora.models import trainable

    config = tiny_config(**{"privacy.epsilon": epsilon, "home.method": "interpolate"})
    work = trainable.load(config, records.load(config).labels)
    before = {name: tensor.clone() for name, tensor in work.start.items()}
    cost = check.describe(config)["cost"]
    assert trainable.load(config, work.labels) is work
    from fedlora.models.adapters import AdapterState

    after = AdapterState.read(work.model)
    assert all(before[name].equal(after[name]) for name in before)
    assert cost["seconds_per_record"] > 0 and cost["seconds"]["home"] > 0
    assert cost["minutes"] == pytest.approx(sum(cost["seconds"].values()) / 60, rel=0.1, abs=0.01)
