"""An adapter folded into its base gives the same outputs without PEFT."""

import json

import pytest
import torch

from fedlora.config.sections import METHODS
from fedlora.gradients import lora_layers
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import merging, models
from tests.fedlora.small_models import CONFIGS, load, outputs, trained

pytestmark = pytest.mark.usefixtures("no_tokenizer")


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_merged_model_is_plain_and_gives_the_same_outputs(
    directories, family, quantization, tmp_path
):
    for method in METHODS:
        model = trained(load(directories / family, quantization), method)
        PerSampleAdapters(model)
        evaluated = outputs(model)
        if quantization == "int8":
            model.train()  # in evaluation bitsandbytes also rounds the activations to 8 bits
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
            model.get_base_model().config.attention_probs_dropout_prob = 0.0
        expected = outputs(model)
        merged = merging.merge(model)
        assert not any(
            "lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters()
        )
        found = outputs(merged)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        # rounded activations move the scores by 4 % of their spread here, plain ones by nothing
        gap = float((found - evaluated).abs().max() / evaluated.std())
        assert 1e-4 < gap < 0.1 if quantization == "int8" else gap < 1e-4
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
    merged = merging.merge(trained(load(directories / "bert", dtype="bf16")))
    merged.save_pretrained(tmp_path)
    again = models.load_base(
        str(tmp_path), dtype="bf16", quantization="none", task="classification", num_labels=3
    ).model
    assert again.classifier.weight.dtype == torch.float32
    assert torch.equal(again.classifier.weight, merged.classifier.weight)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_dequantised_weight_is_what_bitsandbytes_multiplies_by(directories, quantization):
    layer = load(directories / "llama", quantization).model.model.layers[0].mlp.down_proj.train()
    expected = lora_layers.dense_weight(layer)
    assert expected.shape == (64, 128) and expected.dtype == torch.float32
    torch.testing.assert_close(layer(torch.eye(128)).T, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(lora_layers.dense_weight(layer), expected)  # also after a forward
