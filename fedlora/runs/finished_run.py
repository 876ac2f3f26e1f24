"""Use of a finished run: evaluate its adapter on other data, predict, merge it into its base."""

# pyright: reportUnknownMemberType=false

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fedlora.config.config import RunConfig, load
from fedlora.config.sections import check_gpu
from fedlora.data import data, shards
from fedlora.data.text import is_unicode
from fedlora.errors import InputError
from fedlora.files import new_directory, new_path, write_atomic
from fedlora.models import merging, model_files, models, trainable
from fedlora.models.adapters import open_for
from fedlora.models.base_directory import MERGED
from fedlora.models.encoder import EncoderClassifier
from fedlora.models.model_files import Origin
from fedlora.models.trainable import Trainable
from fedlora.runs import model_card
from fedlora.runs.run_files import (
    CONFIG,
    HOME_CONFIG,
    PRIVACY,
    made_at_home,
    read_run_file,
    refuse_audited,
    said_of_origins,
    void,
)

DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
"""The dtype of a run's base in result.json -> ``model.dtype``."""
ENCODED = 4096
"""Texts that are encoded at a time: lists of tokens take ten times the memory of a shard."""
READING = (
    "model.name",
    "data.text",
    "data.label",
    "engine.gpus",
)
"""Keys that may differ from the run's, because they do not change its model: the base must have the
same weights, wherever it lies."""


def configuration(run_dir: Path, overrides: Mapping[str, Any]) -> RunConfig:
    """The configuration of a complete run, with other values for keys in `READING`.

    Args:
        run_dir: Its directory, or the one that `fedlora home` wrote at an institution.
        overrides: Key -> value.

    Raises:
        InputError: If the run is not complete, a key is none of these, or a GPU is asked for where
            there is none.
    """
    read_run_file(run_dir)
    for name in overrides:
        if name not in READING:
            raise InputError(
                f"{name} cannot be changed after the run; only {', '.join(READING)} can"
            )
    config = load(run_dir / (HOME_CONFIG if made_at_home(run_dir) else CONFIG), overrides)
    if config.engine.gpus and "engine.gpus" in overrides:
        check_gpu(f"engine.gpus is {config.engine.gpus:g}", "0")
    return config


def adapter_directory(
    run_dir: Path, config: RunConfig, institution: str, *, own_model: bool = False
) -> Path:
    """The directory of the adapter that a run released, or of an institution's own model.

    Args:
        run_dir: The directory of a complete run.
        config: The run's `configuration`.
        institution: The institution whose adapter it is, where each institution has its own;
            empty otherwise.
        own_model: Whether it is the model that the institution made at home after the run.

    Raises:
        InputError: If there is no such adapter.
    """
    if made_at_home(run_dir):
        only = read_run_file(run_dir)["institution"]
        if institution not in ("", only):
            raise InputError(
                f"institution is {institution}, but {run_dir} has the own model of {only}; leave "
                "it out"
            )
        return run_dir / "own"
    kind = "own" if own_model else "adapter"
    several = own_model or config.federation.traits.local_parts
    found = (run_dir / "institutions").glob(f"*/{kind}")
    names = sorted(path.parent.name for path in found) if several else [""]
    if institution not in names:
        if not several:
            has = "one adapter for all; leave it out"
            if (run_dir / "institutions" / institution / "own").is_dir():
                has += ", or give --own (in Python own=True) for its own model"
        elif not own_model:
            has = f"an adapter for each institution; give one of {', '.join(names)}"
        elif names:
            has = f"own models of {', '.join(names)}; give one of these"
        else:
            has = "no own models; they are made where home.method is not none"
        raise InputError(f"institution is {institution or 'not given'}, but {run_dir} has {has}")
    folder = run_dir / "institutions" / institution if institution else run_dir
    return folder / kind


