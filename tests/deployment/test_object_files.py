"""The SuperLink's objects: large contents are files, and files and rows come and go together."""

import sqlite3

import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.object_store import (
    NoObjectInStoreError,
    ObjectStoreFactory,
    object_store_factory,
)

from deployment.object_files import MIN_FILE_BYTES, FileObjectStore
from fedlora import flower_internals

PIECE = FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE


def _open(folder):
    store = FileObjectStore(str(folder / "state.db"))
    store.initialize()
    return store


@pytest.fixture
def store(tmp_path):
    return _open(tmp_path)


def _message(*values):
    """Records whose array has a piece for each value, and a small one; and their contents."""
    data = b"".join(bytes([value]) * PIECE for value in values) + b"end"
    array = Array("uint8", (len(data),), "safetensors", data)
    record = RecordDict({"adapter": ArrayRecord({"adapter": array})})
    objects = get_all_nested_objects(record).items()
    return get_object_tree(record), {key: value.deflate() for key, value in objects}


def _files(folder):
    return {file.name for file in (folder / "objects").iterdir()}


def test_large_contents_are_files_and_the_database_stays_small(store, tmp_path):
    tree, contents = _message(1, 2)
    assert set(store.preregister(1, tree)) == set(contents)
    assert all(store.get(key) == b"" for key in contents)  # announced, not there yet
    for key, content in contents.items():
        store.put(key, content)
    large = {key for key, content in contents.items() if len(content) >= MIN_FILE_BYTES}
    assert len(large) == 2 and _files(tmp_path) == large
    for again in (store, _open(tmp_path)):  # also after a restart
        assert {key: again.get(key) for key in contents} == contents
        assert again.preregister(1, tree) == []
    with sqlite3.connect(tmp_path / "state.db") as database:
        (stored,) = database.execute("SELECT sum(length(content)) FROM objects").fetchone()
    assert stored < MIN_FILE_BYTES


def test_a_file_goes_with_the_last_message_that_needs_it(store, tmp_path):
    (one, first), (other, second) = _message(1, 2), _message(2, 3)
    for number, (tree, contents) in enumerate([(one, first), (other, second)]):
        store.preregister(number, tree)
        for key, content in contents.items():
            store.put(key, content)
    assert len(_files(tmp_path)) == 3
    store.delete(one.object_id)
    assert len(_files(tmp_path)) == 2
    assert all(store.get(key) == content for key, content in second.items())
    store.delete_objects_in_run(1)
    assert _files(tmp_path) == set() and len(store) == 0


@pytest.mark.parametrize(
    "where", ["../state.db", "{folder}/other", "../objects", "", ".", "a" * 64]
)
def test_an_id_of_no_object_deletes_nothing(store, tmp_path, where):
    """A node confirms a message by any text, and Flower deletes what the text names."""
    (tmp_path / "other").write_bytes(b"kept")
    (tmp_path / "objects" / ("a" * 64)).write_bytes(b"on its way, or nobody's")
    tree, contents = _message(1)
    store.preregister(1, tree)
    for key, content in contents.items():
        store.put(key, content)
    before = _files(tmp_path)
    store.delete(where.format(folder=tmp_path))
    assert (tmp_path / "state.db").exists() and (tmp_path / "other").exists()
    assert _files(tmp_path) == before
    assert {key: store.get(key) for key in contents} == contents


@pytest.mark.parametrize(
    ("announced", "content", "error"),
    [(True, b"other", ValueError), (False, None, NoObjectInStoreError)],
    ids=["another-content", "nobody-announced-it"],
)
def test_a_content_that_is_refused_leaves_no_file(store, tmp_path, announced, content, error):
    tree, contents = _message(1)
    if announced:
        store.preregister(1, tree)
    key = max(contents, key=lambda key: len(contents[key]))
    with pytest.raises(error):
        store.put(key, contents[key] if content is None else content + contents[key])
    assert _files(tmp_path) == set()


def test_the_superlink_makes_its_store_of_this_class(tmp_path, monkeypatch):
    name = "SqlObjectStore"
    monkeypatch.setattr(object_store_factory, name, getattr(object_store_factory, name))
    flower_internals.keep_objects_with(FileObjectStore)
    store = ObjectStoreFactory(str(tmp_path / "state.db")).store()
    assert isinstance(store, FileObjectStore)
