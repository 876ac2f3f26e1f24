"""Files of base models: found by hub name, directory or package, and checked without loading.

Importing this module loads neither torch nor transformers. Weights are safetensors only, because a
pickle can run code when it is opened.
"""

# pyright: reportUnknownVariableType=false

import hashlib
import importlib.metadata
import importlib.util
import json
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict, cast

from fedlora.errors import InputError
from fedlora.files import expanded, sha256

Kind = Literal["encoder", "causal"]

CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel", "ModelWithLMHead", "GenerationDecoder")
"""Endings of the class names of causal models in config.json."""
SENSES = ("vision_config", "audio_config")
"""Keys of a config.json of a model that takes more than text."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
MERGED = "merged.json"
"""Of a model of `fedlora merge`: its `Origin` values, those behind its start and base too."""
ONE_INSTITUTION = "(one institution)"
"""``source`` of an `Origin` that stands beside the one with the file of an own model's institution:
in a deployed run, which knows no institution's file, the records may be the same."""
LICENCES = ("LICENSE*", "NOTICE*")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *LICENCES]
HUB_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A base model on this machine's disk, checked but not loaded.

    Args:
        name: The model's name, as the user wrote it.
        path: Directory with ``config.json``, the weights and the tokenizer.
        weights: Its safetensors files, sorted by name.
        kind: ``causal`` for a language model with a head, ``encoder`` for a model that returns
            hidden states.
        positions: The number of positions, the most tokens of a row; 0 when ``config.json`` sets
            no limit.
        vocabulary: The number of tokens that it knows; 0 when ``config.json`` does not say.
    """

    name: str
    path: Path
    weights: tuple[Path, ...]
    kind: Kind
    positions: int
    vocabulary: int


def resolve(name: str) -> ModelFiles:
    """Find a base model and check its files; a hub name is downloaded where that is possible.

    Args:
        name: ``package:NAME``, a directory, or a hub name such as ``org/model``.

    Raises:
        InputError: If it does not exist, is not readable, or holds pickles instead of safetensors.
    """
    if name.startswith("package:"):
        return _inspect(name, _package_directory(name))
    path = expanded(name)
    if path.is_dir():
        return _inspect(name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"model.name is {name!r}, which is no directory here; give a directory with "
            "config.json and *.safetensors, a hub name, or package:NAME"
        )
    return _from_hub(name)


class Origin(TypedDict):
    """A run whose records an adapter or a base model may know."""

    run: str
    """Its id."""
    source: str
    """Its ``data.source``, without the directories of the machine."""
    private: bool
    """Whether the ledger of each institution was charged for what is known of its records."""


def licences(name: str) -> list[Path]:
    """The licence and notice files of a base model, which its copies must keep."""
    files = [file for kind in LICENCES for file in sorted(resolve(name).path.glob(kind))]
    if name.startswith("package:"):
        package = importlib.metadata.distribution(name.removeprefix("package:"))
        files += [Path(str(file.locate())) for file in package.files or ()
                  if any(fnmatch(file.name, kind) for kind in LICENCES)]  # fmt: skip
    return files


def origins_of(found: Any) -> list[Origin]:
    """The origins in the content of a file or a message.

    Raises:
        ValueError, KeyError, TypeError: If it is no list of them.
    """
    if not isinstance(found, list):
        raise ValueError("it is no list of runs")
    return [Origin(run=str(of["run"]), source=str(of["source"]), private=of["private"] is True)
            for of in cast(list[Any], found)]  # fmt: skip


def origins_of_base(name: str) -> list[Origin]:
    """The runs that a base model was merged from; empty for any other base.

    Args:
        name: As of `resolve`.

    Raises:
        InputError: If there is no such model, or its `MERGED` cannot be read.
    """
    path = resolve(name).path  # a merged model may also lie on the hub or in a package
    try:
        found = json.loads((path / MERGED).read_text(encoding="utf-8"))
        if isinstance(found, dict):  # of an earlier version, which named the merged run only
            found = cast(Any, [found])
        if not found:
            raise ValueError("it names no run")
        return origins_of(found)
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(
            f"model.name is {name!r}, whose {MERGED} cannot be read ({type(error).__name__}); "
            "merge the model again"
        ) from None


def _package_directory(name: str) -> Path:
    package = name.removeprefix("package:")
    module = package.replace("-", "_")
    spec = importlib.util.find_spec(module) if module.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise InputError(
            f"model.name is {name!r}, but no Python package {package!r} is installed; "
            f"run: pip install {package}"
        )
    root = Path(next(iter(spec.submodule_search_locations)))
    for config in sorted(root.rglob("config.json"), key=lambda file: (len(file.parts), file)):
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    raise InputError(
        f"model.name is {name!r}, but that package ships no directory with config.json and "
        "*.safetensors; name a package that does"
    )


def _from_hub(name: str) -> ModelFiles:
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    def snapshot(*, local_files_only: bool) -> Path:
        return Path(
            snapshot_download(
                name,
                local_files_only=local_files_only,
                allow_patterns=HUB_FILES,
                etag_timeout=HUB_TIMEOUT_SECONDS,
            )
        )

    here = expanded(name).absolute()
    hint = f"download it where there is a network (hf download {name}) or give a directory"
    incomplete: InputError | None = None  # names the problem of a copy in the cache
    try:
        return _inspect(name, snapshot(local_files_only=True))
    except HFValidationError:
        raise InputError(
            f"model.name is {name!r}, which is neither a directory here ({here}) nor a hub name; "
            "give a directory, org/model, or package:NAME"
        ) from None
    except InputError as error:
        if constants.HF_HUB_OFFLINE:
            raise
        incomplete = error
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"model.name is {name!r}, which is neither a directory ({here}) nor in the hub "
                f"cache of this machine, and HF_HUB_OFFLINE is set; {hint}"
            ) from None
    try:
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT_SECONDS)
        listed = {file.rfilename for file in info.siblings or ()}
        if not any(file.endswith(".safetensors") for file in listed):
            raise _no_safetensors(
                name, pickled=any(Path(file).match(p) for file in listed for p in PICKLES)
            )
        return _inspect(name, snapshot(local_files_only=False))
    except InputError:
        raise
    except RepositoryNotFoundError:
        raise InputError(
            f"model.name is {name!r}, which is no directory here ({here}), and which the hub does "
            "not have or does not show without a login; check the name, or run: hf auth login"
        ) from None
    except Exception as error:  # each transport has its own errors
        raise incomplete or InputError(
            f"model.name is {name!r}, which is not on this machine ({here}, hub cache), and the "
            f"hub cannot be reached ({type(error).__name__}); {hint}"
        ) from None


def _no_safetensors(name: str, *, pickled: bool) -> InputError:
    if pickled:
        return InputError(
            f"model.name is {name!r}, whose weights are pickles only, which can run code when "
            "opened; convert them (save_pretrained writes safetensors) or choose another model"
        )
    return InputError(
        f"model.name is {name!r}, which holds neither model.safetensors nor "
        "model.safetensors.index.json; give a directory with config.json and one of these"
    )


def _inspect(name: str, path: Path) -> ModelFiles:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if type(config) is not dict:
            raise ValueError("no object")
        architectures: list[str] = config.get("architectures") or []
        causal = any(item.endswith(CAUSAL_ARCHITECTURES) for item in architectures)
        own = config.get("encoder") or config  # a merged classifier describes its encoder there
        positions = int(own.get("max_position_embeddings") or own.get("n_positions") or 0)
        text = own.get("text_config") or own
        vocabulary = int(text.get("vocab_size") or 0)
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RecursionError,
    ) as error:
        raise InputError(
            f"model.name is {name!r}, whose config.json cannot be read ({type(error).__name__}); "
            f"it belongs into {path}"
        ) from None
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        weights = (path / "model.safetensors",)
    elif index.is_file():
        try:
            shards: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            weights = tuple(path / file for file in sorted(set(shards.values())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise InputError(
                f"model.name is {name!r}, whose {index.name} cannot be read; download it again"
            ) from None
    else:
        raise _no_safetensors(name, pickled=any(any(path.glob(p)) for p in PICKLES))
    if missing := [file.name for file in weights if not file.is_file()]:
        raise InputError(
            f"model.name is {name!r}, which lacks {', '.join(missing)} in {path}; download it again"
        )
    if config.get("is_encoder_decoder"):
        raise encoder_decoder_error(name, config.get("model_type"))
    if not causal and (senses := [key for key in SENSES if config.get(key)]):
        raise InputError(
            f"model.name is {name!r}, a model of more than text ({senses[0]} in its config.json); "
            "choose a checkpoint for text only"
        )
    how: Any = config.get("quantization_config")
    method: Any = cast(dict[str, Any], how).get("quant_method") if isinstance(how, dict) else how
    packed = isinstance(how, dict) and ("load_in_4bit" in how or "load_in_8bit" in how)
    if how and not packed and method != "bitsandbytes":
        raise InputError(
            f"model.name is {name!r}, whose weights are quantised already ({str(method)[:40]!r}), "
            "which fedlora can neither train on exactly nor merge; take the checkpoint that it "
            "was made from, with model.quantization nf4 or int8 where memory is short"
        )
    return ModelFiles(
        name=name,
        path=path,
        weights=weights,
        kind="causal" if causal else "encoder",
        positions=positions,
        vocabulary=vocabulary,
    )


def encoder_decoder_error(name: str, model_type: Any) -> InputError:
    """The error for an encoder-decoder or a part of one."""
    return InputError(
        f"model.name is {name!r}, an encoder-decoder or a part of one ({model_type}); "
        "choose an encoder or a causal language model"
    )


def digest(weights: tuple[Path, ...]) -> str:
    """SHA-256 (hex) over the weight files.

    Each process reads every file itself, and reads it again when it was written or replaced.
    """
    digests = [_file_digest(file, _identity(file)) for file in map(Path.resolve, weights)]
    if len(digests) == 1:
        return digests[0]
    lines = "".join(f"{file.name} {value}\n" for file, value in zip(weights, digests, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()


def _identity(file: Path) -> tuple[int, ...]:
    """Numbers that change when a file is written or replaced: no program can set ctime."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def _file_digest(file: Path, identity: tuple[int, ...]) -> str:
    return sha256(file)


def files_for(name: str, task: str) -> ModelFiles:
    """The files of a base model as by `resolve`, checked to support ``model.task``.

    Raises:
        InputError: As `resolve`, and for a task that the model does not support.
    """
    found = resolve(name)
    if task == "sft" and found.kind != "causal":
        raise InputError(
            f"model.name is {name!r}, an encoder, which cannot write the responses of task sft; "
            "choose a causal language model or model.task = 'classification'"
        )
    return found
