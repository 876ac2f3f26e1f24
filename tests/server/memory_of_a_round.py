"""Prints the memory that a server takes for a round of large updates, in adapters.

The replies come through Flower's Grid from a SuperLink that makes each piece when it is asked for.
Run as a program: a process's peak is its own. 196 layers make adapters of 205 MB.

Usage: python -m tests.server.memory_of_a_round DIR 10 streams [LAYERS]
"""

import dataclasses
import json
import os
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from flwr.app import Message, RecordDict
from flwr.app.message import array, remove_content_from_message
from flwr.common.serde import message_to_proto
from flwr.proto import message_pb2
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.run import Run
from flwr.superlink.grid import http_grid

from fedlora import flower_internals
from fedlora.models.adapters import AdapterState
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate
from server import limits
from server.aggregation import Mean
from server.exchange import send
from server.replies import Replies
from strategies import fedavg
from strategies.base import Round
from tests.samples import train_order

WIDTH, LAYERS, RANK = 1024, 20, 128
PIECE = 2**19
"""Bytes of a piece, so that an adapter has as many as one of 205 MB has of Flower's 5 MB."""


def adapter(value, layers):
    """An adapter of about 1 MB a layer; a tensor's values are alike."""
    shapes = {"A": (RANK, WIDTH), "B": (WIDTH, RANK)}
    return AdapterState(
        {
            f"layer{i}.lora_{part}.weight": torch.full(shape, value + i)
            for i in range(layers)
            for part, shape in shapes.items()
        }
    )


class SuperLink:
    """Hands out all replies at once, and their pieces from disk."""

    def __init__(self, folder):
        self.folder = folder
        self.replies = [
            (message_pb2.Message.FromString(proto), message_pb2.ObjectTree.FromString(tree))
            for proto, tree in pickle.loads((folder / "replies").read_bytes())
        ]

    def PushMessages(self, request):  # noqa: N802
        ids = [message.metadata.message_id for message in request.messages_list]
        return SimpleNamespace(message_ids=ids, session_id="", objects_to_push=[])

    def PushObject(self, request):  # noqa: N802
        raise AssertionError("nothing is missing")

    def PullMessages(self, request):  # noqa: N802
        waiting, self.replies = self.replies, []
        return SimpleNamespace(
            messages_list=[proto for proto, _ in waiting],
            message_object_trees=[tree for _, tree in waiting],
        )

    def PullObject(self, request):  # noqa: N802
        content = (self.folder / request.object_id).read_bytes()
        return SimpleNamespace(object_found=True, object_available=True, object_content=content)

    def ConfirmMessageReceived(self, request):  # noqa: N802
        pass


def memory(field):
    """A line of /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) * 1024


def answer(folder, messages, names, layers):
    """Keep each node's reply on disk."""
    update = ClientUpdate(institution="", round=1, run="a1", adapter=adapter(1.0, layers))
    packed, replies = wire.pack_update(update), []
    with no_object_id_recompute():
        for message in messages:
            name = names[message.metadata.dst_node_id]
            own = dataclasses.replace(update, institution=name, adapter=AdapterState({}))
            content = {**wire.pack_update(own), "adapter": packed["adapter"]}
            reply = Message(RecordDict(content), reply_to=message)
            reply.metadata.__dict__["_message_id"] = reply.object_id
            for key, value in get_all_nested_objects(reply).items():
                if not (file := folder / key).exists():
                    file.write_bytes(value.deflate())
            parts = message_to_proto(remove_content_from_message(reply)), get_object_tree(reply)
            replies.append([part.SerializeToString() for part in parts])
    (folder / "replies").write_bytes(pickle.dumps(replies))


def main(folder, updates, streams, layers=LAYERS):
    """Play the round; ``streams``: whether the Grid is fedlora's."""
    torch.set_num_threads(1)  # a fork has no other threads
    array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = PIECE
    flower_internals.set_identity(1, 1, 1)
    names = {node + 1: f"bank{node:02}" for node in range(updates)}
    before = memory("VmRSS")
    order = train_order(run="a1", round=1, parts=("A", "B"), adapter=adapter(0.0, layers))
    content = wire.pack_order(order, wire.pack_adapter(order.adapter))
    messages = [Message(content, node, "train", ttl=600.0) for node in names]
    with no_object_id_recompute():
        for message in messages:
            message.metadata.__dict__["_message_id"] = message.object_id
    if not (child := os.fork()):  # what institutions take is not the server's
        answer(folder, messages, names, layers)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    grid = http_grid.HttpGrid(token="x")
    grid._run, grid._client = Run.create_empty(1), SuperLink(folder)
    if streams:
        flower_internals.stream_replies(limits.most_reply_bytes(order.adapter), 60.0)
    this_round = Round(number=1, asked=updates, before=order.adapter, run="a1")
    replies = Replies(
        grid, send(grid, messages), names, this_round, report=(), spending=None, timeout=60.0
    )
    size = order.adapter.num_bytes
    del message, content, order
    result = Mean(fedavg.STRATEGY).aggregate(this_round, replies).adapter
    peak = (memory("VmHWM") - before) / size
    assert replies.valid == updates and not replies.failed
    assert all(torch.equal(tensor, adapter(1.0, layers)[name]) for name, tensor in result.items())
    print(json.dumps({"adapters": peak, "megabytes": size / 1e6}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "streams", *map(int, sys.argv[4:]))
