"""LoRA, rsLoRA and DoRA on a frozen base, and their factors as they travel and are saved.

Everything here speaks PEFT's own names and files, so that what a run saves opens with
``PeftModel.from_pretrained`` and nothing of this project.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import copy
import difflib
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, cast

import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedlora.encoder import HEAD
from fedlora.errors import InputError
from fedlora.files import write_atomic
from fedlora.models import Base
from fedlora.streams import RandomSource

Method = Literal["lora", "rslora", "dora", "dora-rslora"]
Part = Literal["A", "B", "magnitude", "head"]
PARTS: tuple[Part, ...] = ("A", "B", "magnitude", "head")
METHODS: tuple[Method, ...] = ("lora", "rslora", "dora", "dora-rslora")
ADAPTER = "default"  # PEFT's name for the only adapter of a model
FACTOR_A, FACTOR_B, MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"
RESIDUAL_A, RESIDUAL_B = ".residual_A.weight", ".residual_B.weight"
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

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


@dataclass(frozen=True, kw_only=True)
class LoraSpec:
    """What is trained: low-rank factors on some linear layers of the base.

    Args:
        method: ``lora`` (W + s B A); ``rslora`` has s = alpha / sqrt(rank) instead of alpha / rank;
            ``dora`` also learns the norm of each output row (Liu et al. 2024, arXiv 2402.09353);
            ``dora-rslora`` both.
        rank: Rank of B A, at least 1.
        alpha: Above 0.
        dropout: On the input of A, in [0, 1).
        target_modules: Last parts of layer names; empty for the default of the architecture
            (`TARGETS`).

    Raises:
        InputError: For a value out of bounds.
    """

    method: Method
    rank: int
    alpha: float
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            near = difflib.get_close_matches(self.method, METHODS, n=1, cutoff=0.0)[0]
            raise InputError(
                f"adapter.method is {self.method!r}; choose one of {', '.join(METHODS)} "
                f"(perhaps {near!r})"
            )
        if self.rank < 1:
            raise InputError(f"adapter.rank is {self.rank}, but must be at least 1; 8 is usual")
        if not 0 < self.alpha < float("inf"):
            raise InputError(
                f"adapter.alpha is {self.alpha}, but must be above 0; twice the rank is usual"
            )
        if not 0 <= self.dropout < 1:
            raise InputError(
                f"adapter.dropout is {self.dropout}, but must be in [0, 1); 0 switches it off"
            )


def attach(base: Base, spec: LoraSpec, seed: int) -> PeftModel:
    """Put a fresh adapter on a base; the model computes what the base computes until it is trained.

    B is zero, A uniform in +-1/sqrt(d_in) as in PEFT but from named streams (the same on every
    machine, whatever the order of layers), DoRA's magnitudes are the row norms of the base.
    Adapters are float32. On an encoder the head is trained too. The base's own modules become part
    of the result.

    Args:
        base: Its model must carry no adapter yet.
        spec: What to train.
        seed: Of the initial A.

    Raises:
        InputError: If a target module is not in the model or is not a linear layer, or the rank is
            above what one of these layers can have.
    """
    targets = _targets(base.model, spec.target_modules)
    _check_rank(base.model, spec.rank, targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, spec.alpha),  # PEFT computes with it as a float
        lora_dropout=spec.dropout,
        target_modules=list(targets),
        use_rslora=spec.method.endswith("rslora"),
        use_dora=spec.method.startswith("dora"),
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
        found = [
            name
            for name, _ in model.named_modules()
            if name == target or name.endswith(f".{target}")
        ]
        if not found or not set(found) <= set(layers):
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
    """What a layer's factors are added to: base weight and residual, float32 ``(d_out, d_in)``."""
    weight = dense_weight(layer.get_base_layer())
    pair = residual(layer)
    return weight if pair is None else torch.addmm(weight, pair[1], pair[0])


