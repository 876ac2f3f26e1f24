"""A base model filled with the weights of its directory, and nothing but its own parameters.

The directory itself is never given to transformers, which would look in it for adapters, other
weights and code: the architecture follows from config.json alone, and the weights are tensors that
were read from the safetensors files of `ModelFiles`.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, PreTrainedConfig

from fedlora.errors import InputError
from fedlora.models.base_directory import ModelFiles


def configuration(name: str, content: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of an architecture that transformers itself knows.

    Args:
        name: The model's name, as the user wrote it.
        content: Of a config.json.

    Raises:
        InputError: If transformers knows no such ``model_type``.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise InputError(
            f"model.name is {name!r}, whose config.json has model_type {kind!r}, which "
            "transformers does not know; choose a model that it knows itself"
        )
    return CONFIG_MAPPING[kind].from_dict(dict(content))


def fill(
    files: ModelFiles,
    config: PreTrainedConfig,
    build: Callable[[Any], Any],
    options: Mapping[str, Any],
) -> Any:
    """The model of a configuration with the weights of a directory.

    Args:
        files: The directory.
        config: The configuration.
        build: Makes the model with weights of any value.
        options: Arguments of ``from_pretrained``.

    Returns:
        A model whose parameters are those of ``build(config)`` by name and shape, each read from
        the files. Tensors of the files that the architecture does not have, such as the head of
        another task, are not loaded.

    Raises:
        InputError: If a weight is missing or two files hold one of the same name, or if a parameter
            is not the architecture's.
    """
    with torch.device("meta"):
        reference = build(config)
    model, found = type(reference).from_pretrained(
        None,  # no directory
        config=config,
        state_dict=_read(files),
        output_loading_info=True,
        trust_remote_code=False,
        **options,
    )
    expected = dict(reference.named_parameters())
    loaded = dict(model.named_parameters())
    wrong = {*found["missing_keys"], *(expected.keys() ^ loaded.keys())}
    wrong |= {n for n, p in loaded.items() if n in expected and not _fits(p, expected[n].shape)}
    if wrong:
        raise InputError(
            f"model.name is {files.name!r}, whose weights are not those of its config.json: "
            f"{min(wrong)} is missing, or has another shape, or is no part of it "
            f"({len(wrong)} such); download the model again"
        )
    return model


def _fits(parameter: Any, shape: torch.Size) -> bool:
    """Whether a parameter has a shape; a quantised one is packed, and a Conv1D's transposed."""
    state = getattr(parameter, "quant_state", None)
    own = parameter.shape if state is None else torch.Size(state.shape)
    return own == shape or (not parameter.is_floating_point() and own == shape[::-1])


def _read(files: ModelFiles) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in files.weights:
        content = load_file(file)
        if twice := tensors.keys() & content.keys():
            raise InputError(
                f"model.name is {files.name!r}, where {file.name} and another file hold "
                f"{min(twice)}; download the model again"
            )
        tensors |= content
    return tensors
