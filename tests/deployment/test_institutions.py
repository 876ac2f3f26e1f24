"""Institutions with settings of their own: the server's and theirs meet without a network."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

import server.app
from client import config_policy, settings
from client.ledger import Ledger
from client.releases import Releases
from fedlora.config.sections import INSTITUTIONS
from fedlora.errors import InputError
from fedlora.models.adapters import AdapterState
from fedlora.privacy.budget import plan_run
from fedlora.runs.run_files import SIZES, read_records
from fedlora.wire import wire
from fedlora.wire.released import ReleaseFiles
from server import aggregation, finish, roster
from server.roster import RunFailed
from server.rounds import Federation
from simulation.engines.grid import run_server
from strategies.base import Round
from tests.deployment.remote import BANKS, LABELS, Remote


def _run(config, files):
    run_server(server.app.app, Remote(files, config.flat()), config.flat())
    return json.loads((Path(config.run_dir) / "result.json").read_text())


def test_a_deployment_gives_the_very_adapter_of_the_simulation(
    deployed, tiny_config, institutions, rows, simulate_run, tmp_path
):
    plain = {"privacy.epsilon": float("inf"), "training.local-steps": 3}
    result = _run(deployed(**plain), institutions())
    simulation = tiny_config(
        **plain,
        **{
            "run-dir": str(tmp_path / "simulation"),
            "data.source": str(rows / "all.csv"),
            "data.test-source": str(rows / "test.csv"),
            "data.labels": LABELS,
        },
    )
    other = simulate_run(simulation)
    one, two = (
        AdapterState.open(Path(r) / "adapter") for r in (tmp_path / "run", simulation.run_dir)
    )
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert result["accuracy"] == other["accuracy"]


def test_under_dp_each_ledger_is_charged_and_nothing_but_adapters_leaves(
    deployed, institutions, rows
):
    config = deployed()
    result = _run(config, institutions())
    stated = json.loads((Path(config.run_dir) / "privacy.json").read_text())
    assert "is protected from" in stated["protects"]
    for bank in BANKS:
        with Ledger.open(rows / bank / "ledger.db") as ledger:
            shown = ledger.show()
        assert shown["epsilon"] == pytest.approx(stated["institutions"][bank]["ledger_epsilon"])
        assert 0 < shown["epsilon"] <= 8.0 < shown["limit"]
    assert all(not record["reported"] for record in read_records(Path(config.run_dir)))
    assert 7.5 < result["epsilon_max"] <= 8.0


def test_every_institution_that_is_online_at_the_end_has_the_released_adapter(
    deployed, institutions, rows, monkeypatch
):
    behind = [{"run": "before", "source": "pilot.csv", "private": False}]
    monkeypatch.setattr(finish, "origins", lambda config: behind)
    config = deployed()
    files = institutions()
    result = _run(config, files)
    assert result["released"] == dict.fromkeys(BANKS, "stored")
    assert result["origins"] == behind
    theirs = AdapterState.open(Path(config.run_dir) / "adapter")
    for bank, file in zip(BANKS, files, strict=True):
        found = Releases(rows / bank / "state").find("run")  # the name of the run's directory
        ours = AdapterState.open(found.directory)
        assert set(ours) == set(theirs) and all(torch.equal(ours[n], t) for n, t in theirs.items())
        handed = ReleaseFiles.open(Path(config.run_dir) / "adapter")
        assert (found.run, found.base, found.round) == (handed.run, handed.base, 3)
        assert found.origins == handed.origins == behind
        own = settings.load(str(file))
        assert config_policy.apply(own, handed.config) == config_policy.apply(own, found.config)
        assert str(rows) not in json.dumps(dict(handed.config))


def test_an_institution_that_is_offline_or_refuses_at_the_end_is_named_and_ends_no_run(
    deployed, institutions, rows, monkeypatch
):
    config, files = deployed(), institutions()
    finish = Federation.finish

    def last_round_done(self):
        present = self.grid.get_node_ids
        monkeypatch.setattr(self.grid, "get_node_ids", lambda: [n for n in present() if n != 1])
        files[1].write_text(files[1].read_text().replace("max-delta = 1e-4", "max-delta = 2"))
        finish(self)

    monkeypatch.setattr(Federation, "finish", last_round_done)
    result = _run(config, files)
    outcomes = {"Alpha": "offline", "Beta": "bad-configuration"}
    assert result["released"] == {**dict.fromkeys(BANKS, "stored"), **outcomes}
    assert not (rows / "Alpha" / "state" / "released").exists()
    assert not (rows / "Beta" / "state" / "released").exists()


@pytest.mark.parametrize(
    ("own", "values", "code"),
    [
        ({"models": '["another"]'}, {}, "model-not-allowed"),
        ({}, {"data.labels": '["card", "loan"]', "data.test-source": ""}, "other-labels"),
        ({"strategies": '["ffa"]'}, {}, "strategy-not-allowed"),
        ({"max_steps": "2"}, {"training.local-steps": 3}, "too-many-steps"),
        ({"max_length": "15"}, {"training.max-length": 16}, "rows-too-long"),
        ({"without_dp": "false"}, {"privacy.epsilon": float("inf")}, "dp-required"),
        ({}, {"privacy.noise": "seeded"}, "seeded-noise"),
        ({"max_run_epsilon": "4.0"}, {}, "epsilon-too-large"),
        # epsilon 8 at this delta is above 8 at the ledger's, 1e-4
        ({"max_delta": "0.5"}, {"privacy.delta": 0.0039}, "epsilon-too-large"),
        ({"max_delta": "0.9e-4"}, {}, "delta-too-large"),
        ({"unit": '"customer"'}, {}, "other-unit"),
        (
            {},
            {"privacy.epsilon": float("inf"), "federation.weighting": "records"},
            "metrics-not-allowed",
        ),
        ({"ledger": '"none.db"'}, {}, "ledger-missing"),
        ({"source": '"none.csv"'}, {}, "bad-configuration"),
    ],
)
def test_what_the_settings_forbid_is_refused_before_anything_is_trained_or_spent(
    deployed, institutions, monkeypatch, own, values, code
):
    files = institutions("Beta", **own)
    monkeypatch.setattr(aggregation.Mean, "least_asked", 4)
    config = deployed(**values)
    with pytest.raises(RunFailed) as caught:
        _run(config, files)
    assert code in str(caught.value)
    with Ledger.open(files[0].parent / "ledger.db") as ledger:
        assert ledger.show()["epsilon"] == 0
    assert not (Path(config.run_dir) / "rounds.jsonl").exists()


def test_settings_that_others_could_change_are_refused(institutions):
    file = institutions()[0]
    link = file.with_name("link.toml")
    link.symlink_to(file)
    for path in ("institution.toml", f"{file.parent}/../Alpha/institution.toml", str(link)):
        with pytest.raises(InputError, match=r"absolute path without \.\. or links"):
            settings.load(path)
    file.chmod(0o622)
    with pytest.raises(InputError, match="chmod go-w"):
        settings.load(str(file))
    file.chmod(0o600)
    for mode in (0o720, 0o702):
        file.parent.chmod(mode)
        with pytest.raises(InputError, match=rf"mode {mode:o}.*chmod go-w {file.parent}$"):
            settings.load(str(file))
    file.parent.chmod(0o700)
    with pytest.raises(InputError, match="cannot be read"):
        settings.load(str(file.with_name("none.toml")))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('nmae = "x"', "nmae is no key here; did you mean name?"),
        (
            "max-steps = 0",
            "at least 1: set max-steps to such a value in the institution's settings",
        ),
        ('max-steps = "many"', "max-steps is 'many'; it must be a whole number"),
        ('name = "../x"', "it must be letters"),
        ("models = []", "models is missing"),
        ('strategies = ["fedavgg"]', "strategies has 'fedavgg'; each must be MODULE:OBJECT or one"),
        ('report = ["accuracy"]', "report has 'accuracy'; only loss and records may leave"),
        ("threads = 100000", "threads is 100000; it must be at most"),
        ('gateway = "fed.example.org:84x43"', "it must be HOST:PORT"),
        ('gateway = "fed example.org:8443"', "'fed example.org:8443'; it must be HOST:PORT"),
        ('gateway = "https://fed.example.org:8443"', "it must be HOST:PORT"),
        ('gateway = "fed.example.org:0"', "a port from 1 to 65535"),
        ('gateway = "fed.example.org"', "such as fed.example.org:8443"),
        ("not toml", "is not valid TOML"),
    ],
)
def test_bad_settings_get_one_clear_line(institutions, line, message):
    file = institutions()[0]
    kept = [old for old in file.read_text().splitlines() if old.split()[0] != line.split()[0]]
    file.write_text("\n".join([*kept, line]))
    with pytest.raises(InputError) as caught:
        settings.load(str(file))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_deployment_must_say_what_nobody_can_count(tiny_config):
    for values in ({"data.labels": LABELS}, {"data.institutions": 4}):
        with pytest.raises(InputError, match=r"list the classes in data\.labels"):
            tiny_config(**{"data.source": INSTITUTIONS, **values})


def test_where_sizes_weigh_an_institution_of_unknown_size_is_asked_nothing(
    deployed, institutions, rows, caplog, monkeypatch
):
    monkeypatch.setattr(roster, "NODES_TIMEOUT", 0.0)
    files = institutions()
    (rows / SIZES).write_text(json.dumps({"Alpha": 64, "Beta": 2**23, "Delta": 64}))
    config = deployed(**{"federation.weighting": "public-size", "federation.rounds": 1})
    _run(config, files)
    (record,) = read_records(Path(config.run_dir))
    assert set(record["institutions"]) == {"Alpha", "Beta", "Delta"}
    assert "no-size" in caplog.text and "server/institutions/Gamma.size" in caplog.text


@pytest.mark.parametrize(("known", "accept"), [(4, []), (4, ["noise"]), (3, [])])
def test_noise_that_drowns_everything_is_refused_before_a_charge_where_all_sizes_are_known(
    deployed, institutions, rows, known, accept
):
    files = institutions()
    (rows / SIZES).write_text(json.dumps(dict.fromkeys(BANKS[:known], 64)))
    config = deployed(**{"privacy.epsilon": 0.05, "federation.rounds": 1, "accept": accept})
    if known == 4 and not accept:
        message = r"nothing can be learned at privacy.epsilon 0.05.*add --set accept=noise"
        with pytest.raises(InputError, match=message):
            _run(config, files)
    else:
        _run(config, files)
    for bank in BANKS:
        with Ledger.open(rows / bank / "ledger.db") as ledger:
            assert bool(ledger.show()["entries"]) == (known < 4 or bool(accept))


@pytest.mark.parametrize("believed", [64, 2**20])
def test_a_claimed_size_counts_no_more_than_the_server_believes(
    deployed, institutions, rows, monkeypatch, believed
):
    """The liar's record is that of an institution of the claimed size, in every figure."""
    files = institutions()
    (rows / SIZES).write_text(json.dumps({**dict.fromkeys(BANKS, 64), "Beta": believed}))
    values = {"federation.weighting": "public-size", "federation.rounds": 1, "privacy.delta": 0.0}
    plan = plan_run(deployed(**values), 2**20, 1)
    figures = ("delta", "sample_rate", "noise_multiplier")
    honest, weigh, weights = wire.pack_update, Round.weight, {}

    def pack_update(update):
        if update.institution != "Beta":
            return honest(update)
        lie = {name: getattr(plan, name) for name in figures}
        privacy = dataclasses.replace(update.privacy, **lie)
        return honest(dataclasses.replace(update, size=2.0**20, privacy=privacy))

    def weight(self, update):
        weights[update.institution] = weigh(self, update)
        return weights[update.institution]

    monkeypatch.setattr(wire, "pack_update", pack_update)
    monkeypatch.setattr(Round, "weight", weight)
    _run(deployed(**values), files)
    assert weights == {**dict.fromkeys(BANKS, 64.0), "Beta": float(believed)}
