"""What a process keeps in memory: a base model with one adapter slot, its task, tokenised records.

Both sides use it: an institution trains in it, the server starts from it and evaluates in it.
Loading is the slow part of a round, so each process loads once and swaps adapters.
"""

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel

from fedlora import adapters, exactness, models, tasks, verdicts
from fedlora.adapters import AdapterState
from fedlora.config import RunConfig
from fedlora.errors import InputError, Refusal
from fedlora.per_sample import PerSampleAdapters
from fedlora.records import load as records

__all__ = ["AdapterState", "Trainable", "forget", "load", "records", "training_mode"]


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
        first_position: Where a row's positions begin in a packed row; None where rows are padded.
    """

    base: models.Base
    model: PeftModel
    per_sample: PerSampleAdapters
    task: tasks.Task
    labels: tuple[str, ...]
    start: AdapterState
    first_position: int | None

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

    What is guaranteed: under DP the model was found to give exact per-example gradients
    (`fedlora.exactness`), before any record is looked at by it and any budget charged.

    Raises:
        InputError: If the base model is not there, is pickle-only, cannot take the adapter, or
            gives no exact per-example gradients under DP or with dropout.
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
        config.privacy.enabled,
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
    private: bool,
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
    task = tasks.make(
        model.task,
        base.kind,
        base.tokenizer,
        prompt=prompt,
        max_length=max_length,
        positions=models.resolve(model.name).positions,
    )
    per_sample = PerSampleAdapters(peft_model)
    question = {
        "weights": base.digest,
        "configuration": cast(Any, base.model.config).to_json_string(use_diff=False),
        "adapter": dataclasses.asdict(spec),
        "task": (model.task, max_length, len(labels), base.tokenizer.pad_token_id),
        "checkpointing": checkpointing,
        "device": torch.cuda.get_device_name(device) if device != "cpu" else device,
        "threads": torch.get_num_threads(),
    }

    def examine() -> exactness.Verdict:
        training_mode(peft_model, True)
        try:
            return exactness.examine(peft_model, per_sample, task, labels)
        finally:
            training_mode(peft_model, False)

    verdict = verdicts.remembered(question, examine)
    if verdict.flaw and (private or per_sample.has_dropout):
        raise InputError(
            f"model.name is {base.name!r}, whose layers in adapter.target-modules give no exact "
            f"per-example gradients: {verdict.flaw}; choose other adapter.target-modules or "
            "another base model"
        )
    return Trainable(
        base=base,
        model=peft_model,
        per_sample=per_sample,
        task=task,
        labels=labels,
        start=AdapterState.read(peft_model),
        first_position=verdict.first_position,
    )


def forget() -> None:
    """Let go of the process's `Trainable`, for whoever is about to take its model apart."""
    _load.cache_clear()


def training_mode(model: torch.nn.Module, on: bool) -> None:
    """Switch gradient checkpointing on or off: modules recompute only when they train."""
    model.eval()
    for module in cast(Any, model).modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on
