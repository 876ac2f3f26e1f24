"""Use of a finished run: evaluate its adapter on other data, predict, merge it into its base."""

# pyright: reportUnknownMemberType=false

import os
from pathlib import Path
from typing import Any

from fedlora import data, merging, model_card, trainable
from fedlora.adapters import AdapterState
from fedlora.config import RunConfig, load
from fedlora.encoder import EncoderClassifier
from fedlora.errors import InputError
from fedlora.run_files import CONFIG, read_run_file
from fedlora.text import is_unicode
from fedlora.trainable import Trainable


def _open(run_dir: Path, institution: str) -> tuple[RunConfig, Trainable]:
    """Load a run's base model with the adapter that the run released.

    Args:
        run_dir: The directory of a complete run.
        institution: The institution whose adapter is loaded, where each institution has its own;
            empty otherwise.

    Raises:
        InputError: If the run is not complete, the base model has changed since, or there is no
            such adapter.
    """
    result = read_run_file(run_dir)
    config = load(run_dir / CONFIG)
    work = trainable.load(config, tuple(result["labels"]))
    if work.base.digest != result["base"]["digest"]:
        raise InputError(
            f"model.name {config.model.name} is not the base that {run_dir} was trained on "
            "(weights differ); restore that base or run again"
        )
    traits = config.federation.traits
    own = (run_dir / "institutions").glob("*/adapter")
    names = sorted(path.parent.name for path in own) if traits.local_parts else [""]
    if institution not in names:
        raise InputError(
            f"--institution is {institution or 'not given'}, but {run_dir} has "
            + (
                f"an adapter for each institution; give one of {', '.join(names)}"
                if traits.local_parts
                else "one adapter for all; leave it out"
            )
        )
    folder = run_dir / "institutions" / institution if institution else run_dir
    adapter = AdapterState.open(folder / "adapter")
    if traits.residuals:
        adapter = adapter.as_residual(work.start)
    adapter.load_into(work.model)
    return config, work


def evaluate(run_dir: Path, source: str, institution: str = "") -> dict[str, Any]:
    """Measure a run's adapter on all rows of ``source``, by the run's text and label columns.

    Returns:
        The metrics of the task, and ``truncated``: the number of texts that were longer than
        ``max_length`` tokens and were cut.
    """
    config, work = _open(run_dir, institution)
    shard, truncated = data.load_shard(
        source,
        text=config.data.text,
        label=config.data.label,
        labels=work.labels,
        encode=work.task.encode,
    )
    measured = work.task.evaluate(work.model, shard, work.labels)
    return measured | {"truncated": truncated, "max_length": config.training.max_length}


def predict(run_dir: Path, texts: list[str], institution: str = "") -> dict[str, Any]:
    """Answer each text with a run's adapter.

    Returns:
        ``answers``, one for each text in order, and ``truncated`` and ``max_length`` as in
        `evaluate`.
    """
    for text in texts:
        if not is_unicode(text):
            raise InputError(
                f"the text {text!r} holds half of a surrogate pair and so is no text; write it in "
                "UTF-8"
            )
    config, work = _open(run_dir, institution)
    answers, truncated = work.task.answer(work.model, texts, work.labels)
    return {
        "answers": [{"text": t, "answer": a} for t, a in zip(texts, answers, strict=True)],
        "truncated": truncated,
        "max_length": config.training.max_length,
    }


def merge(run_dir: Path, out_dir: Path, institution: str = "") -> None:
    """Fold a run's adapter into its base model; write safetensors and the tokenizer.

    The classifier of an encoder is written with the code of its class (`fedlora.mean_pooling`).

    Raises:
        InputError: If ``out_dir`` exists.
    """
    if out_dir.exists():
        raise InputError(f"{out_dir} exists; give a directory that does not exist")
    parent = out_dir.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{parent} is no directory that can be written to; give another directory")
    config, work = _open(run_dir, institution)
    trainable.forget()  # merging changes the cached model
    merged = merging.merge(work.model)
    if isinstance(merged, EncoderClassifier):
        merged = merged.portable(work.labels)
    temporary = out_dir.with_name(f".{out_dir.name}.tmp")
    merged.save_pretrained(temporary, safe_serialization=True)
    work.base.tokenizer.save_pretrained(temporary)
    model_card.write_merged(temporary, config, work)
    temporary.rename(out_dir)
