"""An adapter folded into its base: the model of a run without PEFT."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from typing import cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.gradients.lora_layers import ADAPTER, dense_weight, frozen_weight, is_quantized


@torch.no_grad()
def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base: a plain model that ``save_pretrained`` can write.

    Consumes ``model``: its layers are replaced one by one, so that the peak is about one layer
    above the result. A quantised base is dequantised to the dtype of its activations. An int8 base
    also rounds activations to 8 bits in evaluation, which the result does not.

    Returns:
        The base model with merged weights, frozen, in evaluation mode.
    """
    plain = cast(PreTrainedModel, model.get_base_model())
    dtype = plain.dtype  # of the embeddings, which are never quantised
    for name, module in list(plain.named_modules()):
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            plain.set_submodule(name, _dense(base, _folded_weight(module), dtype))
        elif isinstance(module, ModulesToSaveWrapper):
            plain.set_submodule(name, module.modules_to_save[ADAPTER])
    for name, module in list(plain.named_modules()):
        if is_quantized(module):
            plain.set_submodule(name, _dense(module, dense_weight(module), dtype))
    marks = (
        "is_quantized",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "hf_quantizer",
        "quantization_method",
    )
    for module in plain.modules():
        for mark in (*marks, "peft_config"):
            module.__dict__.pop(mark, None)
    plain.config.__dict__.pop("quantization_config", None)
    inner, outer = (
        plain.get_input_embeddings(),
        cast(nn.Module | None, plain.get_output_embeddings()),
    )
    if outer is not None and inner.weight is not outer.weight:
        plain.config.tie_word_embeddings = False  # an adapter on one of them parted them
    return plain.requires_grad_(False).eval()


def _folded_weight(layer: LoraLayer) -> torch.Tensor:
    """``c (W + s B A)``, float32 ``(d_out, d_in)``; c is 1, with DoRA magnitude / row norm.

    W is the base weight with the residual.
    """
    a = cast(nn.Parameter, layer.lora_A[ADAPTER].weight)
    b = cast(nn.Parameter, layer.lora_B[ADAPTER].weight)
    scaling = cast(float, layer.scaling[ADAPTER])
    weight = torch.addmm(frozen_weight(layer), b, a, alpha=scaling)
    if ADAPTER in layer.lora_magnitude_vector:
        magnitude = cast(nn.Parameter, layer.lora_magnitude_vector[ADAPTER].weight)
        weight *= (magnitude / weight.norm(dim=1))[:, None]
    return weight


def _dense(like: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A plain layer for the place of ``like``, with this weight ``(d_out, d_in)`` and its bias."""
    bias = cast(torch.Tensor | None, like.bias)
    layer: nn.Module
    if (
        isinstance(like, Conv1D) or getattr(like, "source_cls", None) is Conv1D
    ):  # a quantised Conv1D
        layer = Conv1D(weight.shape[0], weight.shape[1])
        layer.weight = nn.Parameter(weight.T.contiguous().to(dtype))
    else:
        layer = nn.Linear(1, 1, bias=bias is not None)
        layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
        layer.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype))
    return layer
