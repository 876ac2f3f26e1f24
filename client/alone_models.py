"""Models alone that the runs of a sweep share.

A model alone depends on the institution's records, the base and the settings at home, and on
nothing of the federation: neither its noise nor its strategy. A sweep over epsilon would train it
anew for every epsilon. Instead the first run that needs it keeps it in the sweep's directory, and
the others take it from there. The sweep names another directory for other code and on another
machine.

The models are trained without DP: files and directory are their owner's only.
"""

# torch and Opacus type some of their functions in part only
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import hashlib
import logging
import os
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch

from client.home_models import Setting
from fedlora.config.config import TOGETHER_ONLY, RunConfig
from fedlora.data import records
from fedlora.data.shards import Shard
from fedlora.files import write_atomic
from fedlora.models.adapters import AdapterState

log = logging.getLogger("fedlora.client")

DIRECTORY = "FEDLORA_ALONE_MODELS"
"""The environment variable by which a sweep names the directory to the processes of its runs."""


class AloneModel(NamedTuple):
    """A model alone.

    Args:
        adapter: Its adapter.
        setting: The setting by which it was trained.
        right: Whether its trial was right on each of the records held back; empty without any.
        held_back: The number of training records that were held back.
    """

    adapter: AdapterState
    setting: Setting
    right: tuple[bool, ...]
    held_back: int


def place(config: RunConfig, base: str, name: str, shard: Shard) -> Path | None:
    """The file of an institution's model alone; None outside a sweep.

    Args:
        config: The run. Its keys `TOGETHER_ONLY` do not count.
        base: The digest of the base model, its dtype and the classes in their order.
        name: The institution's name.
        shard: Its training records.
    """
    directory = os.environ.get(DIRECTORY)
    if not directory or config.adapter.start:  # a path says nothing of what is there
        return None
    tokens = records.encoding(config)
    inputs = (config.fingerprint(*TOGETHER_ONLY), base, tokens, name, shard.fingerprint)
    digest = hashlib.sha256("\n".join(inputs).encode()).hexdigest()
    return Path(directory) / f"{digest}.safetensors"


def read(file: Path | None, start: AdapterState) -> AloneModel | None:
    """Read a model alone; None if it is not there, damaged or of another shape.

    Args:
        file: Its `place`.
        start: The fresh adapter; gives names and shapes.
    """
    if file is None:
        return None
    try:
        with safetensors.safe_open(file, "pt") as opened:
            about = opened.metadata() or {}
        adapter = AdapterState(safetensors.torch.load_file(file))
        setting = Setting(int(about["steps"]), float(about["learning-rate"]))
        right = tuple(digit == "1" for digit in about["right"])
        held_back = int(about["held-back"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None
    if adapter.validate_against(start):
        return None
    return AloneModel(adapter, setting, right, held_back)


def write(file: Path | None, model: AloneModel) -> None:
    """Write a model alone, for its owner to read only; outside a sweep nothing is written.

    A failure is logged: the next run trains its own.
    """
    if file is None:
        return
    tensors = {name: tensor.contiguous() for name, tensor in model.adapter.items()}
    about = {
        "steps": str(model.setting.steps),
        "learning-rate": repr(model.setting.learning_rate),
        "right": "".join("1" if right else "0" for right in model.right),
        "held-back": str(model.held_back),
    }
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_atomic(file, safetensors.torch.save(tensors, about), mode=0o600)
    except OSError:
        log.warning("the model alone was not kept for other runs", exc_info=True)
