"""A ClientApp that misbehaves, mounted over an institution's client/app.py in tests.

/state/misbehave.json says how: round -> a word below. What it does not name is answered by the
institution's own app, which is mounted at /honest/app.py.
"""

import dataclasses
import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Message

from fedlora.models.adapters import AdapterState
from fedlora.wire import wire
from fedlora.wire.messages import ClientUpdate

_spec = importlib.util.spec_from_file_location("client._honest", "/honest/app.py")
assert _spec and _spec.loader
_honest = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_honest)


def _each(change: Callable[[torch.Tensor], torch.Tensor]):
    def changed(update: ClientUpdate) -> ClientUpdate:
        adapter = AdapterState({name: change(tensor) for name, tensor in update.adapter.items()})
        return dataclasses.replace(update, adapter=adapter)

    return changed


UPDATES: dict[str, Callable[[ClientUpdate], ClientUpdate]] = {
    "nan": _each(lambda tensor: torch.full_like(tensor, torch.nan)),
    "shape": _each(lambda tensor: tensor[:1]),
    "huge": _each(lambda tensor: torch.full_like(tensor, 1e30)),
    "stale": lambda update: dataclasses.replace(update, round=update.round - 1),
    "other-run": lambda update: dataclasses.replace(update, run="0" * 32),
    "other-name": lambda update: dataclasses.replace(update, institution="a"),
}


def app(message, context):
    """Misbehave, or answer as the institution's own app."""
    file = Path("/state/misbehave.json")
    number = message.metadata.group_id
    said = json.loads(file.read_text()).get(number, "") if file.exists() else ""
    how, _, text = said.partition(" ")
    last = Path("/state/last-answer")
    if how == "raise":
        raise ValueError(text)
    if how == "die":
        os._exit(3)
    if how == "hang":
        time.sleep(3600)
    if how == "replay":
        update = wire.update_from_bytes(last.read_bytes())
        return Message(wire.pack_update(update), reply_to=message)
    answered = _honest.app(message, context)
    if how == "slow":
        time.sleep(20)
    elif how:
        update = UPDATES[how](wire.unpack_update(answered.content))
        return Message(wire.pack_update(update), reply_to=message)
    elif "adapter" in answered.content:  # it trained, and did not refuse
        last.write_bytes(wire.update_to_bytes(wire.unpack_update(answered.content)))
    return answered
