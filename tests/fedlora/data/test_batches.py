"""Batches of rows: padding, order, equal rows, padded sizes."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.data.batches import distinct, micro_batches, once, pad


def test_a_batch_is_padded_to_its_own_longest_row_on_the_given_side() -> None:
    rows = [np.array(row, np.int32) for row in ([8], [5, 6, 7])]
    left, right = (pad(rows, np.array([1, 0]), 3, side) for side in ("left", "right"))
    assert left.input_ids.tolist() == [[3, 3, 8], [5, 6, 7]]
    assert left.attention_mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert right.input_ids.tolist() == [[8, 3, 3], [5, 6, 7]]
    assert right.attention_mask.tolist() == [[1, 0, 0], [1, 1, 1]]
    assert right.targets.tolist() == [1, 0]
    assert {t.dtype for t in vars(right).values()} == {torch.int64}


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    physical=st.integers(1, 7),
    data=st.data(),
)
def test_micro_batches_cover_each_row_once_from_long_to_short_and_keep_ties_in_order(
    lengths: list[int], physical: int, data: st.DataObject
) -> None:
    indices = data.draw(st.lists(st.integers(0, len(lengths) - 1), unique=True))
    batches = micro_batches(lengths, indices, physical)
    flat = [int(i) for batch in batches for i in batch]
    assert flat == sorted(indices, key=lambda i: -lengths[i])
    assert all(len(batch) == physical for batch in batches[:-1])
    assert all(0 < len(batch) <= physical for batch in batches)


@given(st.lists(st.sampled_from([b"a", b"b", b"ab", b"abc", b""])), st.integers(1, 3))
def test_equal_rows_are_computed_once_and_each_row_has_its_equal(
    keys: list[bytes], physical: int
) -> None:
    lengths = np.array([len(key) for key in keys], dtype=np.int64)
    computed, found = [], {}
    for batch, rows, equal in once(keys, lengths, physical):
        assert len(batch) <= physical
        computed += [keys[i] for i in batch]
        assert not found.keys() & set(rows.tolist())
        found |= {row: keys[batch[place]] for row, place in zip(rows.tolist(), equal, strict=True)}
    assert sorted(computed) == sorted(set(keys))
    assert [found[row] for row in range(len(keys))] == keys
    first, _ = distinct(keys)
    in_turn = [keys[i] for batch in micro_batches(lengths, first, physical) for i in batch]
    assert computed == in_turn
