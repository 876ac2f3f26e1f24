"""Base models: found by hub name, directory or package, checked, loaded frozen in one dtype.

`resolve` is cheap: it imports neither torch nor transformers and says what is wrong before anything
is loaded. Weights come from safetensors only (a pickle can run code when opened), and no code of a
model repository is run.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import hashlib
import importlib.util
import json
import logging
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fedlora.errors import InputError
from fedlora.extras import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["encoder", "causal"]
Dtype = Literal["auto", "fp32", "bf16"]
Quantization = Literal["none", "nf4", "int8"]
Task = Literal["classification", "sft"]

CAUSAL_ARCHITECTURES = ("ForCausalLM", "LMHeadModel")  # endings of class names in config.json
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
HUB_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """A base model on this machine's disk, checked but not loaded.

    Args:
        name: As the user wrote it.
        path: Directory with ``config.json``, the weights and the tokenizer.
        weights: Its safetensors files, sorted by name.
        kind: ``causal`` for a language model with a head, ``encoder`` for everything that returns
            hidden states.
        positions: The most tokens of a row that it can place; 0 when ``config.json`` sets no limit.
    """

    name: str
    path: Path
    weights: tuple[Path, ...]
    kind: Kind
    positions: int


@dataclass(frozen=True, kw_only=True)
class Base:
    """A frozen base model with its tokenizer.

    Args:
        model: `EncoderClassifier` or a causal language model; no parameter requires a gradient.
        tokenizer: With a padding token.
        kind: See `ModelFiles`.
        dtype: Of the frozen weights that are not quantised, and of the activations.
        digest: SHA-256 (hex) of the weight files; equal digests mean equal weights.
        name: As the user wrote it.
    """

    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    kind: Kind
    dtype: "torch.dtype"
    digest: str
    name: str


def resolve(name: str) -> ModelFiles:
    """Find a base model and check its files; a hub name is downloaded where that is possible.

    Args:
        name: ``package:NAME``, a directory, or a hub name such as ``org/model``.

    Raises:
        InputError: If it is not there, is not readable, or holds pickles instead of safetensors.
    """
    if name.startswith("package:"):
        return _inspect(name, _package_directory(name))
    path = Path(name).expanduser()
    if path.is_dir():
        return _inspect(name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(
            f"model.name is {name!r}, which is no directory here; give a directory with "
            "config.json and *.safetensors, a hub name, or package:NAME"
        )
    return _from_hub(name)


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
        "*.safetensors; name one that does"
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
                etag_timeout=HUB_SECONDS,
            )
        )

    hint = f"download it where there is a network (hf download {name}) or give a directory"
    incomplete: InputError | None = None  # what is wrong with a copy in the cache
    try:
        return _inspect(name, snapshot(local_files_only=True))
    except HFValidationError:
        raise InputError(
            f"model.name is {name!r}, which is neither a directory here nor a hub name; "
            "give a directory, org/model, or package:NAME"
        ) from None
    except InputError as error:
        if constants.HF_HUB_OFFLINE:
            raise
        incomplete = error
    except OSError:
        if constants.HF_HUB_OFFLINE:
            raise InputError(
                f"model.name is {name!r}, which is neither a directory nor in the hub cache of "
                f"this machine, and HF_HUB_OFFLINE is set; {hint}"
            ) from None
    try:
        listed = {
            file.rfilename for file in HfApi().model_info(name, timeout=HUB_SECONDS).siblings or ()
        }
        if not any(file.endswith(".safetensors") for file in listed):
            raise _no_safetensors(
                name, pickled=any(Path(file).match(p) for file in listed for p in PICKLES)
            )
        return _inspect(name, snapshot(local_files_only=False))
    except InputError:
        raise
    except RepositoryNotFoundError:
        raise InputError(
            f"model.name is {name!r}, which the hub does not have or does not show without "
            "a login; check the name, or run: hf auth login"
        ) from None
    except Exception as error:  # every transport has errors of its own
        raise incomplete or InputError(
            f"model.name is {name!r}, which is not on this machine, and the hub cannot be reached "
            f"({type(error).__name__}); {hint}"
        ) from None


def _no_safetensors(name: str, *, pickled: bool) -> InputError:
    if pickled:
        return InputError(
            f"model.name is {name!r}, whose weights are pickles only, which can run code when "
            "opened; convert them (save_pretrained writes safetensors) or choose another model"
        )
    return InputError(
        f"model.name is {name!r}, which holds no *.safetensors; give a directory with config.json "
        "and model.safetensors"
    )


def _inspect(name: str, path: Path) -> ModelFiles:
    try:
        config: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        if type(config) is not dict:
            raise ValueError("no object")
        architectures: list[str] = config.get("architectures") or []
        causal = any(item.endswith(CAUSAL_ARCHITECTURES) for item in architectures)
        positions = int(config.get("max_position_embeddings") or config.get("n_positions") or 0)
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
        raise _encoder_decoder(name, config.get("model_type"))
    return ModelFiles(
        name=name,
        path=path,
        weights=weights,
        kind="causal" if causal else "encoder",
        positions=positions,
    )


def _encoder_decoder(name: str, model_type: Any) -> InputError:
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
    """Numbers of which one changes when a file is written or replaced: no program sets ctime."""
    stat = file.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


@cache
def _file_digest(file: Path, identity: tuple[int, ...]) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def fast_bf16(device: str) -> bool:
    """Whether bf16 products are native here: AMX or AVX512-bf16, or a GPU from Ampere on."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def kind(name: str, task: Task) -> Kind:
    """The kind of a base model, without loading it.

    Raises:
        InputError: As `resolve`, and for a task that the model cannot do.
    """
    found = resolve(name).kind
    if task == "sft" and found != "causal":
        raise InputError(
            f"model.name is {name!r}, an encoder, which cannot write the responses of task sft; "
            "choose a causal language model or model.task = 'classification'"
        )
    return found


