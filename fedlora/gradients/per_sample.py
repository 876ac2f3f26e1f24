"""Exact per-example gradients for LoRA, rsLoRA and DoRA on any frozen base.

Opacus records activations with hooks, which fails for DoRA. Here each trained layer gets a forward
of its own (`layer_forwards`). In expanded mode a leaf of shape ``(examples, *shape)`` replaces
every trained parameter, and autograd keeps the leaf's gradient per example. The base is only
called, so quantised bases work the same.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from fedlora.errors import Refusal
from fedlora.gradients.layer_forwards import AdaptedLayer, Head, Mode
from fedlora.gradients.lora_layers import ADAPTER, is_linear
from fedlora.privacy.streams import RandomSource


class PerSampleAdapters:
    """Replaces the forward of trained layers, so that one model trains with and without DP.

    In plain mode autograd fills ``p.grad`` as always. In expanded mode::

        with per_sample.expanded(len(batch)):
            losses(model, batch).sum().backward()
            gradients = per_sample.collect()  # (examples, *shape) of each trained parameter

    Guarantee: entry i of ``gradients[p]`` is the gradient of example i's loss, as if it had been
    computed alone, for models in which `gradients.exactness` finds no flaw. Layers and inputs for
    which this cannot hold are refused. What voids it: a loss that mixes examples.

    Args:
        model: A model with an adapter; its trained layers are changed.

    Raises:
        Refusal: ``guard-no-gradient`` if another layer is trained; ``guard-batch-coupled`` if a
            layer computes with statistics of the batch.
    """

    def __init__(self, model: PeftModel) -> None:
        self._mode = Mode({})
        self.has_dropout = False  # whether `draw_dropout` has an effect
        self.layers: dict[str, nn.Module] = {}  # layers with a replaced forward
        self._named: dict[str, nn.Parameter] = {}
        covered: set[nn.Parameter] = set()
        for name, module in model.named_modules():
            if _couples_examples(module):
                raise Refusal(
                    "guard-batch-coupled",
                    f"{name} ({type(module).__name__}) computes with statistics of the whole "
                    "batch, so an example's gradient depends on others; choose a model without it",
                )
            forward: AdaptedLayer | Head | None = None
            if isinstance(module, LoraLayer) and is_linear(module.get_base_layer()):
                forward = AdaptedLayer(name, module, self._mode)
                self.has_dropout |= forward.dropout > 0
            elif isinstance(module, ModulesToSaveWrapper):
                module = module.modules_to_save[ADAPTER]
                if isinstance(module, nn.Linear):
                    forward = Head(name, module, self._mode)
            if forward is not None:
                cast(Any, module).forward = forward
                self.layers[name] = cast(nn.Module, module)
                covered.update(forward.parameters())
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                if parameter not in covered:
                    raise Refusal(
                        "guard-no-gradient",
                        f"{name} is trained but no layer gives its per-example gradient; freeze it",
                    )
                self._named[name] = parameter

    @contextmanager
    def expanded(self, examples: int) -> Generator[None]:
        """Give each trained parameter a leaf per example of a batch.

        Forward, backward and `collect` go inside.
        """
        for parameter in self._trained().values():
            leaf = parameter.detach().expand(examples, *parameter.shape)
            self._mode.leaves[parameter] = leaf.requires_grad_()
        self._mode.examples = examples
        try:
            yield
        finally:
            self._mode.leaves.clear()

    def draw_dropout(self, rows: Sequence[RandomSource]) -> None:
        """Set the random sources of dropout, one for each row, for the next batches.

        A row's mask then depends on its source and the layer only, not on its place in a batch,
        and is the same again when activations are recomputed.

        Args:
            rows: A source for each example of a batch; empty switches dropout off.
        """
        self._mode.rows = rows

    def _trained(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._named.items() if p.requires_grad}

    def collect(self) -> dict[nn.Parameter, torch.Tensor]:
        """Return each trained parameter's gradients and forget them; ``(examples, *shape)``.

        Raises:
            Refusal: ``guard-no-gradient`` if a parameter got no gradient.
        """
        found: dict[nn.Parameter, torch.Tensor] = {}
        for name, parameter in self._trained().items():
            leaf = self._mode.leaves.get(parameter)
            if leaf is None or leaf.grad is None:
                raise Refusal(
                    "guard-no-gradient",
                    f"{name} got no per-example gradient; call collect after backward, inside "
                    "expanded, with a loss that depends on it",
                )
            found[parameter], leaf.grad = leaf.grad, None
        return found


def _couples_examples(module: nn.Module) -> bool:
    """Whether it is BatchNorm, or LLM.int8() with outlier columns, which depend on the batch."""
    state = getattr(module, "state", None)
    return isinstance(module, _BatchNorm) or getattr(state, "threshold", 0.0) > 0
