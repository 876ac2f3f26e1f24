"""Adapters outside a model: tensors that are sent, aggregated and saved.

Names and files are those of PEFT, so ``PeftModel.from_pretrained`` opens a saved adapter without
this project.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import copy
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from torch import nn

from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.gradients.lora_layers import (
    ADAPTER,
    Scale,
    lora_layers,
    parameters,
    residual,
    set_rank,
)

Part = Literal["A", "B", "magnitude", "head"]
PARTS: tuple[Part, ...] = ("A", "B", "magnitude", "head")
FACTOR_A, FACTOR_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
RESIDUAL_A, RESIDUAL_B = ".residual_A.weight", ".residual_B.weight"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def kind(name: str) -> Part | Literal["residual"]:
    """The part of an adapter that the tensor of this name belongs to; see `Factors`."""
    if name.endswith((RESIDUAL_A, RESIDUAL_B)):
        return "residual"
    if name.endswith(FACTOR_A):
        return "A"
    if name.endswith(FACTOR_B):
        return "B"
    return "magnitude" if name.endswith(MAGNITUDE) else "head"


def factor_names(path: str) -> tuple[str, str]:
    """Names of the factors A and B of the layer at a module path."""
    return path + FACTOR_A, path + FACTOR_B


def residual_names(path: str) -> tuple[str, str]:
    """Names of the residual factors A and B of the layer at a module path."""
    return path + RESIDUAL_A, path + RESIDUAL_B


class Factors(NamedTuple):
    """The part of an adapter that belongs to one layer, float32.

    Attributes:
        a: ``(rank, d_in)``.
        b: ``(d_out, rank)``.
        magnitude: DoRA's norms of the output rows, ``(d_out,)``; None without DoRA.
        residual: Frozen factors A ``(R, d_in)`` and B ``(d_out, R)`` of any rank R and scale 1. The
            layer computes with W + B A where it otherwise computes with W.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None = None
    residual: tuple[torch.Tensor, torch.Tensor] | None = None

    def named(self, path: str) -> dict[str, torch.Tensor]:
        """The tensors by the names that they have in the adapter of the layer at ``path``."""
        tensors = dict(zip(factor_names(path), (self.a, self.b), strict=True))
        if self.magnitude is not None:
            tensors[path + MAGNITUDE] = self.magnitude
        if self.residual is not None:
            tensors |= zip(residual_names(path), self.residual, strict=True)
        return tensors


PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of PEFT's ``init_lora_weights`` that leave the base's weights as they are."""
CHANGES_MEANING = (
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "kasa_config",
    "layer_replication",
    "loftq_config",
    "lora_bias",
    "monteclora_config",
    "use_bdlora",
    "use_qalora",
)
"""Settings of PEFT under which tensors of the same names are another function."""


def saved_scale(directory: Path) -> Scale:
    """The scale of a saved adapter.

    Raises:
        InputError: If its configuration is missing or damaged, has a scale for each layer, or gives
            the tensors another meaning (`CHANGES_MEANING`, `PLAIN_STARTS`, trained biases).
    """
    try:
        saved: Any = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
        scale = Scale(float(saved["lora_alpha"]), bool(saved.get("use_rslora")))
        varied = bool(saved.get("alpha_pattern"))
        start = saved.get("init_lora_weights", True)
        other = [f"{key} {saved[key]!r}"[:80] for key in CHANGES_MEANING if saved.get(key)]
        if (bias := saved.get("bias", "none")) != "none":  # it holds trained biases of the base
            other.append(f"bias {bias!r}"[:80])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"{directory / CONFIG_FILE} cannot be read ({type(error).__name__}); give a directory "
            "that PEFT saved"
        ) from None
    if varied:
        raise InputError(
            f"{directory / CONFIG_FILE} has alpha_pattern, a scale of its own for some layers, "
            "which no run here has; give an adapter with one lora_alpha"
        )
    if start not in PLAIN_STARTS:
        other.append(f"init_lora_weights {start!r}"[:80])
    if other:
        raise InputError(
            f"{directory / CONFIG_FILE} has {', '.join(other)}: its tensors then belong to changed "
            "base weights, or to a part of the tokens, and would be another model here; give an "
            "adapter of plain LoRA, rsLoRA or DoRA"
        )
    return scale


class AdapterState(Mapping[str, torch.Tensor]):
    """The values of an adapter: name -> float32 CPU tensor, sorted by name.

    Names are those of PEFT's ``adapter_model.safetensors``. Tensors are held, not copied.

    Args:
        tensors: By name, in any order.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = {name: tensors[name] for name in sorted(tensors)}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @classmethod
    def read(cls, model: nn.Module) -> Self:
        """A copy of the adapter in the model."""
        found: dict[str, torch.Tensor] = {n: p.detach() for n, p in parameters(model).items()}
        for path, layer in lora_layers(model):
            if (pair := residual(layer)) is not None:
                found |= dict(zip(residual_names(path), pair, strict=True))
        return cls({name: t.to("cpu", torch.float32, copy=True) for name, t in found.items()})

    @torch.no_grad()
    def load_into(self, model: nn.Module) -> None:
        """Copy these values into the model's adapter, in place; its rank becomes theirs.

        Raises:
            ValueError: If names or shapes, ranks aside, differ from the model's; nothing is copied
                then.
        """
        targets = parameters(model)
        if problem := _difference(self, targets, any_rank=True, residual=True):
            raise ValueError(f"the adapter does not fit the model: {problem}")
        for path, layer in lora_layers(model):
            factors = self.factors(path)
            set_rank(layer, len(factors.a))
            device = cast(nn.Parameter, layer.lora_A[ADAPTER].weight).device
            pair = factors.residual
            cast(Any, layer).fedlora_residual = pair and tuple(t.to(device) for t in pair)
        for name, parameter in targets.items():
            parameter.copy_(self[name])

    @property
    def num_bytes(self) -> int:
        """Size of the tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.values())

    def layers(self) -> dict[str, Factors]:
        """Module path -> the tensors of each adapted layer, not copied.

        Raises:
            KeyError: If a layer has one factor without the other.
        """
        names = [name for name in self if kind(name) in ("A", "B")]
        paths = [name.removesuffix(FACTOR_A).removesuffix(FACTOR_B) for name in names]
        return {path: self.factors(path) for path in dict.fromkeys(paths)}

    def factors(self, path: str) -> Factors:
        """The tensors of the layer at a module path, not copied.

        Raises:
            KeyError: If there is no such layer, or it has one factor without the other.
        """
        (a, b), (residual_a, residual_b) = factor_names(path), residual_names(path)
        residual = (self[residual_a], self[residual_b]) if residual_a in self else None
        return Factors(self[a], self[b], self.get(path + MAGNITUDE), residual)

    def only(self, parts: Sequence[str]) -> Self:
        """The tensors of the given parts (see `kind`), not copied."""
        return type(self)({name: t for name, t in self.items() if kind(name) in parts})

    def updated(self, other: Mapping[str, torch.Tensor]) -> Self:
        """These tensors with those of ``other`` in their place, not copied."""
        return type(self)({**self, **other})

    def cut(self, rank: int) -> Self:
        """The first ``rank`` rows of each A and columns of each B, not copied."""
        cut = dict(self)
        for path, layer in self.layers().items():
            cut |= Factors(layer.a.narrow(0, 0, rank), layer.b.narrow(1, 0, rank)).named(path)
        return type(self)(cut)

    @property
    def rank(self) -> int:
        """The rank of its factors; of the first layer, where layers differ."""
        return next(t.shape[0] for name, t in self.items() if kind(name) == "A")

    def as_residual(self, start: "AdapterState", scale: Scale) -> Self:
        """This adapter, which has no residuals, as residuals under the factors of another one.

        Args:
            start: The adapter whose factors, with B = 0, stand above the residuals.
            scale: The scale of this adapter.

        Raises:
            KeyError: If ``start`` has no factors for a layer.
        """
        tensors = dict(self.only(("head",)))
        for path, own in self.layers().items():
            fresh = start.factors(path)
            residual = own.a, own.b * scale.of(len(own.a))
            tensors |= Factors(fresh.a, fresh.b, own.magnitude, residual).named(path)
        return type(self)(tensors)

    def validate_against(self, reference: "AdapterState", *, residual: bool = False) -> str | None:
        """The first difference that makes this adapter unusable beside ``reference``, or None.

        Checked: names, shapes, float32, all values finite.

        Args:
            reference: The adapter with the right names and shapes; its residuals do not count.
            residual: Whether layers may have residuals, of any rank.
        """
        if problem := _difference(self, reference, residual=residual):
            return problem
        for name, tensor in self.items():
            if tensor.dtype != torch.float32:
                return f"{name} is {tensor.dtype}, expected torch.float32"
            if not torch.isfinite(tensor).all():
                return f"{name} has values that are not finite"
        return None

    def is_finite(self) -> bool:
        """Whether all values are finite."""
        return all(bool(torch.isfinite(tensor).all()) for tensor in self.values())

    def single(self, scale: Scale) -> tuple[Self, bool]:
        """This adapter with its residuals concatenated to its factors, whose scale is then 1.

        DoRA's norm is that of W + residual + s B A, so its magnitudes do not change.

        Args:
            scale: The scale of its factors.

        Returns:
            The adapter and whether it had residuals. All layers then have the rank of the largest
            one; the others are padded with zeros.
        """
        if not any(kind(name) == "residual" for name in self):
            return self, False
        whole: dict[str, Factors] = {}
        for path, layer in self.layers().items():
            a, b = layer.a, layer.b * scale.of(len(layer.a))
            if layer.residual is not None:
                a = torch.cat([a, layer.residual[0]])
                b = torch.cat([b, layer.residual[1]], 1)
            whole[path] = Factors(a, b, layer.magnitude)
        rank = max(len(layer.a) for layer in whole.values())
        tensors = dict(self.only(("head",)))
        for path, layer in whole.items():
            missing = rank - len(layer.a)
            a = nn.functional.pad(layer.a, (0, 0, 0, missing))
            b = nn.functional.pad(layer.b, (0, missing))
            tensors |= layer._replace(a=a, b=b).named(path)
        return type(self)(tensors), True

    def save(self, directory: Path, model: PeftModel) -> None:
        """Write the two files that ``PeftModel.from_pretrained`` opens, each whole or not at all.

        The adapter of an encoder names no base model: classes such as
        ``AutoPeftModelForSequenceClassification`` would take a head on another kind of pooling and
        answer wrongly without an error. Without a base model they refuse.

        Args:
            directory: Made if missing.
            model: The model that the adapter belongs to; its PEFT configuration is saved.
        """
        config = cast(LoraConfig, copy.copy(model.peft_config[ADAPTER]))
        config.inference_mode = True
        whole, scaled = self.single(Scale.of_model(model))
        if scaled:
            config.use_rslora, config.lora_alpha = False, whole.rank  # a scale of 1
        config.r = whole.rank
        if config.modules_to_save:
            config.task_type, config.base_model_name_or_path = "SEQ_CLS", None
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            write_atomic(directory / CONFIG_FILE, (Path(scratch) / CONFIG_FILE).read_bytes())
        tensors = {name: tensor.contiguous() for name, tensor in whole.items()}
        write_atomic(directory / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the tensors that `save` wrote. Factors with residuals were saved as one.

        Raises:
            InputError: If the file is missing or damaged.
        """
        try:
            return cls(safetensors.torch.load_file(directory / WEIGHTS_FILE))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{directory / WEIGHTS_FILE} cannot be read ({type(error).__name__}); "
                "give the directory of a finished run's adapter"
            ) from None


