"""Records with canaries: rows of the auditor, each included or left out by a fair coin.

An audited run trains on files that a user could have written. Its path from records to adapter is
that of every other run.
"""

import csv
import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedlora.config.config import RunConfig
from fedlora.data.partition import normalise
from fedlora.data.rows import PartitionedRows, partition_rows
from fedlora.errors import InputError
from fedlora.privacy.streams import RandomSource

RANDOM_WORDS = 10
"""Words of a canary's text."""
SECRET_PROMPT = "The account number of customer {name} is"
INSTITUTION, TEXT, LABEL = "institution", "text", "label"


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A row that may be in an institution's records.

    Args:
        institution: The institution that may hold the row.
        text: The text.
        label: The label or response.
        inside: Whether the row is in the records.
    """

    institution: str
    text: str
    label: str
    inside: bool


@dataclass(frozen=True, kw_only=True)
class Audited:
    """A configuration whose records hold canaries.

    Args:
        config: The run's configuration with the new files as its source.
        canaries: All canaries, planted or not.
        file: A source with text and label of each canary, in order.
    """

    config: RunConfig
    canaries: tuple[Canary, ...]
    file: Path


def plant(config: RunConfig, count: int, folder: Path) -> Audited:
    """Write the run's records with canaries, partitioned as in the run.

    Args:
        config: The run.
        count: The number of canaries, spread evenly over institutions. Their coin flips come from
            the operating system, their texts from the run's seed.
        folder: The directory of the files.

    Raises:
        InputError: If there are no held-out rows, too few words to make canaries of, or fewer
            canaries than institutions.
    """
    unit = config.privacy.unit
    dealt = partition_rows(config.data, unit=unit, seed=config.seed, task=config.model.task)
    if count < len(dealt.names):
        raise InputError(
            f"--canaries is {count}, fewer than the {len(dealt.names)} institutions; raise it"
        )
    (train, bounds), (held_out, held_bounds) = dealt.train, dealt.held_out
    if not held_out.texts:
        raise InputError(
            "there are 0 held-out rows to measure on; raise data.test-fraction, or give a "
            "data.test-source"
        )
    canaries = _made(dealt, count, RandomSource.seeded("canaries", config.seed))
    units = [] if unit == "record" else [train.others[unit]]
    owners = np.repeat(np.array(dealt.names), np.diff(bounds))
    rows = list(zip(owners, train.texts, train.labels, *units, strict=True))
    rows += [
        (c.institution, c.text, c.label, *[f"canary {i}"] * len(units))
        for i, c in enumerate(canaries)
        if c.inside
    ]
    held_owners = np.repeat(np.array(dealt.names), np.diff(held_bounds))
    held = list(zip(held_owners, held_out.texts, held_out.labels, strict=True))
    _write(folder / "train.csv", [INSTITUTION, TEXT, LABEL, *[unit] * len(units)], rows)
    _write(folder / "held-out.csv", [INSTITUTION, TEXT, LABEL], held)
    _write(folder / "canaries.csv", [TEXT, LABEL], [(c.text, c.label) for c in canaries])
    values = {
        "data.source": str(folder / "train.csv"),
        "data.test-source": str(folder / "held-out.csv"),
        "data.text": TEXT,
        "data.label": LABEL,
        "data.labels": json.dumps(dealt.classes),
        "data.partition": f"natural:{INSTITUTION}",
        "data.institutions": 0,
        "data.min-records": 1,
        "data.max-records": 0,
    }
    return Audited(
        config=config.replace(values), canaries=tuple(canaries), file=folder / "canaries.csv"
    )


def _made(dealt: PartitionedRows, count: int, draw: RandomSource) -> list[Canary]:
    """Canaries of random words with a random class; of account numbers where rows have no class.

    All texts differ, even after `normalise`, so that no canary replaces another one.
    """
    known = {normalise(text) for text in (*dealt.train[0].texts, *dealt.held_out[0].texts)}
    words = sorted({word for text in dealt.train[0].texts for word in text.split()})
    if dealt.classes and len(words) < 2 * RANDOM_WORDS:
        raise InputError(
            f"the training rows have {len(words)} words, too few to make canaries of; give more "
            "records"
        )
    canaries: list[Canary] = []
    number = 0
    while len(canaries) < count:
        source, number = draw.child("canary", number), number + 1
        if dealt.classes:
            picks = source.child("text").permutation(len(words))[:RANDOM_WORDS]
            text = " ".join(words[int(i)] for i in picks)
            label = dealt.classes[int(source.child("label").permutation(len(dealt.classes))[0])]
        else:
            text = SECRET_PROMPT.format(name=f"{number:05}")
            digits = "".join(str(int(u * 10)) for u in source.uniform(8))
            label = f"{digits[:4]} {digits[4:]}"
        if normalise(text) in known:
            continue
        known.add(normalise(text))
        institution = dealt.names[len(canaries) % len(dealt.names)]
        inside = bool(secrets.randbits(1))
        canaries.append(Canary(institution=institution, text=text, label=label, inside=inside))
    return canaries


def _write(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
