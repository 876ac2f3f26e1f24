"""The digest of an order."""

import dataclasses

import torch

from fedlora.models.adapters import AdapterState
from tests.samples import train_order

STATE = AdapterState({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": torch.ones(4, 2)})
ORDER = train_order(adapter=STATE)


def test_every_part_of_an_order_changes_its_digest():
    digest = ORDER.digest("config")
    moved = AdapterState({k: v + 1e-6 for k, v in STATE.items()})
    renamed = AdapterState({k.replace("x", "y"): v for k, v in STATE.items()})
    changed = [
        dataclasses.replace(ORDER, **{field: value})
        for field, value in (
            ("run", "s"),
            ("round", 3),
            ("participations", 10),
            ("base", "c"),
            ("report", ("loss",)),
            ("parts", ("B",)),
            ("kept", ("B",)),
            ("adapter", moved),
            ("adapter", renamed),
        )
    ]
    digests = {order.digest("config") for order in changed} | {ORDER.digest("other")}
    assert digest not in digests and len(digests) == 10
    assert digest == ORDER.digest("config")
