"""A run starts from an adapter in a directory, or refuses one that does not fit."""

import dataclasses
import json

import pytest
import torch

from fedlora import trainable
from fedlora.adapters import AdapterState, kind
from fedlora.errors import InputError
from server.start import start_adapter


@pytest.fixture
def work(tiny_config):
    config = tiny_config()
    return config, trainable.load(config, trainable.records(config).labels)


def moved(state, parts=("A", "B", "head")):
    """The state with every tensor of these parts at another value."""
    return AdapterState({n: t + 0.5 if kind(n) in parts else t for n, t in state.items()})


def settings(config, directory, **changes):
    return dataclasses.replace(config.adapter, start=str(directory), **changes)


def test_without_a_directory_the_fresh_adapter_is_the_start(work):
    config, made = work
    assert start_adapter(config.adapter, made.start) is made.start


def test_a_saved_adapter_is_the_start(work, tmp_path):
    config, made = work
    saved = moved(made.start)
    saved.save(tmp_path / "adapter", made.model)
    found = start_adapter(settings(config, tmp_path / "adapter"), made.start)
    assert found.keys() == made.start.keys()
    assert all(torch.equal(found[name], saved[name]) for name in found)


def test_a_head_for_other_classes_is_left_out(work, tmp_path):
    config, made = work
    head = {n: torch.ones(9, *t.shape[1:]) for n, t in made.start.only(("head",)).items()}
    moved(made.start).updated(head).save(tmp_path / "adapter", made.model)
    found = start_adapter(settings(config, tmp_path / "adapter"), made.start)
    for name, tensor in found.items():
        expected = made.start[name] if kind(name) == "head" else made.start[name] + 0.5
        assert torch.equal(tensor, expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"alpha": 4.0}, "an adapter of alpha 16; set adapter.alpha"),
        ({"method": "rslora"}, "an adapter of alpha 16; set adapter.alpha"),
    ],
)
def test_an_adapter_of_another_scale_is_refused(work, tmp_path, change, said):
    config, made = work
    made.start.save(tmp_path / "adapter", made.model)
    with pytest.raises(InputError, match=said):
        start_adapter(settings(config, tmp_path / "adapter", **change), made.start)


def test_an_adapter_of_another_rank_or_without_its_configuration_is_refused(work, tmp_path):
    config, made = work
    place = tmp_path / "adapter"
    made.start.cut(2).save(place, made.model)
    with pytest.raises(InputError, match="does not fit this run"):
        start_adapter(settings(config, place), made.start)
    made.start.save(place, made.model)
    (place / "adapter_config.json").write_text(json.dumps({"r": 8}))
    with pytest.raises(InputError, match=r"adapter_config.json cannot be read \(KeyError\)"):
        start_adapter(settings(config, place), made.start)


def test_a_missing_directory_is_refused_by_name(work, tmp_path):
    config, made = work
    with pytest.raises(InputError, match=r"adapter\.start is .*nowhere: .*cannot be read"):
        start_adapter(settings(config, tmp_path / "nowhere"), made.start)


def test_a_run_goes_on_from_the_adapter_of_an_earlier_run(tiny_config, simulate_run, tmp_path):
    first = tiny_config(**{"run-dir": str(tmp_path / "first"), "privacy.epsilon": float("inf")})
    before = simulate_run(first)
    second = tiny_config(
        **{
            "run-dir": str(tmp_path / "second"),
            "adapter.start": str(tmp_path / "first" / "adapter"),
            "federation.rounds": 1,
            "federation.server-learning-rate": 1e-7,
        }
    )
    after = simulate_run(second)
    assert after["loss"] == pytest.approx(before["loss"], abs=1e-4)
