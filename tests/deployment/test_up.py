"""From nothing to a result: init, up, submit; the result is the simulation's."""

import json

import pytest
import torch

from fedlora.adapters import AdapterState
from tests.deployment.conftest import LABELS, PLAIN, rehearsal, split, write_rows

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
    write_rows(tmp_path / "test.csv", test)
    write_rows(tmp_path / "all.csv", train)
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
    done = federation.deploy("results", "one", "--json")
    assert json.loads(done.stdout)["accuracy"] == pytest.approx(other["accuracy"], abs=1e-6)


def test_logs_are_json_lines_without_a_record_in_them(federation, complaints):
    texts = {row["text"] for row in split(complaints)[1]}
    for name in federation.names:
        records = federation.records(name)
        assert records, name
        for record in records:
            assert {"time", "level", "service", "message"} <= record.keys(), record
        said = federation.log(name)
        assert not any(text in said for text in texts)
