"""A run starts from an adapter in a directory, or refuses one that does not fit."""

import dataclasses
import json
import shutil

import pytest
import torch

from fedlora.data import records
from fedlora.errors import InputError
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState, kind
from fedlora.runs import finished_run
from server.start import start_adapter


@pytest.fixture
def work(tiny_config):
    config = tiny_config()
    return config, trainable.load(config, records.load(config).labels)


def moved(state, parts=("A", "B", "head")):
    """The state with every tensor of these parts at another value."""
    return AdapterState({n: t + 0.5 if kind(n) in parts else t for n, t in state.items()})


def started(work, directory, **changes):
    """The start of the run with this adapter.start, and other changes of ``[adapter]``."""
    config, made = work
    adapter = dataclasses.replace(config.adapter, start=str(directory), **changes)
    return start_adapter(dataclasses.replace(config, adapter=adapter), made)


def test_a_saved_adapter_is_the_start(work, tmp_path):
    _, made = work
    saved = moved(made.start)
    saved.save(tmp_path / "adapter", made.model)
    found = started(work, tmp_path / "adapter")
    assert found.keys() == made.start.keys()
    assert all(torch.equal(found[name], saved[name]) for name in found)


def test_an_adapter_of_another_rank_or_without_its_configuration_is_refused(work, tmp_path):
    _, made = work
    place = tmp_path / "adapter"
    made.start.cut(2).save(place, made.model)
    with pytest.raises(InputError, match="does not fit this run"):
        started(work, place)
    made.start.save(place, made.model)
    (place / "adapter_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read \(KeyError\)"):
        started(work, place)


@pytest.mark.parametrize(
    "setting",
    [
        {"bias": "lora_only"},
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"alora_invocation_tokens": [1, 2]},
    ],
    ids=str,
)
def test_an_adapter_that_is_another_function_by_the_same_names_is_refused(work, tmp_path, setting):
    """PiSSA and OLoRA change the base's weights, aLoRA acts on some of the tokens."""
    _, made = work
    place = tmp_path / "adapter"
    made.start.save(place, made.model)
    saved = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps(saved | setting))
    with pytest.raises(InputError, match=next(iter(setting))):
        started(work, place)


def test_a_missing_directory_is_refused_by_name(work, tmp_path):
    with pytest.raises(InputError, match=r"adapter\.start is .*nowhere: .*cannot be read"):
        started(work, tmp_path / "nowhere")


def test_a_head_for_as_many_other_classes_is_left_out(work, tmp_path):
    _, made = work
    moved(made.start).save(tmp_path / "adapter", made.model)
    for labels, kept in (([*made.labels], True), ([*made.labels][::-1], False)):
        (tmp_path / "adapter" / "labels.json").write_text(json.dumps(labels))
        found = started(work, tmp_path / "adapter")
        heads = [torch.equal(t, made.start[n]) for n, t in found.only(("head",)).items()]
        assert set(heads) == {not kept}


def test_a_run_goes_on_from_an_earlier_run_and_refuses_one_that_does_not_fit(
    tiny_config, simulate_run, tmp_path
):
    first = tmp_path / "first"
    before = simulate_run(tiny_config(**{"run-dir": str(first), "privacy.epsilon": float("inf")}))
    values = {
        "run-dir": str(tmp_path / "second"),
        "adapter.start": str(first),
        "federation.rounds": 1,
        "federation.server-learning-rate": 1e-7,
        "privacy.epsilon": float("inf"),
    }
    after = simulate_run(tiny_config(**values))
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)

    def refused(words, **changes):
        config = tiny_config(**(values | changes))
        made = trainable.load(config, records.load(config).labels)
        with pytest.raises(InputError, match=words):
            start_adapter(config, made)

    secure = {"privacy.epsilon": 8.0, "privacy.noise": "secure"}
    for start in (first, first / "adapter"):
        words = "goes back to the run .* on "
        refused(words, **secure, **{"adapter.start": str(start)})
    copy = tmp_path / "copy.csv"  # the same records under another name
    shutil.copy(tiny_config().data.source, copy)
    words = "goes back to the run .* on "
    refused(words, **secure, **{"data.source": str(copy)})
    with copy.open("a") as file:
        file.write(copy.read_text().splitlines()[-1] + "\n")
    config = tiny_config(**(values | secure | {"data.source": str(copy)}))
    start_adapter(config, trainable.load(config, records.load(config).labels))
    result = json.loads((first / "result.json").read_text())
    result["base"]["digest"] = "0" * 64
    (first / "result.json").write_text(json.dumps(result))
    refused("has other weights")
    (first / "result.json").unlink()
    refused("holds no complete run")


@pytest.mark.parametrize("strategy", ["stack", "exact"])
def test_a_strategy_with_residuals_starts_from_what_the_earlier_run_computes(
    strategy, tiny_config, simulate_run, tmp_path, monkeypatch
):
    """From factors of scale 2, of another rank; and from factors that were saved with residuals."""
    plain = {"privacy.epsilon": float("inf"), "home.method": "none"}
    stepwise = {
        "federation.server-optimizer": "none",
        "federation.server-learning-rate": 1,
        "federation.strategy": strategy,
    }
    before = simulate_run(tiny_config(**plain, **{"run-dir": str(tmp_path / "fedavg")}))
    tiny_step = {"training.learning-rate": 1e-7, "federation.rounds": 1, "adapter.rank": 2}
    values = {**plain, **stepwise, **tiny_step}
    start = tmp_path / "fedavg"
    for number, rounds in enumerate((1, 0, 1)):  # of none, of a residual alone, of both
        place = tmp_path / f"run-{number}"
        config = tiny_config(
            **values
            | {"run-dir": str(place), "adapter.start": str(start), "federation.rounds": rounds}
        )
        found = start_adapter(config, trainable.load(config, records.load(config).labels))
        factors = found.layers().values()  # stack sends fresh ones: all that counts is the residual
        assert all(not layer.b.any() and layer.residual[1].any() for layer in factors)
        after = simulate_run(config)
        assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
        measured = finished_run.evaluate(place, config.data.source)
        expected = finished_run.evaluate(tmp_path / "fedavg", config.data.source)
        assert measured["loss"] == pytest.approx(expected["loss"], abs=1e-4)
        start = place
    saved = AdapterState.open(start / "adapter").rank
    assert saved > 2
    monkeypatch.setattr("server.start.RESIDUAL_RANK", saved - 1)
    values |= {"adapter.start": str(start)}
    after = simulate_run(tiny_config(**values | {"run-dir": str(tmp_path / "bounded")}))
    assert after["loss"] == pytest.approx(before["loss"], abs=0.05)  # and nobody refused
