"""Messages with ordinary values, for tests that change some of them, a run's adapter, CSV files."""

import csv
import itertools
from pathlib import Path

import numpy as np
import torch

from fedlora.models.adapters import PARTS, AdapterState
from fedlora.runs import comparison
from fedlora.wire.messages import ClientUpdate, PrivacySpent, TrainOrder


def write_csv(path, rows):
    """Write rows, mappings of the same columns, as a CSV file; its directory is made if need be."""
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def train_order(work=None, **changes):
    """The first order of run ``a1`` for what `trainable.load` loaded; None: without an adapter."""
    values = {
        "run": "a1",
        "round": 1,
        "participations": 3,
        "base": work.base.digest if work else "",
        "report": (),
        "parts": PARTS,
        "kept": (),
        "adapter": work.start if work else AdapterState({}),
    }
    return TrainOrder(**(values | changes))


def privacy_spent(**changes):
    """The spending of a seeded run over records."""
    values = {
        "unit": "record",
        "epsilon": 1.0,
        "delta": 1e-4,
        "noise_multiplier": 1.0,
        "sample_rate": 0.25,
        "steps": 2,
        "noise": "seeded",
        "max_grad_norm": 1.0,
        "ledger_epsilon": 2.0,
        "ledger_epsilon_alone": 2.0,
        "ledger_delta": 1e-5,
        "ledger_limit": 9.0,
    }
    return PrivacySpent(**(values | changes))


def updates_of(states, weights=None):
    """An update of each state, from ``bank-00`` on, with its weight; equal weights if None."""
    weights = [1.0] * len(states) if weights is None else weights
    return [
        (ClientUpdate(institution=f"bank-{i:02}", round=1, adapter=state), weight)
        for i, (state, weight) in enumerate(zip(states, weights, strict=True))
    ]


def final_adapter(config):
    """The adapter that a run released."""
    return AdapterState.open(Path(config.run_dir) / "adapter")


def same_adapters(a, b):
    """Whether two adapters have the same tensors, to the last bit, in the same order."""
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


_TEXTS = itertools.count(1000)  # no two rows have one text unless a test says so


def compared_rows(truth, alone, shared, own, records=64, known=None, texts=None):
    """One institution's held-out rows and the answers of its three models, as class indices."""
    return comparison.Rows(
        records=records,
        truth=np.array(truth),
        texts=np.array(texts or [next(_TEXTS) for _ in truth]),
        predicted={
            "alone": np.array(alone),
            "shared": np.array(shared),
            "own": np.array(own),
        },
        known=np.array(known or [9] * len(truth)),
        choice={
            "alone_steps": 8,
            "own_steps": 4,
            "weight": 0.5,
            "keeps_alone": False,
            "held_back": records // 5,
        },
    )


def compared(institutions, labels=("loan", "card", "fraud"), better=6, worse=2):
    """``joining`` of a result.json: own is right on 20 rows of each institution, alone on fewer."""
    rows = {
        name: compared_rows(
            truth=[0] * 22,
            alone=[1] * better + [0] * (22 - better),
            shared=[0] * 11 + [2] * 11,
            own=[0] * (22 - worse) + [1] * worse,
            records=40 + 40 * place,
        )
        for place, name in enumerate(institutions)
    }
    return comparison.summary(rows, labels) | {"method": "interpolate", "seconds": 1.0}
