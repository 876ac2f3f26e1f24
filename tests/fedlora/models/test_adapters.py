"""What is attached, how it travels, and that PEFT opens what is saved."""

import re

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict

from fedlora.config.sections import METHODS, AdapterConfig
from fedlora.errors import InputError
from fedlora.gradients import lora_layers
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import adapters, lora
from fedlora.models.adapters import AdapterState
from tests.fedlora.small_models import CONFIGS, load, outputs, spec, trained

pytestmark = pytest.mark.usefixtures("no_tokenizer")


def _zeros(state):
    return AdapterState({name: torch.zeros_like(tensor) for name, tensor in state.items()})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_values_are_those_that_peft_saves(directories, family, method):
    model = trained(load(directories / family), method)
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = AdapterState.read(model)
    assert sorted(theirs) == list(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {p for p in model.parameters() if p.requires_grad} == set(
        lora_layers.parameters(model).values()
    )
    assert all(p.dtype == torch.float32 for p in lora_layers.parameters(model).values())


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_opens_a_saved_adapter_with_the_same_outputs(
    directories, family, quantization, tmp_path
):
    for method in METHODS:
        model = trained(load(directories / family, quantization), method)
        PerSampleAdapters(model)
        AdapterState.read(model).save(tmp_path / method, model)
        opened = PeftModel.from_pretrained(
            load(directories / family, quantization).model,
            tmp_path / method,
            trust_remote_code=False,
        )
        torch.testing.assert_close(outputs(opened.eval()), outputs(model), rtol=1e-5, atol=1e-5)


def test_a_missing_or_damaged_adapter_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        AdapterState.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        AdapterState.open(tmp_path)


def test_loading_copies_in_place_and_refuses_what_does_not_fit(directories):
    model = trained(load(directories / "bert"), "dora")
    state = AdapterState.read(model)
    places = {name: p.data_ptr() for name, p in lora_layers.parameters(model).items()}
    name = next(n for n in state if adapters.kind(n) == "A")
    with pytest.raises(ValueError, match="shape"):  # (1, 64) would broadcast into (3, 64)
        AdapterState({**_zeros(state), name: torch.zeros(1, 64)}).load_into(model)
    assert all(torch.equal(v, state[n]) for n, v in AdapterState.read(model).items())
    _zeros(state).load_into(model)
    assert all((p == 0).all() for p in lora_layers.parameters(model).values())
    assert {n: p.data_ptr() for n, p in lora_layers.parameters(model).items()} == places
    assert state[name].abs().sum() > 0  # what was read is a copy


def test_parts_and_layers_follow_from_the_name(directories):
    state = AdapterState.read(trained(load(directories / "bert"), "dora"))
    head = [n for n in state if adapters.kind(n) == "head"]
    assert [n.removeprefix("base_model.model.") for n in head] == [
        "classifier.bias",
        "classifier.weight",
    ]
    layers = state.layers()
    assert set(layers) == {name.removesuffix(".lora_A.weight") for name in state.only(("A",))}
    path = "base_model.model.bert.encoder.layer.0.attention.self.query"
    ends = ("A.weight", "B.weight", "magnitude_vector")
    query = {f"{path}.lora_{end}": layers[path][i] for i, end in enumerate(ends)}
    assert layers[path].named(path).keys() == query.keys() < state.keys()
    assert all(tensor is state[name] for name, tensor in query.items())
    assert layers[path].residual is None
    whole = {name: t for at, layer in layers.items() for name, t in layer.named(at).items()}
    assert whole.keys() | set(head) == state.keys()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda t: {}, "is missing"),
        (lambda t: {"x": t, "y": t}, "y is not expected"),
        (lambda t: {"x": t[:1]}, r"shape \(1, 2\), expected \(3, 2\)"),
        (lambda t: {"x": t.double()}, "float64"),
        (lambda t: {"x": t / 0}, "not finite"),
        (lambda t: {"x": t * 5}, None),
    ],
)
def test_a_state_that_does_not_match_is_told_apart(change, problem):
    reference = AdapterState({"x": torch.ones(3, 2)})
    found = AdapterState(change(torch.ones(3, 2))).validate_against(reference)
    assert found is None if problem is None else re.search(problem, found)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_takes_on_the_rank_of_what_is_loaded(directories, method):
    model = trained(load(directories / "bert"), method)
    other = lora.attach(
        load(directories / "bert"),
        AdapterConfig(method=method, rank=2, alpha=spec(method).alpha),
        seed=5,
    ).eval()
    with torch.no_grad():
        for p in lora_layers.parameters(other).values():
            p += 0.1
    theirs, before = AdapterState.read(other), AdapterState.read(model)
    assert theirs.rank == 2 != before.rank
    expected = outputs(model)
    PerSampleAdapters(model)
    theirs.load_into(model)
    torch.testing.assert_close(outputs(model), outputs(other), rtol=1e-5, atol=1e-5)
    before.load_into(model)
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_residuals_are_expected_in_pairs_that_fit_and_only_where_they_may_be(directories):
    model = trained(load(directories / "bert"))
    state = AdapterState.read(model)
    path = next(lora_layers.lora_layers(model))[0]
    a, b = adapters.residual_names(path)
    d_in, d_out = state[f"{path}.lora_A.weight"].shape[1], state[f"{path}.lora_B.weight"].shape[0]
    good = state.updated({a: torch.ones(4, d_in), b: torch.ones(d_out, 4)})
    assert good.validate_against(state, residual=True) is None
    assert state.validate_against(good, residual=True) is None  # the reference's do not count
    assert "not expected" in good.validate_against(state)
    assert "missing" in state.updated({a: good[a]}).validate_against(state, residual=True)
    assert "missing" in state.updated({b: good[b]}).validate_against(state, residual=True)
    for bad in (torch.ones(d_out, 3), torch.ones(1, 4), torch.ones(d_out)):
        assert "has shape" in good.updated({b: bad}).validate_against(state, residual=True)
    nothing = state.updated({a: torch.ones(0, d_in), b: torch.ones(d_out, 0)})
    assert "has shape" in nothing.validate_against(state, residual=True)
    infinite = good.updated({a: torch.full((4, d_in), torch.inf)})
    assert "not finite" in infinite.validate_against(state, residual=True)
    elsewhere = state.updated({n.replace(path, "other"): good[n] for n in (a, b)})
    assert "not expected" in elsewhere.validate_against(state, residual=True)
