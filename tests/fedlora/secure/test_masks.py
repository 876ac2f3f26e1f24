"""Masks against RFC 8439's keystream, across the borders of chunks."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from fedlora.secure import masks

# RFC 8439, appendix A.1, test vector 1: key, nonce and counter are zero
RFC = (
    "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
    "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
)


def keystream(key, words):
    stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * words))
    return np.frombuffer(stream, dtype="<u8")


def test_a_mask_is_chacha20_s_keystream_of_rfc_8439():
    words = np.zeros(8, dtype="<u8")
    masks.apply(words, add=[bytes(32)])
    assert words.tobytes().hex() == RFC


@pytest.mark.parametrize("size", [1, masks.CHUNK_WORDS, 2 * masks.CHUNK_WORDS + 5])
def test_masks_are_added_and_subtracted_modulo_2_to_the_64(size):
    keys = [bytes([i]) * 32 for i in range(5)]
    words = np.full(size, 2**64 - 1, dtype="<u8")
    masks.apply(words, add=keys[:3], subtract=keys[3:])
    expected = np.full(size, 2**64 - 1, dtype="<u8")
    for key in keys[:3]:
        expected = expected + keystream(key, size)
    for key in keys[3:]:
        expected = expected - keystream(key, size)
    assert np.array_equal(words, expected)


def test_a_mask_that_is_added_and_subtracted_is_gone():
    words = np.arange(40_000, dtype="<u8")
    masks.apply(words, add=[b"k" * 32])
    assert not np.array_equal(words, np.arange(40_000))
    masks.apply(words, subtract=[b"k" * 32])
    assert np.array_equal(words, np.arange(40_000))


@pytest.mark.parametrize(
    "words",
    [np.zeros(4, dtype="<i8"), np.zeros((2, 2), dtype="<u8"), np.zeros(8, dtype="<u8")[::2]],
    ids=["signed", "matrix", "strided"],
)
def test_another_array_than_a_vector_of_words_is_refused(words):
    with pytest.raises(ValueError, match="vector of uint64"):
        masks.apply(words, add=[bytes(32)])
