"""The server's role: sums under every pattern of dropouts, lying institutions, and its own view."""

import dataclasses
import itertools
import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from scipy import stats

from client import secure_keys, secure_store
from fedlora.errors import Refusal
from fedlora.secure import masks, secure_aggregation, shamir
from fedlora.secure.secure_aggregation import (
    KeysMessage,
    ListMessage,
    ListOrder,
    MaskedMessage,
    SharesMessage,
    UnmaskMessage,
)
from server.secure_sum import SecureRound, SecureSetup
from tests.secure_federation import DIGEST, NAMES, Federation, key, pinned, refused, terms

# Dropouts

STEPS = ("before masked", "before the list", "before the shares", "never")
"""The step before which an institution vanishes from a round."""


def one_round(made, number, vanishes):
    """A round in which institutions vanish, and what must come of it."""
    present = [{n for n in NAMES if STEPS.index(vanishes[n]) > i} for i in range(3)]
    masked, signing, answering = (sorted(names) for names in present)
    one = (
        made.listed(number, masked, ()) if len(masked) < 4 else made.listed(number, masked, signing)
    )
    if len(masked) < made.terms.least_survivors:
        with refused("secure-survivors"):
            one.list_order()
        return None
    if len(signing) < made.terms.threshold:
        with refused("secure-list-signatures"):
            one.unmask_order()
        return None
    for name in answering:
        one.add_shares(made.party(name).unmask(one.unmask_order()))
    if len(answering) < made.terms.threshold:
        with refused("secure-shares-few"):
            one.total()
        return None
    assert np.array_equal(one.total(), made.plain(masked, number)), vanishes
    return one


def check_patterns(made, patterns):
    """A round for each pattern, in one run: institutions that vanished come back in the next."""
    sums = 0
    for number, steps in enumerate(patterns, 1):
        made.revealed.clear()
        sums += one_round(made, number, dict(zip(NAMES, steps, strict=True))) is not None
        masked, signing = (sum(STEPS.index(step) > i for step in steps) for i in range(2))
        if min(masked, signing) < made.terms.threshold:
            assert not made.revealed  # given up before anything was unmasked
    return sums


def test_a_sum_is_that_of_the_survivors_to_the_last_bit_or_the_round_is_given_up(memory_path):
    # each multiset of steps once, laid upon the names in random order
    draw = random.Random(5)
    patterns = [draw.sample(s, 5) for s in itertools.combinations_with_replacement(STEPS, 5)]
    # four of five must remain to the end: all five, or one that vanishes at one of three steps
    assert check_patterns(Federation(memory_path, terms(rounds=len(patterns))), patterns) == 4


@pytest.mark.parametrize("dead", [*itertools.combinations("abcdefg", 2)], ids="-".join)
def test_two_of_seven_may_vanish_where_one_colludes(dead, memory_path):
    names = tuple("abcdefg")
    made = Federation(memory_path, terms(names=names))  # T = 5
    survivors = [name for name in names if name not in dead]
    assert np.array_equal(made.unmasked(1, survivors).total(), made.plain(survivors))
    assert np.array_equal(made.unmasked(2, names).total(), made.plain(names, 2))


def test_a_late_answer_completes_a_round_until_the_next_begins(memory_path):
    made = Federation(memory_path)
    one = made.unmasked(1, NAMES, answering=NAMES[:3])
    with refused("secure-shares-few"):
        one.total()
    one.add_shares(made.party("eve").unmask(one.unmask_order()))
    assert np.array_equal(one.total(), made.plain(NAMES))


# A restart of the server


