"""One encoding of text, whole numbers, bytes and tuples of them, for everything that is signed.

It is msgpack in its shortest form: each value carries its type and its length. Two different lists
of values never have the same bytes, and `decode` takes no second encoding of a list.
"""

# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import Any

import msgpack

from fedlora.errors import Refusal

Value = str | int | bytes | tuple[str, ...] | tuple[bytes, ...]

MAX_ITEMS = 20_000
"""Values in a tuple: above the number of institutions of a run."""


def encode(tag: str, *values: Value) -> bytes:
    """The bytes of a tag and values.

    Args:
        tag: The purpose of these bytes; equal values under two tags have different bytes.
        values: Text, numbers in [0, 2^64), bytes, and tuples of text or of bytes.
    """
    packed: Any = msgpack.packb((tag, *values))
    return packed


def decode(tag: str, data: bytes) -> list[Value]:
    """The values of `encode`; the caller checks their types.

    Raises:
        Refusal: ``secure-malformed`` if the bytes are not an encoding under this tag.
    """
    try:
        found: Any = msgpack.unpackb(
            data, use_list=False, max_array_len=MAX_ITEMS, max_map_len=0, max_ext_len=0
        )
        if not isinstance(found, tuple) or found[:1] != (tag,) or msgpack.packb(found) != data:
            raise ValueError(f"they are not the values of {tag}")
    except (ValueError, RecursionError, msgpack.UnpackException) as error:
        raise Refusal(
            "secure-malformed",
            f"bytes cannot be read ({str(error)[:200]}); the sender runs another version",
        ) from None
    return list(found[1:])
