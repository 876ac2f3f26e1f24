"""Named random streams under 32-byte keys: one ChaCha20 keystream per purpose.

The same class draws private numbers (Gaussian noise, Poisson sampling) and public ones (shuffles,
initial weights). A stream is therefore always derived for one purpose and never shared between two
purposes.
"""

from __future__ import annotations

import hashlib
import json
import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedlora.arrays import Floats, Int64

KEY_BYTES = 32
_CHUNK = (
    1 << 14
)  # normals computed at a time, so that the scratch arrays stay in the processor's cache


class RandomSource:
    r"""A stream of random numbers; without the key it is indistinguishable from true randomness.

    Guarantee: with :meth:`secure` the key comes from the operating system, and the numbers
    are those of the ChaCha20 keystream, so noise drawn from it cannot be predicted or subtracted.
    What voids it: a key that others can know. :meth:`seeded` derives such keys on purpose, for
    simulation; its noise protects nobody.

    The numbers depend on the key and on the sequence of calls, never on global state. Two objects
    with one key and the same calls give the same numbers (the last bits of :meth:`normal` follow
    the processor's sine and logarithm). A source belongs to the process that made it: in a fork of
    that process it refuses to draw, since both would draw the same numbers.

    Args:
        key: The key, 32 bytes.

    Raises:
        ValueError: If the key is not 32 bytes long.
    """

    def __init__(self, key: bytes) -> None:
        if len(key) != KEY_BYTES:
            raise ValueError(f"a random source needs a key of {KEY_BYTES} bytes, got {len(key)}")
        self._key, self._process = bytes(key), os.getpid()
        self._stream = Cipher(algorithms.ChaCha20(self._key, bytes(16)), mode=None).encryptor()

    @classmethod
    def secure(cls) -> RandomSource:
        """Make a source under a fresh key from the operating system."""
        return cls(os.urandom(KEY_BYTES))

    @classmethod
    def seeded(cls, purpose: str, seed: int, *path: int | str) -> RandomSource:
        """Make a reproducible source for one purpose: anyone who knows the seed can repeat it.

        Args:
            purpose: The purpose of the numbers, such as ``"noise"``.
            seed: The run's seed.
            path: The place of their use, such as the round and the institution. ``1`` and ``"1"``
                differ.
        """
        return cls(hashlib.sha256(b"fedlora stream\0" + _encode(purpose, seed, *path)).digest())

    @property
    def key(self) -> bytes:
        """The 32-byte key, to be stored where the stream must be repeated."""
        return self._key

    def child(self, purpose: str, *path: int | str) -> RandomSource:
        """Derive the source of another purpose under this key; it does not move this stream."""
        self._check()
        name = _encode(purpose, *path)
        return RandomSource(
            hashlib.blake2b(
                name, key=self._key, digest_size=KEY_BYTES, person=b"fedlora-child"
            ).digest()
        )

    def _check(self) -> None:
        if os.getpid() != self._process:
            raise RuntimeError("a random source was taken into a fork of the process that made it")

    def words(self, n: int) -> npt.NDArray[np.uint64]:
        """Draw ``n`` uniform 64-bit words, uint64 ``(n,)``."""
        self._check()
        raw = self._stream.update(bytes(8 * n))
        return np.frombuffer(raw, dtype="<u8").astype(np.uint64, copy=False)

    def uniform(self, n: int) -> Floats:
        """Draw ``n`` uniform numbers in [0, 1) with all 53 bits of a float64, float64 ``(n,)``."""
        return (self.words(n) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def normal(self, n: int) -> Floats:
        r"""Draw ``n`` independent standard normal numbers, float64 ``(n,)``.

        Each is half the sum of four Box-Muller normals from four different pairs of uniforms. A
        single normal takes so few values near a given float that an observer of all digits of a sum
        can infer the value without noise; with four, finding the draws behind a sum takes more than
        2**100 work. Opacus' secure mode does the same.

        Reference: Holohan & Braghin (2021), Secure Random Sampling in Differential Privacy, arXiv
        2107.10138.
        """
        out = np.empty(n, dtype=np.float64)
        for start in range(0, n, _CHUNK):
            part = out[start : start + _CHUNK]
            self._fill_normal(part)
        return out

    def _fill_normal(self, out: Floats) -> None:
        # Two rows of m + 1 pairs. Value i takes the cosines of pair i and the sines of pair i + 1
        # in both rows.
        pairs = len(out) + 1
        radius, angle = self.uniform(4 * pairs).reshape(2, 2, pairs)
        np.subtract(1.0, radius, out=radius)  # (0, 1]: the logarithm of zero cannot occur
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= 2.0 * np.pi
        cosine = np.cos(angle)
        cosine *= radius
        np.sin(angle, out=angle)
        angle *= radius
        np.add(cosine[0, :-1], cosine[1, :-1], out=out)
        out += angle[0, 1:]
        out += angle[1, 1:]
        out *= 0.5

    def permutation(self, n: int) -> Int64:
        """Draw a uniformly random order of ``0 .. n-1``, int64 ``(n,)``."""
        return np.argsort(self.words(n), kind="stable")


def _encode(*parts: int | str) -> bytes:
    # JSON distinguishes the number 1 and the text "1", and different lists have different texts.
    return json.dumps(parts, separators=(",", ":")).encode()
