"""A base model is what its digest names: attacks on the directory of a base."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from fedlora.errors import InputError
from fedlora.gradients import attention
from fedlora.models import base_directory, model_files, models, weights


@pytest.fixture
def base(tmp_path, tiny_encoder):
    return shutil.copytree(tiny_encoder, tmp_path / "base")


def load(directory):
    return models.load_base(
        str(directory), dtype="fp32", quantization="none", task="classification", num_labels=3
    )


def set_config(**changes):
    def plant(base):
        for file, values in changes.items():
            place = base / f"{file}.json"
            content = json.loads(place.read_text()) if place.exists() else {}
            place.write_text(json.dumps(content | values))

    return plant


def hidden_adapter(base):
    """A LoRA with large values on layers that no run adapts, as PEFT saves it."""
    model = AutoModel.from_pretrained(base, trust_remote_code=False)
    adapted = get_peft_model(model, LoraConfig(target_modules=["output.dense"], r=4))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    adapted.save_pretrained(base)
    assert (base / "adapter_config.json").is_file()


def linked_adapter(base):
    hidden_adapter(base)
    (base / "adapter_config.json").rename(base.parent / "elsewhere.json")
    (base / "adapter_config.json").symlink_to(base.parent / "elsewhere.json")


def dangling_adapter(base):
    (base / "adapter_config.json").symlink_to(base.parent / "absent.json")


def index(base, *files):
    """An index over the weights, which names these files too."""
    content = load_file(base / "model.safetensors")
    (base / "model.safetensors").rename(base / "model-00001-of-00001.safetensors")
    named = dict.fromkeys(content, "model-00001-of-00001.safetensors")
    for number, file in enumerate(files):
        named[f"bert.lora_{number}"] = file
    (base / base_directory.INDEX).write_text(json.dumps({"weight_map": named}))


def adapter_in_the_index(base):
    hidden_adapter(base)
    (base / "adapter_config.json").unlink()
    index(base, "adapter_model.safetensors")


def file_of_another_directory(base):
    shutil.copyfile(base / "model.safetensors", base.parent / "other.safetensors")
    index(base, "../other.safetensors")


def a_missing_weight(base):
    content = load_file(base / "model.safetensors")
    del content["encoder.layer.1.output.dense.weight"]
    save_file(content, base / "model.safetensors", {"format": "pt"})


def one_name_in_two_files(base):
    index(base, "model-00002-of-00002.safetensors")
    shutil.copyfile(
        base / "model-00001-of-00001.safetensors", base / "model-00002-of-00002.safetensors"
    )


def pickle(base):
    (base / "pytorch_model.bin").write_bytes(b"code")


KERNEL = {"_attn_implementation": "user/kernels"}
PLANTS = {
    "adapter": hidden_adapter,
    "linked-adapter": linked_adapter,
    "dangling-adapter": dangling_adapter,
    "adapter-in-index": adapter_in_the_index,
    "other-directory": file_of_another_directory,
    "pickle": pickle,
    "kernel": set_config(config=KERNEL),
    "nested-kernel": set_config(config={"sub": [{"attn_implementation": {"": "user/kernels"}}]}),
    "internal-kernel": set_config(config={"_attn_implementation_internal": "user/kernels"}),
    "experts": set_config(config={"_experts_implementation": "user/kernels"}),
    "code": set_config(config={"auto_map": {"AutoModel": "novel.Novel"}}),
    "tokenizer-code": set_config(tokenizer_config={"auto_map": {"AutoTokenizer": ["a.B", None]}}),
    "other-config": set_config(config={"configuration_files": ["config.1.0.0.json"]}),
    "other-weights": set_config(config={"transformers_weights": "other.safetensors"}),
    "quantised": set_config(
        config={"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    ),
}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_what_could_change_the_model_beside_its_digest_is_refused_before_it_is_loaded(base, plant):
    plant(base)
    for refuse in (model_files.resolve, models.load_tokenizer, load):
        with pytest.raises(InputError) as error:
            refuse(str(base))
        assert "\n" not in str(error.value) and str(base) in str(error.value)


def test_a_parameter_that_the_architecture_lacks_is_refused(base, monkeypatch):
    build = AutoModel.from_config
    grown = []

    def grows(*arguments, **options):
        model = build(*arguments, **options)
        if not grown:  # the reference; the loaded model then lacks it
            model.extra = torch.nn.Linear(2, 2)
        grown.append(model)
        return model

    monkeypatch.setattr(AutoModel, "from_config", grows)
    with pytest.raises(InputError, match=r"extra\.bias is missing"):
        load(base)


def test_each_file_that_is_read_is_in_the_digest_and_no_other_is(base):
    (base / "generation_config.json").write_text("{}")
    (base / "README.md").write_text("about")
    files = model_files.resolve(str(base))
    before = base_directory.digest(files)
    names = {file.name for file in files.read}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert "README.md" not in names
    for file in files.read:
        content = file.read_bytes()
        file.write_bytes(content + b" ")
        assert base_directory.digest(files) != before, file
        file.write_bytes(content)
        assert base_directory.digest(files) == before
    (base / "README.md").write_text("about something else")
    assert base_directory.digest(model_files.resolve(str(base))) == before


def changes_while_loading(monkeypatch, change):
    fill = weights.fill

    def filled(*arguments):
        change()
        return fill(*arguments)

    monkeypatch.setattr(weights, "fill", filled)


def test_an_adapter_that_appears_while_the_model_is_loaded_is_refused(base, monkeypatch):
    changes_while_loading(monkeypatch, lambda: hidden_adapter(base))
    with pytest.raises(InputError, match="adapter_config"):
        load(base)


def test_a_link_that_points_elsewhere_while_the_model_is_loaded_is_refused(base, monkeypatch):
    weights_file, kept = base / "model.safetensors", base.parent / "kept.safetensors"
    weights_file.rename(kept)
    other = base.parent / "other.safetensors"
    save_file({k: v + 1 for k, v in load_file(kept).items()}, other, {"format": "pt"})
    weights_file.symlink_to(kept)
    fill = weights.fill

    def swapped(*arguments):
        weights_file.unlink()
        weights_file.symlink_to(other)
        model = fill(*arguments)
        weights_file.unlink()
        weights_file.symlink_to(kept)  # as it was before
        return model

    monkeypatch.setattr(weights, "fill", swapped)
    with pytest.raises(InputError, match="changed while they were loaded"):
        load(base)


@pytest.mark.parametrize("named", [None, "eager", "sdpa"])
def test_attention_is_set_by_fedlora_whatever_the_directory_says(base, named):
    set_config(config={"_attn_implementation": named})(base)
    assert load(base).model.config._attn_implementation == attention.NAME