def open_model(
    run_dir: Path, config: RunConfig, institution: str, *, own_model: bool = False
) -> Trainable:
    """Load a run's base model with the adapter that the run released, or an own one.

    Args:
        run_dir: The directory of a complete run.
        config: The run's `configuration`.
        institution: The institution whose adapter is loaded, where each institution has its own;
            empty otherwise.
        own_model: See `adapter_directory`.

    Raises:
        InputError: If the run is not complete, the base model has changed since, or there is no
            such adapter, or one that does not fit the model.
    """
    own_model = own_model or made_at_home(run_dir)
    result = read_run_file(run_dir)
    values = {"adapter.head": "zero"}  # the run's own takes its place
    if (dtype := result["base"].get("dtype")) in DTYPES:  # as the run, wherever this machine is
        values["model.dtype"] = DTYPES[dtype]
    config = config.replace(values)
    work = trainable.load(config, tuple(result["labels"]))
    if work.base.digest != result["base"]["digest"]:
        raise InputError(
            f"model.name {config.model.name} is not the base that {run_dir} was trained on "
            "(weights differ); restore that base, name the directory that holds it (--set "
            "model.name=DIR, in Python Result(run, model=DIR)), or run again"
        )
    place = adapter_directory(run_dir, config, institution, own_model=own_model)
    residuals = config.federation.traits.residuals or (own_model and config.home.method == "dual")
    adapter = open_for(place, work.start, residuals=residuals)
    if problem := adapter.validate_against(work.start, residual=residuals):
        raise InputError(
            f"the adapter in {place} does not fit the run's model ({problem}); restore the "
            "directory that the run wrote, or run again"
        )
    adapter.load_into(work.model)
    return work


def evaluate(
    run_dir: Path,
    source: str,
    institution: str = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    own_model: bool = False,
) -> dict[str, Any]:
    """Measure a run's adapter on all rows of ``source``, by the run's text and label columns.

    Args:
        run_dir: The directory of a complete run.
        source: A source, see `fedlora.data.sources`.
        institution: See `predict`.
        overrides: Other values for keys in `READING`.
        own_model: See `predict`.

    Returns:
        The metrics of the task; ``truncated``: the number of texts that were longer than
        ``max_length`` tokens and were cut; ``without_text`` and ``without_label``: rows that were
        left out since they have no text, or a text and no label.
    """
    config = configuration(run_dir, overrides or {})
    work = open_model(run_dir, config, institution, own_model=own_model)
    shard, counts = data.load_shard(
        config.data, source, labels=work.labels, encode=work.task.encode
    )
    measured = work.task.evaluate(work.model, shard, work.labels)
    return measured | counts | {"max_length": config.training.max_length}


def predict(
    run_dir: Path,
    texts: Sequence[str],
    institution: str = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    own_model: bool = False,
    all_scores: bool = True,
    show: Callable[[int], object] = lambda done: None,
) -> dict[str, Any]:
    """Answer each text with a run's adapter.

    Texts are computed in batches of similar length, whatever their order, and only the answers are
    kept of a batch.

    Args:
        run_dir: The directory of a complete run.
        texts: The texts, none of them empty.
        institution: The institution whose adapter is used, where each has its own.
        overrides: Other values for keys in `READING`.
        own_model: Whether the model is the one that this institution made at home.
        all_scores: Whether each answer has ``scores``.
        show: Called after each batch with the number of texts that are answered.

    Returns:
        ``answers``, one for each text in order: ``text``, ``answer`` and, where there are classes,
        ``score`` (the answer's probability) and ``scores`` (class -> probability). ``truncated``
        and ``max_length`` are as in `evaluate`.

    Raises:
        InputError: If a text is empty or no Unicode, or as `open_model`.
    """
    for number, text in enumerate(texts, start=1):
        if not isinstance(cast(object, text), str):
            raise InputError(
                f"text {number} of {len(texts)} is a {type(text).__name__}; give a str"
            )
        if not is_unicode(text):
            raise InputError(
                f"the text {text!r} holds half of a surrogate pair and so is no text; write it in "
                "UTF-8"
            )
        if not text.strip():
            raise InputError(
                f"text {number} of {len(texts)} is empty; leave it out, since every answer to it "
                "would be a guess"
            )
    config = configuration(run_dir, overrides or {})
    work = open_model(run_dir, config, institution, own_model=own_model)
    nothing = work.labels[0] if work.labels else ""  # predictions do not depend on the answer
    parts = (
        work.task.encode(list(some), [nothing] * len(some), work.labels)
        for some in (texts[i : i + ENCODED] for i in range(0, max(1, len(texts)), ENCODED))
    )
    shard = shards.joined([data.shard_of(part).corpus for part in parts])
    answers: list[dict[str, Any]] = [{"text": text} for text in texts]
    done = 0
    for rows, said, probabilities in work.task.answers(work.model, shard, work.labels):
        for place, row in enumerate(map(int, rows)):
            one = answers[row]
            one["answer"] = said[place]
            if probabilities is not None:
                one["score"] = float(probabilities[place].max())
                if all_scores:
                    found = probabilities[place].tolist()
                    one["scores"] = dict(zip(work.labels, found, strict=True))
        done += len(rows)
        show(done)
    return {
        "answers": answers,
        "truncated": int(shard.corpus.truncated.sum()),
        "max_length": config.training.max_length,
    }


