"""Cost of secure aggregation: setup, rounds and bytes.

Usage: python -m benchmarks.secure_aggregation [--institutions 10 39 100 300 1000]

Every institution runs with its real keys and its own store, in this process and its workers; every
figure is measured, none extrapolated. The times of an institution are medians over the institutions
of a run. 5 % of the institutions vanish before their masked vectors. Each sum is compared with the
plain sum. Keys are made for 30 rounds, above 300 institutions for one, and one round is run. The
row of 1,000 is long: some three million agreements and a million and a half signature checks.
"""

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
from cryptography.hazmat.primitives.asymmetric import ec

from client.secure_party import SecureParty
from fedlora.secure import secure_aggregation
from fedlora.secure.secure_aggregation import Terms
from server.secure_sum import SecureRound, SecureSetup

DIGEST = bytes(32)
PARAMETERS = 75_000
ROUNDS = 30
"""Rounds for which keys are made."""
_parties: dict[str, SecureParty] = {}
"""The parties of a run; worker processes inherit them."""


def lost_of(count: int) -> int:
    """Institutions that vanish: 5 %, at least one."""
    return max(1, round(0.05 * count))


def words_of(name: str, parameters: int) -> np.ndarray:
    """An institution's vector."""
    return np.random.default_rng(int(name)).integers(-(2**50), 2**50, parameters)


def answer(task: tuple[str, str, bytes, int]) -> tuple[str, bytes, float]:
    """One answer of an institution: name, encoded message, seconds. Runs in a worker."""
    name, step, data, parameters = task
    kinds = {
        "keys": Terms,
        "shares": secure_aggregation.SharesOrder,
        "begin": secure_aggregation.MaskedOrder,
        "mask": secure_aggregation.MaskedOrder,
        "sign_list": secure_aggregation.ListOrder,
        "unmask": secure_aggregation.UnmaskOrder,
    }
    more = [words_of(name, parameters)] if step == "mask" else []
    started = time.perf_counter()
    message = getattr(_parties[name], step)(kinds[step].from_bytes(data), *more)
    encoded = b"" if message is None else message.to_bytes()
    return name, encoded, time.perf_counter() - started


class Run:
    """One run of the protocol, with the seconds and bytes of each side."""

    def __init__(self, terms: Terms, pool) -> None:
        self.terms, self.pool = terms, pool
        self.clear()

    def clear(self) -> None:
        """Begin a phase."""
        self.seconds = dict.fromkeys(self.terms.names, 0.0)
        self.up = dict.fromkeys(self.terms.names, 0)
        self.down = dict.fromkeys(self.terms.names, 0)
        self.server = 0.0

    def ask(self, step: str, orders, take=None) -> None:
        """Send each institution its order; ``take`` receives each answer at the server."""
        began = time.perf_counter()
        tasks = ((name, step, data, self.terms.parameters) for name, data in orders)
        for name, encoded, seconds in self.pool.imap_unordered(answer, self._counted(tasks)):
            self.seconds[name] += seconds
            self.up[name] += len(encoded)
            if take is not None:
                started = time.perf_counter()
                take(encoded)
                self.server += time.perf_counter() - started
        took, count = time.perf_counter() - began, len(self.terms.names)
        print(f"{count} institutions: {step} took {took:.1f} s", file=sys.stderr, flush=True)

    def _counted(self, tasks):
        for task in tasks:
            self.down[task[0]] += len(task[2])
            yield task

    def timed(self, call):
        """A call of the server."""
        started = time.perf_counter()
        result = call()
        self.server += time.perf_counter() - started
        return result

    def phase(self, names: Sequence[str]) -> dict[str, float]:
        """Figures of the phase: medians over these institutions."""
        return {
            "institution_seconds": median(self.seconds[name] for name in names),
            "server_seconds": self.server,
            "up_bytes": median(self.up[name] for name in names),
            "down_bytes": median(self.down[name] for name in names),
        }


