"""The full protocol of secure aggregation over a Grid: a run's setup and its rounds' exchanges.

The roles are in ``server.secure_sum`` and ``client.secure_party``. This file sends, receives and
stores. Two files in the run's directory make a restart harmless: the setup
once it is complete, and a round's masked sum with its list before the list is sent. A killed server
asks for everything else again, and an institution answers the same order in the same way.
"""

import json
import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from flwr.app import Message
from flwr.serverapp import Grid

from fedlora.arrays import Int64
from fedlora.config.config import RunConfig
from fedlora.errors import Refusal
from fedlora.files import write_atomic
from fedlora.runs.run_files import KEYS
from fedlora.secure import canonical, peers, secure_order
from fedlora.secure.secure_aggregation import (
    KeysMessage,
    ListMessage,
    ListOrder,
    MaskedMessage,
    MaskedOrder,
    SecureMessage,
    SharesMessage,
    Terms,
    UnmaskMessage,
)
from fedlora.wire import wire
from server.exchange import exchange
from server.replies import Replies, content
from server.roster import RunFailed, patience, reasons
from server.secure_sum import SecureRound, SecureSetup
from strategies.base import Round

log = logging.getLogger("fedlora.server")

SETUP_TRIES = 3
"""Times that an institution is asked for its part in the setup."""
SETUP_PAUSE = 20.0
"""Seconds before another try in a deployment: an institution that was restarted is back by then."""
_TAG = "fedlora secure aggregation 1 server "
_Answer = TypeVar("_Answer", KeysMessage, SharesMessage, ListMessage, UnmaskMessage)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """The masked vectors of a round, as their sum; stored before the list of survivors is sent.

    Args:
        survivors: The institutions in the sum, sorted.
        words: The sum of their masked vectors, little-endian.
        sizes: Institution -> its size class.
        privacy: Institution -> the spending that it reported.
    """

    survivors: tuple[str, ...]
    words: bytes
    sizes: Mapping[str, float]
    privacy: Mapping[str, Mapping[str, Any]]


