"""The SuperLink's store of objects, with large contents in files beside its database.

Flower keeps the pieces of messages, 5 MB each, as values in SQLite. Each of its connections then
holds 64 MB of them in a cache and maps 256 MB of the database, and each piece locks the database
for as long as it is written: with messages of about 1 GB, longer than others wait. Here the
database holds which objects there are, and a file holds each large one.
"""

import contextlib
from pathlib import Path

from flwr.supercore.inflatable.inflatable_object import get_object_id, is_valid_sha256_hash
from flwr.supercore.inflatable.inflatable_utils import validate_object_content
from flwr.supercore.object_store import NoObjectInStoreError
from flwr.supercore.object_store.sql_object_store import SqlObjectStore

from fedlora.files import write_atomic

MIN_FILE_BYTES = 64 * 2**10
"""Contents below this size stay in the database."""


class FileObjectStore(SqlObjectStore):
    """Flower's store; the content of a large object is a file that is named by the object's id.

    An id is the SHA-256 of the content, so a file that exists has the right content, also after a
    crash. An object is available once its file is complete, and its file goes with its row. If the
    database then takes the deletion back, the object is unavailable: its message is lost, not torn.

    Args:
        database_path: The database's file; the objects are in ``objects`` beside it.
        verify: Whether contents are checked against their ids.
    """

    def __init__(self, database_path: str, verify: bool = True) -> None:
        super().__init__(database_path, verify=False)  # checked here, before a file is written
        self._check = verify
        self._folder = Path(database_path).with_name("objects")
        self._folder.mkdir(parents=True, exist_ok=True)

    def put(self, object_id: str, object_content: bytes) -> None:
        """Store an object. Raises as Flower's own."""
        if self._check:
            if object_id != get_object_id(object_content):
                raise ValueError(f"Object ID {object_id} does not match content hash")
            validate_object_content(content=object_content)
        if len(object_content) < MIN_FILE_BYTES:
            super().put(object_id, object_content)
            return
        if object_id not in self:
            raise NoObjectInStoreError(f"Object with ID '{object_id}' was not pre-registered.")
        write_atomic(self._file(object_id), object_content)
        try:
            super().put(object_id, b"")
        except NoObjectInStoreError:  # it was deleted meanwhile
            self._drop(object_id)
            raise

    def get(self, object_id: str) -> bytes | None:
        """The content; empty where it has not arrived, None where nobody announced it."""
        content = super().get(object_id)
        if content == b"":
            with contextlib.suppress(FileNotFoundError):
                return self._file(object_id).read_bytes()
        return content

    def delete(self, object_id: str) -> None:
        """Delete an object that no other one needs, and then its own parts.

        An id of no object deletes nothing: an institution names any text here, also a path.
        """
        known = object_id in self
        super().delete(object_id)  # calls this method for the parts
        if known and object_id not in self:
            self._drop(object_id)

    def clear(self) -> None:
        """Delete all objects."""
        super().clear()
        for file in self._folder.iterdir():
            file.unlink(missing_ok=True)

    def _drop(self, object_id: str) -> None:
        self._file(object_id).unlink(missing_ok=True)

    def _file(self, object_id: str) -> Path:
        if not is_valid_sha256_hash(object_id):
            raise ValueError(f"{object_id[:80]!r} is not the id of an object")
        return self._folder / object_id
