"""Per-example gradients against one backward pass per example through PEFT's own forward.

``pytest -s -k exact`` prints the table of errors.
"""

import contextlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import LoraLayer
from torch import nn

from fedlora.config.sections import METHODS
from fedlora.data.batches import pack, rounded
from fedlora.errors import Refusal
from fedlora.gradients import lora_layers, packing
from fedlora.gradients.layer_forwards import dropout_mask
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import adapters
from fedlora.privacy.streams import RandomSource
from tests.fedlora.small_models import CONFIGS, load, trained

pytestmark = pytest.mark.usefixtures("no_tokenizer")

CLASSES = 3
BATCH, WIDTH = 5, 9


def build(directory, method="lora", quantization="none", dtype="fp32", dropout=0.0, dense=False):
    """A trained model in training mode; ``dense`` puts plain layers in place of int8 ones."""
    base = load(directory, quantization, dtype)
    if dense:
        for name, module in list(base.model.named_modules()):
            if type(module).__name__ == "Linear8bitLt":
                weight = module.weight.data.float() * module.weight.SCB[:, None] / 127
                plain = nn.Linear(*weight.T.shape, bias=module.bias is not None)
                plain.weight.data, plain.bias = weight, module.bias
                base.model.set_submodule(name, plain.requires_grad_(False))
        base.model.is_loaded_in_8bit = False
    return trained(base, method, dropout=dropout).train()


def with_adapters(directory, **options):
    model = build(directory, **options)
    return model, PerSampleAdapters(model)


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


@contextlib.contextmanager
def packed_losses(model, ids, mask, labels):
    """The same losses from one packed row of all examples and some filler."""
    lengths = mask.sum(1).numpy()
    tokens = [row[:n].numpy().astype(np.int32) for row, n in zip(ids, lengths, strict=True)]
    rest = {"pad_id": 0, "first": 0, "slots": 8, "device": ids.device}
    packed = pack(tokens, labels.numpy(), rounded(lengths, WIDTH + 3), total=48, **rest)
    with packing.use(packed.row):
        logits = model(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            attention_mask=torch.zeros(1, 1, 1, 1),
        ).logits.float()
        if logits.dim() == 2:
            yield F.cross_entropy(logits, labels, reduction="none")
            return
        said = logits[0, : sum(lengths)].split(lengths.tolist())
        read = packed.input_ids[0, : sum(lengths)].split(lengths.tolist())
        each = zip(said, read, strict=True)
        yield torch.stack([F.cross_entropy(row[:-1], ids[1:]) for row, ids in each])


@contextlib.contextmanager
def either_losses(model, inputs, packed):
    if packed:
        with packed_losses(model, *inputs) as found:
            yield found
    else:
        yield losses(model, *inputs)


def one_by_one(model, inputs):
    """Name -> gradients (examples, *shape) from one backward pass per example."""
    grads = {name: [] for name in lora_layers.parameters(model)}
    for i in range(len(inputs[0])):
        model.zero_grad()
        losses(model, *(x[i : i + 1] for x in inputs)).sum().backward()
        for name, p in lora_layers.parameters(model).items():
            grads[name].append(p.grad.clone())
    model.zero_grad()
    return {name: torch.stack(each) for name, each in grads.items()}


def all_at_once(model, per_sample, inputs, packed=False):
    with per_sample.expanded(len(inputs[0])):
        with either_losses(model, inputs, packed) as found:
            found.sum().backward()
        gradients = per_sample.collect()
    return {name: gradients[p] for name, p in lora_layers.parameters(model).items()}


def worst_error(found, expected):
    assert found.keys() == expected.keys()
    assert all(expected[n].norm() > 0 for n in expected)
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def reference(directory, **options):
    """Outputs and gradients of PEFT's own forward.

    PEFT cannot train DoRA on int8 on a CPU; there the reference is PEFT on the same weights,
    dequantised, which is what bitsandbytes multiplies by when it trains on a CPU.
    """
    fails = options.get("quantization") == "int8" and options["method"].startswith("dora")
    model = build(directory, dense=fails, **options)
    with torch.no_grad():
        outputs = losses(model, *batch())
    return outputs, one_by_one(model, batch()), "PEFT, dequantised" if fails else "PEFT"


PACKED = pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])


