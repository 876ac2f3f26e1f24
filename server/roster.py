"""The institutions of a run: each node is asked once for its name and its readiness."""

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

import fedlora
from fedlora.config.config import RunConfig
from fedlora.data import findings
from fedlora.errors import InputError, Refusal
from fedlora.privacy.accounting import is_size_class
from fedlora.runs import run_files
from fedlora.runs.run_files import NODES, SIZES
from fedlora.wire import wire
from fedlora.wire.messages import Hello, Query
from server.exchange import exchange
from server.replies import AWAY, SILENT, content

log = logging.getLogger("fedlora.server")

NODES_TIMEOUT = 60.0  # seconds to wait for the first institutions
HELLO_PAUSE = 60.0
"""Seconds after which a deployment asks an institution again that did not take part; each further
time twice as many. It is also the longest wait for that answer."""
LEAST = (
    "a robust rule, or privacy.honest + privacy.colluding and more than half of institutions + "
    "colluding"
)
"""What decides on the least number of institutions of a round, in words."""
MAX_SILENT = 2
"""Orders in a row that an institution may leave without an answer."""
PASSING = ("ledger-locked", "timed-out", "client-crashed", AWAY, *SILENT)
"""The codes of an institution that may be ready when it is asked again, with nothing mended."""
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

    A deployment asks whoever refused or was refused again after a while, since the cause may be
    mended by then. An institution that is online and leaves orders without an answer, so that each
    round would last until its timeout, counts as such a one too (`note`).

    Args:
        grid: To the nodes.
        config: The run.
        query: What each node is asked.
        names: The institutions of a simulation, in the order of its nodes.

    Attributes:
        max_sizes: Institution -> the bound of its size as a weight, in a deployment.
        refused: Node -> code of its refusal.
    """

    def __init__(
        self, grid: Grid, config: RunConfig, query: Query, names: Sequence[str] = ()
    ) -> None:
        self._grid, self._config, self._query = grid, config, query
        self._names = dict(enumerate(names, start=1))  # in a deployment by keys
        self._unregistered: dict[int, str] = {}  # node -> code
        self.max_sizes: dict[str, float] = {}
        self._known: dict[int, Hello] = {}
        self.refused: dict[int, str] = {}
        self._again: dict[int, float] = {}  # node -> when it is asked again, monotonic
        self._pauses: dict[int, int] = {}  # node -> how often it has been refused
        self._silent: dict[str, int] = {}  # institution -> orders in a row without an answer
        self._other_code: set[str] = set()  # institutions that were named for other code

    def online(self) -> dict[str, int]:
        """Institution -> node, for the institutions that are connected now."""
        present = sorted(self._grid.get_node_ids())
        if self._config.deployed:
            present = self._registered(present)
        query = wire.pack_query(self._query)
        timeout, now = self._config.federation.timeout, time.monotonic()
        fresh = [
            Message(
                query,
                node,
                MessageType.QUERY,
                group_id="hello",
                ttl=min(timeout, HELLO_PAUSE) if node in self.refused else timeout,
            )
            for node in present
            if node not in self._known and now >= self._again.get(node, now)
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
                if self._config.privacy.shares_noise and not is_size_class(hello.size):
                    raise Refusal(
                        "invalid-size",
                        f"{hello.institution} has size {hello.size}, which is no power of two",
                    )
                if hello.institution in {h.institution for h in self._known.values()}:
                    raise Refusal("name-taken", f"two nodes call themselves {hello.institution}")
                self._known[node] = hello
                self.refused.pop(node, None)
            except Refusal as refusal:
                if self.refused.get(node) != refusal.code:
                    log.warning("%s: %s", self._called(node), refusal)
                self._refuse(node, refusal.code)
        self._tell_other_code()
        return {self._known[node].institution: node for node in present if node in self._known}

    def note(self, rejected: Mapping[str, str], asked: Iterable[str]) -> None:
        """Note who answered in a round of a deployment, and who has been silent too often.

        Args:
            rejected: Institution -> the code of its reply that does not count.
            asked: The institutions of the round.
        """
        if not self._config.deployed:
            return
        nodes = {hello.institution: node for node, hello in self._known.items()}
        for name in asked:
            if rejected.get(name) not in SILENT:
                self._silent.pop(name, None)
                self._pauses.pop(nodes.get(name, 0), None)
                continue
            self._silent[name] = self._silent.get(name, 0) + 1
            if self._silent[name] >= MAX_SILENT and name in nodes:
                log.warning(
                    "%s left %d orders in a row without an answer; it is asked no more until it "
                    "answers again",
                    name,
                    self._silent[name],
                )
                del self._known[nodes[name]]
                self._refuse(nodes[name], "silent")

    def _tell_other_code(self) -> None:
        """Name once each institution whose code is another of this version."""
        stated = {hello.institution: hello.code for hello in self._known.values() if hello.code}
        other = {name for name, code in stated.items() if code != run_files.code()}
        if new := sorted(other - self._other_code):
            log.warning(
                "other code of fedlora %s than the server's: %s; install one checkout everywhere",
                fedlora.__version__,
                ", ".join(new),
            )
        self._other_code |= other

    def _refuse(self, node: int, code: str) -> None:
        self.refused[node] = code
        times = self._pauses.get(node, 0)
        self._pauses[node] = times + 1
        pause = HELLO_PAUSE * 2**times if self._config.deployed else math.inf
        self._again[node] = time.monotonic() + pause

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
                "the server writes it at its start"
            )
        name = self._names[node]
        return (
            f"federation.weighting is {self._config.federation.weighting}, and {folder / SIZES} "
            f"has no bound for the size of {name}; write the number into "
            f"server/institutions/{name}.size"
        )

    def wait(self, institutions: int, least: int, *, all_needed: bool = False) -> None:
        """Wait until all institutions have replied, or until time is up.

        Time is up after `NODES_TIMEOUT`. While fewer are ready than are needed, a deployment goes
        on until ``federation.timeout``, and a refusal of `PASSING` is no reply there.

        Args:
            institutions: The number of institutions of the run.
            least: The least number of institutions with which a round can count.
            all_needed: Whether all are needed first, for the setup of secure aggregation.

        Raises:
            RunFailed: When fewer than ``least`` are ready.
        """
        needed = institutions if all_needed else least
        begun, told = time.monotonic(), False
        longest = max(NODES_TIMEOUT, self._config.federation.timeout)
        while True:
            online = len(self.online())
            lacking = self._config.deployed and len(self) < needed
            passing = PASSING if lacking else ()
            if online + sum(c not in passing for c in self.refused.values()) >= institutions:
                break
            waited = time.monotonic() - begun
            if waited > (longest if lacking else NODES_TIMEOUT):
                break
            if waited > NODES_TIMEOUT and not told:
                told = True
                log.warning(
                    "%d institutions are ready, and %d are needed; waiting for up to %.0f s",
                    len(self),
                    needed,
                    longest,
                )
            time.sleep(1.0)
        if len(self) < least:
            raise RunFailed(
                f"{len(self)} institutions are ready and {len(self.left_out)} refuse or are "
                f"refused ({reasons(self.left_out)}); a round needs {least} ({LEAST})"
            )

    def sizes(self) -> dict[str, float]:
        """Institution -> its size class, under secure aggregation."""
        return {hello.institution: float(hello.size) for hello in self._known.values()}

    def check_noise(self, participations: int) -> None:
        """Refuse a deployed run in which no adapter can learn, before any institution spends on it.

        Without secure aggregation the server has bounds of sizes (`SIZES`), or nothing: it refuses
        what could not learn even if each institution had as many records as its bound.

        Args:
            participations: The most rounds for which one institution may be asked.

        Raises:
            InputError: If the noise drowns all, and the run does not accept it.
        """
        exact = self._config.privacy.shares_noise
        sizes = list(self.max_sizes.values())
        if exact:  # a larger claim than the operator's bound counts as the bound
            sizes = [min(size, self.max_sizes.get(n, size)) for n, size in self.sizes().items()]
        if len(sizes) < self._config.data.institutions:
            return
        try:
            plans = findings.plans_of(self._config, map(int, sizes), participations)
        except InputError:
            if exact:
                raise
            return  # not of a size, but of a bound that may be far above it
        findings.refuse(self._config, findings.noise(self._config, plans, participations))

    def check_budgets(self, least: int) -> None:
        """Refuse a run whose budgets do not last, before any institution spends on it.

        Args:
            least: The least number of institutions with which a round can count.

        Raises:
            InputError: When too few institutions have budget for the whole run.
        """
        privacy = self._config.privacy
        lacking = sum(not hello.fits for hello in self._known.values())
        if len(self) - lacking < least:
            raise InputError(
                f"budget exhausted: {lacking} of {len(self)} institutions have too little left in "
                f"their ledgers for a run at privacy.epsilon {privacy.epsilon:g}, and "
                f"{least} institutions are needed; lower privacy.epsilon or use "
                "other records (`fedlora ledger show` prints what is left)"
            )

    def findings(self) -> list[findings.Finding]:
        """The finding on institutions that take no part, by the names known here; or none."""
        if not self.refused:
            return []
        of = [f"{self._called(node)} ({code})" for node, code in sorted(self.refused.items())]
        return [
            findings.Finding(
                name="took-no-part",
                text=f"{len(of)} institutions took no part at the end of the run: "
                f"{findings.some(of)}; institutions.log has the reason, or each one's own log",
            )
        ]

    def absent(self) -> dict[str, str]:
        """Registered institution -> a refusal's code; ``offline`` if it is not refused."""
        return {name: self.left_out.get(node, "offline") for node, name in self._names.items()}

    def _called(self, node: int) -> str:
        return self._names.get(node) or f"node {node}"

    @property
    def left_out(self) -> dict[int, str]:
        """Node -> the code why it takes no part: not registered, of unknown size, or refused."""
        return {**self._unregistered, **self.refused}

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


def patience(config: RunConfig, timeout: float = 0.0) -> float:
    """Seconds without any reply after which the server stops waiting.

    Args:
        config: The run.
        timeout: Seconds that one institution may take; 0: those of a round.

    An engine may take an institution's time twice, and the start of a new worker, before it reports
    the institution that hangs; the first time together with that of others in a simulation.
    """
    together = 1 if config.deployed else UNTIMED_TOGETHER
    return (together + 1) * (timeout or config.federation.timeout) + 2 * NODES_TIMEOUT


def reasons(failed: Mapping[Any, str]) -> str:
    """The number of times that each reason occurs, in words."""
    counts: dict[str, int] = {}
    for reason in failed.values():
        counts[reason] = counts.get(reason, 0) + 1
    return ", ".join(f"{reason} x {n}" for reason, n in sorted(counts.items())) or "no reason given"
