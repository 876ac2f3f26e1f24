"""Base models: loaded frozen in one dtype from files that `base_directory` has checked.

Weights come from safetensors only (a pickle can run code when it is opened), no code of a model
repository is run, and the directory itself is not shown to transformers (`fedlora.models.weights`).
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import copy
import json
import logging
import shutil
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlora import processors
from fedlora.errors import InputError
from fedlora.extras import require
from fedlora.models.base_directory import (
    TOKENIZER,
    Kind,
    ModelFiles,
    digest,
    encoder_decoder_error,
)
from fedlora.models.model_files import files_for, resolve

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class Base:
    """A frozen base model with its tokenizer.

    Args:
        model: `EncoderClassifier` or a causal language model; no parameter requires a gradient.
        tokenizer: The tokenizer, with a padding token.
        kind: See `ModelFiles`.
        dtype: The dtype of activations and of frozen weights that are not quantised.
        digest: SHA-256 (hex) over every file that was read; equal digests mean equal models.
        name: The model's name, as the user wrote it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    kind: Kind
    dtype: "torch.dtype"
    digest: str
    name: str

    @property
    def dtype_name(self) -> str:
        """The dtype as results name it, such as ``bfloat16``."""
        return str(self.dtype).removeprefix("torch.")


MIN_SPEEDUP = 1.3
"""How much faster a timed product must be, so that processes of one machine agree."""


@cache
def fast_bf16(device: str) -> bool:
    """Whether bf16 products are faster here than those of fp32.

    They are with AMX, and on a GPU from Ampere on. AVX512-bf16 alone does not say it: products take
    half of fp32's time on an AMD EPYC and twice as long on an Intel Xeon whose virtual machine
    hides AMX. There both are timed once a process (some 10 ms).
    """
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return True
    if not capabilities.get("avx512_bf16"):
        return False
    return MIN_SPEEDUP * _product_seconds(torch.bfloat16) < _product_seconds(torch.float32)