@PACKED
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_exact_for_every_method(directories, family, quantization, method, packed):
    options = {"method": method, "quantization": quantization}
    outputs, expected, source = reference(directories / family, **options)
    model, per_sample = with_adapters(directories / family, **options)
    with torch.no_grad(), either_losses(model, batch(), packed) as found:
        torch.testing.assert_close(found, outputs, rtol=1e-6, atol=1e-6)
    error = worst_error(all_at_once(model, per_sample, batch(), packed), expected)
    form = "packed" if packed else "padded"
    print(f"{family:6} {quantization:5} fp32 {method:12} {form} {error:.1e}  against {source}")
    assert error <= 1e-5


@PACKED
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_gradients_are_exact_within_rounding_on_a_bf16_base(directories, family, method, packed):
    _, expected, _ = reference(directories / family, method=method, dtype="bf16")
    model, per_sample = with_adapters(directories / family, method=method, dtype="bf16")
    error = worst_error(all_at_once(model, per_sample, batch(), packed), expected)
    print(f"{family:6} none  bf16 {method:12} {error:.1e}  against PEFT")
    assert error <= 2e-2


class RowMask(nn.Module):
    """PEFT's dropout, drawn as ours is: from the row's source and the layer's name."""

    def __init__(self, name):
        super().__init__()
        self.name, self.row = name, 0

    def forward(self, x):
        assert len(x) == 1  # one example at a time
        return x * dropout_mask(row_sources()[self.row].child(self.name), x.shape[1:], 0.3)


def row_sources():
    return [RandomSource.seeded("dropout", i) for i in range(BATCH)]


def one_by_one_with_dropout(model, inputs):
    masks = []
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            masks.append(RowMask(name))
            module.lora_dropout["default"] = masks[-1]
    rows = []
    for i in range(BATCH):
        for mask in masks:
            mask.row = i
        rows.append(one_by_one(model, tuple(x[i : i + 1] for x in inputs)))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


@PACKED
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_exact_with_dropout_on_the_adapter(directories, family, method, packed):
    expected = one_by_one_with_dropout(
        build(directories / family, method=method, dropout=0.3), batch()
    )
    model, per_sample = with_adapters(directories / family, method=method, dropout=0.3)
    without = all_at_once(model, per_sample, batch())
    assert worst_error(without, expected) > 1e-2  # the mask does matter
    per_sample.draw_dropout(row_sources())
    assert worst_error(all_at_once(model, per_sample, batch(), packed), expected) <= 1e-5


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("reentrant", [False, True])
@PACKED
def test_gradients_are_exact_with_gradient_checkpointing(
    directories, family, method, reentrant, packed
):
    expected = one_by_one(build(directories / family, method=method), batch())
    model, per_sample = with_adapters(directories / family, method=method)
    inner = model.get_base_model()
    inner.gradient_checkpointing_enable({"use_reentrant": reentrant})
    inner.enable_input_require_grads()
    calls = []
    layer = next(m for m in model.modules() if isinstance(m, LoraLayer))
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    assert worst_error(all_at_once(model, per_sample, batch(), packed), expected) <= 1e-5
    assert len(calls) == 2  # it was recomputed


@PACKED
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", METHODS)
def test_plain_mode_gives_pefts_gradients(directories, family, method, packed):
    found, expected = {}, {}
    peft = build(directories / family, method=method)
    ours, _ = with_adapters(directories / family, method=method)
    for model, grads in ((peft, expected), (ours, found)):
        with either_losses(model, batch(), packed and model is ours) as each:
            each.sum().backward()
        grads.update({n: p.grad for n, p in lora_layers.parameters(model).items()})
    assert worst_error(found, expected) <= 1e-5


def test_dora_norms_follow_every_kind_of_change_to_the_factors(directories):
    model, _ = with_adapters(directories / "bert", method="dora")
    trained = lora_layers.parameters(model)
    fresh = adapters.AdapterState.read(model)
    for change in (
        lambda: torch.optim.SGD(trained.values(), lr=0.1).step(),
        lambda: torch.optim.Adam(trained.values(), lr=0.1, foreach=True).step(),
        lambda: torch.optim.AdamW(trained.values(), lr=0.1, fused=True).step(),
        lambda: [p.data.mul_(0.5) for p in trained.values()],
        lambda: fresh.load_into(model),
    ):
        losses(model, *batch()).sum().backward()  # norms are now remembered
        change()
        again = build(directories / "bert", method="dora")
        adapters.AdapterState.read(model).load_into(again)
        with torch.no_grad():
            torch.testing.assert_close(losses(model, *batch()), losses(again, *batch()))


