"""A run's tokenised records, opened once in a process.

Importing this module loads numpy and nothing heavier, and neither does opening records that are
cached.
"""

import functools
from typing import Any

from fedlora import data, models
from fedlora.config import RunConfig
from fedlora.encoding import encoding_key
from fedlora.shards import Federation


def load(config: RunConfig) -> Federation:
    """Every institution's shard and held-out rows, from the cache when it has them.

    Raises:
        InputError: If the source cannot be read or does not fit the configuration.
    """
    return _load(
        config.seed, config.model, config.data, config.training.max_length, config.privacy.unit
    )


def forget() -> None:
    """Let go of the records in memory: their sources have changed."""
    _load.cache_clear()


@functools.lru_cache(maxsize=1)
def _load(seed: int, model: Any, source: Any, max_length: int, unit: str) -> Federation:
    kind = models.kind(model.name, model.task)
    files = models.resolve(model.name)

    def encoder() -> data.Encode:
        from fedlora import tasks

        tokenizer = models.load_tokenizer(model.name)
        return tasks.make(
            model.task,
            kind,
            tokenizer,
            prompt=source.prompt,
            max_length=max_length,
            positions=files.positions,
        ).encode

    federation = data.prepare(
        source=source.source,
        test_source=source.test_source,
        text=source.text,
        label=source.label,
        labels=source.labels,
        unit=unit,
        partition=source.partition,
        institutions=source.institutions,
        min_records=source.min_records,
        test_fraction=source.test_fraction,
        seed=seed,
        task=model.task,
        encoder=encoder,
        encoding_key=encoding_key(
            files.path, task=model.task, prompt=source.prompt, max_length=max_length
        ),
    )
    return federation.seen_as(source.view)
