"""The adapted layers of a model: the adapter's parameters and frozen weights."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Self, cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

ADAPTER = "default"  # PEFT's name for the only adapter of a model


class Scale(NamedTuple):
    """What s of s B A follows from.

    Attributes:
        alpha: ``lora_alpha``.
        rslora: Whether s is alpha / sqrt(rank), and not alpha / rank.
    """

    alpha: float
    rslora: bool

    def of(self, rank: int) -> float:
        """The scale s at a rank."""
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)

    @classmethod
    def of_model(cls, model: PeftModel) -> Self:
        """The scale of the model's adapter."""
        config = cast(LoraConfig, model.peft_config[ADAPTER])
        return cls(float(config.lora_alpha), bool(config.use_rslora))


def is_linear(module: nn.Module) -> bool:
    """Whether adapters can sit on this layer: Linear (bitsandbytes' too) or GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """The layers with low-rank factors, with their module paths, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


@torch.no_grad()
def dense_weight(layer: nn.Module) -> torch.Tensor:
    """The weight of a linear layer, float32 ``(d_out, d_in)``, dequantised if need be."""
    weight = cast(Any, layer.weight)
    if hasattr(weight, "quant_state"):  # bitsandbytes Linear4bit
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state).float()
    if hasattr(weight, "SCB"):  # Linear8bitLt: int8 rows times their largest magnitude / 127
        scale = weight.SCB if weight.SCB is not None else cast(Any, layer.state).SCB
        return weight.data.float() * (scale.float()[:, None] / 127)
    return (weight.detach().T if isinstance(layer, Conv1D) else weight.detach()).float()


@torch.no_grad()
def frozen_weight(layer: LoraLayer) -> torch.Tensor:
    """Base weight plus residual of a layer, float32 ``(d_out, d_in)``."""
    weight = dense_weight(layer.get_base_layer())
    pair = residual(layer)
    return weight if pair is None else torch.addmm(weight, pair[1], pair[0])


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer that bitsandbytes has packed."""
    return is_linear(module) and (
        hasattr(module.weight, "quant_state") or hasattr(module.weight, "SCB")
    )


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters, trained or frozen, in the model's order.

    The names are those that PEFT saves them by.
    """
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if f".modules_to_save.{ADAPTER}." in name:
            found[name.replace(f".modules_to_save.{ADAPTER}.", ".")] = parameter
        elif f".lora_magnitude_vector.{ADAPTER}.weight" in name:
            found[name.removesuffix(f".{ADAPTER}.weight")] = parameter
        elif f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name:
            found[name.replace(f".{ADAPTER}.", ".")] = parameter
    return found


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those of `parameters` that require gradients."""
    return {name: p for name, p in parameters(model).items() if p.requires_grad}


def set_rank(layer: LoraLayer, rank: int) -> None:
    """Make room for factors of this rank and scale them as PEFT does; values are not kept."""
    if rank == layer.r[ADAPTER]:
        return
    a, b = (cast(Any, factors[ADAPTER]) for factors in (layer.lora_A, layer.lora_B))
    a.weight.data = a.weight.new_zeros(rank, a.in_features)
    b.weight.data = b.weight.new_zeros(b.out_features, rank)
    a.out_features = b.in_features = layer.r[ADAPTER] = rank
    scale = Scale(layer.lora_alpha[ADAPTER], cast(Any, layer).use_rslora[ADAPTER])
    layer.scaling[ADAPTER] = scale.of(rank)


def residual(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A layer's residual factors A ``(R, d_in)`` and B ``(d_out, R)``, float32, if it has any."""
    return getattr(layer, "fedlora_residual", None)