def test_gradients_can_be_clipped_in_place_and_do_not_leak_into_the_next_batch(directories):
    model, per_sample = with_adapters(directories / "bert", method="dora")
    found = all_at_once(model, per_sample, batch())
    first = {n: g.clone() for n, g in found.items()}
    for gradients in found.values():
        gradients.mul_(0)
    assert all(p.grad is None for p in model.parameters())
    again = all_at_once(model, per_sample, batch())
    assert all(torch.equal(again[n], first[n]) for n in first)


def test_a_trained_parameter_without_per_example_gradient_is_refused(directories):
    model = build(directories / "bert")
    next(p for n, p in model.named_parameters() if "LayerNorm" in n).requires_grad_()
    with pytest.raises(Refusal, match="LayerNorm") as refusal:
        PerSampleAdapters(model)
    assert refusal.value.code == "guard-no-gradient"


def test_a_loss_that_misses_a_layer_is_refused(directories):
    model, per_sample = with_adapters(directories / "bert")
    with per_sample.expanded(BATCH):
        model.get_base_model().bert(input_ids=batch()[0])[0].sum().backward()
        with pytest.raises(Refusal, match="classifier") as refusal:
            per_sample.collect()
    assert refusal.value.code == "guard-no-gradient"


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4)])
def test_batch_norm_is_refused(directories, norm):
    model = build(directories / "bert")
    model.get_base_model().extra = norm.requires_grad_(False)
    with pytest.raises(Refusal, match="BatchNorm") as refusal:
        PerSampleAdapters(model)
    assert refusal.value.code == "guard-batch-coupled"


def test_int8_with_outlier_columns_is_refused_and_is_not_how_we_load(directories):
    model = build(directories / "llama", quantization="int8")
    PerSampleAdapters(model)
    layer = next(
        m for m in model.modules() if type(m).__name__ == "Linear8bitLt" and hasattr(m, "state")
    )
    layer.state.threshold = 6.0
    with pytest.raises(Refusal, match="statistics") as refusal:
        PerSampleAdapters(model)
    assert refusal.value.code == "guard-batch-coupled"


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("frozen", ["A", "B", "magnitude"])
def test_a_frozen_part_changes_no_gradient_of_the_others(directories, family, method, frozen):
    expected = one_by_one(build(directories / family, method=method), batch())
    model, per_sample = with_adapters(directories / family, method=method)
    for name, parameter in lora_layers.parameters(model).items():
        parameter.requires_grad_(adapters.kind(name) != frozen)
    with per_sample.expanded(BATCH):
        losses(model, *batch()).sum().backward()
        gradients = per_sample.collect()
    for name, parameter in lora_layers.parameters(model).items():
        if parameter.requires_grad:
            error = (gradients[parameter] - expected[name]).norm() / expected[name].norm()
            assert error <= 1e-5
        else:
            assert parameter not in gradients and parameter.grad is None


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", CONFIGS)
def test_a_residual_is_a_part_of_the_frozen_weight(directories, family, method):
    """Exact: outputs and per-example gradients of PEFT on a base whose weight holds W + B A."""
    model, per_sample = with_adapters(directories / family, method=method)
    plain = build(directories / family, method=method)
    generator = torch.Generator().manual_seed(4)
    state = dict(adapters.AdapterState.read(model))
    for path, layer in lora_layers.lora_layers(plain):
        weight = layer.get_base_layer().weight
        dense = lora_layers.dense_weight(layer.get_base_layer())
        b = 0.1 * torch.randn(dense.shape[0], 5, generator=generator)
        a = 0.1 * torch.randn(5, dense.shape[1], generator=generator)
        state |= dict(zip(adapters.residual_names(path), (a, b), strict=True))
        weight.data += (b @ a) if weight.shape == dense.shape and family != "gpt2" else (b @ a).T
    before = losses(model, *batch()).detach()
    adapters.AdapterState(state).load_into(model)
    after = losses(model, *batch()).detach()
    assert (before - after).abs().max() > 1e-3
    with torch.no_grad():
        torch.testing.assert_close(after, losses(plain, *batch()), rtol=1e-5, atol=1e-5)
    found = all_at_once(model, per_sample, batch())
    assert worst_error(found, one_by_one(plain, batch())) <= 2e-5
    read = adapters.AdapterState.read(model)
    assert set(read) == set(state) and all(torch.equal(read[n], state[n]) for n in state)
    adapters.AdapterState({n: t for n, t in state.items() if "residual" not in n}).load_into(model)
    torch.testing.assert_close(losses(model, *batch()).detach(), before)
