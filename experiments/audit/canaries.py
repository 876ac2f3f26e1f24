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

from fedlora.arrays import Int64
from fedlora.config.config import RunConfig
from fedlora.data.partition import normalise
from fedlora.data.rows import Table, partition_rows
from fedlora.errors import InputError
from fedlora.privacy.streams import RandomSource

KINDS = ("wrong label", "random words", "secret")
RANDOM_WORDS = 10  # words of a text of random words
SECRET_PROMPT = "The account number of customer {name} is"
INSTITUTION, TEXT, LABEL = "institution", "text", "label"


@dataclass(frozen=True, kw_only=True)
class Canary:
    """A row that may be in an institution's records.

    Args:
        institution: The institution that may hold the row.
        kind: One of ``KINDS``.
        text: The text.
        label: The label or response.
        inside: Whether the row is in the records.
    """

    institution: str
    kind: str
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
        InputError: If there are too few held-out rows to make canaries, or none that attacks
            could compare with training records, or fewer canaries than institutions.
    """
    dealt = partition_rows(
        config.data, unit=config.privacy.unit, seed=config.seed, task=config.model.task
    )
    if count < len(dealt.names):
        raise InputError(
            f"--canaries is {count}, fewer than the {len(dealt.names)} institutions; raise it"
        )
    draw = RandomSource.seeded("canaries", config.seed)
    train, held_out = dealt.train[0], dealt.held_out[0]
    if config.model.task == "sft":
        if not held_out.texts:
            raise InputError(
                "the run has 0 held-out rows, and an audit compares training records with at least "
                "1; raise data.test-fraction, or give a data.test-source"
            )
        canaries, used = _secrets(dealt.names, count, draw), np.empty(0, np.int64)
    else:
        canaries, used = _rows(dealt.names, dealt.classes, train, held_out, count, draw)
    kept = np.setdiff1d(np.arange(len(held_out.texts)), used)
    rest = held_out.take(kept)
    owners = np.repeat(np.array(dealt.names), np.diff(dealt.train[1]))
    inside = [canary for canary in canaries if canary.inside]
    unit = config.privacy.unit
    columns = [INSTITUTION, TEXT, LABEL, *([] if unit == "record" else [unit])]
    units = [] if unit == "record" else [train.others[unit]]
    rows = list(zip(owners, train.texts, train.labels, *units, strict=True))
    rows += [
        (c.institution, c.text, c.label, *([] if unit == "record" else [f"canary {i}"]))
        for i, c in enumerate(inside)
    ]
    held_owners = np.repeat(np.array(dealt.names), np.diff(dealt.held_out[1]))
    write(folder / "train.csv", columns, rows)
    write(
        folder / "held-out.csv",
        columns[:3],
        list(zip(held_owners[kept], rest.texts, rest.labels, strict=True)),
    )
    write(folder / "canaries.csv", [TEXT, LABEL], [(c.text, c.label) for c in canaries])
    return Audited(
        config=config.replace(
            {
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
        ),
        canaries=tuple(canaries),
        file=folder / "canaries.csv",
    )


def _rows(
    names: tuple[str, ...],
    classes: tuple[str, ...],
    train: Table,
    held_out: Table,
    count: int,
    draw: RandomSource,
) -> tuple[list[Canary], Int64]:
    """Make canaries of held-out texts with a wrong label, and of random words.

    All texts differ, even after `normalise`, so that no canary replaces another one.

    Returns:
        The canaries, and the indices of the held-out rows that they use.
    """
    distinct = {normalise(text): row for row, text in enumerate(held_out.texts)}
    known = {normalise(text) for text in train.texts}
    free = [row for text, row in distinct.items() if text not in known]
    wrong = min(count // 2, len(free) // 2)  # the other half stays held out
    vocabulary = sorted({word for text in train.texts for word in text.split()})
    if not wrong or len(vocabulary) < RANDOM_WORDS:
        raise InputError(
            f"{len(held_out.texts)} held-out rows are too few to make canaries of; raise "
            "data.test-fraction, or give more records"
        )
    order = draw.child("texts").permutation(len(free))[:wrong]
    texts = [(row := free[int(i)], held_out.texts[row], held_out.labels[row]) for i in order]
    words = draw.child("words")
    canaries: list[Canary] = []
    for number in range(count):
        # Every institution gets half of each kind while held-out texts last.
        institution = names[number % len(names)]
        source = draw.child("label", number)
        if (number // len(names)) % 2 == 0 and texts:
            _, text, label = texts.pop()
            others = [name for name in classes if name != label]
            kind, label = KINDS[0], others[int(source.permutation(len(others))[0])]
        else:
            picks = words.child("text", number).permutation(len(vocabulary))[:RANDOM_WORDS]
            text = " ".join(vocabulary[int(i)] for i in picks)
            kind, label = KINDS[1], classes[int(source.permutation(len(classes))[0])]
        inside = bool(secrets.randbits(1))
        canaries.append(
            Canary(institution=institution, kind=kind, text=text, label=label, inside=inside)
        )
    taken = np.array([free[int(i)] for i in order], dtype=np.int64)
    spent = {normalise(held_out.texts[row]) for row in taken}
    used = [row for row, text in enumerate(held_out.texts) if normalise(text) in spent]
    return canaries, np.array(used, dtype=np.int64)


def _secrets(names: tuple[str, ...], count: int, draw: RandomSource) -> list[Canary]:
    """Make account numbers of eight digits, each after its own prompt."""
    return [
        Canary(
            institution=names[number % len(names)],
            kind=KINDS[2],
            text=SECRET_PROMPT.format(name=f"{number:05}"),
            label=secret(draw.child("secret", number)),
            inside=bool(secrets.randbits(1)),
        )
        for number in range(count)
    ]


def secret(draw: RandomSource) -> str:
    """Draw an account number: two groups of four digits."""
    digits = "".join(str(int(u * 10)) for u in draw.uniform(8))
    return f"{digits[:4]} {digits[4:]}"


def write(path: Path, columns: list[str], rows: list[tuple[str, ...]]) -> None:
    """Write a CSV file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