def test_a_server_that_starts_again_at_any_step_goes_on_from_messages(memory_path):
    """After each step, new objects are made of stored bytes, or the institutions answer again."""
    made = Federation(memory_path, until="nothing")
    keys: dict[str, bytes] = {}
    for name in NAMES:
        setup = SecureSetup(made.terms, pinned(*NAMES))  # started again after each message
        for stored in keys.values():
            setup.add_keys(KeysMessage.from_bytes(stored))
        keys[name] = made.party(name).keys(made.terms).to_bytes()
        setup.add_keys(KeysMessage.from_bytes(keys[name]))
    sealed = {name: made.party(name).shares(setup.shares_order()).to_bytes() for name in NAMES}

    def again():
        setup = SecureSetup(made.terms, pinned(*NAMES))
        for name in NAMES:
            setup.add_keys(made.party(name).keys(made.terms))  # asked again
            setup.add_shares(SharesMessage.from_bytes(sealed[name]))  # stored
        return setup

    survivors = NAMES[1:]
    for _ in range(2):  # the first server died before it stored a list: vectors are asked for again
        one = SecureRound(again(), 1, DIGEST)
        for name in survivors:
            order = one.masked_order(name, with_shares=True)
            one.add_masked(made.party(name).mask(order, made.words(name)))
    listed, total = one.list_order().to_bytes(), one.masked_sum
    for _ in range(2):  # the second died after it: list and sum were stored
        one = SecureRound(again(), 1, DIGEST)
        one.restore(ListOrder.from_bytes(listed), total)
        for name in survivors:
            one.add_signature(made.party(name).sign_list(one.list_order()))
        for name in survivors:
            one.add_shares(made.party(name).unmask(one.unmask_order()))
        assert np.array_equal(one.total(), made.plain(survivors))


# Lying institutions


def test_keys_and_shares_that_are_wrong_or_absent_are_refused_by_the_server(memory_path):
    made = Federation(memory_path)
    fresh = SecureSetup(made.terms, pinned(*NAMES))
    ada = made.setup.keys[0]
    with refused("secure-keys-missing"):
        fresh.shares_order()
    with refused("secure-unknown-institution"):
        fresh.add_keys(dataclasses.replace(ada, name="zoe"))
    with refused("secure-keys-signature"):
        fresh.add_keys(dataclasses.replace(ada, name="bob"))
    with refused("secure-keys-unsigned"):
        fresh.add_keys(dataclasses.replace(ada, signature=b""))
    with refused("secure-setup-unfinished"):
        fresh.sealed_for("ada")
    with refused("secure-unknown-institution"):
        fresh.add_shares(SharesMessage(name="zoe", sealed=(b"x",) * 5))
    for sealed in ((b"x",) * 5, (b"", b"x"), (b"", b"", b"x", b"x", b"x"), ()):
        with refused("secure-shares-length"):
            fresh.add_shares(SharesMessage(name="ada", sealed=sealed))
    with refused("secure-shared-key"):
        SecureSetup(made.terms, pinned(*NAMES) | {"eve": key("ada").public_key()})


def test_a_key_of_small_order_or_of_another_institution_stops_the_setup(memory_path):
    made = Federation(memory_path)
    for channel, code in (
        (bytes(32), "secure-keys-small-order"),
        (made.setup.keys[1].channel, "secure-keys-repeated"),
    ):
        lie = dataclasses.replace(made.setup.keys[4], channel=channel)
        signature = secure_aggregation.sign(key("eve"), lie.statement)
        setup = SecureSetup(made.terms, pinned(*NAMES))
        for message in (*made.setup.keys[:4], dataclasses.replace(lie, signature=signature)):
            setup.add_keys(message)
        with refused(code):
            setup.shares_order()


def test_masked_words_that_do_not_belong_to_the_round_are_refused(memory_path):
    made = Federation(memory_path)
    one = made.masked(1, NAMES[:4])
    good = MaskedMessage(name="eve", round=1, words=bytes(8 * 40))
    for changes, code in (
        ({"words": bytes(8 * 39)}, "secure-words-length"),
        ({"words": bytes(8 * 40 + 1)}, "secure-words-length"),
        ({"round": 2}, "secure-other-round"),
        ({"name": "zoe"}, "secure-unknown-institution"),
        ({"name": "ada"}, "secure-words-repeated"),
    ):
        with refused(code):
            one.add_masked(dataclasses.replace(good, **changes))
    listed = one.list_order()
    with refused("secure-words-late"):
        one.add_masked(good)
    for name in listed.survivors:
        one.add_signature(made.party(name).sign_list(listed))
    for name in listed.survivors:
        one.add_shares(made.party(name).unmask(one.unmask_order()))
    assert np.array_equal(one.total(), made.plain(NAMES[:4]))  # the refused changed nothing


