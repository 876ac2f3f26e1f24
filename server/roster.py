"""Who is there: each node is asked once who it is and whether it can take part."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

import fedlora
from fedlora import wire
from fedlora.config import MIXED_RANKS, RunConfig
from fedlora.errors import InputError, Refusal
from fedlora.run_files import NODES
from server.exchange import exchange
from server.replies import content

log = logging.getLogger("fedlora.server")

NODES_TIMEOUT = 60.0  # seconds to wait for the first institutions


class RunFailed(RuntimeError):
    """The run cannot go on. Its last checkpoint is kept."""


class Roster:
    """Node id -> institution, asked once of each node that shows up.

    In a deployment a name belongs to a key: a node takes part under the name that `NODES` has for
    it, and under no other. The server writes that file as it registers keys, and here it is read
    anew each time: one that is registered late comes in, one whose key is replaced or taken off
    goes out. Without the file nobody takes part.
    """

    def __init__(self, grid: Grid, config: RunConfig, query: wire.Query) -> None:
        self._grid, self._config, self._query = grid, config, query
        self._names: dict[int, str] = {}  # by their keys, in a deployment
        self._strangers: set[int] = set()
        self._known: dict[int, wire.Hello] = {}
        self.refused: dict[int, str] = {}

    def online(self) -> dict[str, int]:
        """Institution -> node, of those that are connected now."""
        present = sorted(self._grid.get_node_ids())
        if self._config.deployed:
            present = self._registered(present)
        query = wire.pack_query(self._query)
        timeout = self._config.federation.timeout
        fresh = [
            Message(query, node, MessageType.QUERY, group_id="hello", ttl=timeout)
            for node in present
            if node not in self._known and node not in self.refused
        ]
        for node, reply in exchange(self._grid, fresh, patience(self._config)) if fresh else ():
            try:
                hello = wire.unpack_hello(content(reply))
                if self._config.deployed and hello.institution != self._names[node]:
                    raise Refusal(
                        "wrong-name",
                        f"it calls itself {hello.institution}, and has the key of "
                        f"{self._names[node]}; name in its settings must be that",
                    )
                if hello.version != fedlora.__version__:
                    raise Refusal(
                        "version-mismatch",
                        f"{hello.institution} runs fedlora {hello.version}, "
                        f"the server {fedlora.__version__}",
                    )
                rank, strategy = self._config.adapter.rank, self._config.federation.strategy
                if hello.rank != rank and not (strategy in MIXED_RANKS and 1 <= hello.rank <= rank):
                    raise Refusal(
                        "wrong-rank",
                        f"{hello.institution} has rank {hello.rank}, adapter.rank is {rank} and "
                        f"federation.strategy {strategy}",
                    )
                if hello.institution in {h.institution for h in self._known.values()}:
                    raise Refusal("name-taken", f"two nodes call themselves {hello.institution}")
                self._known[node] = hello
            except Refusal as refusal:
                self.refused[node] = refusal.code
                log.warning("node %d: %s", node, refusal)
        return {self._known[node].institution: node for node in present if node in self._known}

    def _registered(self, present: list[int]) -> list[int]:
        """Those of these nodes whose key is an institution's; who is known by another is forgotten.

        Whoever is not among them may be at the next look, so nobody is refused for good.
        """
        file = Path(self._config.run_dir).parent / NODES
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            self._names = {int(node): str(name) for node, name in content.items()}
        except (OSError, ValueError, AttributeError):
            self._names = {}
        self._known = {n: h for n, h in self._known.items() if self._names.get(n) == h.institution}
        strangers = set(present) - set(self._names)
        for node in sorted(strangers - self._strangers):
            log.warning(
                "node %d: not-registered: %s does not name it, or cannot be read; "
                "`fedlora deploy register` writes it",
                node,
                file,
            )
        self._strangers = strangers
        return [node for node in present if node in self._names]

    def wait(self, institutions: int) -> None:
        """Wait until all institutions have said something, or enough are here for a round.

        Raises:
            RunFailed: When too few are ready.
        """
        deadline = time.monotonic() + NODES_TIMEOUT
        while len(self.online()) + len(self.refused) < institutions:
            if time.monotonic() > deadline:
                break
            time.sleep(1.0)
        if len(self) < max(1, self._config.federation.min_updates):
            codes = dict.fromkeys(map(str, self._strangers), "not-registered")
            codes |= {str(node): code for node, code in self.refused.items()}
            raise RunFailed(
                f"{len(self._known)} institutions are ready and {len(codes)} refuse or are refused "
                f"({reasons(codes)}); federation.min-updates is "
                f"{self._config.federation.min_updates}"
            )

    def rank(self, node: int) -> int:
        """Rank of an institution's factors."""
        return self._known[node].rank

    def check_budgets(self) -> None:
        """Refuse a run that would run dry, before anybody spends anything on it.

        Raises:
            InputError: When too few institutions have budget for the whole run.
        """
        federation, privacy = self._config.federation, self._config.privacy
        lacking = sum(not hello.fits for hello in self._known.values())
        if len(self) - lacking < federation.min_updates:
            raise InputError(
                f"budget exhausted: {lacking} of {len(self)} institutions have too little left in "
                f"their ledgers for a run at privacy.epsilon {privacy.epsilon:g}, and "
                f"federation.min-updates is {federation.min_updates}; lower privacy.epsilon or use "
                "other records (`fedlora ledger show` tells what is left)"
            )

    def __len__(self) -> int:
        return len(self._known)


def patience(config: RunConfig) -> float:
    """Seconds without any answer after which nobody is waited for.

    An engine may take an institution's time twice, and a new worker's start with it, before it
    says which one hangs.
    """
    return 2 * (config.federation.timeout + NODES_TIMEOUT)


def reasons(failed: Mapping[str, str]) -> str:
    """How often each reason occurs, in words."""
    counts: dict[str, int] = {}
    for reason in failed.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{reason} x {n}" for reason, n in sorted(counts.items())) or "no reason given"
