"""Institutions and a server of secure aggregation in one process, for tests."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Generator, Mapping
from pathlib import Path

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from client.secure_party import SecureParty
from fedlora.errors import Refusal
from fedlora.secure.secure_aggregation import (
    KeysMessage,
    ListMessage,
    MaskedMessage,
    SharesMessage,
    Terms,
    UnmaskMessage,
)
from server.secure_sum import SecureRound, SecureSetup

DIGEST = bytes(range(32))
NAMES = ("ada", "bob", "cyd", "dan", "eve")


@functools.cache
def key(name: str) -> ec.EllipticCurvePrivateKey:
    """A P-384 key of a name, the same in a whole session of tests."""
    return ec.generate_private_key(ec.SECP384R1())


@contextlib.contextmanager
def refused(code: str) -> Generator[None]:
    """A block that must be refused with a code."""
    with pytest.raises(Refusal) as caught:
        yield
    assert caught.value.code == code


def pinned(*names: str) -> dict[str, ec.EllipticCurvePublicKey]:
    return {name: key(name).public_key() for name in names}


def terms(**changes) -> Terms:
    return Terms(
        **{
            "run": "run",
            "names": NAMES,
            "colluding": 1,
            "honest": 2,
            "rounds": 3,
            "parameters": 40,
        }
        | changes
    )


class Federation:
    """Parties on stores of their own, each opened anew for each message, and a finished setup."""

    def __init__(self, folder: Path, agreed: Terms | None = None, *, until: str = "shares") -> None:
        self.folder, self.terms = folder, agreed or terms()
        self.revealed: list[tuple[str, str, int]] = []  # of the points of no return
        self.setup = SecureSetup(self.terms, pinned(*self.terms.names))
        for name in self.terms.names if until != "nothing" else ():
            message = self.party(name).keys(self.terms)
            self.setup.add_keys(KeysMessage.from_bytes(message.to_bytes()))
        if until == "shares":
            order = self.setup.shares_order()
            for name in self.terms.names:
                message = self.party(name).shares(order)
                self.setup.add_shares(SharesMessage.from_bytes(message.to_bytes()))

    def party(self, name: str, **changes) -> SecureParty:
        """A new object on an institution's store, as after a restart."""
        return SecureParty(
            **{
                "store": self.folder / f"{name}.db",
                "name": name,
                "key": key(name),
                "peers": pinned(*self.terms.names),
                "before_unmask": lambda run, number, *_: self.revealed.append((name, run, number)),
            }
            | changes
        )

    def words(self, name: str, number: int = 1) -> np.ndarray:
        """The vector of an institution in a round."""
        rng = np.random.default_rng([number, *name.encode()])
        return rng.integers(-(2**58), 2**58, self.terms.parameters)

    def masked(self, number: int, names: Collection[str]) -> SecureRound:
        """A round with the masked vectors of some institutions."""
        one = SecureRound(self.setup, number, DIGEST)
        for name in names:
            order = one.masked_order(name, with_shares=True)
            message = self.party(name).mask(order, self.words(name, number))
            one.add_masked(MaskedMessage.from_bytes(message.to_bytes()))
        return one

    def listed(self, number: int, names: Collection[str], signing: Collection[str]) -> SecureRound:
        """A round with masked vectors and signatures."""
        one = self.masked(number, names)
        for name in signing:
            message = self.party(name).sign_list(one.list_order())
            one.add_signature(ListMessage.from_bytes(message.to_bytes()))
        return one

    def unmasked(
        self,
        number: int,
        names: Collection[str],
        *,
        answering: Collection[str] | None = None,
        lies: Mapping[str, Callable[[UnmaskMessage], UnmaskMessage]] | None = None,
    ) -> SecureRound:
        """A round with shares, of all survivors unless said otherwise."""
        one = self.listed(number, names, names)
        for name in names if answering is None else answering:
            message = self.party(name).unmask(one.unmask_order())
            one.add_shares((lies or {}).get(name, lambda same: same)(message))
        return one

    def plain(self, names: Collection[str], number: int = 1) -> np.ndarray:
        return np.sum([self.words(name, number) for name in names], axis=0)
