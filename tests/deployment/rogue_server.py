"""A ServerApp that asks institutions for what they must refuse, and notes what they said."""

import json
import time
from pathlib import Path

from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp

from fedlora.errors import Refusal
from fedlora.wire import wire
from fedlora.wire.messages import Query

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask everybody once, under whatever configuration the run came with."""
    deadline = time.monotonic() + 60
    while len(nodes := list(grid.get_node_ids())) < 3 and time.monotonic() < deadline:
        time.sleep(1)
    query = wire.pack_query(Query(run="0" * 32, first=True, participations=1))
    asked = [Message(query, node, MessageType.QUERY, group_id="x", ttl=120) for node in nodes]
    said: list[str] = []
    for reply in grid.send_and_receive(asked, timeout=120):
        try:
            said.append("hello from " + wire.unpack_hello(reply.content).institution)
        except Refusal as refusal:
            said.append(refusal.code)
    Path(str(context.run_config["run-dir"])).write_text(json.dumps(sorted(said)))
