"""Using a finished run: evaluate its adapter on other data, predict, merge it into its base."""

# pyright: reportUnknownMemberType=false

import json
import os
from pathlib import Path
from typing import Any

from fedlora import adapters, data, trainable
from fedlora import config as configuration
from fedlora.adapters import AdapterState
from fedlora.errors import InputError
from fedlora.text import is_unicode
from fedlora.trainable import Trainable


def _open(run_dir: Path, institution: str) -> tuple[configuration.RunConfig, Trainable]:
    """A run's base with its released adapter in place.

    Args:
        run_dir: Of a complete run.
        institution: Whose adapter, where each has its own; else empty.

    Raises:
        InputError: If the run is not complete, its base is another one now, or it has no such
            adapter.
    """
    if not (run_dir / "result.json").exists():
        raise InputError(
            f"{run_dir} holds no complete run (no result.json); give the directory that a "
            f"finished run printed, or continue it with `fedlora run --resume {run_dir}`"
        )
    config = configuration.load(run_dir / "config.toml")
    try:
        result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{run_dir / 'result.json'} cannot be read ({type(error).__name__}); "
            "restore it, or run again"
        ) from None
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
    """Metrics of a run's adapter on all rows of ``source``, by the run's text and label columns.

    With them ``truncated``, how many texts were longer than ``max_length`` tokens and were cut.
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
    """``answers``, one to each text in turn, and as in `evaluate` what was cut."""
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
    """Write the base with the adapter folded in, as safetensors with its tokenizer.

    Raises:
        InputError: If ``out_dir`` exists.
    """
    if out_dir.exists():
        raise InputError(f"{out_dir} exists; give a directory that is not there")
    parent = out_dir.absolute().parent
    if not (parent.is_dir() and os.access(parent, os.W_OK)):
        raise InputError(f"{parent} is no directory that can be written to; give another place")
    _, work = _open(run_dir, institution)
    trainable.forget()  # merging takes the model apart
    merged = adapters.merge(work.model)
    if work.base.kind == "encoder":
        merged.config.id2label = dict(enumerate(work.labels))
        merged.config.label2id = {label: i for i, label in enumerate(work.labels)}
    temporary = out_dir.with_name(f".{out_dir.name}.tmp")
    merged.save_pretrained(temporary, safe_serialization=True)
    work.base.tokenizer.save_pretrained(temporary)
    temporary.rename(out_dir)