class SecureSession:
    """The protocol of one run.

    Args:
        grid: The Grid that reaches the institutions.
        config: The run.
        names: The institutions' names, which only a simulation knows beforehand.
    """

    def __init__(self, grid: Grid, config: RunConfig, names: Sequence[str]) -> None:
        self._grid, self._config, self._names = grid, config, names
        self._folder = Path(config.run_dir) / "secure"
        self._setup: SecureSetup | None = None
        self._delivered: set[str] = set()  # institutions that have the others' shares
        self._nodes: Mapping[int, str] = {}
        self._digest = b""

    @property
    def is_set_up(self) -> bool:
        """Whether an earlier process of the run stored its setup."""
        return (self._folder / "setup").exists()

    def set_up(
        self, run: str, parameters: int, nodes: Mapping[int, str], institutions: int
    ) -> None:
        """Make the keys of a run, or read the setup that an earlier process of the run stored.

        Args:
            run: The run's identity.
            parameters: The length of its vectors (``secure_order.parameters``).
            nodes: Node -> institution, for the institutions that are online.
            institutions: The number of institutions of the run.

        Raises:
            RunFailed: If an institution has no part in the setup, which needs all of them.
        """
        try:
            self._setup = self._read_setup()
            if self._setup is None:
                if len(nodes) != institutions:
                    raise Refusal(
                        "institutions-missing",
                        f"{len(nodes)} of {institutions} institutions are online, and the setup "
                        "needs all; start the others and resume the run, or correct "
                        "data.institutions",
                    )
                privacy = self._config.privacy
                terms = Terms(
                    run=run,
                    names=tuple(sorted(nodes.values())),
                    colluding=privacy.colluding,
                    honest=privacy.honest,
                    rounds=self._config.federation.rounds,
                    parameters=parameters,
                    mechanism=secure_order.mechanism(self._config),
                )
                self._setup = self._made(terms, nodes)
        except Refusal as refusal:
            raise RunFailed(f"secure aggregation cannot be set up: {refusal}") from None

    def _read_setup(self) -> SecureSetup | None:
        stored = self._read("setup")
        if stored is None:
            return None
        encoded, public, keys, shares = stored
        terms = Terms.from_bytes(encoded)
        # the keys of the setup: those registered now may be others
        known = {
            name: peers.read(key, self._folder / "setup")
            for name, key in zip(terms.names, public, strict=True)
        }
        setup = SecureSetup(terms, known)
        for message in keys:
            setup.add_keys(KeysMessage.from_bytes(message))
        for message in shares:
            setup.add_shares(SharesMessage.from_bytes(message))
        return setup

    def _made(self, terms: Terms, nodes: Mapping[int, str]) -> SecureSetup:
        setup = SecureSetup(terms, self._peers())
        self._ask_all(terms, wire.KEYS, nodes, KeysMessage, setup.add_keys)
        order = setup.shares_order()
        self._ask_all(order, wire.SHARES, nodes, SharesMessage, setup.add_shares)
        public = tuple(_pem(setup.peers[name]) for name in terms.names)
        shares = tuple(setup.shares[name].to_bytes() for name in terms.names)
        self._write("setup", terms.to_bytes(), public, order.keys, shares)
        return setup

    def _ask_all(
        self,
        order: SecureMessage,
        message_type: str,
        nodes: Mapping[int, str],
        kind: type[_Answer],
        accept: Callable[[_Answer], None],
    ) -> None:
        """Ask until all have answered. Raises `RunFailed` with the reasons of those who did not."""
        waiting, failed = dict(nodes), dict[str, str]()
        for attempt in range(SETUP_TRIES):
            if attempt and self._config.deployed:
                time.sleep(SETUP_PAUSE)
            failed = self._ask(order, message_type, waiting, kind, accept)
            waiting = {node: name for node, name in waiting.items() if name in failed}
            if not waiting:
                return
        raise RunFailed(
            f"{len(failed)} institutions have no part in the setup of secure aggregation, which "
            f"needs all ({reasons(failed)}); repair them, and resume the run, or begin a new one "
            "where a key, a name or a number of the run had to change"
        )

    @property
    def members(self) -> Collection[str]:
        """The institutions of the setup. Nobody can join them later."""
        return self._finished().terms.names

    def masked_orders(
        self, number: int, digest: bytes, nodes: Mapping[int, str]
    ) -> dict[str, MaskedOrder]:
        """The parts of a round's orders that begin it at the institutions.

        Args:
            number: The round.
            digest: ``secure_order.digest`` of the round.
            nodes: Node -> institution, for the institutions that are asked.
        """
        self._nodes, self._digest = nodes, digest
        one = SecureRound(self._finished(), number, digest)
        return {
            name: one.masked_order(name, with_shares=name not in self._delivered)
            for name in nodes.values()
        }

    def is_collected(self, number: int) -> bool:
        """Whether an earlier process has the sum of the round of the last `masked_orders`."""
        return self._read_collected(number) is not None

    def total(self, this_round: Round, replies: Replies) -> tuple[Int64, Collection[float]]:
        """Collect a round's vectors, agree on the list of survivors, and unmask their sum.

        Args:
            this_round: The round of the last call of `masked_orders`.
            replies: Its replies; not asked for where an earlier process has collected them.

        Returns:
            The sum of the survivors' vectors, int64 ``(this_round.words,)``, and their size
            classes.

        Raises:
            Refusal: When the round is given up, with the reason as its code.
        """
        collected = self._read_collected(this_round.number)
        one = SecureRound(self._finished(), this_round.number, self._digest)
        if collected is None:
            collected = self._collect(one, this_round, replies)
        else:
            survivors = collected.survivors
            listed = ListOrder(run=this_round.run, round=this_round.number, survivors=survivors)
            one.restore(listed, collected.words)
            replies.restore(len(collected.survivors), collected.privacy)
        nodes = {n: name for n, name in self._nodes.items() if name in collected.survivors}
        self._ask(one.list_order(), wire.LIST, nodes, ListMessage, one.add_signature, one.is_signed)
        self._ask(
            one.unmask_order(), wire.UNMASK, nodes, UnmaskMessage, one.add_shares, one.has_shares
        )
        words = one.total()
        sizes = [collected.sizes[name] for name in collected.survivors]
        return words[: this_round.words], sizes

    def _collect(self, one: SecureRound, this_round: Round, replies: Replies) -> Collected:
        """Add up the masked vectors as they arrive, and store their sum with the list."""
        length = self._finished().terms.parameters
        sizes: dict[str, float] = {}
        for update, size in replies:
            assert update.words is not None  # `Replies` has checked it
            words = np.zeros(length, np.int64)  # a round may train fewer parameters than another
            words[: len(update.words)] = update.words
            message = MaskedMessage(
                name=update.institution, round=update.round, words=words.tobytes()
            )
            one.add_masked(message)
            self._delivered.add(update.institution)
            sizes[update.institution] = size
        survivors, words = one.list_order().survivors, one.masked_sum
        text = json.dumps({"sizes": sizes, "privacy": replies.privacy})
        self._write("round", this_round.number, self._digest, survivors, words, text)
        return Collected(survivors=survivors, words=words, sizes=sizes, privacy=replies.privacy)

    def _read_collected(self, number: int) -> Collected | None:
        """What an earlier process collected for the same order in this round."""
        stored = self._read("round")
        if stored is None or (stored[0], stored[1]) != (number, self._digest):
            return None
        _, _, survivors, words, text = stored
        return Collected(survivors=survivors, words=words, **json.loads(text))

    def _ask(
        self,
        order: SecureMessage,
        message_type: str,
        nodes: Mapping[int, str],
        kind: type[_Answer],
        accept: Callable[[_Answer], None],
        enough: Callable[[], bool] = lambda: False,
    ) -> dict[str, str]:
        """Send one message to institutions; returns institution -> code where none was accepted.

        ``enough`` answers whether those accepted so far suffice: nobody waits long for the others.
        """
        packed, failed = wire.pack_secure(order), dict[str, str]()
        ttl = self._config.federation.timeout
        messages = [
            Message(packed, node, message_type, group_id=message_type, ttl=ttl) for node in nodes
        ]
        replies = exchange(self._grid, messages, patience(self._config), enough=enough)
        for node, reply in replies:
            name = nodes[node]
            try:
                answer = wire.unpack_secure(kind, content(reply))
                if answer.name != name:
                    raise Refusal("wrong-institution", f"{name} answered as {answer.name}")
                accept(answer)
            except Refusal as refusal:
                failed[name] = refusal.code
                log.warning("%s, %s: %s", message_type, name, refusal)
        return failed

    def _peers(self) -> Mapping[str, ec.EllipticCurvePublicKey]:
        """Institution -> its public key; in a deployment the registered one."""
        config = self._config
        if not config.deployed:
            return peers.simulated_public(config.seed, self._names)
        file = Path(config.run_dir).parent / KEYS
        try:
            keys = json.loads(file.read_text(encoding="utf-8"))
            return {str(name): peers.read(key.encode(), file) for name, key in keys.items()}
        except (OSError, ValueError, AttributeError) as error:
            raise RunFailed(
                f"{file} holds no public keys ({error}); the server writes it at its start"
            ) from None

    def _finished(self) -> SecureSetup:
        if self._setup is None:
            raise RuntimeError("the setup comes before the first round")
        return self._setup

    def _write(self, name: str, *values: canonical.Value) -> None:
        write_atomic(self._folder / name, canonical.encode(_TAG + name, *values))

    def _read(self, name: str) -> list[Any] | None:
        try:
            return canonical.decode(_TAG + name, (self._folder / name).read_bytes())
        except FileNotFoundError:
            return None


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
