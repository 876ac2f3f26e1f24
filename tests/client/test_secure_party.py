"""An institution against a lying server and lying institutions, and after a kill at any point."""

import contextlib
import dataclasses
import itertools
import os
import random
import signal
import sqlite3
import stat
import tempfile
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import example, given, settings
from hypothesis import strategies as st

from client import ledger_file, secure_store
from fedlora.errors import Refusal
from fedlora.secure import noise_shares, secure_aggregation
from fedlora.secure.secure_aggregation import (
    ListOrder,
    MaskedMessage,
    MaskedOrder,
    SharesOrder,
    UnmaskOrder,
)
from tests.secure_federation import DIGEST, NAMES, Federation, key, pinned, refused, terms


def signed(message, name, **changes):
    """A key message with other content, signed by an institution, which lies."""
    changed = dataclasses.replace(message, **changes)
    signature = secure_aggregation.sign(key(name), changed.statement)
    return dataclasses.replace(changed, signature=signature)


# The setup


@pytest.mark.parametrize(
    "changes",
    [
        {"names": ("bob", "ada")},
        {"names": ("ada", "ada", "bob")},
        {"names": ()},
        {"names": ("", "ada", "bob")},
        {"run": "r" * 1001},
        {"honest": 1},
        {"colluding": 4},
        {"colluding": 0},
        {"rounds": 0},
        {"parameters": 0},
        {"parameters": noise_shares.MAX_PARAMETERS + 1},
    ],
    ids=str,
)
def test_terms_outside_their_bounds_are_refused(changes):
    with refused("secure-terms"):
        terms(**changes)


@pytest.mark.parametrize(
    ("n", "colluding", "threshold", "least"), [(5, 1, 4, 4), (4, 2, 4, 4), (39, 3, 22, 35)]
)
def test_the_threshold_and_the_least_survivors_by_hand(n, colluding, threshold, least):
    made = terms(
        names=tuple(f"{i:03}" for i in range(n)), colluding=colluding, honest=least - colluding
    )
    assert (made.threshold, made.least_survivors) == (threshold, least)
    assert 2 * threshold - n > colluding


@pytest.mark.parametrize("cut", [0, 1, 30, -1])
def test_a_message_that_is_cut_or_another_one_is_refused(cut):
    data = MaskedOrder(run="run", round=1, digest=DIGEST, sealed=(b"", b"x")).to_bytes()
    assert MaskedOrder.from_bytes(data).to_bytes() == data
    for wrong, kind in (
        (data[:cut], MaskedOrder),
        (data + b"\0", MaskedOrder),
        (data, ListOrder),
        (data.replace(b"\xc4\x20", b"\xd9\x20"), MaskedOrder),  # a text in place of bytes
        (data.replace(b"\xc4\x20", b"\xc5\x00\x20"), MaskedOrder),  # a longer encoding
    ):
        with refused("secure-malformed"):
            kind.from_bytes(wrong)


def test_a_run_is_set_up_only_among_pinned_keys_with_a_key_for_each_name(memory_path):
    made = Federation(memory_path, until="keys")
    ada, fresh = made.party, terms(run="other")
    other_curve = ec.generate_private_key(ec.SECP256R1()).public_key()
    for peers, code in (
        (pinned("ada", "bob", "cyd", "dan"), "secure-unknown-institution"),
        (pinned(*NAMES) | {"eve": key("dan").public_key()}, "secure-shared-key"),
        (pinned(*NAMES) | {"eve": other_curve}, "secure-curve"),
        (pinned(*NAMES) | {"ada": key("zoe").public_key()}, "secure-own-key"),
    ):
        with refused(code):
            ada("ada", peers=peers).keys(fresh)
    with refused("secure-name-missing"):
        ada("zoe", key=key("zoe")).keys(fresh)
    ada("ada", peers=pinned(*NAMES, "zoe")).keys(fresh)  # more pinned keys than names are allowed


def test_other_terms_for_a_run_are_refused_and_the_same_have_the_same_keys(memory_path):
    made = Federation(memory_path, until="keys")
    first, again = (made.party("ada").keys(made.terms) for _ in range(2))
    assert first == again
    with refused("secure-terms-changed"):
        made.party("ada").keys(terms(colluding=2))


