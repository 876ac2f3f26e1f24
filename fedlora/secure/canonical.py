"""One encoding of text, whole numbers, bytes and tuples of them, for everything that is signed.

Two different lists of values never have the same bytes, and one list has one encoding: each value
carries its type and its length.
"""

from __future__ import annotations

from fedlora.errors import Refusal

Value = str | int | bytes | tuple[str, ...] | tuple[bytes, ...]

MAX_ITEMS = 20_000
"""Values in a tuple: above the number of institutions of a run."""
_LENGTH = 8


def encode(tag: str, *values: Value) -> bytes:
    """The bytes of a tag and values: each as a letter for its type, its length, its content.

    Args:
        tag: The purpose of these bytes; equal values under two tags have different bytes.
        values: Text, numbers in [0, 2^64), bytes, and tuples of text or of bytes.
    """
    parts: list[bytes] = []
    for value in (tag, *values):
        if isinstance(value, tuple):
            parts += [b"t", _number(len(value))]
            for item in value:
                _append(parts, item)
        else:
            _append(parts, value)
    return b"".join(parts)


def decode(tag: str, data: bytes) -> list[Value]:
    """The values of `encode`.

    Raises:
        Refusal: ``secure-malformed`` if the bytes are not an encoding under this tag.
    """
    reader = _Reader(data)
    found = reader.value()
    if found != tag:
        raise _malformed(f"the bytes do not begin with the tag {tag}")
    values: list[Value] = []
    while not reader.ended:
        values.append(reader.value())
    return values


def _number(value: int) -> bytes:
    return value.to_bytes(_LENGTH, "little")


def _append(parts: list[bytes], value: str | int | bytes) -> None:
    if isinstance(value, int):
        parts += [b"i", _number(value)]
        return
    content = value.encode() if isinstance(value, str) else value
    parts += [b"s" if isinstance(value, str) else b"b", _number(len(content)), content]


def _malformed(detail: str) -> Refusal:
    return Refusal("secure-malformed", f"{detail}; the sender runs another version or is damaged")


class _Reader:
    """A position in encoded bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = memoryview(data), 0

    @property
    def ended(self) -> bool:
        return self._at == len(self._data)

    def value(self) -> Value:
        kind = self._take(1)
        if kind != b"t":
            return self._single(kind)
        count = self._count()
        if count > MAX_ITEMS:
            raise _malformed(f"a tuple has {count} values, above {MAX_ITEMS}")
        items = [self._single(self._take(1)) for _ in range(count)]
        texts = tuple(item for item in items if isinstance(item, str))
        blobs = tuple(item for item in items if isinstance(item, bytes))
        if count not in (len(texts), len(blobs)):
            raise _malformed("a tuple mixes types")
        return texts or blobs

    def _single(self, kind: bytes) -> str | int | bytes:
        number = self._count()
        if kind == b"i":
            return number
        content = self._take(number)
        if kind == b"b":
            return content
        if kind != b"s":
            raise _malformed(f"a value has the type {kind!r}")
        try:
            return content.decode()
        except UnicodeDecodeError:
            raise _malformed("a text is not UTF-8") from None

    def _count(self) -> int:
        return int.from_bytes(self._take(_LENGTH), "little")

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self._at:
            raise _malformed(f"{length} bytes are missing after byte {self._at}")
        self._at += length
        return bytes(self._data[self._at - length : self._at])