def merged_model(
    run_dir: Path,
    institution: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    own_model: bool = False,
) -> tuple[Any, Trainable]:
    """A run's base model with the adapter folded in, as transformers knows it.

    Args:
        run_dir: The directory of a complete run.
        institution: See `predict`.
        overrides: Other values for keys in `READING`.
        own_model: See `predict`.

    Returns:
        The model, in evaluation mode, which nothing else in this process uses, and its parts.
    """
    config = configuration(run_dir, overrides or {})
    work = open_model(run_dir, config, institution, own_model=own_model)
    trainable.forget()  # merging changes the cached model
    merged = merging.merge(work.model)
    if isinstance(merged, EncoderClassifier):
        merged = merged.portable(work.labels)
    return merged, work


def origins_of_run(
    run_dir: Path,
    config: RunConfig,
    result: Mapping[str, Any],
    *,
    own_model: bool,
    private: bool,
) -> list[Origin]:
    """A run as one whose records an adapter in its directory may know.

    Args:
        run_dir: Its directory, or the one that `fedlora home` wrote.
        config: Its configuration.
        result: Its ``result.json``; empty where the run is not complete.
        own_model: Whether the adapter is an institution's own (`model_files.ONE_INSTITUTION`).
        private: Whether ledgers were charged for what the adapter knows.
    """
    run = str(result.get("run", run_dir.name))  # an early version wrote no identity
    sources = [model_card.source(config), *[model_files.ONE_INSTITUTION] * own_model]
    return [Origin(run=run, source=source, private=private) for source in sources]


def merge(
    run_dir: Path,
    out_dir: Path,
    institution: str = "",
    overrides: Mapping[str, Any] | None = None,
    *,
    own_model: bool = False,
) -> None:
    """Fold a run's adapter into its base model; write safetensors and the tokenizer.

    The classifier of an encoder is written with the code of its class (`models.mean_pooling`). The
    card says what the run promises, that of an own model what its adapter's card does, also whether
    it may leave. The file `base_directory.MERGED` names run and source, and those behind the start
    of the run, so that no run under DP on the same records takes the model for a base that never
    saw them.

    Raises:
        InputError: If ``out_dir`` exists, the run is not complete or was audited, its base model
            has changed since, or there is no such adapter.
    """
    new_path(out_dir)  # before the model is loaded
    own_model = own_model or made_at_home(run_dir)
    config = configuration(run_dir, overrides or {})
    refuse_audited(run_dir, "merge")
    merged, work = merged_model(run_dir, institution, overrides, own_model=own_model)
    if own_model:
        place = adapter_directory(run_dir, config, institution, own_model=True)
        said = model_card.said_of_own(place)
    else:
        said = str(read_run_file(run_dir, PRIVACY)["protects"])
    result = read_run_file(run_dir)
    if not own_model and config.federation.traits.local_parts:
        said += f" {model_card.KEPT_PART}"
    said += said_of_origins(result)
    said = "\n\n".join(
        [
            said,
            *(f"**The result is void, and the run accepted it: {text}.**" for text in void(result)),
        ]
    )
    private = model_card.is_private(config, own_model=own_model) and config.privacy.promises
    of_one = own_model or bool(config.federation.traits.local_parts)
    this = origins_of_run(run_dir, config, result, own_model=of_one, private=private)
    licences = model_files.licences(config.model.name)
    with new_directory(out_dir) as new:
        for licence in licences:
            shutil.copyfile(licence, new / licence.name)
        merged.save_pretrained(new, safe_serialization=True)
        models.save_tokenizer(work.base.tokenizer, new)
        named = configuration(run_dir, {})  # the card names the base as the run did
        model_card.write_merged(new, named, work, said, own_model=own_model)
        content = json.dumps([*this, *result.get("origins", [])])
        write_atomic(new / MERGED, f"{content}\n".encode())
