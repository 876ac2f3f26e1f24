"""A model is examined when it is loaded: what gives no exact per-example gradients is refused."""

import dataclasses
import shutil

import pytest
import torch
import transformers as hf

from benchmarks import families
from client.institution import Institution
from fedlora.config.sections import METHODS
from fedlora.errors import InputError
from fedlora.gradients import exactness
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import trainable
from simulation import run

SIZE = {
    "vocab_size": families.WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "pad_token_id": 1,
    "initializer_range": 0.2,
}
XLNET = hf.XLNetConfig(vocab_size=families.WORDS, d_model=32, n_layer=2, n_head=4, d_inner=48)
LONGFORMER = hf.LongformerConfig(**SIZE, attention_window=[4, 4], max_position_embeddings=66)
BART = hf.BartConfig(
    vocab_size=families.WORDS, d_model=32, decoder_layers=2, decoder_ffn_dim=48,
    decoder_attention_heads=4, is_encoder_decoder=False, is_decoder=True, pad_token_id=1,
)  # fmt: skip
LLAMA = hf.LlamaConfig(**SIZE, num_key_value_heads=2)
MIXTRAL = hf.MixtralConfig(**SIZE, num_key_value_heads=2, num_local_experts=4)
FALCON = hf.FalconConfig(vocab_size=families.WORDS, hidden_size=32, num_hidden_layers=2,
                         num_attention_heads=4, pad_token_id=1)  # fmt: skip
DOGE = families.tiny("doge")
DOGE.is_moe = False


def _rope(**parameters):
    parameters |= {"rope_theta": 10000.0}
    return hf.LlamaConfig(**SIZE, max_position_embeddings=256, rope_parameters=parameters)


