"""The adapter that a run starts from: a fresh one, or one from a directory."""

import json
from pathlib import Path

from fedlora.adapters import CONFIG_FILE, AdapterState
from fedlora.config import AdapterConfig
from fedlora.errors import InputError


def start_adapter(config: AdapterConfig, fresh: AdapterState) -> AdapterState:
    """Read the adapter of ``adapter.start``.

    A head for other classes is left out: the head then starts fresh.

    Args:
        config: The section ``[adapter]``.
        fresh: The adapter of this run as it was attached.

    Returns:
        The adapter, with every tensor of ``fresh``; ``fresh`` itself where nothing is set.

    Raises:
        InputError: If the directory holds no adapter, or one of another base, rank or scale.
    """
    if not config.start:
        return fresh
    folder = Path(config.start)
    try:
        loaded = AdapterState.open(folder)
    except InputError as error:
        raise InputError(f"adapter.start is {config.start}: {error}") from None
    head = fresh.only(("head",))
    if any(loaded.get(name) is None or loaded[name].shape != t.shape for name, t in head.items()):
        loaded = loaded.only(("A", "B", "magnitude")).updated(head)
    if problem := loaded.validate_against(fresh):
        raise InputError(
            f"adapter.start is {config.start}, whose adapter does not fit this run ({problem}); "
            "give an adapter of the same model.name, adapter.method, adapter.rank and "
            "adapter.target-modules"
        )
    try:
        saved = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        scale = float(saved["lora_alpha"]), bool(saved["use_rslora"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(
            f"adapter.start is {config.start}, whose {CONFIG_FILE} cannot be read "
            f"({type(error).__name__}); give a directory that PEFT saved"
        ) from None
    wanted = config.alpha, config.method.endswith("rslora")
    if scale != wanted:
        raise InputError(
            f"adapter.start is {config.start}, an adapter of alpha {scale[0]:g}"
            f"{' with rsLoRA' * scale[1]}; set adapter.alpha and adapter.method to its own"
        )
    return loaded
