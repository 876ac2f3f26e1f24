"""Masks in the ring of integers modulo 2^64: ChaCha20 keystreams, added to a vector in place."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

CHUNK_WORDS = 2**14
"""Words of a chunk, 128 KiB: the chunk, its keystream and the zeros stay in the second cache."""
_NONCE = bytes(16)  # counter and nonce: a key makes one keystream


def apply(words: np.ndarray, *, add: Iterable[bytes] = (), subtract: Iterable[bytes] = ()) -> None:
    """Add and subtract the keystreams of keys, modulo 2^64, in place.

    Each chunk of the vector is read from memory once for all keys.

    Args:
        words: ``(d,)`` uint64, contiguous and writable.
        add: Keys of 32 bytes whose masks are added; a mask is the keystream read as d
            little-endian words.
        subtract: Keys whose masks are subtracted.

    Raises:
        ValueError: If ``words`` is not such a vector.

    Reference: Bernstein (2008), ChaCha, a variant of Salsa20; RFC 8439.
    """
    if words.dtype != np.dtype("<u8") or words.ndim != 1 or not words.flags.c_contiguous:
        raise ValueError(
            f"a contiguous vector of uint64 is masked, not {words.dtype} {words.shape}"
        )
    streams = [
        (Cipher(ChaCha20(key, _NONCE), mode=None).encryptor(), operation)
        for keys, operation in ((add, np.add), (subtract, np.subtract))
        for key in keys
    ]
    mask = np.empty(min(CHUNK_WORDS, len(words)), dtype="<u8")
    zeros = memoryview(bytes(mask.nbytes))
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS]
        part = mask[: len(chunk)]
        target, source = part.data.cast("B"), zeros[: part.nbytes]
        for stream, operation in streams:
            stream.update_into(source, target)
            operation(chunk, part, out=chunk)