def _product_seconds(dtype: "torch.dtype") -> float:
    """The shortest time of ten products of 256 rows with a matrix of MiniLM, on one thread."""
    import torch

    rows, matrix = torch.ones(256, 384, dtype=dtype), torch.ones(384, 384, dtype=dtype)
    seconds: list[float] = []
    with processors.threads(1):
        for _ in range(10):
            started = time.perf_counter()
            torch.mm(rows, matrix)
            seconds.append(time.perf_counter() - started)
    return min(seconds)


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base model, with a padding token.

    Raises:
        InputError: As `resolve`, and if the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    files = resolve(name)
    with tempfile.TemporaryDirectory() as copy:  # transformers finds nothing else in there
        for file in files.read:
            if file.name in ("config.json", *TOKENIZER):
                shutil.copyfile(file, Path(copy) / file.name)
        try:
            with _quiet():  # transformers notes that it does not know a merged classifier's type
                tokenizer: Any = AutoTokenizer.from_pretrained(
                    copy, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:  # errors of Python, transformers or the Rust tokenizers
            raise _cannot_open(files, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> list[Path]:
    """Save a tokenizer that cuts and pads no text by itself, whatever it encoded before.

    Args:
        tokenizer: A tokenizer of `load_tokenizer`.
        directory: An existing directory.

    Returns:
        The files.
    """
    plain = copy.deepcopy(tokenizer)
    plain.backend_tokenizer.no_truncation()
    plain.backend_tokenizer.no_padding()
    return [Path(file) for file in plain.save_pretrained(directory)]


def _cannot_open(files: ModelFiles, error: Exception) -> InputError:
    why = (str(error).splitlines() or [""])[0]
    return InputError(
        f"model.name is {files.name!r}, which transformers cannot open "
        f"({type(error).__name__}: {why}); check the files in {files.path}"
    )


def load_base(
    name: str,
    *,
    dtype: str,
    quantization: str,
    task: str,
    num_labels: int,
    device: str = "cpu",
) -> Base:
    """Load a base model, frozen, in evaluation mode.

    Args:
        name: See `model_files.resolve`.
        dtype: The dtype of weights and activations; ``auto`` is bf16 where `fast_bf16`, else fp32.
        quantization: ``nf4`` or ``int8`` store the linear layers in 4 or 8 bits (bitsandbytes).
            int8 runs without the outlier columns of LLM.int8(), which depend on the whole batch and
            so couple its examples.
        task: ``classification`` puts mean pooling and a zero float32 head on an encoder (a causal
            model scores label words, without a head); ``sft`` needs a causal model.
        num_labels: Classes of the head of an encoder; not used for a causal model.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: As `resolve`, for an architecture that transformers does not know, and for an
            encoder with sft.

    Reference: Dettmers et al. (2023), QLoRA, arXiv 2305.14314; (2022), LLM.int8(),
    arXiv 2208.07339.
    """
    if quantization != "none":
        require("bitsandbytes", "qlora", f"model.quantization {quantization}")
    files = files_for(name, task)
    import torch

    from fedlora.gradients import attention

    weights_dtype = torch.float32
    if dtype == "bf16" or (dtype == "auto" and fast_bf16(device)):
        weights_dtype = torch.bfloat16
    options = _options(quantization, weights_dtype, device)
    logging.getLogger("bitsandbytes").setLevel(
        logging.ERROR
    )  # otherwise it logs a line for each layer and forward
    tokenizer = load_tokenizer(name)
    named = digest(files)
    with _quiet():
        try:
            model = _open(files, num_labels, options)
        except InputError:
            raise
        except Exception as error:  # of Python, transformers, torch or safetensors
            raise _cannot_open(files, error) from error
    if resolve(name).state != files.state:
        raise InputError(
            f"model.name is {name!r}, whose files changed while they were loaded; run again when "
            "nobody writes to them"
        )
    _freeze_behaviour(model)
    attention.use(model)
    model.requires_grad_(False).eval()
    return Base(
        model=model,
        tokenizer=tokenizer,
        kind=files.kind,
        dtype=weights_dtype,
        digest=named,
        name=name,
    )


def _options(quantization: str, dtype: "torch.dtype", device: str) -> dict[str, Any]:
    """Arguments of ``from_pretrained`` for weights of this dtype, on this device."""
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": dtype}
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "nf4",
            load_in_8bit=quantization == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            llm_int8_threshold=0.0,
        )
    if device != "cpu":
        options["device_map"] = {"": device}
    return options


def _open(files: ModelFiles, num_labels: int, options: dict[str, Any]) -> Any:
    """The model of these files; an encoder gets mean pooling and a head."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    from fedlora.models import encoder, weights

    def causal(config: Any) -> Any:
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)

    if files.kind == "causal":
        config = weights.configuration(files.name, files.config)
        model = weights.fill(files, config, causal, options)
        if (own := files.path / "generation_config.json") in files.read:
            model.generation_config = GenerationConfig.from_dict(json.loads(own.read_bytes()))
        return model
    family: Any = encoder.configuration(files)
    # The configuration of a saved T5 encoder denies being an encoder-decoder; its family is one.
    if getattr(type(family), "is_encoder_decoder", False) is True:
        raise encoder_decoder_error(files.name, family.model_type)
    return encoder.load(files, num_labels=num_labels, options=options)


def _freeze_behaviour(model: Any) -> None:
    """Switch off parts that would change a frozen base's results between passes."""
    from torch.nn import Dropout

    for module in model.modules():
        # bitsandbytes repacks a 4-bit weight at the first evaluation on a CPU and then no longer
        # differentiates through the layer, so training after an evaluation would silently lose
        # gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # A frozen base has nothing to regularise; its dropout would tie a row to its place, and
        # OPT's layerdrop and a drop_path leave out whole layers.
        for key, value in vars(module).items():
            if isinstance(value, float) and ("drop" in key or type(module) is Dropout):
                setattr(module, key, 0.0)


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bars and no notes about unused weights while a model is loaded."""
    from transformers.utils import logging as notes

    verbosity, bars = notes.get_verbosity(), notes.is_progress_bar_enabled()
    notes.set_verbosity_error()
    notes.disable_progress_bar()
    try:
        yield
    finally:
        notes.set_verbosity(verbosity)
        if bars:
            notes.enable_progress_bar()
