"""The institutions of a run: each node is asked once for its name and its readiness."""

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

import fedlora
from fedlora import wire
from fedlora.config import RunConfig
from fedlora.errors import InputError, Refusal
from fedlora.messages import Hello, Query
from fedlora.run_files import NODES, SIZES
from server.exchange import exchange
from server.replies import content

log = logging.getLogger("fedlora.server")

NODES_TIMEOUT = 60.0  # seconds to wait for the first institutions
UNTIMED_TOGETHER = 8
"""The most institutions that a worker of a simulation serves together while nobody knows how long
they take."""


class RunFailed(RuntimeError):
    """The run cannot go on. Its last checkpoint is kept."""


class Roster:
    """Node id -> institution, from one query to each node.

    In a deployment a name belongs to a key: a node takes part under the name that the file `NODES`
    has for it, and under no other. The server writes the file as it registers keys, and the roster
    reads it before each round, so that a late registration, a replaced key and a removed key take
    effect. Without the file no node takes part. Where updates are weighted by size, an institution
    without a bound in the file `SIZES` does not take part: its claim alone decides no weight.

    Attributes:
        max_sizes: Institution -> the bound of its size as a weight, in a deployment.
        refused: Node -> code of its refusal.
    """

    def __init__(self, grid: Grid, config: RunConfig, query: Query) -> None:
        self._grid, self._config, self._query = grid, config, query
        self._names: dict[int, str] = {}  # names by keys, in a deployment
        self._unregistered: dict[int, str] = {}  # node -> code
        self.max_sizes: dict[str, float] = {}
        self._known: dict[int, Hello] = {}
        self.refused: dict[int, str] = {}

    def online(self) -> dict[str, int]:
        """Institution -> node, for the institutions that are connected now."""
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
                        f"it calls itself {hello.institution}, but has the key of "
                        f"{self._names[node]}; set name in its settings to that",
                    )
                if hello.version != fedlora.__version__:
                    raise Refusal(
                        "version-mismatch",
                        f"{hello.institution} runs fedlora {hello.version}, "
                        f"the server {fedlora.__version__}",
                    )
                rank, strategy = self._config.adapter.rank, self._config.federation.strategy
                mixed = self._config.federation.traits.mixed_ranks
                if hello.rank != rank and not (mixed and 1 <= hello.rank <= rank):
                    raise Refusal(
                        "wrong-rank",
                        f"{hello.institution} has rank {hello.rank}, adapter.rank is {rank} and "
                        f"federation.strategy {strategy}",
                    )
                if self._config.privacy.shares_noise and not _is_class(hello.size):
                    raise Refusal(
                        "invalid-size",
                        f"{hello.institution} has size {hello.size}, which is no power of two",
                    )
                if hello.institution in {h.institution for h in self._known.values()}:
                    raise Refusal("name-taken", f"two nodes call themselves {hello.institution}")
                self._known[node] = hello
            except Refusal as refusal:
                self.refused[node] = refusal.code
                log.warning("node %d: %s", node, refusal)
        return {self._known[node].institution: node for node in present if node in self._known}

    def _registered(self, present: list[int]) -> list[int]:
        """The nodes among these whose key is registered; a node under a replaced key is forgotten.

        A node that is not registered now may register later, so no node is refused for good.
        """
        folder = Path(self._config.run_dir).parent
        try:
            self._names = {int(node): str(name) for node, name in _read(folder / NODES).items()}
        except ValueError:
            self._names = {}
        self.max_sizes = {n: v for n, v in _read(folder / SIZES).items() if _is_size(v)}
        self._known = {n: h for n, h in self._known.items() if self._names.get(n) == h.institution}
        strangers = dict.fromkeys(set(present) - set(self._names), "not-registered")
        if self._config.federation.weighting != "uniform":
            unsized = {n for n in present if n in self._names} - {
                n for n, name in self._names.items() if name in self.max_sizes
            }
            strangers |= dict.fromkeys(unsized, "no-size")
        for node, code in sorted(strangers.items()):
            if self._unregistered.get(node) != code:
                log.warning("node %d: %s: %s", node, code, self._why(node, code, folder))
        self._unregistered = strangers
        return [node for node in present if node not in strangers]

    def _why(self, node: int, code: str, folder: Path) -> str:
        if code == "not-registered":
            return (
                f"{folder / NODES} does not name the node, or cannot be read; "
                "`fedlora deploy register` writes it"
            )
        name = self._names[node]
        return (
            f"federation.weighting is {self._config.federation.weighting}, and {folder / SIZES} "
            f"has no bound for the size of {name}; write the number into "
            f"server/institutions/{name}.size"
        )

    def wait(self, institutions: int) -> None:
        """Wait until all institutions have replied, or until time is up.

        Raises:
            RunFailed: When too few are ready.
        """
        deadline = time.monotonic() + NODES_TIMEOUT
        while len(self.online()) + len(self.refused) < institutions:
            if time.monotonic() > deadline:
                break
            time.sleep(1.0)
        if len(self) < max(1, self._config.federation.min_updates):
            codes = {str(node): code for node, code in self._unregistered.items()}
            codes |= {str(node): code for node, code in self.refused.items()}
            raise RunFailed(
                f"{len(self._known)} institutions are ready and {len(codes)} refuse or are refused "
                f"({reasons(codes)}); federation.min-updates is "
                f"{self._config.federation.min_updates}"
            )

    def rank(self, node: int) -> int:
        """Rank of an institution's factors."""
        return self._known[node].rank

    def sizes(self) -> dict[str, float]:
        """Institution -> its size class, under secure aggregation."""
        return {hello.institution: float(hello.size) for hello in self._known.values()}

    def check_budgets(self, least: int) -> None:
        """Refuse a run whose budgets do not last, before any institution spends on it.

        Args:
            least: The least number of institutions with which a round can change something.

        Raises:
            InputError: When too few institutions have budget for the whole run.
        """
        privacy = self._config.privacy
        least = max(least, self._config.federation.min_updates)
        lacking = sum(not hello.fits for hello in self._known.values())
        if len(self) - lacking < least:
            home = self._config.home
            also = f" with own models at home.epsilon {home.epsilon:g}" if home.private else ""
            raise InputError(
                f"budget exhausted: {lacking} of {len(self)} institutions have too little left in "
                f"their ledgers for a run at privacy.epsilon {privacy.epsilon:g}{also}, and "
                f"{least} institutions are needed; lower privacy.epsilon"
                f"{' or home.epsilon' if also else ''} or use "
                "other records (`fedlora ledger show` prints the remaining budget; --max-epsilon "
                "is for new ledgers and does not raise the limit of one that exists)"
            )

    def __len__(self) -> int:
        return len(self._known)


def _read(file: Path) -> dict[str, Any]:
    """A JSON object on disk; an empty one where there is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_class(size: int) -> bool:
    return size >= 1 and size & (size - 1) == 0


def patience(config: RunConfig) -> float:
    """Seconds without any reply after which the server stops waiting.

    An engine may take an institution's time twice, and the start of a new worker, before it reports
    the institution that hangs; the first time together with that of others in a simulation.
    """
    together = 1 if config.deployed else UNTIMED_TOGETHER
    return (together + 1) * config.federation.timeout + 2 * NODES_TIMEOUT


def reasons(failed: Mapping[str, str]) -> str:
    """The number of times that each reason occurs, in words."""
    counts: dict[str, int] = {}
    for reason in failed.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{reason} x {n}" for reason, n in sorted(counts.items())) or "no reason given"
