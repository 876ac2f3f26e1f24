"""A process's model in memory: a base with one adapter slot, its task, tokenised records.

Both sides use it: an institution trains it, the server starts from it and evaluates with it.
Loading is the slow part of a round, so each process loads once and swaps adapters.
"""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from peft import PeftModel

from fedlora import processors
from fedlora.config.config import RunConfig
from fedlora.config.sections import AdapterConfig, ModelConfig
from fedlora.config.task_choice import choose_task
from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.errors import InputError, Refusal
from fedlora.gradients import exactness, lora_layers
from fedlora.gradients.per_sample import PerSampleAdapters
from fedlora.models import adapters, base_directory, label_words, lora, model_files, models
from fedlora.models.adapters import AdapterState
from fedlora.models.encoder import is_merged
from fedlora.models.tasks import Task

log = logging.getLogger("fedlora")


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A base with an adapter attached, ready to train and to predict.

    Args:
        base: The frozen base, with its tokenizer, kind and weight digest.
        model: The base wrapped by PEFT; only the adapter (and a head, where the task has one)
            requires gradients.
        per_sample: The layers that give per-example gradients.
        task: Losses, predictions, metrics.
        labels: The label set; empty for sft.
        start: The initial adapter: the same for the same seed, and its head on the same kernels.
        first_position: The position of an example's first token in a packed row; None where rows
            are padded.
    """

    base: models.Base
    model: PeftModel
    per_sample: PerSampleAdapters
    task: Task
    labels: tuple[str, ...]
    start: AdapterState
    first_position: int | None

    def train_only(self, parts: Sequence[str]) -> None:
        """Freeze every part of the adapter except these, until the next call.

        Raises:
            Refusal: ``malformed-message`` if a part is unknown or no part is left.
        """
        named = lora_layers.parameters(self.model)
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

    Guarantee: under DP the model has been found to give exact per-example gradients
    (`gradients.exactness`), with ``engine.threads`` threads, before the model is given a record and
    before any charge.

    Raises:
        InputError: If the base model is missing, has pickles only, cannot take the adapter, or
            gives no exact per-example gradients under DP or with dropout.
        Refusal: ``guard-batch-coupled`` for a layer with statistics of the batch, or
            ``guard-no-gradient`` for a trained layer without per-example gradients; also without
            DP.
    """
    device = "cuda" if config.engine.gpus > 0 and torch.cuda.is_available() else "cpu"
    settings = _Settings(
        seed=config.seed,
        model=config.model,
        adapter=config.adapter,
        prompt=config.data.prompt,
        max_length=config.training.max_length,
        gradient_checkpointing=config.training.gradient_checkpointing,
        physical_batch=config.training.physical_batch,
        labels=labels,
        device=device,
        threads=config.engine.threads,
        private=config.privacy.enabled,
        weights=_weights(config.model.name),
    )
    # one is loaded with one, since forks would wait for others
    with processors.threads(settings.threads):
        return _load(settings)


_files = functools.lru_cache(maxsize=1)(model_files.resolve)  # every message comes by here


def _weights(name: str) -> str:
    """The digest of a base model's files of now."""
    try:
        return base_directory.digest(_files(name))
    except OSError:  # they were moved
        _files.cache_clear()
        return base_directory.digest(_files(name))


@dataclass(frozen=True, kw_only=True)
class _Settings:
    """The settings that decide a `Trainable`. Runs that differ only in other settings share it."""

    seed: int
    model: ModelConfig
    adapter: AdapterConfig
    prompt: str
    max_length: int
    gradient_checkpointing: bool
    physical_batch: int
    labels: tuple[str, ...]
    device: str
    threads: int
    private: bool
    weights: str


def _check_classes(name: str, model: Any, labels: Sequence[str]) -> None:
    """Check that the head of a merged classifier, from which training starts, is of these classes.

    Raises:
        InputError: If it is of others, or they stand in another order.
    """
    if not is_merged(model.config):
        return
    known = [model.config.id2label[number] for number in range(len(labels))]
    if known != list(labels):
        raise InputError(
            f"model.name is {name!r}, a classifier of the classes {known}, but the data have "
            f"{list(labels)}; take its base model, or set data.labels to its classes in that order"
        )


