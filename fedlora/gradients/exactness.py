"""Examination of a loaded model: per-example gradients are exact, and examples stay apart.

Differential privacy rests on gradients that belong to one example each. Whether a layer's input has
an entry for each example is a property of the model's code, and the shapes of one batch can suggest
it by coincidence. A loaded model is therefore run on synthetic examples before it is given a record
and before any budget is charged. The numbers of examples and tokens differ from every dimension of
the model.

The checks run in float32, with every trained parameter away from its initial value, in passes of
``count`` examples of one padded width:

1. Each layer's input and each trained parameter's gradient of an example are the same **to the last
   bit** when all other examples are exchanged. The example keeps its place and the pass its shape,
   so that kernels compute the same, and any difference comes from the other examples.
2. Each example's gradients equal those of one backward pass with that example alone, and those of
   the example at another place, both within `TOLERANCE` of their norm. Kernels may round a product
   of another number of rows, or a row at another place, differently: by up to 7e-5 in models of 110
   and 135 million parameters. A wrong layout makes differences of 0.05 and more.

Packed rows are checked in the same way, except that exchanging other examples moves an example to
another place too, which must change no bit either. A layer that mixes tokens outside attention
mixes the examples of a packed row and fails that check.

A model that changes one of its attributes or buffers in a pass is refused, since its later passes
would depend on earlier rows. Rotary positions that change with the longest row of a pass are
refused too, where rows may be that long.

The examination does not cover sizes and values that were not run. The code of a model is assumed to
treat examples alike at all of them; the guard in `gradients.per_sample` checks the shapes of every
pass.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedlora.arrays import Int64
from fedlora.data.batches import Batch, PackedBatch
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.data.shards import Shard
from fedlora.errors import Refusal
from fedlora.gradients import lora_layers, packing
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import adapters
from fedlora.models.encoder import HEAD
from fedlora.models.tasks import LENGTH_DEPENDENT, Task
from fedlora.privacy.streams import RandomSource

TOLERANCE = 3e-3
"""The largest relative difference of a parameter's gradient from that of one backward pass."""
MIN_NORM_SHARE = 0.1
"""An error is relative to the gradient's norm, or to this share of the largest norm if more."""
DIMENSION_SUFFIXES = ("size", "dim", "features", "heads")
"""Endings of the names of layers' attributes that hold dimensions."""
PLAIN_TYPES = (bool, int, float, str, type(None), torch.dtype)
"""Types of a module's attributes that are compared before and after the examination."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of an examination.

    Args:
        flaw: The reason why a layer's per-example gradients are not exact; empty if all are.
        first_position: The position of an example's first token in a packed row; None where rows
            are padded.
    """

    flaw: str
    first_position: int | None


def examine(
    model: PeftModel, per_sample: PerSampleAdapters, task: Task, labels: tuple[str, ...]
) -> Verdict:
    """Run the checks of this module on a loaded model, which is left as it was.

    Weights in 16 bits are converted to float32 during the examination: memory holds them once as
    they are and once at twice the size. Quantised weights stay, and are multiplied in float32.

    Args:
        model: A model with an adapter of any values.
        per_sample: The trained layers of the model.
        task: The task, which gives batches and losses.
        labels: The label set; empty for sft.
    """
    plain = next(model.parameters()).device.type != "cpu"
    with (
        _in_float32(model),
        _moved(model),
        sdpa_kernel(SDPBackend.MATH) if plain else nullcontext(),
    ):
        try:
            _check_dense(cast(Any, model).config.to_dict())
            probe = _Probe(model, per_sample, task, labels)
            _check_positions(model, task)
            with _unchanged(model):
                probe.padded()
        except _Flaw as flaw:
            return Verdict(flaw=str(flaw), first_position=None)
        try:
            with _unchanged(model):
                return Verdict(flaw="", first_position=probe.packed())
        except _Flaw:
            return Verdict(flaw="", first_position=None)


class _Flaw(Exception):
    """A failed check. The message names the layer where it is known."""


MIXTURES = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
"""Keys of configurations for the number of experts in a mixture."""


