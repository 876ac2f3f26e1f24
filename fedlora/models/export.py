"""A finished run's adapter in the layout that another program serves."""

import importlib.util
import json
import logging
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedlora.config.config import RunConfig
from fedlora.errors import InputError
from fedlora.files import new_directory, new_path, sync, write_atomic
from fedlora.models import model_files
from fedlora.models.adapters import CONFIG_FILE, WEIGHTS_FILE
from fedlora.runs import finished_run, model_card
from fedlora.runs.run_files import made_at_home, refuse_audited

log = logging.getLogger("fedlora.models.export")
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The values that vLLM takes for ``--max-lora-rank``."""
CARD_FILES = (model_card.CARD, model_card.LABELS)
LORA_CONVERTER, BASE_CONVERTER = "convert_lora_to_gguf.py", "convert_hf_to_gguf.py"
"""Scripts at the top of a checkout of llama.cpp."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
LAST_LINES = 3


CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt")
"""Values of model_type whose linear layers are Conv1D, with swapped factors."""


def vllm(run_dir: Path, out_dir: Path, institution: str = "") -> str:
    """Write the adapter of a causal model as a directory that vLLM serves.

    vLLM reads PEFT's two files, but neither DoRA nor a head beside the low-rank factors, and no
    rank above the largest of `VLLM_RANKS`. The directory also has the tokenizer and the model card,
    and it names no directory of this machine. Of a run on a quantised base a note is logged: vLLM
    opens the base as it is.

    Args:
        run_dir: The directory of a complete run.
        out_dir: The directory to create.
        institution: The institution whose adapter it is, where each has its own.

    Returns:
        The command that serves the adapter.

    Raises:
        InputError: If the run is not complete, ``out_dir`` exists, or vLLM cannot read the adapter.
    """
    new_path(out_dir)
    config, folder, saved = _causal_adapter(run_dir, institution, "vLLM serves")
    rank = int(saved["r"])
    if saved.get("use_dora") or rank > VLLM_RANKS[-1]:
        what = "of DoRA" if saved.get("use_dora") else f"of rank {rank}"
        raise InputError(
            f"{run_dir} has an adapter {what}, which vLLM does not read; merge it with "
            f"`fedlora merge {run_dir} DIRECTORY`, which vLLM serves as a model"
        )
    base = model_card.base_name(config)
    with new_directory(out_dir) as new:
        for file in _files(folder):
            shutil.copyfile(file, new / file.name)
        saved["base_model_name_or_path"] = base
        write_atomic(new / CONFIG_FILE, (json.dumps(saved, indent=2) + "\n").encode())
    _note_quantization(run_dir, config, "vLLM")
    largest = next(allowed for allowed in VLLM_RANKS if allowed >= rank)
    return (
        f"vllm serve {base} --enable-lora --lora-modules {out_dir.name}={out_dir} "
        f"--max-lora-rank {largest}"
    )