def open_for(directory: Path, start: AdapterState, *, residuals: bool) -> AdapterState:
    """Read a saved adapter in the form that a run's rounds continue from.

    Args:
        directory: The adapter's directory.
        start: The run's fresh adapter.
        residuals: Whether the run's strategy carries residuals (``federation.traits``). The
            adapter, of any rank and scale, then becomes the residual, under the factors of
            ``start``.

    Raises:
        InputError: If the weights are missing or damaged. With ``residuals`` also as `saved_scale`,
            or if a layer is not one of ``start`` or a factor is no matrix. Without, the caller
            compares with ``start`` (`AdapterState.validate_against`).
    """
    opened = AdapterState.open(directory)
    saved = AdapterState(  # PEFT saves in the dtype that its user trained in
        {name: t.float() if t.is_floating_point() else t for name, t in opened.items()}
    )
    if not residuals:
        return saved
    for name, tensor in saved.items():
        if kind(name) in ("A", "B") and (tensor.dim() != 2 or not tensor.numel()):
            raise InputError(
                f"the adapter in {directory} does not fit: {name} has the shape "
                f"{tuple(tensor.shape)}, and a factor has rows and columns"
            )
    try:
        return saved.as_residual(start, saved_scale(directory))
    except KeyError as error:
        raise InputError(f"the adapter in {directory} does not fit: {error.args[0]}") from None


def _difference(
    state: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    any_rank: bool = False,
    residual: bool = False,
) -> str | None:
    """The first difference in names or shapes, or None; see `AdapterState.validate_against`."""
    wanted = {name: tuple(t.shape) for name, t in reference.items() if kind(name) != "residual"}
    for path in [name.removesuffix(FACTOR_A) for name in wanted if kind(name) == "A"]:
        (a, b), (residual_a, residual_b) = factor_names(path), residual_names(path)
        if b not in wanted:
            continue
        (_, d_in), (d_out, _) = wanted[a], wanted[b]
        if any_rank and a in state:
            rank = state[a].shape[0]
            wanted |= {a: (rank, d_in), b: (d_out, rank)}
        if residual and (residual_a in state or residual_b in state):
            rank = state[residual_a].shape[0] if residual_a in state else 0
            wanted |= {residual_a: (rank, d_in), residual_b: (d_out, rank)}
    if missing := sorted(set(wanted) - set(state)):
        return f"{missing[0]} is missing ({len(missing)} in all)"
    if extra := sorted(set(state) - set(wanted)):
        return f"{extra[0]} is not expected ({len(extra)} in all)"
    for name, shape in wanted.items():
        if tuple(state[name].shape) != shape or 0 in shape:
            return f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
    return None
