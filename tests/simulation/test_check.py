"""`fedlora check` describes a run before it starts, and what it says is what the run does."""

import json
from pathlib import Path

import pytest

from client.ledger import Ledger
from simulation import check
from tests.messy import LARGE, TINY, WORDS, messy_rows, write_messy

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


def test_one_row_institutions_that_are_kept_void_the_result_until_accepted(messy) -> None:
    make, _ = messy
    tiny = {"data.min-records": 1, "federation.weighting": "public-size"}
    described = check.describe(make(**tiny))
    kept = [n for n, said in described["institutions"].items() if said["units"] == 1]
    assert kept and all(described["institutions"][n]["delta"] == 0.1 for n in kept)
    assert names(described)["delta"]["voids"]
    assert len(described["refused"]) == 1 and "--accept delta" in described["refused"][0]
    accepted = check.describe(make(**tiny, accept="delta"))
    assert accepted["refused"] == [] and names(accepted)["delta"]["voids"]


SHARES = {
    "privacy.trust": "secure-aggregation",
    "privacy.honest": 2,
    "privacy.colluding": 1,
}


@pytest.mark.parametrize(
    "values",
    [
        {"federation.strategy": "ffa"},
        {"federation.strategy": "rolora"},
        {"federation.strategy": "fedsa"},
        SHARES | {"federation.weighting": "public-size"},
    ],
    ids=str,
)
def test_the_bytes_of_a_check_are_those_that_a_run_moves(values, tiny_config, simulate_run) -> None:
    config = tiny_config(**values)
    expected = check.describe(config)["cost"]["bytes_moved"]
    simulate_run(config)
    lines = (Path(config.run_dir) / "rounds.jsonl").read_text().splitlines()
    moved = [json.loads(line)["institutions"].values() for line in lines]
    assert expected == sum(one["sent"] + one["received"] for of in moved for one in of)


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


def test_a_check_spends_nothing_and_shows_what_is_left_in_a_ledger(messy, tmp_path) -> None:
    make, _ = messy
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir(mode=0o700)
    for name, limit in (("Alpha", 2.0), ("Sparkasse", 1.0), ("Credit-Nord", 1.0)):
        Ledger.create(ledgers / f"{name}.db", max_epsilon=limit, delta=1e-4, accountant="rdp")
    config = make(
        **{
            "data.min-records": 8,
            "privacy.ledger": str(ledgers),
            "privacy.epsilon": 4.0,
        }
    )
    described = check.describe(config)
    for name, limit, fits in (("Alpha", 2.0, False), ("Sparkasse", 1.0, False)):
        said = described["ledgers"][name]
        assert (said["epsilon"], said["left"], said["limit"]) == (0.0, limit, limit)
        assert said["fits"] is fits
    assert any("budget exhausted: 3 of 3" in reason for reason in described["refused"])
    assert not Path(config.run_dir).exists()
    for name in ("Alpha", "Sparkasse"):
        with Ledger.open(ledgers / f"{name}.db") as ledger:
            assert ledger.show()["entries"] == []


def test_a_check_finds_what_a_run_would_refuse_later(tiny_config, simulate_run, tmp_path) -> None:
    first = tiny_config(**{"privacy.epsilon": float("inf"), "federation.rounds": 1})
    simulate_run(first)
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir(mode=0o700)
    for name in ("Alpha", "Beta", "Gamma", "Delta"):
        Ledger.create(ledgers / f"{name}.db", max_epsilon=9.0, delta=1e-4, accountant="rdp")
        with Ledger.open(ledgers / f"{name}.db") as ledger:
            ledger.bind("0" * 64, "record")
    config = tiny_config(
        **{
            "run-dir": str(tmp_path / "second"),
            "privacy.noise": "secure",
            "adapter.start": first.run_dir,
            "privacy.ledger": str(ledgers),
        }
    )
    described = check.describe(config)
    assert described["ledgers"]["Beta"]["fits"] is False
    assert (
        "belongs to records 000000000000 by record, not " in described["ledgers"]["Beta"]["problem"]
    )
    assert any("adapter.start is" in reason for reason in described["refused"])
    said = "4 of 4 institutions cannot use their ledgers, and a round needs 1: "
    assert any(reason.startswith(said) for reason in described["refused"])
    assert not any("budget exhausted" in reason for reason in described["refused"])


def test_a_check_says_that_others_may_write_where_a_run_would_make_its_ledgers(
    tiny_config, tmp_path
) -> None:
    ledgers = tmp_path / "ledgers"
    ledgers.mkdir()
    ledgers.chmod(0o770)
    config = tiny_config(**{"privacy.noise": "secure", "privacy.ledger": str(ledgers)})
    (reason,) = check.describe(config)["refused"]
    assert "4 of 4 institutions cannot use their ledgers" in reason and "chmod go-w" in reason
    assert not list(ledgers.iterdir())


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


def test_the_messy_rows_have_the_faults_that_the_tests_speak_of() -> None:
    rows = messy_rows()
    assert any("é" in text for text, _, _ in rows)
    assert {"NaN", "Credit_Card", "credit_card", ""} <= {label for _, label, _ in rows}
