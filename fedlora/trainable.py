"""What a process keeps in memory: a base model with one adapter slot, its task, tokenised records.

Both sides use it: an institution trains in it, the server starts from it and evaluates in it.
Loading is the slow part of a round, so each process loads once and swaps adapters.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel

from fedlora import adapters, data, models, tasks
from fedlora.adapters import AdapterState
from fedlora.config import RunConfig
from fedlora.errors import InputError, Refusal
from fedlora.per_sample import PerSampleAdapters
from fedlora.shards import Federation


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A base with an adapter attached, ready to train and to predict.

    Args:
        base: The frozen base, its tokenizer, kind and weight digest.
        model: The base wrapped by PEFT; only the adapter (and a head, where the task has one)
            requires gradients.
        per_sample: The layers that give per-example gradients.
        task: Losses, predictions, metrics.
        labels: The label set; empty for sft.
        start: The adapter as it was attached: the same for the same seed.
    """

    base: models.Base
    model: PeftModel
    per_sample: PerSampleAdapters
    task: tasks.Task
    labels: tuple[str, ...]
    start: AdapterState

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze every part of the adapter but these, until the next call.

        Raises:
            Refusal: ``malformed-message`` for a part that there is not, or when none is left.
        """
        named = adapters.parameters(self.model)
        kinds = {name: adapters.kind(name) for name in named}
        if not set(parts) <= set(adapters.PARTS) or not set(parts) & set(kinds.values()):
            raise Refusal(
                "malformed-message",
                f"the order trains {', '.join(parts) or 'nothing'}; parts are "
                f"{', '.join(sorted(set(kinds.values())))}",
            )
        for name, parameter in named.items():
            parameter.requires_grad_(kinds[name] in parts)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Name -> every parameter that is trained."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def load(config: RunConfig, labels: tuple[str, ...]) -> Trainable:
    """The process's one `Trainable` for this configuration, loaded at the first call.

    Raises:
        InputError: If the base model is not there, is pickle-only, or cannot take the adapter.
    """
    device = "cuda" if config.engine.gpus > 0 and torch.cuda.is_available() else "cpu"
    return _load(
        config.seed,
        config.model,
        config.adapter,
        config.data.prompt,
        config.training.max_length,
        config.training.gradient_checkpointing,
        labels,
        device,
    )


@functools.lru_cache(maxsize=1)
def _load(
    seed: int,
    model: Any,
    adapter: Any,
    prompt: str,
    max_length: int,
    checkpointing: bool,
    labels: tuple[str, ...],
    device: str,
) -> Trainable:
    base = models.load_base(
        model.name,
        dtype=model.dtype,
        quantization=model.quantization,
        task=model.task,
        num_labels=len(labels),
        device=device,
    )
    spec = adapters.LoraSpec(
        method=adapter.method,
        rank=adapter.rank,
        alpha=adapter.alpha,
        dropout=adapter.dropout,
        target_modules=adapter.target_modules,
    )
    peft_model = adapters.attach(base, spec, seed)
    if checkpointing:
        cast(Any, base.model).gradient_checkpointing_enable({"use_reentrant": False})
    return Trainable(
        base=base,
        model=peft_model,
        per_sample=PerSampleAdapters(peft_model),
        task=_task(model, prompt, max_length, base.kind, base.tokenizer),
        labels=labels,
        start=AdapterState.read(peft_model),
    )


def _task(
    model: Any, prompt: str, max_length: int, kind: models.Kind, tokenizer: Any
) -> tasks.Task:
    positions = models.resolve(model.name).positions
    if positions and max_length > positions:
        raise InputError(
            f"training.max-length is {max_length}, but {model.name} has {positions} positions; "
            "lower it"
        )
    return tasks.make(model.task, kind, tokenizer, prompt=prompt, max_length=max_length)


def forget() -> None:
    """Let go of the process's `Trainable`, for whoever is about to take its model apart."""
    _load.cache_clear()


@functools.lru_cache(maxsize=1)
def _records(seed: int, model: Any, source: Any, max_length: int, unit: str) -> Federation:
    tokenizer = models.load_tokenizer(model.name)
    work = _task(model, source.prompt, max_length, models.kind(model.name, model.task), tokenizer)
    return data.prepare(
        source=source.source,
        test_source=source.test_source,
        text=source.text,
        label=source.label,
        labels=source.labels,
        unit=unit,
        partition=source.partition,
        institutions=source.institutions,
        min_records=source.min_records,
        test_fraction=source.test_fraction,
        seed=seed,
        task=model.task,
        encode=work.encode,
        encoding_key=work.encoding_key,
    )


def records(config: RunConfig) -> Federation:
    """Every institution's shard and held-out rows, from the cache when it has them.

    Raises:
        InputError: If the source cannot be read or does not fit the configuration.
    """
    return _records(
        config.seed, config.model, config.data, config.training.max_length, config.privacy.unit
    )


def training_mode(model: torch.nn.Module, on: bool) -> None:
    """Switch gradient checkpointing on or off: modules recompute only when they train."""
    model.eval()
    for module in cast(Any, model).modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on
