"""A run's tokenised records, opened once in a process.

Importing this module loads numpy and nothing heavier, and neither does opening records that are
cached.
"""

import functools

from fedlora.config.config import RunConfig
from fedlora.config.sections import DataConfig, ModelConfig
from fedlora.data import data, sources
from fedlora.data.encoding import encoding_key
from fedlora.data.shards import Federation
from fedlora.models import model_files, models


def load(config: RunConfig) -> Federation:
    """Every institution's shard and held-out rows, from the cache if they are there.

    Raises:
        InputError: If the source cannot be read or does not fit the configuration.
    """
    return _load(
        config.seed, config.model, config.data, config.training.max_length, config.privacy.unit
    )


def encoding(config: RunConfig) -> str:
    """The digest of the tokenizer and of all else, but the labels, that turns texts into tokens."""
    return _encoding(config.model, config.data.prompt, config.training.max_length)


def forget() -> None:
    """Drop the records in memory, so that changed sources are read again."""
    _load.cache_clear()
    sources.forget()


def _encoding(model: ModelConfig, prompt: str, max_length: int) -> str:
    files = model_files.files_for(model.name, model.task)
    return encoding_key(files.path, task=model.task, prompt=prompt, max_length=max_length)


@functools.lru_cache(maxsize=1)
def _load(
    seed: int, model: ModelConfig, settings: DataConfig, max_length: int, unit: str
) -> Federation:
    files = model_files.files_for(model.name, model.task)

    def encoder() -> data.Encode:
        from fedlora.config.task_choice import choose_task

        tokenizer = models.load_tokenizer(model.name)
        return choose_task(
            model.task,
            files.kind,
            tokenizer,
            prompt=settings.prompt,
            max_length=max_length,
            positions=files.positions,
            vocabulary=files.vocabulary,
        ).encode

    federation = data.prepare(
        settings,
        unit=unit,
        seed=seed,
        task=model.task,
        encoder=encoder,
        encoding_key=_encoding(model, settings.prompt, max_length),
    )
    return federation.seen_as(settings.view)