def set_up(run: Run, peers) -> SecureSetup:
    """The setup, with the delivery of the sealed shares."""
    messages = secure_aggregation
    setup = SecureSetup(run.terms, peers)
    data = run.terms.to_bytes()
    run.ask(
        "keys",
        ((name, data) for name in run.terms.names),
        lambda e: setup.add_keys(messages.KeysMessage.from_bytes(e)),
    )
    order = run.timed(lambda: setup.shares_order().to_bytes())
    run.ask(
        "shares",
        ((name, order) for name in run.terms.names),
        lambda e: setup.add_shares(messages.SharesMessage.from_bytes(e)),
    )
    one = SecureRound(setup, 1, DIGEST)
    orders = run.timed(
        lambda: {n: one.masked_order(n, with_shares=True).to_bytes() for n in run.terms.names}
    )
    run.ask("begin", orders.items())
    return setup


def one_round(run: Run, setup: SecureSetup, survivors: Sequence[str]) -> None:
    """A round in which the others vanish before their masked vectors."""
    messages = secure_aggregation
    one = run.timed(lambda: SecureRound(setup, 1, DIGEST))
    for step, order, take in (
        (
            "mask",
            lambda: one.masked_order(survivors[0], with_shares=False),
            lambda e: one.add_masked(messages.MaskedMessage.from_bytes(e)),
        ),
        (
            "sign_list",
            one.list_order,
            lambda e: one.add_signature(messages.ListMessage.from_bytes(e)),
        ),
        (
            "unmask",
            one.unmask_order,
            lambda e: one.add_shares(messages.UnmaskMessage.from_bytes(e)),
        ),
    ):
        data = run.timed(lambda order=order: order().to_bytes())
        run.ask(step, [(name, data) for name in survivors], take)
    total = run.timed(one.total)
    plain = np.zeros(run.terms.parameters, dtype=np.int64)
    for name in survivors:
        plain += words_of(name, run.terms.parameters)
    assert np.array_equal(total, plain)


def cost(count: int, processes: int) -> dict[str, object]:
    """Setup and one round among ``count`` institutions."""
    names = tuple(f"{i:05}" for i in range(count))
    lost = lost_of(count)
    terms = Terms(
        run="benchmark",
        names=names,
        colluding=max(1, count // 13),
        honest=max(2, count // 2),
        rounds=ROUNDS if count <= 300 else 1,
        parameters=PARAMETERS,
    )
    keys = {name: ec.generate_private_key(ec.SECP384R1()) for name in names}
    peers = {name: key.public_key() for name, key in keys.items()}
    with tempfile.TemporaryDirectory() as folder:
        _parties.clear()
        for name in names:
            _parties[name] = SecureParty(
                store=Path(folder) / f"{name}.db",
                name=name,
                key=keys[name],
                peers=peers,
                before_unmask=lambda *_: None,
            )
        with multiprocessing.get_context("fork").Pool(processes) as pool:
            run = Run(terms, pool)
            setup = set_up(run, peers)
            setup_cost = run.phase(names)
            run.clear()
            survivors = names[lost:]
            one_round(run, setup, survivors)
            round_cost = run.phase(survivors)
    return {
        "institutions": count,
        "rounds": terms.rounds,
        "lost": lost,
        "setup": setup_cost,
        "round": round_cost,
        "bytes_ratio": _ratio(terms, setup_cost, round_cost),
    }


def _ratio(terms: Terms, setup, one_round) -> float:
    """Bytes of a run over those of one without, which sends a float32 adapter each way."""
    ways, adapter = ("up_bytes", "down_bytes"), terms.rounds * 4 * terms.parameters
    ours = sum(setup[way] + terms.rounds * one_round[way] for way in ways)
    return (adapter + ours) / (2 * adapter)


def table(rows) -> str:
    """The costs as text."""
    columns = ("institution_seconds", "server_seconds", "up_bytes", "down_bytes")
    phases = ("setup", "round")
    head = ["institutions", "lost", *(f"{p} {c}" for p in phases for c in columns), "bytes ratio"]
    lines = [head]
    for row in rows:
        figures = [f"{row[phase][column]:.3g}" for phase in phases for column in columns]
        lines.append([str(row["institutions"]), str(row["lost"]), *figures])
        lines[-1].append(f"{row['bytes_ratio']:.2f}")
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--institutions", type=int, nargs="*", default=[10, 39, 100, 300, 1000])
    parser.add_argument("--processes", type=int, default=1)
    arguments = parser.parse_args()
    rows: list[dict[str, object]] = []
    for count in arguments.institutions:
        rows.append(cost(count, arguments.processes))
        print(table(rows[-1:]), flush=True)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
