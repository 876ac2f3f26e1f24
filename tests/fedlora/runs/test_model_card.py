"""The Python of a card opens the base as the run had it: in its dtype, quantised alike."""

import json
import re
import sys

import pytest
import torch
from transformers import dynamic_module_utils

from fedlora.config.config import from_flat
from fedlora.gradients import lora_layers
from fedlora.models import trainable
from fedlora.models.adapters import AdapterState
from fedlora.runs import model_card
from tests.fedlora.runs.test_finished_run import tiny_causal  # noqa: F401

TEXT = "stolen card and a lender"
LABELS = ("card", "fraud", "loan")


@pytest.fixture
def opened(tmp_path, monkeypatch, tiny_config):
    """Makes a card beside an adapter away from its start, runs its code and gives both models."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])

    def make(model, **values):
        config = tiny_config(**{"model.name": str(model), "training.max-length": 64, **values})
        work = trainable.load(config, LABELS)
        generator = torch.Generator().manual_seed(2)
        away = {
            n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in work.start.items()
        }
        AdapterState(away).load_into(work.model)
        folder = tmp_path / "own"
        AdapterState.read(work.model).save(folder, work.model)
        model_card.write_own(folder, "Said.", config, work)
        (code,) = re.findall("```python\n(.*?)\n```", (folder / "README.md").read_text(), re.DOTALL)
        code = code.replace('= "."', f"= {str(folder)!r}").replace('["..."]', f"[{TEXT!r}]")
        space = {}
        exec(re.sub("BASE = .*", f"BASE = {str(model)!r}", code), space)
        inputs = work.base.tokenizer(TEXT, return_tensors="pt")
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            return work.model(**inputs).logits, space["model"](**inputs).logits, space["model"]

    yield make
    trainable.forget()


@pytest.mark.parametrize(
    ("quantization", "method"), [("nf4", "lora"), ("nf4", "dora"), ("int8", "lora")]
)
@pytest.mark.parametrize("kind", ["encoder", "causal"])
def test_the_code_of_a_card_opens_the_quantised_base_that_the_run_measured(
    kind,
    quantization,
    method,
    opened,
    tiny_encoder,
    tiny_causal,  # noqa: F811
):
    ours, theirs, model = opened(
        tiny_encoder if kind == "encoder" else tiny_causal,
        **{"model.quantization": quantization, "adapter.method": method},
        **({"training.max-length": 128} if kind == "causal" else {}),
    )
    assert any(lora_layers.is_quantized(module) for module in model.modules())
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.std()))


def test_the_code_of_a_card_opens_the_base_in_the_dtype_of_the_run_and_not_of_its_file(
    opened,
    tiny_causal,  # noqa: F811
):
    _, _, model = opened(tiny_causal, **{"model.dtype": "bf16", "training.max-length": 128})
    assert model.get_base_model().model.embed_tokens.weight.dtype == torch.bfloat16


def test_what_has_no_noise_of_the_server_is_not_called_private():
    level = {"privacy.epsilon": float("inf"), "privacy.institution-epsilon": 5.0}
    assert model_card.is_private(from_flat(level))
    assert not model_card.is_private(from_flat({**level, "federation.strategy": "fedsa"}))
    assert model_card.is_private(from_flat({"federation.strategy": "fedsa"}))


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_cards_name_the_quantisation_of_the_base(quantization, tiny_encoder, tiny_config, tmp_path):
    config = tiny_config(
        **{
            "model.name": str(tiny_encoder),
            "model.quantization": quantization,
            "model.dtype": "bf16",
            "adapter.method": "dora",
        }
    )
    work = trainable.load(config, LABELS)
    result = {"trained_parameters": 1, "rounds": 1, "counts": {}}
    result |= {"epsilon_max": 8.0, "delta": 1e-5}
    privacy = {"protects": "Nobody.", "institutions": {}}
    model_card.write_adapter(tmp_path, config, work, result, privacy)
    card = (tmp_path / "README.md").read_text()
    assert "| largest epsilon of an institution | 8" in card  # also where none is named
    assert f"\n- base model: dtype bfloat16, quantization {quantization}\n" in card
    assert ("PEFT ends with an error" in card) == (quantization == "int8")
    model_card.write_merged(tmp_path, config, work, "Nobody.", own_model=False)
    merged = (tmp_path / "README.md").read_text()
    assert ("does not round activations" in merged) == (quantization == "int8")
    trainable.forget()


@pytest.mark.parametrize("level", ["none", "record", "institution"])
def test_a_card_counts_records_only_where_no_dp_hides_them(tiny_config, tmp_path, level):
    off = {"privacy.epsilon": float("inf")}
    values = {"none": off, "record": {}, "institution": off | {"privacy.institution-epsilon": 5.0}}
    config = tiny_config(**values[level] | {"federation.weighting": "uniform"})
    result = {"trained_parameters": 1, "rounds": 1, "counts": {"train": 12345}}
    result |= {"epsilon_max": 8.0, "delta": 1e-5}
    work, said = trainable.load(config, LABELS), {"protects": "Nobody.", "institutions": {}}
    model_card.write_adapter(tmp_path, config, work, result, said)
    assert ("12,345" in (tmp_path / "README.md").read_text()) == (level == "none")


def test_the_tokenizer_beside_an_adapter_cuts_no_texts(tiny_config, tmp_path):
    work = trainable.load(tiny_config(**{"training.max-length": 5}), LABELS)
    work.task.encode(["a text"], [LABELS[0]], LABELS)
    assert work.base.tokenizer.backend_tokenizer.truncation["max_length"] == 5
    result = {"trained_parameters": 1, "rounds": 1, "counts": {}}
    result |= {"epsilon_max": 8.0, "delta": 1e-5}
    privacy = {"protects": "Nobody.", "institutions": {}}
    model_card.write_adapter(tmp_path, tiny_config(), work, result, privacy)
    saved = json.loads((tmp_path / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    assert work.base.tokenizer.backend_tokenizer.truncation["max_length"] == 5