def test_a_run_that_goes_on_under_another_roster_is_refused(memory_path):
    made = Federation(memory_path)
    party = made.party("ada", peers=pinned(*NAMES) | {"eve": key("mallory").public_key()})
    one = made.masked(1, NAMES)
    for call in (
        lambda: party.keys(made.terms),
        lambda: party.shares(made.setup.shares_order()),
        lambda: party.begin(one.masked_order("ada", with_shares=True)),
        lambda: party.sign_list(one.list_order()),
    ):
        with refused("secure-roster-changed"):
            call()


SMALL_ORDER = [
    bytes(32),
    (1).to_bytes(32, "little"),
    (2**255 - 20).to_bytes(32, "little"),  # -1
    (2**255 - 19).to_bytes(32, "little"),  # 0, not reduced
    bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"),
    bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"),
]
"""Points of order 1, 2, 4 and 8 (Bernstein, A state-of-the-art Diffie-Hellman function)."""


def swapped(keys, made):
    return [keys[1], keys[0], *keys[2:]]


def replayed(keys, made):
    with tempfile.TemporaryDirectory() as other:
        mine = Federation(Path(other), terms(run="an earlier run"), until="keys")
        return [*keys[:4], mine.setup.keys[4]]


def unsigned(keys, made):
    return [*keys[:4], dataclasses.replace(keys[4], signature=b"")]


def altered(keys, made):
    fresh = X25519PrivateKey.generate().public_key().public_bytes_raw()
    return [*keys[:4], dataclasses.replace(keys[4], channel=fresh)]


def another_signer(keys, made):
    return [*keys[:4], signed(keys[4], "dan")]


def short(keys, made):
    return [*keys[:4], signed(keys[4], "eve", masks=keys[4].masks[:-32])]


def copied(keys, made):
    return [*keys[:4], signed(keys[4], "eve", channel=keys[1].channel)]


def copied_with_another_encoding(keys, made):
    high = keys[1].channel[:-1] + bytes([keys[1].channel[-1] | 0x80])
    return [*keys[:4], signed(keys[4], "eve", channel=high)]


def own_replaced(keys, made):
    """The server has a second message of ada's own, as from a store that was lost."""
    with tempfile.TemporaryDirectory() as other:
        return [Federation(Path(other), until="keys").setup.keys[0], *keys[1:]]


KEY_ATTACKS = [
    (swapped, "secure-keys-swapped"),
    (replayed, "secure-keys-replayed"),
    (unsigned, "secure-keys-unsigned"),
    (altered, "secure-keys-signature"),
    (another_signer, "secure-keys-signature"),
    (short, "secure-keys-length"),
    (copied, "secure-keys-repeated"),
    (copied_with_another_encoding, "secure-keys-repeated"),
    (own_replaced, "secure-keys-own"),
    (lambda keys, made: keys[:4], "secure-keys-missing"),
    *(
        (lambda keys, made, p=point: [*keys[:4], signed(keys[4], "eve", channel=p)], code)
        for point, code in zip(SMALL_ORDER, itertools.repeat("secure-keys-small-order"))
    ),
    (
        lambda keys, made: [
            *keys[:4],
            signed(keys[4], "eve", masks=keys[4].masks[:32] + bytes(32) + keys[4].masks[64:]),
        ],
        "secure-keys-small-order",
    ),
]


@pytest.mark.parametrize(("attack", "code"), KEY_ATTACKS, ids=lambda v: getattr(v, "__name__", v))
def test_a_lie_about_keys_is_refused_with_a_code_of_its_own(attack, code, memory_path):
    made = Federation(memory_path, until="keys")
    keys = attack(made.setup.keys, made)
    order = SharesOrder(run="run", keys=tuple(message.to_bytes() for message in keys))
    with refused(code):
        made.party("ada").shares(order)
    assert made.party("ada").shares(made.setup.shares_order())  # nothing was stored before