def gguf(
    run_dir: Path, out: Path, llama_cpp: Path | None, institution: str = ""
) -> tuple[str, str, str]:
    """Write the adapter of a causal model as a GGUF file, by llama.cpp's own converter.

    The converter is run by this interpreter, offline, as it stands in ``llama_cpp``. It reads the
    adapter and the base model's ``config.json``. It knows only the scale alpha / rank, so that it
    gets an adapter of rsLoRA with alpha times sqrt(rank). It has no form for DoRA, and it swaps
    the two factors of GPT-2's Conv1D. Of a run on a quantised base a note is logged, as by `vllm`.

    Args:
        run_dir: The directory of a complete run.
        out: The file to create; float32.
        llama_cpp: A checkout of llama.cpp.
        institution: The institution whose adapter it is, where each has its own.

    Returns:
        The command that serves the adapter, Python that loads it with llama-cpp-python, and the
        command that makes the base model's file, which both need.

    Raises:
        InputError: If the run is not complete, ``out`` exists, ``llama_cpp`` has no converter, the
            adapter has no such form, or the converter fails. Nothing is written then.
    """
    parent = new_path(out)
    converter = _converter(llama_cpp)
    config, folder, saved = _causal_adapter(run_dir, institution, "llama.cpp takes")
    base = model_files.resolve(config.model.name).path
    kind = json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type")
    # a quantised base has other layers in place of Conv1D, which the adapter does not show
    if saved.get("use_dora") or saved.get("fan_in_fan_out") or kind in CONV1D_MODELS:
        what = "of DoRA" if saved.get("use_dora") else "on GPT-2's Conv1D layers"
        raise InputError(
            f"{run_dir} has an adapter {what}, which {LORA_CONVERTER} does not convert; run "
            f"`fedlora merge {run_dir} DIRECTORY`, then {BASE_CONVERTER} DIRECTORY"
        )
    if saved.get("use_rslora"):
        saved |= {"use_rslora": False, "lora_alpha": saved["lora_alpha"] * math.sqrt(saved["r"])}
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{out.name}-") as scratch:
        adapter, made = Path(scratch) / "adapter", Path(scratch) / "adapter.gguf"
        adapter.mkdir()
        for file in (WEIGHTS_FILE, *CARD_FILES):
            if (folder / file).exists():
                shutil.copyfile(folder / file, adapter / file)
        write_atomic(adapter / CONFIG_FILE, json.dumps(saved).encode())
        arguments = ["--base", base, "--outfile", made, "--outtype", "f32", adapter]
        done = subprocess.run(
            [sys.executable, converter, *arguments],
            env={**os.environ, **OFFLINE},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        if done.returncode or not made.exists():
            said = done.stdout.strip().splitlines()[-LAST_LINES:]
            raise InputError(
                f"{converter} ended with exit code {done.returncode} and no usable file; its last "
                f"lines: {' | '.join(said)}"
            )
        sync(made)
        made.rename(out)
    sync(parent)
    _note_quantization(run_dir, config, "llama.cpp")
    base_file = f"{model_card.base_name(config).rpartition('/')[2]}.gguf"
    return (
        shlex.join(["llama-server", "-m", base_file, "--lora", str(out)]),
        f"Llama(model_path={base_file!r}, lora_path={str(out)!r})",
        shlex.join(
            ["python", str(converter.with_name(BASE_CONVERTER)), str(base), "--outfile", base_file]
        ),
    )


def _converter(llama_cpp: Path | None) -> Path:
    """llama.cpp's script for adapters, which finds `gguf` in its checkout or in this Python."""
    if llama_cpp is None or not (llama_cpp / LORA_CONVERTER).is_file():
        what = "is not given" if llama_cpp is None else f"is {llama_cpp}, without {LORA_CONVERTER}"
        raise InputError(
            f"--llama-cpp {what}; give a checkout of llama.cpp, which has that script at its top"
        )
    if not (llama_cpp / "gguf-py" / "gguf").is_dir() and not importlib.util.find_spec("gguf"):
        raise InputError(
            f"--llama-cpp is {llama_cpp}, without gguf-py/gguf, and the package gguf is not "
            "installed; give a whole checkout, or run: pip install gguf"
        )
    return llama_cpp / LORA_CONVERTER


def _causal_adapter(
    run_dir: Path, institution: str, program_takes: str
) -> tuple[RunConfig, Path, dict[str, Any]]:
    """A complete run's configuration, its adapter's directory and ``adapter_config.json``."""
    if made_at_home(run_dir):
        raise InputError(
            f"{run_dir} has an institution's own model; export is for the adapter that a run "
            "released. `fedlora merge` writes a model that transformers serves"
        )
    config = finished_run.configuration(run_dir, {})
    refuse_audited(run_dir, "export")
    folder = finished_run.adapter_directory(run_dir, config, institution)
    if model_files.resolve(config.model.name).kind != "causal":
        raise InputError(
            f"{run_dir} has an adapter for {config.model.name}, an encoder; {program_takes} "
            "adapters of causal models only. `fedlora merge` writes a model that transformers "
            "serves"
        )
    return config, folder, json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))


def _note_quantization(run_dir: Path, config: RunConfig, program: str) -> None:
    """Say of a run on a quantised base that its figures are not those of the served model."""
    quantization = config.model.quantization
    if quantization == "none":
        return
    rounded = ", but for activations in 8 bits" if quantization == "int8" else ""
    log.warning(
        "note: the figures of %s were measured on its base quantised to %s, and %s opens the base "
        "as it is; `fedlora merge %s DIRECTORY` writes the model that was measured%s",
        run_dir,
        quantization,
        program,
        run_dir,
        rounded,
    )


def _files(folder: Path) -> list[Path]:
    """Weights, model card, class names and tokenizer of an adapter's directory."""
    wanted = (WEIGHTS_FILE, *CARD_FILES)
    return [
        file
        for file in sorted(folder.iterdir())
        if file.name in wanted or file.name.startswith(("tokenizer", "special_tokens", "chat_"))
    ]
