"""LoRA, rsLoRA and DoRA on a frozen base: a fresh adapter on a model."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import difflib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedlora.config.sections import AdapterConfig
from fedlora.errors import InputError
from fedlora.gradients.lora_layers import ADAPTER, dense_weight, is_linear, lora_layers
from fedlora.models.encoder import HEAD
from fedlora.models.models import Base
from fedlora.privacy.streams import RandomSource

# The query and value projections (Hu et al. 2021, section 7.1), or the fused projection that
# contains them.
TARGETS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert"), ("query", "value")
    ),
    "distilbert": ("q_lin", "v_lin"),
    "mpnet": ("attn.q", "attn.v"),
    "modernbert": ("Wqkv",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gpt2": ("c_attn",),
    **dict.fromkeys(("gpt_neox", "bloom", "falcon"), ("query_key_value",)),
    "phi3": ("qkv_proj",),
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi",
         "smollm3", "olmo", "olmo2", "granite", "cohere", "stablelm", "gptj", "gpt_neo", "opt"),
        ("q_proj", "v_proj"),
    ),
}  # fmt: skip


def attach(base: Base, adapter: AdapterConfig, seed: int) -> PeftModel:
    """Put a fresh adapter on a base; until it is trained, outputs equal those of the base.

    ``lora`` is W + s B A; ``rslora`` has s = alpha / sqrt(rank) instead of alpha / rank; ``dora``
    also learns the norm of each output row (Liu et al. 2024, arXiv 2402.09353); ``dora-rslora``
    both. B is zero, A uniform in +-1/sqrt(d_in) as in PEFT but from named streams (the same on
    every machine, whatever the order of layers), DoRA's magnitudes are the row norms of the base.
    Adapters are float32. On an encoder the head is trained too. The base's own modules become part
    of the result.

    Args:
        base: A base without an adapter.
        adapter: The adapter's settings; ``start`` has no effect here.
        seed: The seed of the initial A.

    Raises:
        InputError: If a target module is not in the model or is not a linear layer, the rank is
            above the largest rank of one of these layers, or DoRA finds a row of zeros in one.

    Reference: Hu et al. (2021), LoRA, arXiv 2106.09685; Kalajdzievski (2023), rsLoRA,
    arXiv 2312.03732.
    """
    targets = _targets(base.model, adapter.target_modules)
    _check_rank(base.model, adapter.rank, targets)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=cast(int, adapter.alpha),  # PEFT computes with it as a float
        lora_dropout=adapter.dropout,
        target_modules=list(targets),
        use_rslora=adapter.method.endswith("rslora"),
        use_dora=adapter.method.startswith("dora"),
        fan_in_fan_out=any(
            isinstance(layer, Conv1D) for _, layer in _matching(base.model, targets)
        ),
        modules_to_save=[HEAD] if base.kind == "encoder" else None,
        task_type="CAUSAL_LM" if base.kind == "causal" else None,
    )
    try:
        with torch.random.fork_rng(devices=[]):
            model = cast(PeftModel, get_peft_model(cast(Any, base.model), config))
    except ValueError as error:  # such as out_proj of a Mamba, whose weight its layer uses itself
        why = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"adapter.target-modules is {', '.join(targets)}, which PEFT refuses ({why}); "
            "name other layers"
        ) from error
    config.base_model_name_or_path = base.name  # PEFT takes the directory
    with torch.no_grad():
        for name, layer in lora_layers(model):
            a = cast(nn.Parameter, layer.lora_A[ADAPTER].weight)
            a.copy_(fresh_a(a.shape, RandomSource.seeded("adapter-init", seed, name)))
            if ADAPTER in layer.lora_magnitude_vector:
                magnitude = cast(nn.Parameter, layer.lora_magnitude_vector[ADAPTER].weight)
                magnitude.copy_(dense_weight(layer.get_base_layer()).norm(dim=1))
                if zeros := int((magnitude == 0).sum()):
                    raise InputError(
                        f"adapter.method is {adapter.method}, which divides by the norm of each "
                        f"row, and {zeros} rows of {name} in {base.name} are zero; take lora or "
                        "rslora, or other adapter.target-modules"
                    )
    return model


def fresh_a(shape: Sequence[int], source: RandomSource) -> torch.Tensor:
    """A as PEFT starts it: uniform in +-1/sqrt(d_in), float32 ``(rank, d_in)``."""
    rank, d_in = shape
    values = torch.from_numpy(source.uniform(rank * d_in)).view(rank, d_in)
    return ((2 * values - 1) / d_in**0.5).float()


def _targets(model: nn.Module, asked: tuple[str, ...]) -> tuple[str, ...]:
    kind = str(getattr(model.config, "model_type", ""))
    layers = [name for name, module in model.named_modules() if is_linear(module) and name != HEAD]
    endings = sorted({name.rpartition(".")[2] for name in layers})
    targets = asked or TARGETS.get(kind, ())
    if not targets:
        raise InputError(
            f"adapter.target-modules is empty and there is no default for {kind!r}; "
            f"name some of its linear layers: {', '.join(endings)}"
        )
    for target in targets:
        found = {name for name, _ in _matching(model, (target,))}
        if not found or not found <= set(layers):
            near = difflib.get_close_matches(target, endings, n=1)
            raise InputError(
                f"adapter.target-modules has {target!r}, which is "
                f"{'not a linear layer' if found else 'no layer'} of this {kind} model; "
                + (f"perhaps {near[0]!r}" if near else f"it has {', '.join(endings)}")
            )
    return targets


def _check_rank(model: nn.Module, rank: int, targets: tuple[str, ...]) -> None:
    """Refuse a rank above ``min(d_in, d_out)``, which no product B A has."""
    limit, narrowest = min((min(_widths(layer)), name) for name, layer in _matching(model, targets))
    if rank > limit:
        raise InputError(
            f"adapter.rank is {rank}, but {narrowest} can have at most {limit} "
            "(the smaller of its inputs and outputs); lower it, or leave that layer out of "
            "adapter.target-modules"
        )


def _widths(layer: nn.Module) -> tuple[int, int]:
    """Inputs and outputs, in no order; a quantised weight is packed and has no such shape."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    rows, columns = cast(nn.Parameter, layer.weight).shape
    return rows, columns


def _matching(model: nn.Module, targets: tuple[str, ...]) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(name == target or name.endswith(f".{target}") for target in targets):
            yield name, module
