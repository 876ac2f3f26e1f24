"""A run's tokenised records, read once in a process."""

from fedlora.config.config import RunConfig
from fedlora.data import data, sources
from fedlora.data.encoding import encoding_key
from fedlora.data.shards import Federation
from fedlora.models import model_files, models

_read: dict[tuple[object, ...], Federation] = {}


def load(config: RunConfig) -> Federation:
    """Every institution's shard and held-out rows.

    Raises:
        InputError: If the source cannot be read or does not fit the configuration.
    """
    key = _key(config)
    if key not in _read:
        from fedlora.config.task_choice import choose_task  # torch

        files = model_files.files_for(config.model.name, config.model.task)
        encode = choose_task(
            config.model.task,
            files.kind,
            models.load_tokenizer(config.model.name),
            prompt=config.data.prompt,
            max_length=config.training.max_length,
            positions=files.positions,
            vocabulary=files.vocabulary,
        ).encode
        unit, task = config.privacy.unit, config.model.task
        federation = data.prepare(
            config.data, unit=unit, seed=config.seed, task=task, encode=encode
        )
        give(config, federation)
    return _read[key]


def give(config: RunConfig, federation: Federation) -> None:
    """Let `load` return these records, which another process has read, for this configuration."""
    _read.clear()
    _read[_key(config)] = federation


def forget() -> None:
    """Drop the records in memory, so that changed sources are read again."""
    _read.clear()
    sources.forget()


def encoding(config: RunConfig) -> str:
    """The digest of the tokenizer and of all else, but the labels, that turns texts into tokens."""
    model, files = config.model, model_files.files_for(config.model.name, config.model.task)
    return encoding_key(
        files.path,
        task=model.task,
        prompt=config.data.prompt,
        max_length=config.training.max_length,
    )


def _key(config: RunConfig) -> tuple[object, ...]:
    return config.seed, config.model, config.data, config.training.max_length, config.privacy.unit
