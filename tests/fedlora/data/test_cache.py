import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlora.data import cache
from fedlora.data.cache import evict, open_corpus, open_partition, store_corpus, store_partition
from fedlora.data.shards import Corpus, Federation
from fedlora.errors import InputError
from tests.fedlora.data.test_shards import contents, federation, shard


def stored(base: Path, corpus: str = "corpus-1", partition: str = "partition-1") -> Federation:
    """Store the federation of test_shards as `fedlora.data.data` does."""
    made = federation()
    kept = store_corpus(base / corpus, made.all_train.corpus)
    return store_partition(base / partition, over(kept, made))


def over(corpus: Corpus, made: Federation) -> Federation:
    return replace(
        made,
        all_train=replace(made.all_train, corpus=corpus),
        all_held_out=replace(made.all_held_out, corpus=corpus),
    )


def opened(base: Path, corpus: str = "corpus-1", partition: str = "partition-1"):
    tokens = open_corpus(base / corpus)
    return None if tokens is None else open_partition(base / partition, tokens)


def mapped(array: np.ndarray) -> bool:
    """Whether an array is a view of a mapped file."""
    while array is not None and not isinstance(array, np.memmap):
        array = array.base
    return array is not None


def names(base: Path) -> list[str]:
    return sorted(path.name for path in base.iterdir())


def test_a_stored_federation_comes_back_memory_mapped(tmp_path: Path) -> None:
    for one in (stored(tmp_path / "cache"), opened(tmp_path / "cache")):
        assert one is not None
        assert mapped(one.all_train.corpus.tokens) and mapped(one.all_train.rows)
        assert type(one.all_train.corpus.tokens) is np.ndarray  # slices of np.memmap are slow
        assert one.all_train.corpus is one.all_held_out.corpus
        assert (one.names, one.labels, one.counts) == (("a", "b"), ("no", "yes"), {"rows": 4})
        assert contents(one.train(0)) == [([1, 2, 3], 0, 0)]
        assert contents(one.train(1)) == [([4], 1, 1), ([5, 6], 0, 2)]
        assert contents(one.held_out(0)) == []
        pooled, owner = one.pooled_held_out()
        assert (contents(pooled), owner.tolist()) == ([([7], 1, 0)], [1])
        assert one.fingerprint() == federation().fingerprint()


def test_a_partition_holds_numbers_of_rows_and_no_token(tmp_path: Path) -> None:
    stored(tmp_path)
    held = {p.stem: np.load(p).tolist() for p in (tmp_path / "partition-1").glob("*.npy")}
    assert held == {
        "train_rows": [0, 1, 3],
        "train_units": [0, 1, 2],
        "train_bounds": [0, 1, 3],
        "held_out_rows": [2],
        "held_out_units": [0],
        "held_out_bounds": [0, 0, 1],
    }


def test_only_the_owner_may_read_the_cache(tmp_path: Path) -> None:
    stored(tmp_path / "cache")
    places = (tmp_path / "cache", *(tmp_path / "cache").glob("*-1"))
    assert [path.stat().st_mode & 0o777 for path in places] == [0o700] * 3


@pytest.mark.parametrize("entry", ["corpus-1", "partition-1"])
def test_any_damage_makes_an_entry_absent_and_storing_mends_it(tmp_path: Path, entry: str) -> None:
    assert opened(tmp_path) is None
    stored(tmp_path)
    files = sorted((tmp_path / entry).iterdir())
    assert len(files) == {"corpus-1": 7, "partition-1": 8}[entry]
    for path in files:
        content = path.read_bytes()
        for damage in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b"", None):
            if damage is None:
                path.unlink()
            else:
                path.write_bytes(damage)
            assert opened(tmp_path) is None, path
            path.write_bytes(content)
    assert opened(tmp_path) is not None
    (tmp_path / entry / "meta.json").write_text('{"names": []}')
    assert contents(stored(tmp_path).train(0)) == [([1, 2, 3], 0, 0)]
    assert opened(tmp_path) is not None
    assert names(tmp_path) == [".lock", "corpus-1", "partition-1"]