def test_a_second_set_of_keys_for_a_run_is_refused_and_the_first_has_the_same_answer(memory_path):
    made = Federation(memory_path)
    order = made.setup.shares_order()
    first, again = (made.party("ada").shares(order) for _ in range(2))
    assert first == again
    eve = signed(made.setup.keys[4], "eve", channel=b"\7" * 32)
    with refused("secure-other-keys"):
        made.party("ada").shares(SharesOrder(run="run", keys=(*order.keys[:4], eve.to_bytes())))


def test_a_share_is_sealed_for_one_institution_of_one_run(memory_path):
    made = Federation(memory_path)
    for_bob = made.setup.sealed_for("bob")
    order = MaskedOrder(run="run", round=1, digest=DIGEST, sealed=for_bob)
    cyd = made.party("cyd")
    cyd.begin(order)  # nothing of it opens
    cyd.begin(dataclasses.replace(order, sealed=made.setup.sealed_for("cyd")))  # too late
    with secure_store.opened(memory_path / "cyd.db") as db:
        assert set(secure_store.shares(db, "run", 1)) == {"cyd"}
    dan = made.party("dan")
    dan.begin(dataclasses.replace(order, sealed=made.setup.sealed_for("dan")))
    with secure_store.opened(memory_path / "dan.db") as db:
        assert set(secure_store.shares(db, "run", 1)) == set(NAMES)


# A round


def test_a_round_without_a_setup_or_without_shares_is_refused(memory_path):
    made = Federation(memory_path, until="keys")
    order = MaskedOrder(run="run", round=1, digest=DIGEST, sealed=())
    with refused("secure-setup-unfinished"):
        made.party("ada").begin(order)
    with refused("secure-run-unknown"):
        made.party("ada").begin(dataclasses.replace(order, run="another"))
    made.party("ada").shares(made.setup.shares_order())
    with refused("secure-shares-missing"):
        made.party("ada").begin(order)
    with refused("secure-shares-length"):
        made.party("ada").begin(dataclasses.replace(order, sealed=(b"", b"")))


def test_a_round_is_one_of_the_run_and_has_one_order(memory_path):
    made = Federation(memory_path)
    ada, sealed = made.party("ada"), made.setup.sealed_for("ada")
    order = MaskedOrder(run="run", round=2, digest=DIGEST, sealed=sealed)
    ada.begin(order)
    ada.begin(dataclasses.replace(order, sealed=()))  # the shares are there
    for changes, code in (
        ({"digest": b"\1" * 32}, "secure-round-other-order"),
        ({"digest": b"\1" * 31}, "secure-digest"),
        ({"round": 0}, "secure-round-range"),
        ({"round": 4}, "secure-round-range"),
        ({"round": 1}, "secure-round-past"),
    ):
        with refused(code):
            ada.begin(dataclasses.replace(order, **changes))


