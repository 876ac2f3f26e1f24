"""Packed rows: which models take them, and that an example gets there what it gets alone."""

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

from fedlora.config.sections import AdapterConfig
from fedlora.config.task_choice import choose_task
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.gradients import attention, exactness, packing
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import lora
from fedlora.models.encoder import EncoderClassifier
from fedlora.models.models import Base

LABELS = ("a", "b", "c")
PAD = 1
SIZE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
}
DISTIL = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}
ENCODERS = {
    "bert": (hf.BertConfig(**SIZE), 0),
    "roberta": (hf.RobertaConfig(**SIZE), PAD + 1),
    "xlm-roberta": (hf.XLMRobertaConfig(**SIZE), PAD + 1),
    "electra": (hf.ElectraConfig(**SIZE, embedding_size=32), 0),
    "modernbert": (hf.ModernBertConfig(**SIZE, local_attention=32), 0),
    "modernbert, a narrower window": (hf.ModernBertConfig(**SIZE, local_attention=16), None),
    "deberta, positions relative": (hf.DebertaV2Config(**SIZE, relative_attention=True), None),
}
LLAMA = SIZE | {"num_key_value_heads": 2}
CAUSAL = {
    "llama": (hf.LlamaConfig(**LLAMA), 0),
    "qwen2": (hf.Qwen2Config(**LLAMA), 0),
    "mistral": (hf.MistralConfig(**LLAMA, sliding_window=64), 0),
    "mistral, a narrower window": (hf.MistralConfig(**LLAMA, sliding_window=4), None),
    "gpt2": (
        hf.GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3),
        0,
    ),
    "gpt-neox": (hf.GPTNeoXConfig(**SIZE), 0),
    "opt": (
        hf.OPTConfig(
            **{k: v for k, v in SIZE.items() if k not in ("intermediate_size",)},
            ffn_dim=48,
            word_embed_proj_dim=32,
        ),
        0,
    ),
    "lfm2, convolutions over neighbours": (
        hf.Lfm2Config(**LLAMA, layer_types=["conv", "full_attention"]),
        None,
    ),
    "bloom, positions in the attention": (
        hf.BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4, pad_token_id=PAD),
        None,
    ),
}


def tokenizer():
    words = ["[UNK]", "[PAD]", *LABELS, *(f"w{i}" for i in range(35))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="[UNK]", pad_token="[PAD]", model_max_length=64
    )


def made(family):
    torch.manual_seed(0)
    encoder = family in ENCODERS
    config, first = (ENCODERS if encoder else CAUSAL)[family]
    if encoder:
        inner = hf.AutoModel.from_config(config, trust_remote_code=False)
        inner.config.num_labels = len(LABELS)
        model = EncoderClassifier(inner.config, inner)
        torch.nn.init.normal_(model.classifier.weight)
    else:
        model = hf.AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    attention.use(model)
    kind = "encoder" if encoder else "causal"
    task = choose_task("classification", kind, tokenizer(), prompt="", max_length=16)
    model.requires_grad_(False).eval()
    return model, task, first


def found_first(model, task):
    """Where positions begin in packed rows, None for padded rows, as it is found at load."""
    base = Base(
        model=model,
        tokenizer=tokenizer(),
        kind="encoder" if isinstance(model, EncoderClassifier) else "causal",
        dtype=torch.float32,
        digest="",
        name="made",
    )
    targets = ("q_proj", "v_proj") if model.config.model_type == "lfm2" else ()
    spec = AdapterConfig(method="lora", rank=2, alpha=4.0, target_modules=targets)
    peft = lora.attach(base, spec, seed=1).eval()
    found = exactness.examine(peft, PerSampleAdapters(peft), task, LABELS)
    assert not found.flaw
    return found.first_position


def rows_of(lengths):
    draw = np.random.default_rng(1)
    ids = [draw.integers(5, 40, length).tolist() for length in lengths]
    targets = draw.integers(0, 3, len(lengths)).tolist()
    return shard_of(Encoded(ids=ids, targets=targets, truncated=[False] * len(ids)))


@pytest.mark.parametrize("family", [*ENCODERS, *CAUSAL])
def test_which_models_take_packed_rows_and_that_rows_get_there_what_they_get_alone(family):
    model, task, first = made(family)
    assert found_first(model, task) == first
    if first is None:
        return
    shard = rows_of([7, 1, 8, 3, 16, 9])
    rows = np.arange(len(shard))
    batch = task.pack(shard, rows, first=first, total=60, slots=8, device=torch.device("cpu"))
    with torch.no_grad():
        alone = torch.cat([task.logits(model, task.collate(shard, [i]), LABELS) for i in rows])
        with packing.use(batch.row):
            together = task.logits(model, batch, LABELS)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    assert (alone[1:] - alone[:-1]).abs().max() > 0.1  # rows do differ


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_model_that_is_not_told_positions_takes_padded_rows(family):
    model, task, _ = made(family)
    inner = model.transformer if family == "gpt2" else model.bert
    whole = inner.forward
    inner.forward = lambda *args, position_ids=None, **options: whole(*args, **options)
    assert found_first(model, task) is None


def test_a_model_whose_tokens_see_their_neighbours_takes_padded_rows():
    model, task, _ = made("bert")
    inner = model.bert.embeddings
    whole = inner.forward
    inner.forward = lambda *args, **options: whole(*args, **options).roll(1, 1)
    assert found_first(model, task) is None


@pytest.mark.parametrize("slots", [4, 6])
def test_maps_and_their_transposes_are_each_others(slots):
    """<A x, y> = <x, A^T y> for all of them, with filler that nothing comes from or goes to."""
    row = packing.Packing(
        np.array([3, 8, 9, 1]), np.array([8, 8, 16, 8]), total=25, slots=slots, device="cpu"
    )
    assert row.last.tolist() == [2, 10, 19, 20, 2, 10][:slots]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(25, 5, generator=generator, requires_grad=True)
    e = torch.randn(4, 5, generator=generator, requires_grad=True)
    for found, argument in ((row.sums(x), x), (row.unpad(row.pad(x)), x), (row.spread(e), e)):
        y = torch.randn(found.shape, generator=generator)
        (transposed,) = torch.autograd.grad(found, argument, y)
        assert torch.isclose((found * y).sum(), (argument * transposed).sum(), rtol=1e-5)
        if argument is x:
            assert not transposed[21:].any()
    torch.testing.assert_close(row.unpad(row.pad(x))[:21], x[:21])
    assert not row.unpad(row.pad(x))[21:].any()
    assert not row.spread(e)[21:].any()
    torch.testing.assert_close(row.means(x)[2], x[11:20].mean(0))


def test_what_one_example_holds_never_reaches_another():
    row = packing.Packing(
        np.array([3, 8, 9, 1]), np.array([8, 8, 16, 8]), total=25, slots=4, device="cpu"
    )
    x, y = torch.ones(25, 5), torch.ones(25, 3)
    x[3:11] = torch.nan  # example 1
    x[21:] = torch.inf  # filler
    fine = [0, 2, 3]
    assert row.outer(x, y)[fine].isfinite().all()
    assert row.outer(y, x)[fine].isfinite().all()
    assert row.sums(x)[fine].isfinite().all()
