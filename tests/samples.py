"""Messages with ordinary values, for tests that change some of them."""

from fedlora.adapters import PARTS, AdapterState
from fedlora.messages import ClientUpdate, PrivacySpent, TrainOrder


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
    """The spending of a seeded run over records, with the RDP accountant."""
    values = {
        "unit": "record",
        "epsilon": 1.0,
        "delta": 1e-4,
        "noise_multiplier": 1.0,
        "sample_rate": 0.25,
        "steps": 2,
        "accountant": "rdp",
        "noise": "seeded",
        "max_grad_norm": 1.0,
        "clipping": "flat",
        "size_noise": 0.0,
        "ledger_epsilon": 2.0,
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
