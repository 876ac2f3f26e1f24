import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import shards
from fedlora.errors import InputError
from fedlora.shards import Federation, Shard, evict, open_entry, store_entry


def shard(*rows: tuple[list[int], int], units: list[int] | None = None) -> Shard:
    ids, targets = [row for row, _ in rows], [target for _, target in rows]
    return Shard(
        tokens=np.array([token for row in ids for token in row], dtype=np.int32),
        offsets=np.cumsum([0, *map(len, ids)]),
        targets=np.array(targets, dtype=np.int64),
        units=np.array(range(len(rows)) if units is None else units, dtype=np.int64),
        records=np.array([[sum(row)] * 32 for row in ids], dtype=np.uint8).reshape(-1, 32),
    )


ABC = shard(([1, 2, 3], 0), ([4], 1), ([5, 6], 0))


def contents(of: Shard) -> list[tuple[list[int], int, int]]:
    return [(of.row(i).tolist(), int(of.targets[i]), int(of.units[i])) for i in range(len(of))]


def federation() -> Federation:
    return Federation(
        names=("a", "b"),
        labels=("no", "yes"),
        counts={"rows": 4},
        all_train=ABC,
        train_bounds=np.array([0, 1, 3]),
        all_held_out=shard(([7], 1)),
        held_out_bounds=np.array([0, 0, 1]),
    )


def test_rows_and_lengths_follow_the_offsets() -> None:
    assert len(ABC) == 3
    assert ABC.lengths.tolist() == [3, 1, 2]
    assert ABC.row(1).tolist() == [4]
    assert ABC.row(0).base is ABC.tokens
    for outside in (-1, 3):
        with pytest.raises(IndexError):
            ABC.row(outside)


def test_select_copies_rows_in_the_order_asked_for() -> None:
    assert contents(ABC.select([2, 0, 2])) == [([5, 6], 0, 2), ([1, 2, 3], 0, 0), ([5, 6], 0, 2)]
    assert contents(ABC.select([])) == []


def test_slice_is_a_view_that_counts_from_its_own_start() -> None:
    part = ABC.slice(1, 3)
    assert contents(part) == [([4], 1, 1), ([5, 6], 0, 2)]
    assert part.offsets.tolist() == [0, 1, 3]
    assert np.shares_memory(part.tokens, ABC.tokens)


def test_a_shard_of_unequal_columns_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="3 rows, 3 targets, 2 units"):
        replace(ABC, units=np.array([0, 1]))


@given(st.permutations(range(6)), st.permutations(range(3)))
def test_the_fingerprint_ignores_the_order_of_rows_and_the_numbers_of_units(
    order: list[int], numbers: list[int]
) -> None:
    groups = [0, 0, 1, 2, 2, 2]
    rows = [([10 + i], 0) for i in range(6)]
    original = shard(*rows, units=groups)
    shuffled = shard(*(rows[i] for i in order), units=[numbers[groups[i]] for i in order])
    assert shuffled.fingerprint() == original.fingerprint()


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
    assert len({s.fingerprint() for s in (base, *others)}) == 6
    retokenised = replace(base, tokens=base.tokens + 1)
    assert retokenised.fingerprint() == base.fingerprint()
    plain = replace(base, records=None)
    assert replace(retokenised, records=None).fingerprint() != plain.fingerprint()


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


def test_a_stored_federation_comes_back_memory_mapped(tmp_path: Path) -> None:
    stored = store_entry(tmp_path / "cache/key", federation())
    opened = open_entry(tmp_path / "cache/key")
    assert opened is not None
    for one in (stored, opened):
        assert isinstance(one.all_train.tokens, np.memmap)
        assert (one.names, one.labels, one.counts) == (("a", "b"), ("no", "yes"), {"rows": 4})
        assert contents(one.train(0)) == [([1, 2, 3], 0, 0)]
        assert contents(one.train(1)) == [([4], 1, 1), ([5, 6], 0, 2)]
        assert contents(one.held_out(0)) == []
        pooled, owner = one.pooled_held_out()
        assert (contents(pooled), owner.tolist()) == ([([7], 1, 0)], [1])
        assert one.train(0).fingerprint() == ABC.slice(0, 1).fingerprint()


def test_only_the_owner_may_read_the_cache(tmp_path: Path) -> None:
    store_entry(tmp_path / "cache/key", federation())
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "cache", tmp_path / "cache/key")}
    assert modes == {0o700}


def test_any_damage_makes_an_entry_absent_and_storing_mends_it(tmp_path: Path) -> None:
    entry = tmp_path / "key"
    assert open_entry(entry) is None
    store_entry(entry, federation())
    files = sorted(entry.iterdir())
    assert len(files) == 14
    for path in files:
        content = path.read_bytes()
        for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b"", None):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            assert open_entry(entry) is None, path
            path.write_bytes(content)
    (entry / "meta.json").write_text("{}")
    assert contents(store_entry(entry, federation()).train(0)) == [([1, 2, 3], 0, 0)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "key"]


def test_processes_that_race_for_an_entry_all_get_a_whole_one(tmp_path: Path) -> None:
    entry = tmp_path / "key"
    store_entry(entry, federation())
    (entry / "meta.json").write_text(json.dumps({"names": []}))
    with ThreadPoolExecutor(8) as pool:
        stored = list(pool.map(lambda _: store_entry(entry, federation()), range(32)))
    assert {one.train(1).fingerprint() for one in stored} == {ABC.slice(1, 3).fingerprint()}
    assert open_entry(entry) is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "key"]


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\).*FEDLORA_CACHE"):
        store_entry(tmp_path / "file/cache/key", federation())


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"No space left on device.*make room"):
        store_entry(tmp_path / "key", federation())
    assert list(tmp_path.iterdir()) == []


def test_only_the_entry_that_was_opened_last_outlives_an_eviction(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    for name in ("first", "second", "third"):
        store_entry(base / name, federation())
        time.sleep(0.01)  # file times are that coarse
    mapped = open_entry(base / "second")
    store_entry(tmp_path / "elsewhere" / "other", federation())
    evict(base)
    assert [entry.name for entry in base.iterdir() if entry.is_dir()] == ["second"]
    assert mapped is not None and contents(mapped.train(0)) == contents(federation().train(0))
    evict(tmp_path / "absent")


def test_entries_that_were_not_opened_for_long_are_removed(tmp_path):
    now = time.time()
    for name, days in (("old", shards.MAX_AGE_DAYS + 1), ("young", shards.MAX_AGE_DAYS - 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.npy").write_bytes(b"1234")
        os.utime(tmp_path / name, (now, now - days * 86400))
    (tmp_path / ".lock").touch()
    assert [(e.path.name, e.size) for e in shards.entries(tmp_path)] == [("young", 4), ("old", 4)]
    shards.expire(tmp_path)
    assert [e.path.name for e in shards.entries(tmp_path)] == ["young"]
    shards.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    shards.expire(tmp_path / "nowhere")
