from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.data import shard_of
from fedlora.data.encoding import Encoded
from fedlora.data.shards import Federation, Shard, concatenate


def shard(*rows: tuple[list[int], int], units: list[int] | None = None) -> Shard:
    ids, targets = [row for row, _ in rows], [target for _, target in rows]
    records = np.array([[sum(row)] * 32 for row in ids], dtype=np.uint8).reshape(-1, 32)
    made = shard_of(Encoded(ids=ids, targets=targets, truncated=[False] * len(rows)), records)
    return made if units is None else replace(made, units=np.array(units, dtype=np.int64))


ABC = shard(([1, 2, 3], 0), ([4], 1), ([5, 6], 0))


def contents(of: Shard) -> list[tuple[list[int], int, int]]:
    return [(of.row(i).tolist(), int(of.targets[i]), int(of.units[i])) for i in range(len(of))]


def federation() -> Federation:
    whole = shard(([1, 2, 3], 0), ([4], 1), ([7], 1), ([5, 6], 0))
    return Federation(
        names=("a", "b"),
        labels=("no", "yes"),
        counts={"rows": 4},
        all_train=replace(whole.select([0, 1, 3]), units=np.arange(3)),
        train_bounds=np.array([0, 1, 3]),
        all_held_out=replace(whole.select([2]), units=np.arange(1)),
        held_out_bounds=np.array([0, 0, 1]),
    )


def test_rows_and_lengths_are_those_of_the_corpus() -> None:
    assert len(ABC) == 3
    assert ABC.lengths.tolist() == [3, 1, 2]
    assert ABC.row(1).tolist() == [4]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            ABC.row(outside)


def test_rows_come_in_the_order_asked_for_and_no_token_is_copied() -> None:
    picked = ABC.select([2, 0, 2])
    assert contents(picked) == [([5, 6], 0, 2), ([1, 2, 3], 0, 0), ([5, 6], 0, 2)]
    assert (picked.lengths.tolist(), picked.records[:, 0].tolist()) == ([2, 3, 2], [11, 6, 11])
    assert contents(picked.select([1])) == [([1, 2, 3], 0, 0)]
    assert contents(ABC.select([])) == []
    part = ABC.select(slice(1, 3))
    assert contents(part) == [([4], 1, 1), ([5, 6], 0, 2)]
    both = concatenate([picked, part])
    assert contents(both) == [*contents(picked), *contents(part)]
    for one in (picked, part, both):
        assert one.corpus is ABC.corpus
        assert np.shares_memory(one.row(1), ABC.corpus.tokens)


@given(st.permutations(range(6)), st.permutations(range(3)))
def test_the_fingerprint_ignores_the_order_of_rows_and_the_numbers_of_units(
    order: list[int], numbers: list[int]
) -> None:
    groups = [0, 0, 1, 2, 2, 2]
    rows = [([10 + i], 0) for i in range(6)]
    original = shard(*rows, units=groups)
    shuffled = shard(*(rows[i] for i in order), units=[numbers[groups[i]] for i in order])
    assert shuffled.fingerprint == original.fingerprint


def test_the_fingerprint_changes_with_records_copies_and_grouping_but_not_with_tokens() -> None:
    rows = [([10], 0), ([11], 1), ([12], 0)]
    base = shard(*rows)
    others = [
        shard(*rows[:2]),
        shard(*rows, ([12], 0)),
        shard(([13], 0), *rows[1:]),
        shard(*rows, units=[0, 0, 1]),
        shard(*rows, units=[0, 1, 1]),
    ]
    assert len({s.fingerprint for s in (base, *others)}) == 6
    retokenised = replace(base, corpus=replace(base.corpus, tokens=base.corpus.tokens + 1))
    assert retokenised.fingerprint == base.fingerprint


def test_a_shard_made_of_another_never_has_its_fingerprint() -> None:
    base = shard(([10], 0), ([11], 1), ([12], 0))
    whole = federation()
    made = whole.train(1).fingerprint, base.fingerprint
    assert base.select([0, 1]).fingerprint == shard(([10], 0), ([11], 1)).fingerprint
    one_unit = replace(base, units=np.zeros(3, dtype=np.int64))
    assert one_unit.fingerprint == shard(([10], 0), ([11], 1), ([12], 0), units=[0] * 3).fingerprint
    assert (one_unit.num_units, base.num_units) == (1, 3)
    moved = replace(whole, train_bounds=np.array([0, 2, 3]))
    assert moved.train(1).fingerprint == whole.all_train.select([2]).fingerprint != made[0]
    assert (whole.train(1).fingerprint, base.fingerprint) == made


def test_each_unit_has_its_rows_in_order_and_there_is_no_other_unit() -> None:
    grouped = shard(([10], 0), ([11], 1), ([12], 0), ([13], 0), units=[5, 2, 5, 9])
    assert [grouped.rows_of_unit(i).tolist() for i in range(3)] == [[1], [0, 2], [3]]
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            grouped.rows_of_unit(outside)


def test_a_federations_fingerprint_says_who_holds_what() -> None:
    one = federation()
    swapped = one.all_train.select([1, 0, 2])  # both institutions have units of number 0
    others = [
        replace(one, names=("a", "c")),
        replace(one, all_train=swapped),
        replace(one, train_bounds=np.array([0, 2, 3])),
        replace(one, held_out_bounds=np.array([0, 1, 1])),
    ]
    assert len({other.fingerprint() for other in (one, *others)}) == 5
    assert federation().fingerprint() == one.fingerprint()
