"""A deployed institution in a process of its own, which is asked for one round after another.

Arguments: a directory and the number of the first case. `cases.pickle` in the directory holds each
case's configuration; standard output has a line of JSON before each case and one after it, so that
whoever reads it knows which case a process died of.
"""

import json
import pickle
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context, Message, MessageType, RecordDict

from client.app import app
from client.ledger import Ledger
from fedlora.config.config import from_flat
from fedlora.errors import Refusal
from fedlora.models import trainable
from fedlora.wire import wire
from fedlora.wire.messages import Query
from simulation.engines.grid import identify
from tests.samples import train_order

RUN = "a1"
QUERY = wire.pack_query(Query(run=RUN, first=True, participations=2))


def main() -> None:
    directory, first = Path(sys.argv[1]), int(sys.argv[2])
    cases = pickle.loads((directory / "cases.pickle").read_bytes())
    identify()
    empty = (directory / "ledger.empty").read_bytes()
    for number in range(first, len(cases)):
        _say(case=number)
        _reset(directory, empty)
        values, of_the_server = cases[number]
        order = _order(of_the_server)
        started = time.process_time()
        code = _code(_asked(directory, values, MessageType.TRAIN, order), wire.unpack_update)
        _say(
            case=number,
            code=code,
            untouched=(directory / "ledger.db").read_bytes() == empty,
            seconds=time.process_time() - started,
            charges=_charges(directory) if code == "answered" else 0,
            hello=_code(_asked(directory, values, MessageType.QUERY, QUERY), wire.unpack_hello),
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,  # MiB
        )


def _say(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def _reset(directory: Path, empty: bytes) -> None:
    for file in directory.glob("ledger.db*"):
        file.unlink()
    (directory / "ledger.db").write_bytes(empty)
    (directory / "ledger.db").chmod(0o600)


def _order(values: dict[str, object]) -> RecordDict:
    """The order of a server that trains under this configuration."""
    config = from_flat(values)
    work = trainable.load(config, config.data.labels)
    order = train_order(work, run=RUN, participations=2)
    return wire.pack_order(order, wire.pack_adapter(order.adapter))


def _asked(
    directory: Path, values: dict[str, object], kind: str, content: RecordDict
) -> RecordDict:
    context = Context(1, 1, {"settings": str(directory / "institution.toml")}, RecordDict(), values)
    return app(Message(content, 1, kind), context).content


def _code(reply: RecordDict, unpack: Callable[[RecordDict], object]) -> str:
    """The code of a refusal, or ``answered``."""
    try:
        unpack(reply)
    except Refusal as refusal:
        return refusal.code
    return "answered"


def _charges(directory: Path) -> int:
    with Ledger.open(directory / "ledger.db") as ledger:
        return len(ledger.show()["entries"])


if __name__ == "__main__":
    main()
