"""Errors of a deployment, in one line each: of its files, and of the SuperLink."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fedlora.errors import place


class FlowerError(RuntimeError):
    """Flower's error for a request that it did not fulfil."""


class Unanswered(FlowerError):
    """The SuperLink got a request and did not answer: it may have fulfilled it."""


class FileError(OSError):
    """A file that cannot be used. One line: the file and the cause."""


@contextlib.contextmanager
def named(file: Path) -> Iterator[None]:
    """Turn an error in the block, which uses one file of the server, into a `FileError`.

    Python's own error of a full disk, or of damaged JSON, does not name the file.
    """
    try:
        yield
    except OSError as error:
        raise FileError(f"{file} cannot be used: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FileError(f"{file} is damaged ({type(error).__name__}: {error})") from error


def in_words(error: Exception) -> str:
    """An error in one line."""
    if not isinstance(error, OSError) or isinstance(error, FileError):
        return str(error)
    if not error.filename:
        return f"{error} ({place(error)})"
    return f"{error.filename} cannot be read or written: {error.strerror or error}"