def test_garbage_words_make_the_sum_wrong_by_that_garbage_and_show_nothing(memory_path):
    made = Federation(memory_path)
    one = made.masked(1, NAMES[:4])
    order = one.masked_order("eve", with_shares=True)
    honest = made.party("eve").mask(order, made.words("eve"))
    added = np.random.default_rng(1).integers(-(2**63), 2**63 - 1, 40)
    garbage = np.frombuffer(honest.words, "<i8") + added
    one.add_masked(dataclasses.replace(honest, words=garbage.tobytes()))
    for name in NAMES:
        one.add_signature(made.party(name).sign_list(one.list_order()))
    for name in NAMES:
        one.add_shares(made.party(name).unmask(one.unmask_order()))
    assert np.array_equal(one.total(), made.plain(NAMES) + added)


def test_a_vector_for_another_order_has_no_sum_with_those_of_the_signed_one(memory_path):
    """The signers alone have noise for this order: other vectors must not count as their shares.

    False alarm: 2^-64 for each of 40 words.
    """
    made = Federation(memory_path)
    one = made.masked(1, NAMES[:4])
    order = one.masked_order("eve", with_shares=True)
    other = dataclasses.replace(order, digest=bytes(32))
    one.add_masked(made.party("eve").mask(other, made.words("eve")))
    for name in NAMES[:4]:
        one.add_signature(made.party(name).sign_list(one.list_order()))
    for name in NAMES[:4]:
        one.add_shares(made.party(name).unmask(one.unmask_order()))
    assert not (one.total() == made.plain(NAMES)).any()


def test_a_signature_of_another_list_or_of_nobody_is_refused(memory_path):
    made = Federation(memory_path)
    one = made.masked(1, NAMES[:4])
    bound = secure_aggregation.transcript(made.setup.keys)
    other = secure_aggregation.list_statement(made.terms, bound, 1, DIGEST, NAMES)
    forged = ListMessage(name="ada", round=1, signature=secure_aggregation.sign(key("ada"), other))
    for changes, code in (
        ({}, "secure-list-signature"),
        ({"signature": b""}, "secure-list-signature"),
        ({"name": "eve"}, "secure-unlisted"),
        ({"round": 2}, "secure-other-round"),
    ):
        with refused(code):
            one.add_signature(dataclasses.replace(forged, **changes))


def changed_share(position, value=b"\0" * shamir.SHARE_BYTES):
    """A lie: one share of an answer is another value."""

    def lie(message):
        shares = [*message.shares]
        shares[position] = value
        return dataclasses.replace(message, shares=tuple(shares))

    return lie


@pytest.mark.parametrize("liar", NAMES)
@pytest.mark.parametrize("value", [b"\0" * shamir.SHARE_BYTES, b"\xff" * shamir.SHARE_BYTES])
def test_a_wrong_share_makes_the_round_void_and_never_gives_another_secret(
    liar, value, memory_path
):
    made = Federation(memory_path)
    one = made.unmasked(1, NAMES, lies={liar: changed_share(NAMES.index("cyd"), value)})
    if liar == "eve":  # five shares, four are enough: the last one is not needed
        assert np.array_equal(one.total(), made.plain(NAMES))
        return
    with pytest.raises(Refusal, match="cyd") as caught:
        one.total()
    assert caught.value.code == "secure-shares-wrong"
    assert all(name in str(caught.value) for name in NAMES)


