"""A model is examined when it is loaded: what gives no exact per-example gradients is refused."""

import dataclasses
import os
import shutil

import pytest
import torch
import transformers as hf

from benchmarks import families
from client.institution import Institution
from fedlora.config.sections import METHODS
from fedlora.errors import InputError
from fedlora.gradients import exactness, verdicts
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


def test_rows_so_short_that_each_width_is_a_dimension_are_refused(tmp_path):
    """Four tokens of a model with four heads could be taken for examples."""
    with pytest.raises(InputError, match=r"from 4 to training.max-length \(4\) is a dimension"):
        families.load(made("bert", tmp_path), (), **{"training.max-length": 4})


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


@pytest.mark.parametrize("layers", [["conv", "full_attention"], ["full_attention", "conv"]])
@pytest.mark.parametrize("spread", [0.002, 0.01, 0.2])
def test_a_convolution_below_the_resolution_of_16_bits_makes_rows_padded(spread, layers, tmp_path):
    size = SIZE | {"initializer_range": spread}
    config = hf.Lfm2Config(**size, num_key_value_heads=2, layer_types=layers)
    directory = made("lfm2", tmp_path, config)
    work = families.load(directory, ("q_proj", "v_proj"), **{"model.dtype": "bf16"})
    assert work.first_position is None


@pytest.mark.parametrize("hidden", [8, 12, 20, 44])
def test_examples_and_tokens_are_as_many_as_no_dimension_of_the_model(hidden, tmp_path):
    size = SIZE | {"hidden_size": hidden, "intermediate_size": 11, "num_hidden_layers": 3}
    work = families.load(made("bert", tmp_path, hf.BertConfig(**size)), ())
    probe = exactness._Probe(work.model, work.per_sample, work.task, work.labels)
    sizes = {n for p in work.model.parameters() for n in p.shape} | {3, hidden // 4, 11}
    assert len({probe.count, probe.width} - sizes) == 2
    assert len(set(probe.shard.lengths[: probe.count])) > 1


def test_a_model_is_examined_once_for_each_adapter(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path / "cache"))
    calls = []
    whole = exactness.examine
    monkeypatch.setattr(exactness, "examine", lambda *args: calls.append(1) or whole(*args))
    model = made("bert", tmp_path / "m")
    first = families.load(model, ())
    assert families.load(model, ()).first_position == first.first_position == 0
    assert len(calls) == 1
    for number, values in enumerate(
        ({"adapter.rank": 3}, {"adapter.method": "dora"}, {"training.max-length": 16}), start=2
    ):
        families.load(model, (), **values)
        assert len(calls) == number
    families.load(model, ("key",))
    assert len(calls) == 5
    config = hf.AutoConfig.from_pretrained(
        model, trust_remote_code=False
    )  # other code on the same weights
    config.layer_norm_eps = 1e-3
    config.save_pretrained(model)
    families.load(model, ())
    assert len(calls) == 6


def test_a_refusal_is_kept_too_and_said_again(tmp_path, monkeypatch):
    model = made("xlnet", tmp_path / "m")
    said = []
    for _ in range(2):
        with pytest.raises(InputError) as refused:
            families.load(model, ("layer_1",))
        said.append(str(refused.value))
        monkeypatch.setattr(exactness, "examine", None)
    assert said[0] == said[1]


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))

    def ask(flaw="wrong"):
        made = exactness.Verdict(flaw=flaw, first_position=None if flaw else 2)
        return verdicts.remembered({"weights": "abc"}, lambda: made)

    ask()
    (entry,) = (tmp_path / "verdicts").iterdir()
    assert ask(flaw="").flaw == "wrong"
    return entry, ask


def test_a_damaged_entry_counts_as_absent_wherever_it_is_damaged(kept):
    entry, ask = kept
    content = entry.read_bytes()
    places = [*range(0, len(content), 200), *range(len(content) - 75, len(content), 5)]
    for place in places:
        other = bytes([content[place] ^ 1])  # one bit
        for damaged in (content[:place], content[:place] + other + content[place + 1 :]):
            entry.write_bytes(damaged)
            assert ask(flaw="").flaw == ""  # examined again, and kept
            assert ask(flaw="x").flaw == ""
    for question in ('"weights": "abd"', '"torch": "0"'):
        entry.write_bytes(content.replace(question[:9].encode(), b"other"))
        assert ask(flaw="").flaw == ""


def test_an_entry_that_others_may_write_counts_as_absent(kept):
    entry, ask = kept
    for path, mode in ((entry, 0o646), (entry.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert ask(flaw="").flaw == ""
        path.chmod(before)
        entry.unlink()
        assert ask().flaw == "wrong"
    if os.geteuid() == 0:
        os.chown(entry, 12345, -1)
        assert ask(flaw="").flaw == ""


def test_entries_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(verdicts, "MAX_ENTRIES", 5)
    for number in range(9):
        verdicts.remembered({"n": number}, lambda: exactness.Verdict(flaw="", first_position=None))
    assert len(list((tmp_path / "verdicts").iterdir())) == 5


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