def load_tokenizer(name: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a base model, with a padding token.

    Raises:
        InputError: As `resolve`, and if the directory holds no tokenizer.
    """
    from transformers import AutoTokenizer

    files = resolve(name)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            files.path, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # of Python, transformers or the Rust tokenizers
        raise _cannot_open(files, error) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _cannot_open(files: ModelFiles, error: Exception) -> InputError:
    if "trust_remote_code" in str(error):
        return InputError(
            f"model.name is {files.name!r}, which needs code of its own directory ({files.path}) "
            "to be opened, and such code is never run; choose a model that transformers itself "
            "knows"
        )
    why = (str(error).splitlines() or [""])[0]
    return InputError(
        f"model.name is {files.name!r}, which transformers cannot open "
        f"({type(error).__name__}: {why}); check the files in {files.path}"
    )


def load_base(
    name: str,
    *,
    dtype: Dtype,
    quantization: Quantization,
    task: Task,
    num_labels: int,
    device: str = "cpu",
) -> Base:
    """Load a base model, frozen, in evaluation mode.

    Args:
        name: See `resolve`.
        dtype: Of weights and activations; ``auto`` is bf16 where `fast_bf16`, else fp32.
        quantization: ``nf4`` or ``int8`` store the linear layers in 4 or 8 bits (bitsandbytes).
            int8 runs without the outlier columns of LLM.int8(), which are picked over the whole
            batch and so couple its examples.
        task: ``classification`` puts mean pooling and a zero float32 head on an encoder (a causal
            model scores label words, without a head); ``sft`` needs a causal model.
        num_labels: Classes of the head of an encoder; not used for a causal model.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        InputError: As `resolve`, for an architecture that transformers does not know, and for an
            encoder with sft.
    """
    if quantization != "none":
        require("bitsandbytes", "qlora", f"model.quantization {quantization}")
    files = resolve(name)
    kind(name, task)
    import torch
    from torch.nn import Dropout
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    from fedlora import attention, encoder

    weights_dtype = torch.float32
    if dtype == "bf16" or (dtype == "auto" and fast_bf16(device)):
        weights_dtype = torch.bfloat16
    options: dict[str, Any] = {
        "dtype": weights_dtype,
        "local_files_only": True,
        "use_safetensors": True,
    }
    if quantization != "none":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantization == "nf4",
            load_in_8bit=quantization == "int8",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=weights_dtype,
            llm_int8_threshold=0.0,
        )
    if device != "cpu":
        options["device_map"] = {"": device}
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # else a line per layer and forward
    tokenizer = load_tokenizer(name)
    weights_digest = digest(files.weights)
    with _quiet():
        try:
            if files.kind == "causal":
                model: Any = AutoModelForCausalLM.from_pretrained(
                    files.path, trust_remote_code=False, **options
                )
            else:
                family: Any = AutoConfig.from_pretrained(
                    files.path, local_files_only=True, trust_remote_code=False
                )
                # A T5 encoder saved by itself says that it is no encoder-decoder; its family is.
                if getattr(type(family), "is_encoder_decoder", False) is True:
                    raise _encoder_decoder(name, family.model_type)
                model = encoder.load(files.path, name=name, num_labels=num_labels, options=options)
        except InputError:
            raise
        except Exception as error:  # of Python, transformers, torch or safetensors
            raise _cannot_open(files, error) from error
    if digest(files.weights) != weights_digest:
        raise InputError(
            f"model.name is {name!r}, whose weights changed while they were loaded; run again when "
            "nobody writes to them"
        )
    for module in model.modules():
        # bitsandbytes repacks a 4-bit weight at the first evaluation on a CPU and then no longer
        # differentiates through the layer, so training after an evaluation would silently lose
        # gradients.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # A frozen base has nothing to regularise; its dropout would tie a row to its place.
        for key, value in vars(module).items():
            if isinstance(value, float) and ("dropout" in key or type(module) is Dropout):
                setattr(module, key, 0.0)
    attention.use(model)
    model.requires_grad_(False).eval()
    return Base(
        model=model,
        tokenizer=tokenizer,
        kind=files.kind,
        dtype=weights_dtype,
        digest=weights_digest,
        name=name,
    )


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
