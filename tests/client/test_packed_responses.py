"""Packed rows with responses: each gradient is exact, and to the last bit its own."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks import families
from client import passes, training
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.gradients import exactness
from fedlora.models import trainable
from fedlora.models.sft import PART
from tests.client.unit_gradients import dropout, set_values, unit_gradients

LONGEST = 160
LENGTHS = {  # tokens of a prompt and of its response
    "one token": (30, 1),
    "over a quarter of the row": (40, 60),
    "over a part": (10, PART + 6),
    "all but one token": (1, LONGEST - 1),
    "a long prompt": (LONGEST - 2, 2),
    "short": (7, 9),
    "short too": (9, 7),
    "also one token": (63, 1),
}


SIZE = {
    "vocab_size": families.WORDS,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
}


def saved(directory, config):
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    made.save_pretrained(directory)
    tokenizer = families.tokenizer()
    tokenizer.model_max_length = 256
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZE, num_key_value_heads=2))


def load(model, **values):
    work = families.load(
        model, (), **{"model.task": "sft", "training.max-length": LONGEST, **values}
    )
    assert work.first_position == 0
    set_values(work)
    return work


def rows(work):
    """The rows above, and one that was cut to length, which lost the end of its text."""
    draw = np.random.default_rng(1)
    ids = [draw.integers(6, families.WORDS, sum(each)).tolist() for each in LENGTHS.values()]
    cut = work.task.encode(["w1 " * LONGEST], ["w2 w3 w4"], ())
    assert (sum(cut.truncated), len(cut.ids[0])) == (1, LONGEST)
    targets = [prompt for prompt, _ in LENGTHS.values()] + cut.targets
    return shard_of(Encoded(ids=ids + cut.ids, targets=targets, truncated=[False] * len(targets)))


def gradients(work, shard, drawn, physical):
    units = [np.array([row]) for row in drawn]
    found = unit_gradients(work, shard, units, physical, packed=True)
    return {row: gradient for (row,), gradient in found.items()}


def alone(work, shard, row):
    """The gradient of one padded pass with one row, by plain autograd."""
    work.model.zero_grad()
    with training.training_steps(work, private=False):
        passes.padded_losses(work, shard, np.array([row]), dropout).sum().backward()
    found = torch.cat([p.grad.flatten() for p in work.parameters().values()])
    work.model.zero_grad()
    return found


CASES = [
    {},
    {"adapter.method": "dora", "adapter.dropout": 0.2},
    {"model.dtype": "bf16", "training.gradient-checkpointing": True},
    {"model.dtype": "bf16", "model.quantization": "nf4"},
]


@pytest.mark.parametrize("values", CASES, ids=lambda values: " ".join(map(str, values.values())))
def test_a_packed_responses_gradient_is_its_own(model, values):
    """Exact where the base is in float32; the same bits whatever else is drawn, on any base."""
    work = load(model, **values)
    shard = rows(work)
    every = list(range(len(shard)))
    for physical in (2, 8):  # packed rows of 192 and 640 tokens
        together = gradients(work, shard, every, physical)
        if "model.dtype" not in values:
            for row in every:
                expected = alone(work, shard, row)
                # one last bit of each of the base's weights moves these by 1e-5 to 1e-3
                assert (together[row] - expected).norm() <= 1e-4 * expected.norm()
        for drawn in (every[::-1], every[1::2], [6, 3, 5], *([row] for row in every)):
            for row, gradient in gradients(work, shard, drawn, physical).items():
                assert torch.equal(gradient, together[row])
                assert gradient.norm() > 0
    trainable.forget()


def test_an_example_whose_logits_see_another_makes_responses_padded(model):
    work = load(model)
    work.base.model.lm_head.register_forward_hook(
        lambda _, arguments, output: output + 1e-5 * output.roll(1, 1)
    )
    found = exactness.examine(work.model, work.per_sample, work.task, ())
    assert found.first_position is None
