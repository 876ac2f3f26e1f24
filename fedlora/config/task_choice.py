"""The choice of the task that a configuration asks for."""

from typing import Any

from fedlora.data.encoding import (
    LABEL_PROMPT,
    RESPONSE_PROMPT,
    LabelPrompt,
    PlainText,
    ResponsePrompt,
)
from fedlora.errors import InputError
from fedlora.models.base_directory import Kind
from fedlora.models.classification import Classification
from fedlora.models.sft import Sft
from fedlora.models.tasks import Task


def choose_task(
    task: str,
    kind: Kind,
    tokenizer: Any,
    *,
    prompt: str,
    max_length: int,
    positions: int = 0,
    vocabulary: int = 0,
) -> Task:
    """The task of a configuration.

    Args:
        task: ``model.task``.
        kind: The kind of base, which supports the task (`model_files.files_for`).
        tokenizer: A Hugging Face tokenizer in its fast form.
        prompt: ``data.prompt``, for causal models only: a template with ``{text}`` once, and
            ``{labels}`` where it lists them; empty for the task's own.
        max_length: ``training.max-length``, in tokens.
        positions: The model's number of positions; 0 when it sets no limit.
        vocabulary: The number of tokens that the model knows; 0 when that is not known.

    Raises:
        InputError: For a prompt on an encoder, a tokenizer without a fast form, and a length that
            the model cannot take.
    """
    if not tokenizer.is_fast:
        raise InputError(
            "model.name has a tokenizer without a fast form (tokenizer.json); "
            "convert it or use another model"
        )
    limit = min(tokenizer.model_max_length, positions or max_length)
    if max_length > limit:
        raise InputError(
            f"training.max-length is {max_length}, but the base model takes at most "
            f"{limit} tokens; lower it"
        )
    if kind == "encoder":
        if prompt:
            raise InputError(
                "data.prompt is for causal models, but model.name is an encoder; leave it empty"
            )
        plain = PlainText(tokenizer=tokenizer, max_length=max_length)
        return Classification(plain, vocabulary)
    if task == "classification":
        label_prompt = prompt or LABEL_PROMPT
        return Classification(
            LabelPrompt(tokenizer=tokenizer, prompt=label_prompt, max_length=max_length), vocabulary
        )
    response_prompt = prompt or RESPONSE_PROMPT
    return Sft(
        ResponsePrompt(tokenizer=tokenizer, prompt=response_prompt, max_length=max_length),
        vocabulary,
    )