@pytest.mark.parametrize("broken", ["sealed", "polynomial"])
def test_bad_shares_of_a_dealer_make_the_round_void(broken, memory_path, monkeypatch):
    made = Federation(memory_path, until="keys")
    order, right = made.setup.shares_order(), secure_keys.deal

    def wrong(agreed, secrets):
        return right(agreed, {n: (mask, b"\1" * 32) for n, (mask, _) in secrets.items()})

    for name in NAMES:
        with monkeypatch.context() as patch:
            if name == "cyd" and broken == "polynomial":
                patch.setattr(secure_keys, "deal", wrong)
            message = made.party(name).shares(order)
        if name == "cyd" and broken == "sealed":
            sealed = tuple(part and bytes(len(part)) for part in message.sealed)
            message = dataclasses.replace(message, sealed=sealed)
        made.setup.add_shares(message)
    one = made.unmasked(1, NAMES)
    with refused("secure-shares-few" if broken == "sealed" else "secure-shares-wrong"):
        one.total()


# What the server sees

FALSE_ALARM = 1e-9
"""Of one chi-square test."""


@pytest.mark.parametrize(
    "words",
    [np.zeros(20_000, np.int64), np.full(20_000, 2**59), np.arange(-10_000, 10_000)],
    ids=["zeros", "constant", "counter"],
)
def test_masked_words_are_uniform_whatever_the_records(words, memory_path):
    """Chi-square over all bytes, and over the bytes at each of the 8 places of a word: 9 tests.

    False alarm: below 9e-9 for each vector, 2.7e-8 for the three.
    """
    made = Federation(memory_path, terms(parameters=len(words)))
    order = made.masked(1, ()).masked_order("cyd", with_shares=True)
    message = made.party("cyd").mask(order, words)
    seen = np.frombuffer(message.words, np.uint8).reshape(-1, 8)
    for part in (seen, *seen.T):
        counts = np.bincount(part.ravel(), minlength=256)
        assert stats.chisquare(counts).pvalue > FALSE_ALARM
    # the same test finds words without masks
    plain = np.bincount(words.view(np.uint8), minlength=256)
    assert stats.chisquare(plain).pvalue < FALSE_ALARM


def keystream(seed, size):
    words = np.zeros(size, "<u8")
    masks.apply(words, add=[seed])
    return words


class Secrets:
    """All that institutions hold in a round: seeds, mask keys, and the masks of pairs."""

    def __init__(self, made, number):
        self.terms = made.terms
        keys = {message.name: message for message in made.setup.keys}
        bound = secure_aggregation.transcript(made.setup.keys)
        self.private, self.seeds = {}, {}
        for name in made.terms.names:
            with secure_store.opened(made.folder / f"{name}.db") as db:
                self.private[name], self.seeds[name] = secure_store.secrets(db, "run")[number]
        self.pairs = {}
        for first, second in itertools.combinations(made.terms.names, 2):
            own = X25519PrivateKey.from_private_bytes(self.private[first])
            secret = secure_aggregation.agree(own, keys[second].mask(number), second)
            pair = (first, second)
            mask_key = secure_aggregation.pair_key(secret, made.terms, bound, number, DIGEST, pair)
            self.pairs[pair] = keystream(mask_key, made.terms.parameters)


def simulated(total, secrets, survivors, pairs):
    """The simulator: the survivors' masked vectors from their sum and randomness, no vector.

    The masks of pairs of survivors are uniform and independent to the server, which knows the seeds
    and the keys of the dead. The first survivor is given the sum and all others zeros.
    """
    view = {}
    for name in survivors:
        words = total.astype("<i8").view("<u8").copy() if name == survivors[0] else 0
        words = words + keystream(secrets.seeds[name], secrets.terms.parameters)
        for (first, second), mask in pairs.items():
            if name in (first, second):
                words = words + mask if name == first else words - mask
        view[name] = words
    return view