REFUSED = {
    "xlnet": (XLNET, ("layer_1", "layer_2"), r"ff\.layer_1 got an input of shape \(\d+, 3, 32\)"),
    "longformer": (LONGFORMER, ("value",), r"self\.value got an input of shape"),
    "longformer, query": (LONGFORMER, ("query",), r"self\.query got an input of shape"),
    "mixtral": (MIXTRAL, ("q_proj", "v_proj"), "routes tokens to experts"),
    "deberta with keys shared": (
        hf.DebertaV2Config(
            **SIZE,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
        ),
        (),
        r"query_proj got an input of shape",
    ),
    "bart": (BART, ("q_proj", "v_proj"), r"encoder_attn\.\w+ takes no part in the loss"),
    "big bird": (
        hf.BigBirdConfig(
            **SIZE,
            attention_type="block_sparse",
            block_size=4,
            num_random_blocks=1,
            max_position_embeddings=256,
        ),
        ("query", "value"),
        r"a pass changes base_model\S+ of the model",
    ),
    "longrope": (
        _rope(
            rope_type="longrope",
            original_max_position_embeddings=6,
            short_factor=[1.0] * 4,
            long_factor=[4.0] * 4,
            factor=3.2,
        ),
        (),
        "rotary positions change with the longest row of a pass above 6 tokens",
    ),
    "longrope by type of layer": (
        hf.Gemma3TextConfig(
            **SIZE,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=256,
            rope_parameters={
                "full_attention": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 6,
                    "short_factor": [1.0] * 4,
                    "long_factor": [4.0] * 4,
                    "factor": 3.2,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        ("q_proj", "v_proj"),
        "rotary positions change with the longest row of a pass above 6 tokens",
    ),
    "dynamic": (
        _rope(rope_type="dynamic", factor=4.0, original_max_position_embeddings=6),
        (),
        "rotary positions change with the longest row",
    ),
    "reformer": (families.tiny("reformer"), ("query", "value"), "the model fails in a pass"),
}
EXACT = {
    "bert": (hf.BertConfig(**SIZE), (), True),
    "llama": (LLAMA, (), True),
    "lfm2": (families.tiny("lfm2"), ("q_proj", "v_proj"), False),
    # it changes what adapted layers return in place
    "falcon": (FALCON, ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"), False),
    "doge": (DOGE, ("q_proj", "v_proj"), False),  # a mixture that is switched off
    "longformer, dense": (LONGFORMER, ("dense",), False),  # beside its attention in chunks
}
CAUSAL = (
    *("bart", "llama", "lfm2", "longrope", "longrope by type of layer", "dynamic"),
    *("mixtral", "falcon", "doge"),
)


def made(name, directory, config=None):
    torch.manual_seed(0)
    config = config or (REFUSED | EXACT)[name][0]
    factory = hf.AutoModelForCausalLM if name in CAUSAL else hf.AutoModel
    factory.from_config(config, trust_remote_code=False).save_pretrained(directory)
    families.tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("physical", [8, 11, 16])  # also the padded width, whatever is examined
@pytest.mark.parametrize("name", REFUSED)
def test_layers_without_exact_gradients_are_refused_by_name_at_load(name, physical, tmp_path):
    _, targets, reason = REFUSED[name]
    values = {"training.physical-batch": physical, "training.max-length": physical}
    with pytest.raises(InputError, match=reason) as refused:
        families.load(made(name, tmp_path), targets, **values)
    assert "choose other adapter.target-modules" in str(refused.value)


ROBERTA = hf.RobertaConfig(**SIZE, max_position_embeddings=26, type_vocab_size=1)


def test_a_length_that_the_model_cannot_take_is_refused_before_a_record_shows_it(tmp_path):
    """RoBERTa counts positions from after padding: of 26 it takes 24."""
    made("roberta", tmp_path, ROBERTA)
    with pytest.raises(InputError, match=r"training.max-length is 25, but the base model fails"):
        families.load(tmp_path, (), **{"training.max-length": 25})
    assert families.load(tmp_path, (), **{"training.max-length": 24})


def test_a_token_that_the_model_does_not_know_is_read_as_the_unknown_one(tmp_path):
    made("bert", tmp_path)
    tokenizer = families.tokenizer()
    tokenizer.add_tokens(["TICKER"])
    tokenizer.save_pretrained(tmp_path)
    task = families.load(tmp_path, ()).task
    label = families.LABELS[0]
    found = task.encode(["w1 TICKER w2", ""], [label, label], families.LABELS)
    one, two = (tokenizer.convert_tokens_to_ids(word) for word in ("w1", "w2"))
    assert found.ids == [[one, tokenizer.unk_token_id, two], [tokenizer.unk_token_id]]


@pytest.mark.parametrize("name", EXACT)
def test_exact_models_train_packed_where_only_attention_mixes_tokens(name, tmp_path):
    _, targets, packed = EXACT[name]
    work = families.load(made(name, tmp_path), targets)
    assert (work.first_position is not None) == packed
    families.train(work)


@pytest.mark.parametrize("name, task", [("bert", "classification"), ("llama", "sft")])
@pytest.mark.parametrize(
    "values",
    [
        *({"adapter.method": method} for method in METHODS),
        {"model.dtype": "bf16"},
        {"model.quantization": "nf4", "model.dtype": "bf16"},
        {"model.quantization": "int8", "model.dtype": "bf16"},
        {"adapter.rank": 7, "adapter.dropout": 0.3},
        {"training.max-length": 7},
        {"training.gradient-checkpointing": True},
    ],
    ids=lambda values: " ".join(map(str, values.values())),
)
def test_every_method_and_base_is_found_exact_and_left_as_it_was(name, task, values, tmp_path):
    """On a base in 16 bits too: what is examined is the same model in float32."""
    work = families.load(made(name, tmp_path), (), **{"model.task": task, **values})
    model = work.model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    states = [dict(vars(m)) for m in model.modules() if hasattr(m, "compute_dtype")]
    found = exactness.examine(model, work.per_sample, work.task, work.labels)
    assert found == exactness.Verdict(flaw="", first_position=0)
    after = model.state_dict()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert all(after[key].dtype == value.dtype for key, value in before.items())
    assert states == [dict(vars(m)) for m in model.modules() if hasattr(m, "compute_dtype")]
    assert all(p.grad is None for p in model.parameters())


@pytest.fixture
def bert(tmp_path):
    return families.load(made("bert", tmp_path), ())


def flaw(work):
    return exactness.examine(work.model, work.per_sample, work.task, work.labels).flaw


def leaking(share, dim, offset=1):
    """What adds a share of the entry before, along one dimension."""
    return lambda _, arguments, output: output + share * output.roll(offset, dim)


@pytest.mark.parametrize("dim, offset", [(0, 1), (0, 2)])
@pytest.mark.parametrize("share", [1.0, 1e-5])
def test_the_least_bit_from_a_neighbour_is_found(bert, share, dim, offset):
    layer = bert.base.model.bert.encoder.layer[0].intermediate.dense
    layer.register_forward_hook(leaking(share, dim, offset))
    assert "changes with the other" in flaw(bert) or "are off by" in flaw(bert)


def test_a_statistic_over_the_batch_is_found_though_nothing_is_passed_between_rows(bert):
    layer = bert.base.model.bert.encoder.layer[1].output
    layer.register_forward_hook(lambda _, arguments, output: output / output.std())
    assert "changes with the other" in flaw(bert) or "are off by" in flaw(bert)


def test_gradients_that_go_to_the_wrong_example_are_found(bert, monkeypatch):
    right = PerSampleAdapters.collect

    def swapped(self):
        return {p: gradients.roll(1, 0) for p, gradients in right(self).items()}

    monkeypatch.setattr(PerSampleAdapters, "collect", swapped)
    assert "are off by" in flaw(bert)


@pytest.mark.parametrize("share", [1.0, 1e-5])
def test_tokens_that_mix_outside_attention_make_a_models_rows_padded(bert, share):
    bert.base.model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        leaking(share, 1)
    )
    found = exactness.examine(bert.model, bert.per_sample, bert.task, bert.labels)
    assert found == exactness.Verdict(flaw="", first_position=None)


def test_without_dp_layers_need_no_gradients_per_example_except_for_dropout(tmp_path):
    model = made("xlnet", tmp_path)
    plain = {"privacy.epsilon": float("inf")}
    assert families.load(model, ("layer_1",), **plain).first_position is None
    experts = made("mixtral", tmp_path / "mixtral")
    assert families.load(experts, ("q_proj",), **plain).first_position is None
    with pytest.raises(InputError, match="layer_1"):
        families.load(model, ("layer_1",), **plain, **{"adapter.dropout": 0.1})


def test_a_run_is_refused_before_anything_is_written(tiny_config, tmp_path):
    config = tiny_config(
        **{
            "model.name": str(made("xlnet", tmp_path / "m")),
            "adapter.target-modules": "layer_1,layer_2",
            "training.max-length": 16,
            "training.physical-batch": 16,
        }
    )
    with pytest.raises(InputError, match="layer_1"), run.load("inline", config):
        pass
    assert not (tmp_path / "run").exists()


def test_an_institution_refuses_before_its_ledger_is_opened(tiny_config, tmp_path, monkeypatch):
    config = tiny_config(**{"model.name": str(made("xlnet", tmp_path / "m"))})
    config = dataclasses.replace(
        config, adapter=dataclasses.replace(config.adapter, target_modules=("layer_1",))
    )
    monkeypatch.setattr(Institution, "open_ledger", None)
    who = Institution.locate(config, 0)
    with pytest.raises(InputError, match="layer_1"):
        who.answer(None)
    assert not who.ledger_path.exists()
    trainable.forget()
    shutil.rmtree(tmp_path / "m")