def test_a_round_masks_one_vector(memory_path):
    made = Federation(memory_path)
    order = MaskedOrder(run="run", round=1, digest=DIGEST, sealed=made.setup.sealed_for("ada"))
    words = made.words("ada")
    assert made.party("ada").begin(order) is None
    sent = made.party("ada").mask(order, words)
    words[0] += 1  # as a second training may differ in its last bits
    assert made.party("ada").begin(order) == made.party("ada").mask(order, words) == sent


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (np.zeros(39, dtype=np.int64), "secure-words-length"),
        (np.zeros(40, dtype=np.uint64), "secure-words-length"),
        (np.full(40, 2**62 // 5), "secure-words-range"),
        (np.full(40, -(2**62 // 5)), "secure-words-range"),
        (np.full(40, np.iinfo(np.int64).min), "secure-words-range"),
    ],
)
def test_a_vector_that_could_wrap_or_has_another_length_is_refused(words, code, memory_path):
    made = Federation(memory_path)
    order = MaskedOrder(run="run", round=1, digest=DIGEST, sealed=made.setup.sealed_for("ada"))
    with refused(code):
        made.party("ada").mask(order, words)


@pytest.mark.parametrize(
    ("survivors", "code"),
    [
        (("ada", "bob", "cyd", "dan", "zoe"), "secure-list-names"),
        (("bob", "ada", "cyd", "dan"), "secure-list-names"),
        (("ada", "ada", "bob", "cyd", "dan"), "secure-list-names"),
        (("bob", "cyd", "dan", "eve"), "secure-list-excluded"),
        (("ada", "bob", "cyd"), "secure-list-short"),
        (("ada",), "secure-list-short"),  # all but one victim declared dead
    ],
)
def test_a_list_that_would_show_too_much_is_refused(survivors, code, memory_path):
    made = Federation(memory_path)
    made.masked(1, NAMES)
    with refused(code):
        made.party("ada").sign_list(ListOrder(run="run", round=1, survivors=survivors))


def test_a_list_is_signed_after_a_vector_was_masked_in_this_round_only(memory_path):
    made = Federation(memory_path)
    with refused("secure-list-unmasked"):
        made.party("ada").sign_list(ListOrder(run="run", round=1, survivors=NAMES))
    made.party("ada").begin(made.masked(1, NAMES[1:]).masked_order("ada", with_shares=True))
    with refused("secure-list-unmasked"):
        made.party("ada").sign_list(ListOrder(run="run", round=1, survivors=NAMES))
    made.masked(2, NAMES)
    with refused("secure-round-past"):
        made.party("ada").sign_list(ListOrder(run="run", round=1, survivors=NAMES))
    with refused("secure-list-unmasked"):
        made.party("ada").sign_list(ListOrder(run="run", round=3, survivors=NAMES))


def test_a_round_asked_for_again_with_one_institution_fewer_is_refused(memory_path):
    # the difference of two sums would be the vector of the institution that is left out
    made = Federation(memory_path)
    one = made.unmasked(1, NAMES)
    assert np.array_equal(one.total(), made.plain(NAMES))
    fewer = ListOrder(run="run", round=1, survivors=NAMES[:4])
    for name in NAMES[:4]:
        with refused("secure-list-second"):
            made.party(name).sign_list(fewer)
    again = made.party("ada").unmask(one.unmask_order())
    assert again == made.party("ada").unmask(one.unmask_order())


def test_different_lists_for_different_institutions_unmask_at_most_one(memory_path):
    """Eve colludes and signs both lists; for each split of the others, one list at most is used."""
    splits = [*itertools.product((0, 1), repeat=4)]
    made = Federation(memory_path, terms(rounds=len(splits)))
    lists = (NAMES, NAMES[:3] + NAMES[4:])  # with and without dan
    answered_ever = 0
    for number, split in enumerate(splits, 1):
        made.masked(number, NAMES)
        bound = secure_aggregation.transcript(made.setup.keys)
        signatures = []
        for which, survivors in enumerate(lists):
            statement = secure_aggregation.list_statement(
                made.terms, bound, number, DIGEST, survivors
            )
            found = {"eve": secure_aggregation.sign(key("eve"), statement)}
            for name, side in zip(NAMES[:4], split, strict=True):
                order = ListOrder(run="run", round=number, survivors=survivors)
                if side == which and name in survivors:
                    found[name] = made.party(name).sign_list(order).signature
            signatures.append(tuple(found.get(name, b"") for name in survivors))
        answered = set()
        for name, which in itertools.product(NAMES[:4], (0, 1)):
            order = UnmaskOrder(run="run", round=number, signatures=signatures[which])
            with contextlib.suppress(Refusal):
                made.party(name).unmask(order)
                answered.add(which)
        assert len(answered) <= 1, f"split {split}"
        answered_ever += len(answered)
    # four signatures are needed: the first list has them if three or four of the others sign it
    # (5 splits), the second if ada, bob and cyd do (2 splits)
    assert answered_ever == 7


def test_shares_are_revealed_only_for_a_list_that_enough_others_signed(memory_path):
    made = Federation(memory_path)
    one = made.listed(1, NAMES, NAMES)
    good = one.unmask_order()
    three = (*good.signatures[:3], b"", b"")
    for signatures in (
        three,
        three[:4],
        (*three[:3], three[0], three[1]),  # of names that did not sign
        (*three[:3], b"\0" * 70, b"x"),
        (),
        good.signatures * 2,
    ):
        with refused("secure-unmask-signatures"):
            made.party("ada").unmask(dataclasses.replace(good, signatures=signatures))
    assert not made.revealed
    made.party("ada").unmask(good)
    assert made.revealed == [("ada", "run", 1)]


def test_an_answer_reveals_one_kind_of_share_for_each_name_whatever_is_asked(memory_path):
    made = Federation(memory_path)
    one = made.listed(1, NAMES[:4], NAMES[:4])
    with secure_store.opened(memory_path / "ada.db") as db:
        held = secure_store.shares(db, "run", 1)
    answer = made.party("ada").unmask(one.unmask_order())
    assert answer.shares == (*(held[name][1] for name in NAMES[:4]), held["eve"][0])
    # the signatures of a list with eve, from the four others and eve, who colludes
    bound = secure_aggregation.transcript(made.setup.keys)
    other = secure_aggregation.list_statement(made.terms, bound, 1, DIGEST, NAMES)
    signatures = tuple(secure_aggregation.sign(key(name), other) for name in NAMES)
    for forged in (signatures, signatures[:4]):
        with refused("secure-unmask-signatures"):
            made.party("ada").unmask(UnmaskOrder(run="run", round=1, signatures=forged))


def test_shares_of_another_round_are_refused(memory_path):
    made = Federation(memory_path)
    one = made.listed(1, NAMES, NAMES)
    order = one.unmask_order()
    two = made.listed(2, NAMES, NAMES)
    with refused("secure-round-past"):
        made.party("ada").unmask(order)
    with refused("secure-unmask-signatures"):  # signatures of round 1 in round 2
        made.party("ada").unmask(dataclasses.replace(order, round=2))
    with refused("secure-list-unmasked"):
        made.party("ada").unmask(dataclasses.replace(two.unmask_order(), round=3))
    made.masked(3, NAMES)
    with refused("secure-unmask-unsigned"):
        made.party("ada").unmask(dataclasses.replace(two.unmask_order(), round=3))


def test_nothing_is_revealed_where_the_point_of_no_return_is_not_stored(memory_path):
    made = Federation(memory_path)
    order = made.listed(1, NAMES, NAMES).unmask_order()

    def fails(run, number, digest, survivors):
        assert (run, number, digest, survivors) == ("run", 1, DIGEST, NAMES)
        raise Refusal("ledger-locked", "in use")

    with refused("ledger-locked"):
        made.party("ada", before_unmask=fails).unmask(order)
    assert made.party("ada").unmask(order)


class LyingServer:
    """A server that, with eve, asks the four others for anything, in any order, again and again."""

    LISTS = (NAMES, NAMES[:3] + NAMES[4:], NAMES[:4], NAMES[1:], NAMES[:3])
    DIGESTS = (DIGEST, b"\1" * 32)

    def __init__(self, made, draw):
        self.made, self.draw = made, draw
        self.bound = secure_aggregation.transcript(made.setup.keys)
        self.signatures = {}  # round, digest, list -> name -> signature
        self.kinds = {}  # round, name -> kinds of shares that were revealed
        self.vectors = {}  # round, name -> masked vectors
        self.answers = 0

    def step(self):
        name = self.draw.choice(NAMES[:4])
        number = self.draw.choices((1, 2, 3), (40, 2, 1))[0]
        ask = self.draw.choice((self.mask, self.sign, self.sign, self.unmask))
        with contextlib.suppress(Refusal):
            ask(self.made.party(name), name, number)

    def mask(self, party, name, number):
        sealed = self.draw.choice(((), self.made.setup.sealed_for(name)))
        digest = self.draw.choices(self.DIGESTS, (9, 1))[0]
        words = self.made.words(name, self.draw.choices((number, 9), (9, 1))[0])
        order = MaskedOrder(run="run", round=number, digest=digest, sealed=sealed)
        masked = party.mask(order, words).words
        self.vectors.setdefault((number, name), set()).add(masked)

    def sign(self, party, name, number):
        survivors = self.draw.choices(self.LISTS, (12, 3, 1, 1, 1))[0]
        order = ListOrder(run="run", round=number, survivors=survivors)
        signature = party.sign_list(order).signature
        for digest in self.DIGESTS:
            statement = secure_aggregation.list_statement(
                self.made.terms, self.bound, number, digest, survivors
            )
            found = self.signatures.setdefault((number, digest, survivors), {})
            found["eve"] = secure_aggregation.sign(key("eve"), statement)
            if secure_aggregation.is_signed(key(name).public_key(), signature, statement):
                found[name] = signature

    def unmask(self, party, name, number):
        known = [choice for choice in self.signatures if choice[0] == number]
        if not known:
            return
        chosen = max(known, key=lambda k: (len(self.signatures[k]), self.draw.random()))
        chosen = self.draw.choices((chosen, self.draw.choice(known)), (3, 1))[0]
        found, survivors = self.signatures[chosen], chosen[2]
        signatures = tuple(found.get(signer, b"") for signer in survivors)
        order = UnmaskOrder(run="run", round=number, signatures=signatures)
        with secure_store.opened(self.made.folder / f"{name}.db") as db:
            held = secure_store.shares(db, "run", number)
        for of, share in zip(NAMES, party.unmask(order).shares, strict=True):
            self.kinds.setdefault((number, of), set()).add(held[of].index(share))
        self.answers += 1


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32))  # schedules that Hypothesis draws itself get no answer
@example(seed=5)
def test_no_schedule_of_a_lying_server_gets_both_shares_or_two_vectors(seed):
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        server = LyingServer(Federation(Path(folder)), random.Random(seed))
        for _ in range(150):
            server.step()
        assert all(len(kinds) == 1 for kinds in server.kinds.values())
        assert all(len(vectors) == 1 for vectors in server.vectors.values())
        if seed == 5:
            assert server.kinds  # the property is about something: shares are revealed


# The store


def test_the_store_is_readable_by_its_owner_only(memory_path):
    Federation(memory_path)
    assert {stat.S_IMODE(file.stat().st_mode) for file in memory_path.iterdir()} == {0o600}


def test_secrets_of_a_round_are_erased_from_the_file_when_the_next_begins(memory_path):
    made = Federation(memory_path)
    with secure_store.opened(memory_path / "ada.db") as db:
        first, second = secure_store.secrets(db, "run")[1], secure_store.secrets(db, "run")[2]
        channel = secure_store.run(db, "run").channel
    files = lambda: b"".join(file.read_bytes() for file in memory_path.glob("ada.db*"))  # noqa: E731
    assert all(secret in files() for secret in (*first, *second, channel))
    made.masked(1, NAMES)
    assert channel not in files()  # the shares arrived
    with secure_store.opened(memory_path / "ada.db") as db:
        shares = secure_store.shares(db, "run", 1)["bob"]
        vector = secure_store.latest_round(db, "run").masked
    assert all(secret in files() for secret in (*first, *shares, vector))
    made.masked(2, NAMES)
    assert not any(secret in files() for secret in (*first, *shares, vector))
    with secure_store.opened(memory_path / "ada.db") as db:
        vector = secure_store.latest_round(db, "run").masked
        assert secure_store.known(db) == {"run": False}
        secure_store.end(db, "run")
        assert secure_store.known(db) == {"run": True}
        ended = secure_store.run(db, "run")
        assert (ended.keys, ended.peers, ended.sealed, ended.channel) == (b"", None, None, None)
    assert not any(secret in files() for secret in (*second, vector))
    with refused("secure-run-ended"):
        made.party("ada").keys(made.terms)


def channel_of(store):
    with secure_store.opened(store) as db:
        return secure_store.run(db, "run").channel


def test_a_server_that_garbles_a_share_does_not_keep_a_channel_key_in_a_store(memory_path):
    # with that key all sealed shares, and so the secrets of rounds that are over, would open again
    made = Federation(memory_path)
    message = made.party("bob").shares(made.setup.shares_order())
    first, *others = message.sealed
    garbled = (bytes([first[0] ^ 1]) + first[1:], *others)
    made.setup.add_shares(dataclasses.replace(message, sealed=garbled))
    store, order = memory_path / "ada.db", made.masked(1, ()).masked_order("ada", with_shares=True)
    channel = channel_of(store)
    assert channel in store.read_bytes()
    for _ in range(2):  # the server has no answer yet, and sends the shares again
        made.party("ada").begin(order)
        assert channel not in b"".join(file.read_bytes() for file in memory_path.glob("ada.db*"))
    for number in (1, 2):
        one = made.unmasked(number, NAMES)
        assert np.array_equal(one.total(), made.plain(NAMES, number))


def test_a_store_of_something_else_a_damaged_one_and_an_exposed_one_are_refused(memory_path):
    made = Federation(memory_path, until="keys")
    store = memory_path / "ada.db"
    good = store.read_bytes()
    store.write_bytes(good[:5000] + bytes(3000) + good[8000:])
    with refused("secure-store-corrupt"):
        made.party("ada").keys(made.terms)
    store.write_bytes(b"text")
    with refused("secure-store-corrupt"):
        made.party("ada").keys(made.terms)
    store.unlink()
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.execute("CREATE TABLE runs (run TEXT)")
    with refused("secure-store-foreign"):
        made.party("ada").keys(made.terms)
    store.write_bytes(good)
    with contextlib.closing(sqlite3.connect(store)) as db:
        db.execute("PRAGMA user_version=9")
    with refused("secure-store-foreign"):
        made.party("ada").keys(made.terms)
    store.write_bytes(good)
    with refused("secure-store-corrupt"), secure_store.opened(store) as db:
        db.execute("SELECT CAST(x'ff' AS TEXT)").fetchone()  # as a damaged name is read
    store.chmod(0o622)
    with refused("secure-store-exposed"):
        made.party("ada").keys(made.terms)
    with refused("secure-store-unusable"):
        made.party("ada", store=memory_path / "absent" / "ada.db").keys(made.terms)


def test_a_store_that_another_process_holds_is_refused(memory_path, monkeypatch):
    made = Federation(memory_path, until="keys")
    monkeypatch.setattr(ledger_file, "BUSY_SECONDS", 0.05)
    with secure_store.opened(memory_path / "ada.db"), refused("secure-store-locked"):
        made.party("ada").keys(made.terms)


WRITES = ("INSERT", "UPDATE", "DELETE", "COMMIT")
"""Statements before which a kill leaves something else in the file."""


def killed_at(count, call):
    """Run a call in a process that dies by SIGKILL before its n-th write, if it has so many."""
    child = os.fork()
    if child == 0:
        connect, left = sqlite3.connect, [count]

        def trace(statement):
            left[0] -= statement.startswith(WRITES)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def traced(*args, **kwargs):
            db = connect(*args, **kwargs)
            db.set_trace_callback(trace)
            return db

        secure_store.sqlite3.connect = traced
        code = 1
        with contextlib.suppress(BaseException):
            call()
            code = 0
        os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_a_party_that_is_killed_at_any_write_goes_on(memory_path):
    """Bob is killed before and after each write of each step, then asked again."""
    made = Federation(memory_path, terms(rounds=1), until="nothing")
    kills = 0

    def step(call):
        """For each write, the state from before the step, a kill at the write, and two answers."""
        nonlocal kills
        before = {file: file.read_bytes() for file in memory_path.glob("bob.db*")}
        for count in itertools.count(1):
            for file in memory_path.glob("bob.db*"):
                file.unlink()
            for file, content in before.items():
                file.write_bytes(content)
                file.chmod(0o600)
            died = killed_at(count, call)
            first, again = call(), call()
            assert first == again
            if not died:
                break
            kills += 1
        return first

    def ask(name, call):
        return step(call) if name == "bob" else call()

    for name in NAMES:
        made.setup.add_keys(ask(name, lambda n=name: made.party(n).keys(made.terms)))
    order = made.setup.shares_order()
    for name in NAMES:
        made.setup.add_shares(ask(name, lambda n=name: made.party(n).shares(order)))
    survivors = NAMES[:4]
    one = made.masked(1, ())
    for name in survivors:
        masked_order = one.masked_order(name, with_shares=True)
        message = ask(name, lambda n=name, o=masked_order: made.party(n).mask(o, made.words(n)))
        one.add_masked(MaskedMessage.from_bytes(message.to_bytes()))
    for name in survivors:
        one.add_signature(ask(name, lambda n=name: made.party(n).sign_list(one.list_order())))
    for name in survivors:
        one.add_shares(ask(name, lambda n=name: made.party(n).unmask(one.unmask_order())))
    assert np.array_equal(one.total(), made.plain(survivors))
    assert kills > 20  # several in each of the five steps
