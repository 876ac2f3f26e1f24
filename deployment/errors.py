"""Errors of a deployment, in one line each: of its files, and of the SuperLink."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from fedlora.errors import place

_REMEDIES = {
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free space in the user's quota",
    errno.EACCES: f"give user {os.geteuid()}, who runs this, access to it",
    errno.EPERM: f"give user {os.geteuid()}, who runs this, access to it",
    errno.EROFS: "mount its disk for writing",
    errno.EIO: "check its disk",
}


class FlowerError(RuntimeError):
    """Flower's error for a request that it did not fulfil."""


class Unanswered(FlowerError):
    """The SuperLink got a request and did not answer: it may have fulfilled it."""


class FileError(OSError):
    """A file that cannot be used. One line: the file, the cause, the remedy."""


@contextlib.contextmanager
def named(file: Path, how: Literal["read", "written"]) -> Iterator[None]:
    """Turn an error in the block, which uses one file of the server, into a `FileError`.

    Python's own error of a full disk, or of damaged JSON, does not name the file.
    """
    try:
        yield
    except OSError as error:
        raise FileError(_sentence(str(file), how, error)) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(
            f"{file} is damaged ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def in_words(error: Exception) -> str:
    """An error in one line.

    It never advises a copy: an older ledger, or an older store of secure aggregation, must not be
    put back.
    """
    if not isinstance(error, OSError) or isinstance(error, FileError):
        return str(error)
    if not error.filename:
        return f"{error} ({place(error)})"
    return _sentence(str(error.filename), "read or written", error)


def _sentence(file: str, how: str, error: OSError) -> str:
    remedy = _REMEDIES.get(error.errno or 0)
    return f"{file} cannot be {how}: {error.strerror or error}" + (f"; {remedy}" if remedy else "")
