"""A finished run's adapter in the layout that another program serves."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, cast

from fedlora import finished_run, model_card, model_files
from fedlora.adapters import CONFIG_FILE, WEIGHTS_FILE
from fedlora.errors import InputError
from fedlora.files import write_atomic

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""
CARD_FILES = (model_card.CARD, model_card.LABELS)


def vllm(run_dir: Path, out_dir: Path, institution: str = "") -> str:
    """Write the adapter of a causal model as a directory that vLLM serves.

    vLLM reads PEFT's two files, but neither DoRA nor a head beside the low-rank factors, and no
    rank above the largest of `VLLM_RANKS`. The directory also has the tokenizer and the model card,
    and it names no directory of this machine.

    Args:
        run_dir: The directory of a complete run.
        out_dir: The directory to create.
        institution: The institution whose adapter it is, where each has its own.

    Returns:
        The command that serves the adapter.

    Raises:
        InputError: If the run is not complete, ``out_dir`` exists, or vLLM cannot read the adapter.
    """
    parent = finished_run.new_directory(out_dir)
    config = finished_run.configuration(run_dir, {})
    folder = finished_run.adapter_directory(run_dir, config, institution)
    kind = model_files.kind(config.model.name, cast(model_files.Task, config.model.task))
    if kind != "causal":
        raise InputError(
            f"{run_dir} has an adapter for {config.model.name}, an encoder; vLLM serves adapters "
            "of causal models only. `fedlora merge` writes a model that transformers serves"
        )
    saved: dict[str, Any] = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    rank = int(saved["r"])
    if saved.get("use_dora") or rank > VLLM_RANKS[-1]:
        what = "of DoRA" if saved.get("use_dora") else f"of rank {rank}"
        raise InputError(
            f"{run_dir} has an adapter {what}, which vLLM does not read; merge it with "
            f"`fedlora merge {run_dir} DIRECTORY`, which vLLM serves as a model"
        )
    base = model_card.base_name(config)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out_dir.name}-") as scratch:
        new = Path(scratch) / "adapter"
        new.mkdir()
        for file in _files(folder):
            shutil.copyfile(file, new / file.name)
        saved["base_model_name_or_path"] = base
        write_atomic(new / CONFIG_FILE, (json.dumps(saved, indent=2) + "\n").encode())
        new.rename(out_dir)
    largest = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return (
        f"vllm serve {base} --enable-lora --lora-modules {out_dir.name}={out_dir} "
        f"--max-lora-rank {largest}"
    )


def _files(folder: Path) -> list[Path]:
    """Weights, model card, class names and tokenizer of an adapter's directory."""
    wanted = (WEIGHTS_FILE, *CARD_FILES)
    return [
        file
        for file in sorted(folder.iterdir())
        if file.name in wanted or file.name.startswith(("tokenizer", "special_tokens", "chat_"))
    ]
