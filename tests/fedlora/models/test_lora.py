"""A fresh adapter on a base, and the settings that are refused."""

import math

import pytest
import torch

from fedlora.config.sections import METHODS
from fedlora.errors import InputError
from fedlora.gradients import lora_layers
from fedlora.models import adapters, lora
from fedlora.models.adapters import AdapterState
from tests.fedlora.small_models import CONFIGS, load, outputs, spec

pytestmark = pytest.mark.usefixtures("no_tokenizer")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fresh_adapter_computes_what_the_base_computes(directories, family, method):
    expected = outputs(load(directories / family).model)
    model = lora.attach(load(directories / family), spec(method), seed=1).eval()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


def test_the_start_depends_on_the_seed_and_the_layer_only(directories):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = AdapterState.read(lora.attach(load(directories / "llama"), spec(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    same = AdapterState.read(lora.attach(load(directories / "llama"), spec(), seed=1))
    other = AdapterState.read(lora.attach(load(directories / "llama"), spec(), seed=2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    firsts = [name for name in one if adapters.kind(name) == "A"]
    assert not any(torch.equal(one[name], other[name]) for name in firsts)
    assert not torch.equal(one[firsts[0]], one[firsts[2]])
    values = torch.cat([one[name].flatten() for name in firsts])  # uniform in +-1/sqrt(64)
    assert values.abs().max() <= 1 / 8
    # mean and variance within 5 standard errors of the uniform law's (false alarm < 2e-6)
    assert abs(values.mean()) < 5 / 8 / math.sqrt(3 * len(values))
    assert abs(values.var() * 3 * 64 - 1) < 5 * math.sqrt(0.8 / len(values))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_dora_magnitudes_start_at_the_row_norms_of_the_base(directories, quantization):
    model = lora.attach(load(directories / "gpt2", quantization), spec("dora"), seed=1)
    layer = next(layer for _, layer in lora_layers.lora_layers(model))
    magnitude = layer.lora_magnitude_vector["default"].weight
    plain = load(directories / "gpt2").model.transformer.h[0].attn.c_attn.weight.norm(dim=0)
    tolerance = {"none": 1e-6, "nf4": 0.1, "int8": 0.01}[quantization]
    torch.testing.assert_close(magnitude, plain, rtol=tolerance, atol=0)


def test_dora_refuses_a_row_of_zeros_which_has_no_direction(directories):
    for method in ("lora", "dora"):
        base = load(directories / "llama")
        with torch.no_grad():
            base.model.model.layers[0].self_attn.q_proj.weight[3] = 0
        if method == "lora":
            assert lora.attach(base, spec(method), seed=1)
            continue
        with pytest.raises(InputError, match=r"1 rows of .*q_proj in .* are zero; take lora"):
            lora.attach(base, spec(method), seed=1)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("qery", "'qery', which is no layer of this bert model; perhaps 'query'"),
        ("LayerNorm", "not a linear layer"),
        ("word_embeddings", "not a linear layer"),
        ("classifier", "not a linear layer"),
    ],
)
def test_a_target_that_cannot_be_adapted_is_named(directories, target, message):
    with pytest.raises(InputError, match=message):
        lora.attach(load(directories / "bert"), spec(target_modules=("query", target)), seed=1)


@pytest.mark.parametrize(
    ("family", "quantization", "limit", "layer"),
    [
        ("bert", "none", 64, "layer.0.attention.self.query"),
        ("bert", "nf4", 64, "layer.0.attention.self.query"),
        ("llama", "none", 32, "layers.0.self_attn.v_proj"),  # 64 in, 2 heads of 16 out
        ("gpt2", "none", 64, "h.0.attn.c_attn"),
    ],
)
def test_a_rank_above_what_the_narrowest_layer_can_have_is_refused(
    directories, family, quantization, limit, layer
):
    base = load(directories / family, quantization)
    with pytest.raises(InputError, match=rf"rank is {limit + 1}, .*{layer} .* at most {limit} "):
        lora.attach(base, spec(rank=limit + 1), seed=1)
    assert lora.attach(base, spec(rank=limit), seed=1)