def test_a_simulator_that_knows_only_the_sum_produces_the_server_s_view(memory_path):
    """The simulator's masks are the real ones moved by a bijection, so both views have one law.

    With masks r of the pairs of survivors (uniform, independent), the real view of vectors x is
    the simulator's view with masks r', where r' of neighbours u_i, u_{i+1} in the list is r plus
    the sum of x of u_{i+1} and all later ones negated: for each x, r -> r' is a translation of
    the ring. A translation keeps the uniform law. So the view's law depends on the sum alone.
    """
    made = Federation(memory_path)
    survivors = NAMES[:4]  # eve is dead: her key is part of the view
    everyone = made.masked(1, ())
    inputs = {name: made.words(name) for name in survivors}
    real = {}
    for name in survivors:
        message = made.party(name).mask(everyone.masked_order(name, with_shares=True), inputs[name])
        real[name] = np.frombuffer(message.words, "<u8")
    secrets = Secrets(made, 1)
    total = np.sum([*inputs.values()], axis=0)

    moved = dict(secrets.pairs)
    for i, pair in enumerate(itertools.pairwise(survivors)):
        later = np.sum([inputs[name] for name in survivors[i + 1 :]], axis=0)
        moved[pair] = moved[pair] - later.astype("<i8").view("<u8")
    view = simulated(total, secrets, survivors, moved)
    for name in survivors:
        assert np.array_equal(view[name], real[name]), name
    # without the translation it is another view, with the same sum
    other = simulated(total, secrets, survivors, secrets.pairs)
    assert not any(np.array_equal(other[name], real[name]) for name in survivors)
    assert np.array_equal(sum(other.values()), sum(real.values()))


def test_two_inputs_with_one_sum_have_the_same_views(memory_path):
    """Whatever the server sees of one input, it sees of the other under moved masks."""
    made = Federation(memory_path)
    survivors = NAMES[:4]
    secrets = Secrets(made, 1)
    first = {name: made.words(name) for name in survivors}
    second = {name: made.words(name, 2) for name in survivors}
    second["dan"] = second["dan"] + sum(first.values()) - sum(second.values())
    assert np.array_equal(sum(first.values()), sum(second.values()))

    def view(inputs, pairs):
        found = {}
        for name in survivors:
            words = inputs[name].astype("<i8").view("<u8") + keystream(secrets.seeds[name], 40)
            for (one, two), mask in pairs.items():
                if name in (one, two):
                    words = words + mask if name == one else words - mask
            found[name] = words
        return found

    one = made.masked(1, ())
    for name in survivors:  # the formula is the party's
        message = made.party(name).mask(one.masked_order(name, with_shares=True), first[name])
        assert message.words == view(first, secrets.pairs)[name].tobytes()
    moved = dict(secrets.pairs)
    for i, pair in enumerate(itertools.pairwise(survivors)):
        later = sum(second[name] - first[name] for name in survivors[i + 1 :])
        moved[pair] = moved[pair] + later.astype("<i8").view("<u8")
    for name in survivors:
        assert np.array_equal(view(first, secrets.pairs)[name], view(second, moved)[name])


def test_a_sum_of_the_largest_vectors_does_not_wrap(memory_path):
    made = Federation(memory_path, terms(parameters=2))
    bound = 2**62 // 5 - 1
    made.words = lambda name, number=1: np.array([bound, -bound])
    assert made.unmasked(1, NAMES).total().tolist() == [5 * bound, -5 * bound]


def test_shares_of_another_round_are_wrong_shares(memory_path):
    made = Federation(memory_path)
    with secure_store.opened(memory_path / "ada.db") as db:
        later = secure_store.shares(db, "run", 2)
    made.party("ada").begin(made.masked(1, ()).masked_order("ada", with_shares=True))
    with secure_store.opened(memory_path / "ada.db") as db:
        later = secure_store.shares(db, "run", 2)

    def replay(message):
        return dataclasses.replace(message, shares=tuple(later[name][1] for name in NAMES))

    one = made.unmasked(1, NAMES, lies={"ada": replay})
    with refused("secure-shares-wrong"):
        one.total()


def test_answers_of_others_rounds_and_lengths_are_refused(memory_path):
    made = Federation(memory_path)
    one = made.listed(1, NAMES[:4], NAMES[:4])
    good = UnmaskMessage(name="ada", round=1, shares=(b"",) * 5)
    for changes, code in (
        ({"name": "eve"}, "secure-unlisted"),
        ({"round": 2}, "secure-other-round"),
        ({"shares": (b"",) * 4}, "secure-shares-length"),
    ):
        with refused(code):
            one.add_shares(dataclasses.replace(good, **changes))
