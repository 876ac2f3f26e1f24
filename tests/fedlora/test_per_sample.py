"""Per-example gradients against one backward pass per example through PEFT's own forward.

``pytest -s -k exact`` prints the table of errors.
"""

import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, GPT2Config, LlamaConfig

from fedlora import adapters, models
from fedlora.adapters import METHODS, LoraSpec
from fedlora.errors import Refusal
from fedlora.per_sample import PerSampleAdapters

CONFIGS = {
    "bert": BertConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, architectures=["BertModel"],
    ),
    "llama": LlamaConfig(
        vocab_size=60, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128,
    ),
    "gpt2": GPT2Config(
        vocab_size=60, n_embd=64, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=0,
        embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0,
    ),
}  # fmt: skip
CLASSES = 3
BATCH, WIDTH = 5, 9


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Family -> directory of a tiny random model."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for family, config in CONFIGS.items():
        factory = AutoModel if family == "bert" else AutoModelForCausalLM
        factory.from_config(config).save_pretrained(root / family)
    return root


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch):
    monkeypatch.setattr(models, "load_tokenizer", lambda name: None)


def build(directory, method="lora", quantization="none", dtype="fp32", dropout=0.0):
    """A model with every trained value away from its start, in training mode."""
    task = "classification" if directory.name == "bert" else "sft"
    base = models.load_base(
        str(directory), dtype=dtype, quantization=quantization, task=task, num_labels=CLASSES
    )
    model = adapters.attach(base, LoraSpec(method=method, rank=4, alpha=8, dropout=dropout), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in adapters.parameters(model).values():
            p += 0.1 * torch.randn(p.shape, generator=generator)
    return model.train()


def batch():
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 60, (BATCH, WIDTH), generator=generator)
    mask = torch.ones_like(ids)
    for i in range(BATCH):
        mask[i, WIDTH - i :] = 0  # right padding, i tokens
    return ids, mask, torch.arange(BATCH) % CLASSES


def losses(model, ids, mask, labels):
    logits = model(input_ids=ids, attention_mask=mask).logits.float()
    if logits.dim() == 2:
        return F.cross_entropy(logits, labels, reduction="none")
    each = F.cross_entropy(logits[:, :-1].mT, ids[:, 1:], reduction="none")
    return (each * mask[:, 1:]).sum(1) / mask[:, 1:].sum(1)


def one_by_one(model, inputs):
    """Name -> gradients (examples, *shape) from one backward pass per example."""
    grads = {name: [] for name in adapters.parameters(model)}
    for i in range(len(inputs[0])):
        model.zero_grad()
        losses(model, *(x[i : i + 1] for x in inputs)).sum().backward()
        for name, p in adapters.parameters(model).items():
            grads[name].append(p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in grads.items()}


def all_at_once(model, per_sample, inputs, n_units=None, unit=None):
    with per_sample.expanded(n_units or len(inputs[0]), unit):
        losses(model, *inputs).sum().backward()
        per_sample.collect()
    return {name: p.grad_sample for name, p in adapters.parameters(model).items()}


def worst_error(found, expected):
    assert found.keys() == expected.keys()
    assert all(expected[n].norm() > 0 for n in expected)
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def reference(directory, **options):
    """PEFT's own outputs and gradients, or None where PEFT itself cannot run."""
    model = build(directory, **options)
    inputs = batch()
    try:
        with torch.no_grad():
            outputs = losses(model, *inputs)
        return outputs, one_by_one(model, inputs)
    except (RuntimeError, AttributeError, TypeError):
        return None


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_exact_for_every_method(directories, family, quantization):
    for method in METHODS:
        options = {"method": method, "quantization": quantization}
        expected = reference(directories / family, **options)
        model = build(directories / family, **options)
        per_sample = PerSampleAdapters(model)
        source = "PEFT" if expected else "own plain mode (PEFT fails)"
        if expected:
            with torch.no_grad():
                torch.testing.assert_close(losses(model, *batch()), expected[0], rtol=1e-6, atol=1e-6)
        grads = expected[1] if expected else one_by_one(model, batch())
        error = worst_error(all_at_once(model, per_sample, batch()), grads)
        print(f"{family:6} {quantization:5} fp32 {method:12} {error:.1e}  against {source}")
        assert error <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_exact_within_rounding_on_a_bf16_base(directories, family):
    for method in METHODS:
        expected = reference(directories / family, method=method, dtype="bf16")
        model = build(directories / family, method=method, dtype="bf16")
        error = worst_error(all_at_once(model, PerSampleAdapters(model), batch()), expected[1])
        print(f"{family:6} none  bf16 {method:12} {error:.1e}  against PEFT")
        assert error <= 2e-2
