"""A base model's directory: which files are read, what is refused, and the digest that names both.

A base model is what its digest names. Only `READ` and the safetensors files that the index names
are read, and the digest covers each of them. A file or a setting that could change in another way
what is computed is refused: `REFUSED_FILES`, `REFUSED_SETTINGS`.

Importing this module loads neither torch nor transformers.
"""

# pyright: reportUnknownVariableType=false

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast

from fedlora.errors import InputError
from fedlora.files import sha256

Kind = Literal["encoder", "causal"]

CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "GenerationDecoder")
"""Endings of the class names of causal models in config.json."""
SENSES = ("vision_config", "audio_config")
"""Keys of a config.json of a model that takes more than text."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
INDEX = "model.safetensors.index.json"
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
    "chat_template.jinja",
)
MERGED = "merged.json"
"""Of a model of `fedlora merge`: its `Origin` values, those behind its start and base too."""
READ = ("config.json", "generation_config.json", MERGED, INDEX, *TOKENIZER)
"""The files of a base that are read, where they exist, beside its weights."""
REFUSED_FILES = {
    "adapter_*": "an adapter changes what the model computes; move it to a directory of its own, "
    "and name that in adapter.start",
    **dict.fromkeys(PICKLES, "a pickle can run code when it is opened; remove it"),
}
"""Pattern of a name -> why a base directory must not hold such a file, and what to do."""
_OTHER_CODE = "no code of a model's repository is run; remove that key"
_OTHER_WEIGHTS = "weights come from model.safetensors or its index only; remove that key"
_OTHER_ATTENTION = "fedlora sets the kernels; remove that key"
REFUSED_SETTINGS = {
    "auto_map": _OTHER_CODE,
    "custom_generate": _OTHER_CODE,
    "configuration_files": "config.json alone describes a model; remove that key",
    "fast_tokenizer_files": "tokenizer.json alone describes a tokenizer; remove that key",
    "transformers_weights": _OTHER_WEIGHTS,
    "gguf_file": _OTHER_WEIGHTS,
    "fusion_config": _OTHER_ATTENTION,
    "kernel_config": _OTHER_ATTENTION,
    "use_kernels": _OTHER_ATTENTION,
    "distributed_config": _OTHER_ATTENTION,
}
"""Key at any depth of a JSON file -> why it is refused."""
KERNELS = ("attn_implementation", "experts_implementation")
PLAIN_KERNELS = (None, "eager", "sdpa")
"""Values of `KERNELS` that are dropped; any other names another library or code of the hub."""
MEAN_POOLING = "mean-pooling-classifier"
"""``model_type`` of a merged classifier, whose ``auto_map`` is for readers without fedlora."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A base model on this machine's disk, checked but not loaded.

    Args:
        name: The model's name, as the user wrote it.
        path: Directory with ``config.json``, the weights and the tokenizer.
        read: Every file that is read, sorted by name.
        weights: The safetensors files among them.
        config: The content of ``config.json`` without `KERNELS`.
        state: Of the directory and of each file, numbers that change when it is written or
            replaced; equal before and after a load, so nothing changed meanwhile.
        kind: ``causal`` for a language model with a head, ``encoder`` for a model that returns
            hidden states.
        positions: The number of positions, the most tokens of a row; 0 when ``config.json`` sets
            no limit.
        vocabulary: The number of tokens that it knows; 0 when ``config.json`` does not say.
    """

    name: str
    path: Path
    read: tuple[Path, ...]
    weights: tuple[Path, ...]
    config: Mapping[str, Any]
    state: tuple[tuple[int, ...], ...]
    kind: Kind
    positions: int
    vocabulary: int


def no_safetensors(name: str, *, pickled: bool) -> InputError:
    """The error for a model without safetensors; ``pickled``: it has pickles."""
    if pickled:
        return InputError(
            f"model.name is {name!r}, whose weights are pickles only, which can run code when "
            "opened; convert them (save_pretrained writes safetensors) or choose another model"
        )
    return InputError(
        f"model.name is {name!r}, which holds neither model.safetensors nor "
        "model.safetensors.index.json; give a directory with config.json and one of these"
    )


def inspect(name: str, path: Path) -> ModelFiles:
    """Check the directory of a base, without loading weights.

    Args:
        name: The model's name, as the user wrote it.
        path: The directory.

    Raises:
        InputError: If a file is missing, cannot be read, or is refused.
    """
    _refuse_files(name, path)
    small = [path / file for file in READ if (path / file).is_file()]
    if (path / "model.safetensors").is_file():
        small = [file for file in small if file.name != INDEX]  # it is not read then
        weights = (path / "model.safetensors",)
    elif (path / INDEX).is_file():
        weights = _shards(name, path)
    else:
        raise no_safetensors(name, pickled=False)
    if missing := [file.name for file in weights if not file.is_file()]:
        raise InputError(
            f"model.name is {name!r}, which lacks {', '.join(missing)} in {path}; download it again"
        )
    read = tuple(sorted((*small, *weights)))
    state = _state(path, read)
    config = _without_kernels(name, _json(name, path / "config.json"))
    for file in small:
        if file.name.endswith("config.json"):  # also those of tokenizer and generation
            content = config if file.name == "config.json" else _json(name, file)
            _refuse_settings(name, file.name, content)
    try:
        architectures: list[str] = config.get("architectures") or []
        causal = any(item.endswith(CAUSAL_ARCHITECTURES) for item in architectures)
        own = config.get("encoder") or config  # a merged classifier describes its encoder there
        positions = int(own.get("max_position_embeddings") or own.get("n_positions") or 0)
        text = own.get("text_config") or own
        vocabulary = int(text.get("vocab_size") or 0)
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise _unreadable(name, path / "config.json", error) from None
    if config.get("is_encoder_decoder"):
        raise encoder_decoder_error(name, config.get("model_type"))
    if not causal and (senses := [key for key in SENSES if config.get(key)]):
        raise InputError(
            f"model.name is {name!r}, a model of more than text ({senses[0]} in its config.json); "
            "choose a checkpoint for text only"
        )
    return ModelFiles(
        name=name,
        path=path,
        read=read,
        weights=weights,
        config=config,
        state=state,
        kind="causal" if causal else "encoder",
        positions=positions,
        vocabulary=vocabulary,
    )


def _refuse_files(name: str, path: Path) -> None:
    """Refuse a directory with a file of `REFUSED_FILES`, also where it is a link to nothing."""
    try:
        present = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        raise _unreadable(name, path, error) from None
    if not any(file.endswith(".safetensors") for file in present):
        raise no_safetensors(name, pickled=any(fnmatch(f, p) for f in present for p in PICKLES))
    for file in present:
        for pattern, why in REFUSED_FILES.items():
            if fnmatch(file.lower(), pattern):
                raise InputError(f"model.name is {name!r}, whose directory holds {file}: {why}")


def _shards(name: str, path: Path) -> tuple[Path, ...]:
    """The weight files that an index names, each a safetensors file of this directory."""
    try:
        named = sorted({str(file) for file in _json(name, path / INDEX)["weight_map"].values()})
    except (KeyError, AttributeError) as error:
        raise _unreadable(name, path / INDEX, error) from None
    for file in named:
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise InputError(
                f"model.name is {name!r}, whose {INDEX} names {file!r}; it must name safetensors "
                "files of its own directory: download the model again"
            )
    return tuple(path / file for file in named)


def _json(name: str, file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if type(content) is not dict:
            raise ValueError("no object")
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(name, file, error) from None
    return cast(dict[str, Any], content)


def _unreadable(name: str, file: Path, error: Exception) -> InputError:
    return InputError(
        f"model.name is {name!r}, whose {file.name} cannot be read ({type(error).__name__}); "
        f"it belongs into {file.parent}: download it again"
    )


def _settings(content: Any) -> Iterator[tuple[str, Any]]:
    """Each key at any depth with its value."""
    for key, value in cast(Any, content.items() if isinstance(content, dict) else ()):
        yield str(key), value
        yield from _settings(value)
    for value in cast(list[Any], content if isinstance(content, list) else ()):
        yield from _settings(value)


def _is_kernel(key: str) -> bool:
    return key.strip("_").removesuffix("_internal") in KERNELS


def _refuse_settings(name: str, file: str, content: Mapping[str, Any]) -> None:
    """Refuse a setting of `REFUSED_SETTINGS`, of kernels, or of a quantisation of its own."""
    merged = content.get("model_type") == MEAN_POOLING
    for key, value in _settings(content):
        why = REFUSED_SETTINGS.get(key, "")
        if key == "quantization_config":
            why = (
                "such weights can neither be trained on exactly nor merged; take the checkpoint "
                "that it was made from, with model.quantization where memory is short"
            )
        elif _is_kernel(key) and value not in PLAIN_KERNELS:
            why = _OTHER_ATTENTION
        if why and value and not (merged and key == "auto_map"):
            shown = repr(value)[:40]
            raise InputError(f"model.name is {name!r}, whose {file} sets {key} to {shown}: {why}")


def _without_kernels(name: str, content: Any) -> Any:
    """The content without the settings of `KERNELS` that `_refuse_settings` lets pass."""
    _refuse_settings(name, "config.json", content)

    def plain(part: Any) -> Any:
        if isinstance(part, list):
            return [plain(each) for each in cast(list[Any], part)]
        if not isinstance(part, dict):
            return part
        items = cast(dict[str, Any], part).items()
        return {k: plain(v) for k, v in items if not _is_kernel(k)}

    return plain(content)


def _state(path: Path, files: Sequence[Path]) -> tuple[tuple[int, ...], ...]:
    """The `ModelFiles.state`: links count with their targets, and the directory with both."""
    places = [path, path.resolve(), *files]
    return tuple(
        part for place in places for part in (_identity(place.lstat()), _identity(place.stat()))
    )


def encoder_decoder_error(name: str, model_type: Any) -> InputError:
    """The error for an encoder-decoder or a part of one."""
    return InputError(
        f"model.name is {name!r}, an encoder-decoder or a part of one ({model_type}); "
        "choose an encoder or a causal language model"
    )


def digest(files: ModelFiles) -> str:
    """SHA-256 (hex) over every file that is read: of its name and its content.

    Each process reads every file itself, and reads it again when it was written or replaced.
    """
    lines = [
        f"{file.name} {_file_digest(file.resolve(), _identity(file.stat()))}\n"
        for file in files.read
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _identity(stat: os.stat_result) -> tuple[int, ...]:
    """Numbers that change when a file is written or replaced: no program can set ctime."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def _file_digest(file: Path, identity: tuple[int, ...]) -> str:
    return sha256(file)
