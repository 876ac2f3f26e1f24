"""A run's tokenised records, opened once in a process.

Importing this module loads numpy and nothing heavier, and neither does opening records that are
cached.
"""

import functools
from typing import cast

from fedlora import data, model_files, models, sources
from fedlora.config import RunConfig
from fedlora.encoding import encoding_key
from fedlora.sections import DataConfig, ModelConfig
from fedlora.shards import Federation


def load(config: RunConfig) -> Federation:
    """Every institution's shard and held-out rows, from the cache if they are there.

    Raises:
        InputError: If the source cannot be read or does not fit the configuration.
    """
    return _load(
        config.seed, config.model, config.data, config.training.max_length, config.privacy.unit
    )


def forget() -> None:
    """Drop the records in memory, so that changed sources are read again."""
    _load.cache_clear()
    sources.forget()


@functools.lru_cache(maxsize=1)
def _load(
    seed: int, model: ModelConfig, settings: DataConfig, max_length: int, unit: str
) -> Federation:
    task = cast(model_files.Task, model.task)
    kind = model_files.kind(model.name, task)
    files = model_files.resolve(model.name)

    def encoder() -> data.Encode:
        from fedlora.task_choice import choose_task

        tokenizer = models.load_tokenizer(model.name)
        return choose_task(
            task,
            kind,
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
        task=task,
        encoder=encoder,
        encoding_key=encoding_key(
            files.path, task=task, prompt=settings.prompt, max_length=max_length
        ),
    )
    return federation.seen_as(settings.view)
