"""From nothing to a result: init, up, submit; the result is the simulation's."""

import json

import pytest
import torch

from fedlora.models.adapters import AdapterState
from tests.deployment.conftest import LABELS, PLAIN, rehearsal, split
from tests.samples import write_csv

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def federation(tmp_path_factory, tiny_encoder, complaints):
    with rehearsal(tmp_path_factory.mktemp("up"), tiny_encoder, complaints) as made:
        made.up()
        yield made


def test_a_deployment_gives_the_adapter_of_the_simulation(
    federation, complaints, tiny_config, simulate_run, tmp_path
):
    assert federation.submit("one")["state"] == "completed"
    test, train = split(complaints)
    write_csv(tmp_path / "test.csv", test)
    write_csv(tmp_path / "all.csv", train)
    alike = {k: v for k, v in PLAIN.items() if not k.startswith(("data.", "model.name"))}
    simulation = tiny_config(
        **alike,
        **{
            "data.source": str(tmp_path / "all.csv"),
            "data.test-source": str(tmp_path / "test.csv"),
            "data.labels": json.dumps(LABELS),
        },
    )
    other = simulate_run(simulation)
    ours = AdapterState.open(federation.results("one") / "adapter")
    theirs = AdapterState.open(tmp_path / "run" / "adapter")
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=1e-6)
    result = json.loads((federation.results("one") / "result.json").read_text())
    assert result["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)


def test_logs_are_json_lines_without_a_record_in_them(federation, complaints):
    texts = {row["text"] for row in split(complaints)[1]}
    for name in federation.names:
        records = federation.records(name)
        assert records, name
        for record in records:
            assert {"time", "level", "service", "message"} <= record.keys(), record
        said = federation.log(name)
        assert not any(text in said for text in texts)


def test_a_finished_run_is_signed_by_the_server_and_verified(federation):
    assert federation.submit("signed", **{"federation.rounds": 1})["state"] == "completed"
    done = federation.exec("server", "fedlora", "verify", "/results/signed", "--json", check=False)
    checks = {c["name"]: c for c in json.loads(done.stdout)["checks"]}
    assert done.returncode == 0, done.stdout
    assert checks["signature"]["state"] == checks["files"]["state"] == "ok"
    assert "a deployment" in checks["run"]["detail"]
    file = federation.results("signed") / "privacy.json"
    content = file.read_text()
    said = json.loads(content)
    said["protects"] = "everything"
    try:
        file.write_text(json.dumps(said))
        done = federation.exec("server", "fedlora", "verify", "/results/signed", check=False)
        assert done.returncode == 3 and "NOT VERIFIED: seal, signature" in done.stdout
    finally:
        file.write_text(content)


def test_an_institution_trains_its_own_models_after_a_run(federation):
    assert federation.submit("short", **{"federation.rounds": 1})["state"] == "completed"
    result = json.loads((federation.results("short") / "result.json").read_text())
    assert result["released"] == dict.fromkeys("abc", "stored")
    command = ("fedlora", "home", "/etc/fedlora/institution.toml", "--steps", "2", "--json")
    unknown = federation.exec("institution-a", *command, "--run", "none", check=False)
    assert unknown.returncode == 2 and "there are: " in unknown.stderr
    done = federation.exec("institution-a", *command, "--run", "short", check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["institution"] == "a" and said["held_out"]["from"] == "split"
    home = federation.folder("a") / "state" / "home" / "short"
    assert (
        AdapterState.open(home / "own").keys()
        == AdapterState.open(federation.results("short") / "adapter").keys()
    )
