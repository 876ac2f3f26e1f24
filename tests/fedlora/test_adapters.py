"""What is attached, how it travels, and that PEFT opens what is saved."""

import json
import math
import re

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from fedlora import adapters, models
from fedlora.adapters import METHODS, AdapterState, LoraSpec
from fedlora.errors import InputError
from fedlora.per_sample import PerSampleAdapters

CONFIGS = {
    "bert": BertConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                       intermediate_size=128, architectures=["BertModel"]),
    "llama": LlamaConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, intermediate_size=128),
    "gpt2": GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=32,
                       bos_token_id=0, eos_token_id=0),
}  # fmt: skip
IDS = torch.arange(1, 15).view(2, 7)


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for family, config in CONFIGS.items():
        factory = AutoModel if family == "bert" else AutoModelForCausalLM
        factory.from_config(config, trust_remote_code=False).save_pretrained(root / family)
    return root


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: None)


def load(directory, quantization="none", dtype="fp32"):
    task = "classification" if directory.name == "bert" else "sft"
    return models.load_base(
        str(directory), dtype=dtype, quantization=quantization, task=task, num_labels=3
    )


def spec(method="lora", **changes):
    return LoraSpec(**{"method": method, "rank": 3, "alpha": 7, **changes})


def trained(base, method="lora"):
    """An adapter away from its start."""
    model = adapters.attach(base, spec(method), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapters.parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def _zeros(state):
    return AdapterState({name: torch.zeros_like(tensor) for name, tensor in state.items()})


@torch.no_grad()
def outputs(model):
    return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits.float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_fresh_adapter_computes_what_the_base_computes(directories, family, method):
    expected = outputs(load(directories / family).model)
    model = adapters.attach(load(directories / family), spec(method), seed=1).eval()
    torch.testing.assert_close(outputs(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_names_and_values_are_those_that_peft_saves(directories, family, method):
    model = trained(load(directories / family), method)
    theirs = get_peft_model_state_dict(model, save_embedding_layers=False)
    ours = AdapterState.read(model)
    assert sorted(theirs) == list(ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert {p for p in model.parameters() if p.requires_grad} == set(
        adapters.parameters(model).values()
    )
    assert all(p.dtype == torch.float32 for p in adapters.parameters(model).values())


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


def test_saving_again_replaces_the_files_and_leaves_nothing_else(directories, tmp_path):
    model = trained(load(directories / "bert"))
    state = AdapterState.read(model)
    state.save(tmp_path, model)
    _zeros(state).save(tmp_path, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert all((t == 0).all() for t in AdapterState.open(tmp_path).values())
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(directories / "bert")
    assert config["modules_to_save"] == ["classifier"] and config["inference_mode"] is True


def test_a_missing_or_damaged_adapter_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        AdapterState.open(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError, match="cannot be read"):
        AdapterState.open(tmp_path)


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_merged_model_is_plain_and_gives_the_same_outputs(
    directories, family, quantization, tmp_path
):
    for method in METHODS:
        model = trained(load(directories / family, quantization), method)
        PerSampleAdapters(model)
        if quantization == "int8":
            model.train()  # in evaluation bitsandbytes also rounds the activations to 8 bits
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
            model.get_base_model().config.attention_probs_dropout_prob = 0.0
        expected = outputs(model)
        merged = adapters.merge(model)
        assert not any(
            "lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters()
        )
        torch.testing.assert_close(outputs(merged), expected, rtol=1e-4, atol=1e-4)
        merged.save_pretrained(tmp_path / method)
        assert "quantization_config" not in json.loads(
            (tmp_path / method / "config.json").read_text()
        )
        again = models.load_base(
            str(tmp_path / method), dtype="fp32", quantization="none", num_labels=3,
            task="classification" if family == "bert" else "sft",
        )  # fmt: skip
        torch.testing.assert_close(outputs(again.model), outputs(merged))


def test_a_merged_bf16_encoder_keeps_its_float32_head(directories, tmp_path):
    merged = adapters.merge(trained(load(directories / "bert", dtype="bf16")))
    merged.save_pretrained(tmp_path)
    again = load(directories / "bert").model.__class__.from_pretrained(
        tmp_path, dtype=torch.bfloat16, trust_remote_code=False
    )
    assert again.classifier.weight.dtype == torch.float32
    assert torch.equal(again.classifier.weight, merged.classifier.weight)


def test_the_start_depends_on_the_seed_and_the_layer_only(directories):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = AdapterState.read(adapters.attach(load(directories / "llama"), spec(), seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    same = AdapterState.read(adapters.attach(load(directories / "llama"), spec(), seed=1))
    other = AdapterState.read(adapters.attach(load(directories / "llama"), spec(), seed=2))
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
    model = adapters.attach(load(directories / "gpt2", quantization), spec("dora"), seed=1)
    layer = next(layer for _, layer in adapters.lora_layers(model))
    magnitude = layer.lora_magnitude_vector["default"].weight
    plain = load(directories / "gpt2").model.transformer.h[0].attn.c_attn.weight.norm(dim=0)
    tolerance = {"none": 1e-6, "nf4": 0.1, "int8": 0.01}[quantization]
    torch.testing.assert_close(magnitude, plain, rtol=tolerance, atol=0)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_dequantised_weight_is_what_bitsandbytes_multiplies_by(directories, quantization):
    layer = load(directories / "llama", quantization).model.model.layers[0].mlp.down_proj.train()
    expected = adapters.dense_weight(layer)
    assert expected.shape == (64, 128) and expected.dtype == torch.float32
    torch.testing.assert_close(layer(torch.eye(128)).T, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(adapters.dense_weight(layer), expected)  # also after a forward


def test_every_default_target_is_in_the_model_it_is_for():
    checked = 0
    for model_type in adapters.TARGETS:
        config = AutoConfig.for_model(model_type)
        with torch.device("meta"):
            try:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            except ValueError:
                model = AutoModel.from_config(config, trust_remote_code=False)
        assert adapters._targets(model, ()) == adapters.TARGETS[model_type]
        checked += 1
    assert checked == len(adapters.TARGETS) > 20


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "rlora"}, "adapter.method is 'rlora'.*rslora"),
        ({"rank": 0}, "adapter.rank is 0"),
        ({"alpha": 0}, "adapter.alpha is 0"),
        ({"alpha": math.nan}, "adapter.alpha is nan"),
        ({"dropout": 1.0}, "adapter.dropout is 1.0"),
    ],
)
def test_a_bad_value_is_named(values, message):
    with pytest.raises(InputError, match=message):
        LoraSpec(**{"method": "lora", "rank": 8, "alpha": 16, **values})


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
        adapters.attach(load(directories / "bert"), spec(target_modules=("query", target)), seed=1)


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
        adapters.attach(base, spec(rank=limit + 1), seed=1)
    assert adapters.attach(base, spec(rank=limit), seed=1)


def test_an_unknown_architecture_asks_for_targets_and_lists_them(directories):
    base = load(directories / "llama")
    base.model.config.model_type = "novel"
    with pytest.raises(InputError, match=r"no default for 'novel'.*down_proj.*q_proj"):
        adapters.attach(base, spec(), seed=1)


def test_loading_copies_in_place_and_refuses_what_does_not_fit(directories):
    model = trained(load(directories / "bert"), "dora")
    state = AdapterState.read(model)
    places = {name: p.data_ptr() for name, p in adapters.parameters(model).items()}
    name = next(n for n in state if adapters.kind(n) == "A")
    with pytest.raises(ValueError, match="shape"):  # (1, 64) would broadcast into (3, 64)
        AdapterState({**_zeros(state), name: torch.zeros(1, 64)}).load_into(model)
    assert all(torch.equal(v, state[n]) for n, v in AdapterState.read(model).items())
    _zeros(state).load_into(model)
    assert all((p == 0).all() for p in adapters.parameters(model).values())
    assert {n: p.data_ptr() for n, p in adapters.parameters(model).items()} == places
    assert state[name].abs().sum() > 0  # what was read is a copy


def test_a_state_is_sorted_and_counts_its_bytes():
    state = AdapterState({"b": torch.ones(2, 3), "a": torch.ones(4)})
    assert list(state) == ["a", "b"] and state.num_bytes == 40


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


def test_a_layer_with_one_factor_of_two_is_an_error_and_not_left_out():
    for end in ("A", "B"):
        with pytest.raises(KeyError, match=r"q\.lora_"):
            AdapterState({f"q.lora_{end}.weight": torch.ones(1, 1)}).layers()


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
    other = adapters.attach(
        load(directories / "bert"),
        LoraSpec(method=method, rank=2, alpha=spec(method).alpha),
        seed=5,
    ).eval()
    with torch.no_grad():
        for p in adapters.parameters(other).values():
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
    path = next(adapters.lora_layers(model))[0]
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
