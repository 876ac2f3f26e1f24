"""Random streams: known bytes, independence, distribution, and the hardened normal."""

import math
import os

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

from fedlora.privacy.streams import RandomSource

KEY = bytes(range(32))


def keystream(key: bytes, n: int) -> list[int]:
    raw = Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor().update(bytes(8 * n))
    return [int.from_bytes(raw[8 * i : 8 * i + 8], "little") for i in range(n)]


def test_the_stream_is_chacha20_with_the_published_test_vector() -> None:
    # RFC 8439, appendix A.1, test vector 1: key 0, nonce 0, counter 0.
    first = RandomSource(bytes(32)).words(2).astype("<u8").tobytes()
    assert first.hex() == "76b8e0ada0f13d90405d6ae55386bd28"


def test_uniform_takes_the_upper_53_bits_of_each_word() -> None:
    expected = [(word >> 11) / 2**53 for word in keystream(KEY, 5)]
    assert RandomSource(KEY).uniform(5).tolist() == expected


def test_a_normal_is_half_the_sum_of_four_box_muller_normals() -> None:
    u = [(word >> 11) / 2**53 for word in keystream(KEY, 8)]
    # One value takes two rows of two pairs: radii first, then angles.
    radius = [math.sqrt(-2 * math.log(1 - x)) for x in u[:4]]
    angle = [2 * math.pi * x for x in u[4:]]
    four = [
        radius[0] * math.cos(angle[0]),
        radius[2] * math.cos(angle[2]),
        radius[1] * math.sin(angle[1]),
        radius[3] * math.sin(angle[3]),
    ]
    assert RandomSource(KEY).normal(1)[0] == pytest.approx(sum(four) / 2, rel=1e-12)


def test_calls_continue_one_stream_and_never_repeat_it() -> None:
    whole, parts = RandomSource(KEY), RandomSource(KEY)
    assert whole.words(10).tolist() == [*parts.words(3).tolist(), *parts.words(7).tolist()]


def test_normals_have_the_moments_and_tails_of_a_standard_normal() -> None:
    # One million draws under a fixed key. Each bound is six standard errors: a correct generator
    # under a random key would fail one of these five with probability below 1e-8.
    x = RandomSource(KEY).normal(1_000_000)
    root = 1e-3
    assert abs(x.mean()) < 6 * root
    assert abs((x**2).mean() - 1) < 6 * root * math.sqrt(2)
    assert abs((x**3).mean()) < 6 * root * math.sqrt(15)
    assert abs((x**4).mean() - 3) < 6 * root * math.sqrt(96)
    beyond = math.erfc(3 / math.sqrt(2))
    assert abs((np.abs(x) > 3).mean() - beyond) < 6 * root * math.sqrt(beyond)


def test_normals_that_share_a_pair_of_uniforms_are_uncorrelated() -> None:
    # Neighbours share pairs, and chunks meet at 16,384. Six standard errors: false alarm 2e-9 each.
    x = RandomSource(KEY).normal(1_000_000)
    for lag in (1, 2, 16_384):
        for a, b in ((x, x), (x**2 - 1, (x**2 - 1) / 2)):
            assert abs((a[:-lag] * b[lag:]).mean()) < 6e-3


def test_the_number_zero_never_reaches_the_logarithm(monkeypatch: pytest.MonkeyPatch) -> None:
    source = RandomSource(KEY)
    for extreme in (0.0, 1 - 2.0**-53):
        monkeypatch.setattr(source, "uniform", lambda n, value=extreme: np.full(n, value))
        assert np.isfinite(source.normal(3)).all()


@pytest.mark.parametrize("n", [0, 1, 16_384, 16_385])
def test_any_number_of_normals_can_be_drawn(n: int) -> None:
    assert RandomSource(KEY).normal(n).shape == (n,)


def test_seeded_sources_differ_by_purpose_seed_and_each_step_of_the_path() -> None:
    names = [
        ("noise", 1),
        ("noise", 2),
        ("sampling", 1),
        ("noise", 1, 1),
        ("noise", 1, "1"),
        ("noise", 1, 1, 1),
        ("noise", 1, 11),
        ("noise", 1, "1,1"),
        ("noise", 1, "a", "b"),
        ("noise", 1, "ab"),
        ("noise", 1, 'a","b'),
    ]
    assert len({RandomSource.seeded(*name).key for name in names}) == len(names)
    assert RandomSource.seeded("noise", 1).key == RandomSource.seeded("noise", 1).key


def test_a_child_depends_on_key_and_name_and_leaves_its_parent_alone() -> None:
    parent = RandomSource(KEY)
    child = parent.child("noise", 3)
    assert parent.words(2).tolist() == RandomSource(KEY).words(2).tolist()
    assert child.key == RandomSource(KEY).child("noise", 3).key
    others = [
        parent.child("noise", 4),
        parent.child("size", 3),
        RandomSource(bytes(32)).child("noise", 3),
    ]
    assert len({child.key, KEY, *(other.key for other in others)}) == 5


def test_secure_sources_never_share_a_key() -> None:
    assert RandomSource.secure().key != RandomSource.secure().key


def test_a_key_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="32 bytes, got 31"):
        RandomSource(bytes(31))


def test_a_permutation_holds_every_index_once_and_every_order_is_as_likely() -> None:
    source = RandomSource(KEY)
    assert sorted(source.permutation(1000).tolist()) == list(range(1000))
    # 24 orders of 4, 24,000 draws: chi-square with 23 degrees exceeds 70 with probability 1.3e-6.
    seen = [tuple(source.permutation(4).tolist()) for _ in range(24_000)]
    counts = [seen.count(order) for order in set(seen)]
    assert len(counts) == 24
    assert sum((count - 1000) ** 2 / 1000 for count in counts) < 70


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_source_draws_nothing_in_a_fork():
    source = RandomSource.secure()
    source.normal(3)
    pid = os.fork()
    if not pid:
        refused = 0
        for draw in (lambda: source.words(1), lambda: source.normal(1), lambda: source.child("x")):
            try:
                draw()
            except RuntimeError:
                refused += 1
        os._exit(refused)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 3
    source.normal(3)  # goes on where it was made
