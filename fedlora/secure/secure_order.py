"""What institutions agree on under secure aggregation: a run's mechanism, and a round's order.

Each institution computes both digests from the configuration that it follows and the order that it
received. All masks of a run follow from the first: a server that tells one institution of less
noise than another learns no sum of both. The second is part of what institutions sign in a round.
"""

import hashlib
import json

import fedlora
from fedlora.config.config import RunConfig
from fedlora.models.adapters import AdapterState
from fedlora.wire.messages import TrainOrder

BOUND = (
    "privacy.trust",
    "privacy.honest",
    "privacy.colluding",
    "privacy.epsilon",
    "privacy.delta",
    "privacy.max-grad-norm",
    "privacy.unit",
    "privacy.noise",
    "training.batch-size",
    "training.local-steps",
    "federation.rounds",
    "federation.strategy",
    "federation.weighting",
)
"""Configuration keys on which an institution's noise, its grid or its promise depends."""


def mechanism(config: RunConfig) -> bytes:
    """SHA-256 of the values of `BOUND` and fedlora's version: `Terms.mechanism`; 32 bytes.

    Args:
        config: The run, as the institution follows it, or as the server has it.
    """
    values = config.flat()
    bound = [fedlora.__version__, *(values[key] for key in BOUND)]
    return hashlib.sha256(json.dumps(bound).encode()).digest()


def digest(order: TrainOrder, config: RunConfig) -> bytes:
    """SHA-256 of an order without its shares, and of the run's `mechanism`; 32 bytes.

    Args:
        order: The round's order, as it was sent.
        config: The run.
    """
    return bytes.fromhex(order.digest(mechanism(config).hex()))


def parameters(adapter: AdapterState, config: RunConfig) -> int:
    """The length of the vectors of a run: the most parameters that a round of it trains.

    Args:
        adapter: Any adapter of the run.
        config: The run.
    """
    sent = config.federation.traits.sent[: config.federation.rounds]
    return max(sum(t.numel() for t in adapter.only(parts).values()) for parts in sent)
