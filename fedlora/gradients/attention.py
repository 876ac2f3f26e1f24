"""torch's attention, always with a mask, and in float32 on a CPU.

Under DP a row's result must not depend on other rows. When no row of a batch is padded,
transformers leaves the mask out and shares keys between heads (grouped queries) by another
computation, which rounds differently. On a CPU the backward pass of torch's fused bf16 kernel takes
five times as long as that of the float32 kernel, and plain products take twice as long
(benchmarks/LOG.md).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportPrivateUsage=false

from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from fedlora.gradients import packing

NAME = "fedlora"


def use(model: PreTrainedModel) -> None:
    """Have a model use `attention`, if it uses torch's kernels."""
    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attention)
        AttentionMaskInterface.register(NAME, mask)
        model.set_attn_implementation(NAME)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of queries ``(b, heads, t, d)`` to keys and values ``(b, key heads, u, d)``.

    Args:
        module: The layer, which knows how many heads share a key.
        query: The queries, in any floating dtype.
        key: The keys, in the same dtype.
        value: The values, in the same dtype.
        attention_mask: Float, ``(b, 1, t, u)``, added to the products; not read in a packed row.
        options: Further arguments of transformers: scaling, dropout, position_bias.

    Returns:
        ``(b, t, heads, d)`` in the query's dtype, and no weights.
    """
    dtype = torch.float32 if query.device.type == "cpu" else query.dtype
    if (row := packing.active()) is not None:
        return _packed(row, module, (query, key, value), dtype, options), None
    q, k, v, added = (tensor.to(dtype) for tensor in (query, key, value, attention_mask))
    attended, _ = sdpa_attention_forward(module, q, k, v, added, **options)
    return attended.to(query.dtype), None


def _packed(
    row: packing.Packing,
    module: Any,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    dtype: torch.dtype,
    options: dict[str, Any],
) -> torch.Tensor:
    """Each example's tokens attend to each other; ``(1, heads, t, d)`` to ``(1, t, heads, d)``."""
    q, k, v = (
        row.pad(tensor[0].transpose(0, 1).flatten(1))
        .to(dtype)
        .unflatten(1, (tensor.shape[1], -1))  # (places, heads, d)
        for tensor in tensors
    )
    causal = bool(getattr(module, "is_causal", False))
    parts: list[torch.Tensor] = []
    for (_, a), (_, b), (_, c), added in zip(
        row.groups(q), row.groups(k), row.groups(v), row.masks(causal), strict=True
    ):
        a, b, c = (part.transpose(1, 2) for part in (a, b, c))
        attended, _ = sdpa_attention_forward(module, a, b, c, added.to(dtype), **options)
        parts.append(attended.flatten(0, 1).flatten(1).to(tensors[0].dtype))
    return row.unpad(torch.cat(parts)).unflatten(1, (q.shape[1], -1))[None]


def mask(*arguments: Any, **options: Any) -> torch.Tensor:
    """The mask as floats, whether or not anything is masked."""
    options["allow_is_bidirectional_skip"] = False
    return eager_mask(*arguments, **options)