@torch.no_grad()
def merge(model: PeftModel) -> PreTrainedModel:
    """Fold the adapter into the base: a plain model that ``save_pretrained`` can write.

    Consumes ``model``: its layers are replaced one by one, so that the peak is about one layer
    above the result. A quantised base is dequantised to the dtype of its activations.

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


def is_quantized(module: nn.Module) -> bool:
    """Whether this is a linear layer that bitsandbytes has packed."""
    return is_linear(module) and (
        hasattr(module.weight, "quant_state") or hasattr(module.weight, "SCB")
    )


def _dense(like: nn.Module, weight: torch.Tensor, dtype: torch.dtype) -> nn.Module:
    """A plain layer for the place of ``like``, with this weight ``(d_out, d_in)`` and its bias."""
    bias = cast(torch.Tensor | None, like.bias)
    layer: nn.Module
    if (
        isinstance(like, Conv1D) or getattr(like, "source_cls", None) is Conv1D
    ):  # what quantising replaced
        layer = Conv1D(weight.shape[0], weight.shape[1])
        layer.weight = nn.Parameter(weight.T.contiguous().to(dtype))
    else:
        layer = nn.Linear(1, 1, bias=bias is not None)
        layer.in_features, layer.out_features = weight.shape[1], weight.shape[0]
        layer.weight = nn.Parameter(weight.to(dtype))
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach().to(dtype))
    return layer


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters under the names that PEFT saves them by, in the model's order."""
    found: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        if f".modules_to_save.{ADAPTER}." in name:
            found[name.replace(f".modules_to_save.{ADAPTER}.", ".")] = parameter
        elif f".lora_magnitude_vector.{ADAPTER}.weight" in name:
            found[name.removesuffix(f".{ADAPTER}.weight")] = parameter
        elif f".lora_A.{ADAPTER}." in name or f".lora_B.{ADAPTER}." in name:
            found[name.replace(f".{ADAPTER}.", ".")] = parameter
    return found


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


class AdapterState(Mapping[str, torch.Tensor]):
    """Values of everything that is trained: name -> float32 CPU tensor, sorted by name.

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
            _set_rank(layer, len(factors.a))
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

    def as_residual(self, start: "AdapterState") -> Self:
        """An adapter of scale 1 as residuals under the factors of ``start``, whose B is zero."""
        tensors = dict(self.only(("head",)))
        for path, own in self.layers().items():
            fresh = start.factors(path)
            tensors |= Factors(fresh.a, fresh.b, own.magnitude, (own.a, own.b)).named(path)
        return type(self)(tensors)

    def validate_against(self, reference: "AdapterState", *, residual: bool = False) -> str | None:
        """Say what makes this adapter unusable beside ``reference``, or None.

        Checked: names, shapes, float32, all values finite.

        Args:
            reference: Whose names and shapes count; its residuals do not.
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

    def single(self, scale: Callable[[int], float]) -> tuple[Self, bool]:
        """This adapter with its residuals taken into its factors, whose scale is then 1.

        DoRA's norm is that of W + residual + s B A, so its magnitudes stay what they are.

        Args:
            scale: Rank -> s of s B A.

        Returns:
            The adapter and whether it had residuals. All layers then have the rank of the largest
            one; the others are padded with zeros.
        """
        if not any(kind(name) == "residual" for name in self):
            return self, False
        whole: dict[str, Factors] = {}
        for path, layer in self.layers().items():
            a, b = layer.a, layer.b * scale(len(layer.a))
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

        Args:
            directory: Made if missing.
            model: The model that the adapter belongs to; its PEFT configuration is saved.
        """
        config = cast(LoraConfig, copy.copy(model.peft_config[ADAPTER]))
        config.inference_mode = True
        whole, scaled = self.single(lambda rank: _scaling(config, rank))
        if scaled:
            config.use_rslora, config.lora_alpha = False, whole.rank  # a scale of 1
        config.r = whole.rank
        with tempfile.TemporaryDirectory() as scratch:
            config.save_pretrained(scratch)
            write_atomic(directory / CONFIG_FILE, (Path(scratch) / CONFIG_FILE).read_bytes())
        tensors = {name: tensor.contiguous() for name, tensor in whole.items()}
        write_atomic(directory / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Read the tensors that `save` wrote.

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


def _difference(
    state: Mapping[str, torch.Tensor],
    reference: Mapping[str, torch.Tensor],
    *,
    any_rank: bool = False,
    residual: bool = False,
) -> str | None:
    """What differs in names or shapes, or None; see `AdapterState.validate_against`."""
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


def _scaling(config: LoraConfig, rank: int) -> float:
    return config.lora_alpha / (rank**0.5 if config.use_rslora else rank)


def _set_rank(layer: LoraLayer, rank: int) -> None:
    """Make room for factors of this rank and scale them as PEFT does; values are not kept."""
    if rank == layer.r[ADAPTER]:
        return
    a, b = (cast(Any, factors[ADAPTER]) for factors in (layer.lora_A, layer.lora_B))
    a.weight.data = a.weight.new_zeros(rank, a.in_features)
    b.weight.data = b.weight.new_zeros(b.out_features, rank)
    a.out_features = b.in_features = layer.r[ADAPTER] = rank
    alpha = layer.lora_alpha[ADAPTER]
    rslora = cast(Any, layer).use_rslora[ADAPTER]
    layer.scaling[ADAPTER] = alpha / (rank**0.5 if rslora else rank)


def residual(layer: LoraLayer) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A layer's residual factors A ``(R, d_in)`` and B ``(d_out, R)``, float32, if it has any."""
    return getattr(layer, "fedlora_residual", None)