def _check_dense(config: Mapping[str, Any]) -> None:
    """Check a configuration, and those inside it. Raises `_Flaw` for a mixture of experts."""
    used = config.get("is_moe", True)
    if experts := [key for key in MIXTURES if used and config.get(key)]:
        raise _Flaw(
            f"the base routes tokens to experts ({experts[0]}), whose products have as many rows "
            "as tokens came, so a gradient depends on other examples"
        )
    for inner in config.values():
        if isinstance(inner, Mapping):
            _check_dense(cast(Mapping[str, Any], inner))


Parts = torch.Tensor | tuple[torch.Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class _Pass:
    """Gradients and inputs of one pass.

    Args:
        gradients: Parameter's name -> gradients ``(count, *shape)``.
        inputs: Layer's name -> for each of its calls, each example's part of the input.
    """

    gradients: dict[str, torch.Tensor]
    inputs: dict[str, list[Parts]]


class _Probe:
    """Synthetic examples for a model, and the passes over them.

    Rows 0 to count - 1 of the shard are the examined examples, of lengths from 1 or 2 to the width.
    Row ``i + count`` replaces example i when it is exchanged; its length is the width.
    """

    def __init__(
        self,
        model: PeftModel,
        per_sample: PerSampleAdapters,
        task: Task,
        labels: tuple[str, ...],
    ) -> None:
        self.model, self.per_sample, self.task, self.labels = model, per_sample, task, labels
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        sizes, most = _sizes(model), task.encoding.max_length
        free = (n for n in (*range(11, 40), *range(10, 3, -1)) if n <= most and n not in sizes)
        self.width = next(free, 0)
        if not self.width:
            raise _Flaw(
                f"every number of tokens from 4 to training.max-length ({most}) is a dimension of "
                "the model, so that shapes could agree by coincidence; raise training.max-length"
            )
        sizes |= {self.width, len(labels)}
        self.count = next(n for n in range(3, 1 + len(sizes) + 3) if n not in sizes)
        self.shard = self._made_up()

    def _made_up(self) -> Shard:
        shortest = 1 if self.labels else 2  # a response has a prompt
        lengths = np.linspace(self.width, shortest, self.count).astype(int).tolist()
        lengths += [self.width] * self.count
        words = self.task.words(self.model)
        source = RandomSource.seeded("exactness", 0)
        ids = [[words[int(i)] for i in source.words(n) % np.uint64(len(words))] for n in lengths]
        targets = [i % max(1, len(self.labels)) for i in range(len(ids))]
        if not self.labels:  # where a response begins
            targets = [n - min(4, n - 1) for n in lengths]
        return shard_of(Encoded(ids=ids, targets=targets, truncated=[False] * len(ids)))

    def padded(self) -> None:
        """Check passes of padded rows.

        Raises:
            _Flaw: At the first failed check.
        """
        rows = np.arange(self.count)
        alone = self._alone(self.width)
        found = self._pass(self.task.collate(self.shard, rows, self.width))
        _compare(found, alone)
        for i in range(self.count):
            batch = self.task.collate(self.shard, self._exchanged(i), self.width)
            _same(found, i, self._pass(batch), i)
        moved = np.roll(rows, 1)
        turned = self._pass(self.task.collate(self.shard, moved, self.width))
        _compare(turned, {name: g[moved] for name, g in alone.items()})

    def packed(self) -> int | None:
        """Check packed rows.

        Returns:
            Where each example's positions begin in them; None if the model cannot be told.

        Raises:
            _Flaw: At the first failed check.
        """
        with _explained():
            first = self.task.first_position(self.model)
        if first is None:
            return None
        total = packing.row_size(self.count * self.width)

        def run(rows: Int64) -> _Pass:
            batch = self.task.pack(
                self.shard,
                rows,
                first=first,
                total=total,
                slots=self.count + 1,
                device=next(self.model.parameters()).device,
            )
            return self._pass(batch)

        rows = self._ordered(np.arange(self.count))
        found = run(rows)
        _compare(found, {name: g[rows] for name, g in self._alone(0).items()})
        for i in range(self.count):
            others = self._ordered(self._exchanged(i))
            place, other = (int(np.flatnonzero(each == i)[0]) for each in (rows, others))
            _same(found, place, run(others), other)
        return first

    def _exchanged(self, kept: int) -> Int64:
        """All examples but one exchanged for others."""
        rows = np.arange(self.count)
        return np.where(rows == kept, rows, rows + self.count)

    def _ordered(self, rows: Int64) -> Int64:
        """The rows in an order in which equally wide ones follow each other, the widest first.

        The shortest example, whose tokens are all near the neighbour's, thus follows another one.
        """
        return rows[np.argsort(-self.task.widths(self.shard)[rows], kind="stable")]

    def _alone(self, width: int) -> dict[str, torch.Tensor]:
        """Gradients ``(count, *shape)`` of each parameter, from one backward pass per example."""
        found: dict[str, list[torch.Tensor]] = {name: [] for name in self.names.values()}
        for i in range(self.count):
            batch = self.task.collate(self.shard, [i], width)
            with _explained():
                self.task.losses(self.model, batch, self.labels).sum().backward()
            for parameter, name in self.names.items():
                if parameter.grad is None:
                    raise _Flaw(f"{_layer(name)} takes no part in the loss")
                found[name].append(parameter.grad)
                parameter.grad = None
        return {name: torch.stack(each) for name, each in found.items()}

    def _pass(self, batch: Batch | PackedBatch) -> _Pass:
        row = batch.row if isinstance(batch, PackedBatch) else None
        with (
            packing.use(row) if row else nullcontext(),
            self._inputs(row) as inputs,
            _explained(),
            self.per_sample.expanded(self.count),
        ):
            self.task.losses(self.model, batch, self.labels).sum().backward()
            collected = self.per_sample.collect()
        gradients = {name: collected[p] for p, name in self.names.items()}
        return _Pass(gradients=gradients, inputs=inputs)

    @contextmanager
    def _inputs(self, row: packing.Packing | None) -> Generator[dict[str, list[Parts]]]:
        """Record each layer's inputs while a pass runs, in the order of first calls."""
        found: dict[str, list[Parts]] = {}

        def keep(name: str, flat: bool) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
            def hook(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
                (x,) = arguments
                parts: Parts = x.detach().clone()
                if row is not None and not flat:
                    parts = x[0, : row.used].detach().clone().split(row.lengths)
                found.setdefault(name, []).append(parts)

            return hook

        hooks = [
            layer.register_forward_pre_hook(keep(name, name.endswith(HEAD)))
            for name, layer in self.per_sample.layers.items()
        ]
        try:
            yield found
        finally:
            for hook in hooks:
                hook.remove()


@contextmanager
def _explained() -> Generator[None]:
    """Turn any error of the model into a flaw, except a lack of memory."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Refusal as refusal:
        raise _Flaw(_layer(refusal.detail.partition(";")[0])) from refusal
    except Exception as error:
        why = (str(error).splitlines() or [""])[0]
        raise _Flaw(f"the model fails in a pass ({type(error).__name__}: {why})") from error


def _compare(found: _Pass, alone: Mapping[str, torch.Tensor]) -> None:
    """Refuse gradients that are not those of one backward pass per example."""
    for name, expected in alone.items():
        gradients = found.gradients[name]
        lengths = expected.flatten(1).norm(dim=1)
        if not lengths.any() and not gradients.any():
            continue
        errors = (gradients - expected).flatten(1).norm(dim=1)
        scales = lengths.maximum(MIN_NORM_SHARE * lengths.amax())
        worst = float((errors / scales).amax())
        if not worst <= TOLERANCE:  # also if it is nan
            raise _Flaw(
                f"per-example gradients of {_layer(name)} are off by {worst:.2g} from those of one "
                f"backward pass per example, above {TOLERANCE:g}"
            )


def _same(one: _Pass, i: int, other: _Pass, j: int) -> None:
    """Refuse any difference in bits between example i of one pass and example j of another.

    Inputs are compared first, in the order of calls: they show the layer that mixes examples.
    """
    for name, calls in one.inputs.items():
        for a, b in zip(calls, other.inputs[name], strict=True):
            if not torch.equal(a[i], b[j]):
                raise _Flaw(
                    f"{_layer(name)} has an input that changes with the other examples of a pass"
                )
    for name, gradients in one.gradients.items():
        if not torch.equal(gradients[i], other.gradients[name][j]):
            raise _Flaw(
                f"an example's gradient of {_layer(name)} changes with the others of a pass"
            )


def _layer(name: str) -> str:
    """The layer of a parameter, or of PEFT's module, as the base model calls it."""
    return name.removeprefix("base_model.model.").partition(".lora_")[0]


def _check_positions(model: PeftModel, task: Task) -> None:
    """Refuse rotary positions that change for all rows of a pass when one row is long enough.

    The rows of the examination are too short to show it.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if not any(kind in str(rope) for kind in LENGTH_DEPENDENT):
        return
    nested = [one for one in rope.values() if isinstance(one, dict)]  # by type of layer
    keys = ("original_max_position_embeddings", "max_position_embeddings")
    limits = [
        n
        for found in (rope, *nested, vars(config))
        for key in keys
        if type(n := found.get(key)) is int
    ]
    longest = task.encoding.max_length
    if longest > min(limits, default=0):
        raise _Flaw(
            f"rotary positions change with the longest row of a pass above "
            f"{min(limits, default=0)} tokens, and training.max-length is {longest}"
        )


@contextmanager
def _unchanged(model: PeftModel) -> Generator[None]:
    """Refuse a model that changes itself in a pass: its results then depend on earlier rows."""
    before = _state(model)
    yield
    after = _state(model)
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        same = (
            torch.equal(one, other)
            if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
            else type(one) is type(other) and one == other
        )
        if not same:
            raise _Flaw(f"a pass changes {name} of the model, and so the passes that follow")


def _state(model: PeftModel) -> dict[str, Any]:
    """Plain values of all modules, and copies of all buffers."""
    state: dict[str, Any] = {name: b.detach().clone() for name, b in model.named_buffers()}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if isinstance(v, PLAIN_TYPES)}
        state |= {f"{name}.{key}": value for key, value in plain.items()}
    return state


def _sizes(model: PeftModel) -> set[int]:
    """The dimensions in the model's weights, layers and configuration."""
    config: Any = model.config
    found = {n for tensor in (*model.parameters(), *model.buffers()) for n in tensor.shape}
    found |= {n for n in config.to_dict().values() if type(n) is int}
    for module in model.modules():
        found |= {
            n
            for name, n in vars(module).items()
            if type(n) is int and name.endswith(DIMENSION_SUFFIXES)
        }
    return found


@contextmanager
def _in_float32(model: nn.Module) -> Generator[None]:
    """Hold 16-bit weights as float32 inside the context; restore the same tensors after it."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    kept = [(t, t.data) for t in tensors if t.dtype != torch.float32]
    states = [(m, dict(vars(m))) for m in model.modules() if hasattr(m, "compute_type_is_set")]
    try:
        for tensor, data in kept:
            tensor.data = data.float()
        for (
            module,
            _,
        ) in states:  # of bitsandbytes, which otherwise keeps the dtype of its first input
            vars(module).update(compute_dtype=torch.float32, compute_type_is_set=True)
        yield
    finally:
        for tensor, data in kept:
            tensor.data = data
        for module, state in states:
            vars(module).update(state)


@contextmanager
def _moved(model: PeftModel) -> Generator[None]:
    """Give every trained parameter a value with an effect; restore the old values after it."""
    named = lora_layers.parameters(model)
    kept = {name: p.detach().clone() for name, p in named.items()}
    scale = {
        adapters.factor_names(path)[1]: layer.scaling[lora_layers.ADAPTER]
        for path, layer in lora_layers.lora_layers(model)
    }
    source = RandomSource.seeded("exactness", 1)
    try:
        with torch.no_grad():
            for name, p in named.items():
                values = torch.from_numpy(2 * source.uniform(p.numel()) - 1).view(p.shape).to(p)
                match adapters.kind(name):
                    case "magnitude":
                        p.mul_(1 + values / 10)
                    case "B":  # an update about as large as its input
                        p.copy_(values / (scale[name] * p.shape[1] ** 0.5))
                    case _:
                        p.copy_(2 * values / p.shape[-1] ** 0.5)
        yield
    finally:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(kept[name])