def test_a_partition_of_another_corpus_is_absent_and_is_replaced(tmp_path: Path) -> None:
    """Else its numbers would give institutions rows of others."""
    stored(tmp_path)
    other = store_corpus(tmp_path / "corpus-1", shard(*[([9], 0)] * 4).corpus)
    assert open_partition(tmp_path / "partition-1", other) is None
    mended = store_partition(tmp_path / "partition-1", over(other, federation()))
    assert [contents(one.train(0)) for one in (mended, opened(tmp_path))] == [[([9], 0, 0)]] * 2


def test_processes_that_race_for_an_entry_all_get_a_whole_one(tmp_path: Path) -> None:
    stored(tmp_path)
    for entry in ("corpus-1", "partition-1"):
        (tmp_path / entry / "meta.json").write_text('{"names": []}')
    with ThreadPoolExecutor(8) as pool:
        all_stored = list(pool.map(lambda _: stored(tmp_path), range(32)))
    assert {one.fingerprint() for one in all_stored} == {federation().fingerprint()}
    assert opened(tmp_path) is not None
    assert names(tmp_path) == [".lock", "corpus-1", "partition-1"]


def test_a_cache_that_cannot_be_written_says_how_to_move_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"cannot be written \(Not a directory\).*FEDLORA_CACHE"):
        stored(tmp_path / "file/cache")


def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(InputError, match=r"No space left on device.*make room"):
        stored(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_corpus_that_is_removed_meanwhile_serves_whoever_has_it_open(tmp_path: Path) -> None:
    kept = store_corpus(tmp_path / "corpus-1", federation().all_train.corpus)
    shutil.rmtree(tmp_path)
    made = store_partition(tmp_path / "partition-1", over(kept, federation()))
    assert contents(made.train(0)) == [([1, 2, 3], 0, 0)]
    assert opened(tmp_path) is None


def test_only_the_entries_that_were_opened_last_outlive_an_eviction(tmp_path: Path) -> None:
    base = tmp_path / "cache"
    for number in "123":
        stored(base, f"corpus-{number}", f"partition-{number}")
        time.sleep(0.01)  # file times are that coarse
    last = opened(base, "corpus-2", "partition-2")
    stored(tmp_path / "elsewhere")
    (base / ".new-unfinished").mkdir()
    evict(base)
    assert names(base) == [".lock", ".new-unfinished", "corpus-2", "partition-2"]
    assert last is not None and contents(last.train(0)) == contents(federation().train(0))
    evict(tmp_path / "absent")


def test_entries_that_were_not_opened_for_long_are_removed(tmp_path: Path) -> None:
    now = time.time()
    for name, days in (("old", cache.MAX_AGE_DAYS + 1), ("young", cache.MAX_AGE_DAYS - 1)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokens.npy").write_bytes(b"1234")
        os.utime(tmp_path / name, (now, now - days * 86400))
    (tmp_path / ".lock").touch()
    assert [(e.path.name, e.size) for e in cache.entries(tmp_path)] == [("young", 4), ("old", 4)]
    cache.expire(tmp_path)
    assert [e.path.name for e in cache.entries(tmp_path)] == ["young"]
    cache.expire(tmp_path / "nowhere")


def test_texts_are_as_old_as_the_last_use_of_any_partition_of_them(tmp_path: Path) -> None:
    stored(tmp_path, partition="partition-1")
    stored(tmp_path, partition="partition-2")
    old = time.time() - (cache.MAX_AGE_DAYS + 1) * 86400
    for path in tmp_path.glob("*-?"):
        os.utime(path, (old, old))
    assert opened(tmp_path, partition="partition-2") is not None
    cache.expire(tmp_path)
    assert names(tmp_path) == [".lock", "corpus-1", "partition-2"]