@functools.lru_cache(maxsize=1)
def _load(settings: _Settings) -> Trainable:
    model, adapter, labels = cast(Any, settings.model), cast(Any, settings.adapter), settings.labels
    base = models.load_base(
        model.name,
        dtype=model.dtype,
        quantization=model.quantization,
        task=model.task,
        num_labels=len(labels),
        device=settings.device,
    )
    _check_classes(model.name, base.model, labels)
    peft_model = lora.attach(base, adapter, settings.seed)
    if settings.gradient_checkpointing:
        try:
            cast(Any, base.model).gradient_checkpointing_enable({"use_reentrant": False})
        except ValueError as error:
            raise InputError(
                f"training.gradient-checkpointing is true, which {model.name} does not take "
                f"({' '.join(str(error).split())}); set it to false"
            ) from None
    files = model_files.resolve(model.name)
    task = choose_task(
        model.task,
        base.kind,
        base.tokenizer,
        prompt=settings.prompt,
        max_length=settings.max_length,
        positions=files.positions,
        vocabulary=files.vocabulary,
    )
    task.physical_batch = min(task.physical_batch, settings.physical_batch)
    if files.positions and settings.max_length > files.positions // 2:
        _check_longest_row(peft_model, task, labels)
    per_sample = PerSampleAdapters(peft_model)

    training_mode(peft_model, True)
    try:
        verdict = exactness.examine(peft_model, per_sample, task, labels)
    finally:
        training_mode(peft_model, False)
    if verdict.flaw and (settings.private or per_sample.has_dropout):
        raise InputError(
            f"model.name is {base.name!r}, whose layers in adapter.target-modules give no exact "
            f"per-example gradients: {verdict.flaw}; choose other adapter.target-modules or "
            "another base model"
        )
    start = AdapterState.read(peft_model)
    headless = base.kind == "encoder" and not is_merged(cast(Any, base.model.config))
    if headless and adapter.reads_labels(len(labels)):
        try:
            start = _with_words(start, peft_model, task, labels)
        except InputError as error:
            if adapter.head == "labels":
                raise InputError(
                    f"adapter.head is labels, but {error}; rename that class, or set it to zero"
                ) from None
            log.warning("adapter.head: the head starts at zero, since %s", error)
    return Trainable(
        base=base,
        model=peft_model,
        per_sample=per_sample,
        task=task,
        labels=labels,
        start=start,
        first_position=verdict.first_position,
    )


def _with_words(
    start: AdapterState, model: Any, task: Task, labels: tuple[str, ...]
) -> AdapterState:
    """A fresh adapter whose head is made from the labels' words.

    It comes after the examination of the model, which must see the model's first pass.

    Raises:
        InputError: As `label_words.head`.
    """
    (name,) = (name for name, tensor in start.only(("head",)).items() if tensor.dim() == 2)
    made = start.updated(AdapterState({name: label_words.head(model, task, labels)}))
    made.load_into(model)
    return made


def _check_longest_row(model: Any, task: Task, labels: tuple[str, ...]) -> None:
    """Check that the model takes a row of ``training.max-length`` tokens.

    RoBERTa's family counts positions from after padding, so that it takes fewer tokens than its
    configuration says. Under DP a row that fails would show in the reply.

    Raises:
        InputError: If it does not.
    """
    words, length = task.words(model), task.encoding.max_length
    ids = list(itertools.islice(itertools.cycle(words), length))
    target = 0 if labels else length // 2  # for sft where the response begins
    row = shard_of(Encoded(ids=[ids], targets=[target], truncated=[False]))
    try:
        with torch.no_grad():
            task.losses(model, task.collate(row, [0], length), labels)
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"training.max-length is {length}, but the base model fails on a row of so many tokens "
            f"({' '.join(str(error).split())[:120]}); lower it by a few tokens: some models count "
            "positions from after padding"
        ) from None


def forget() -> None:
    """Drop the process's `Trainable`, before its model is taken apart."""
    _load.cache_clear()
    _files.cache_clear()


def without_weights(work: Trainable) -> Trainable:
    """The same for a process that neither trains nor predicts from here on.

    The process's `Trainable` is dropped. Of the model only the PEFT configuration stays, which
    `AdapterState.save` reads; ``start`` is empty. The weights go with the next garbage collection
    after the caller has dropped ``work``.
    """
    forget()
    rest: Any = SimpleNamespace(peft_config=work.model.peft_config)
    base = dataclasses.replace(work.base, model=rest)
    return dataclasses.replace(work, base=base, model=rest, per_sample=rest, start=AdapterState({}))


def training_mode(model: torch.nn.Module, on: bool) -> None:
    """Switch gradient checkpointing on or off: modules recompute only when they train."""
    model.eval()
    for module in cast(Any, model).modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = on
