"""What institutions agree on in a round of secure aggregation: an order, and the values behind it.

Each institution computes this digest from the order that it received and from the configuration
that it follows, signs it, and unmasks only for institutions that signed the same. So a server that
tells one institution of less noise than another learns no sum of both.
"""

import json

from fedlora.adapters import AdapterState
from fedlora.config import RunConfig
from fedlora.messages import TrainOrder

BOUND = (
    "privacy.trust",
    "privacy.honest",
    "privacy.colluding",
    "privacy.epsilon",
    "privacy.delta",
    "privacy.max-grad-norm",
    "privacy.clipping",
    "privacy.accountant",
    "privacy.unit",
    "privacy.noise",
    "training.sample-rate",
    "training.local-steps",
    "federation.rounds",
    "federation.strategy",
    "federation.weighting",
)
"""Configuration keys on which an institution's noise, its grid or its promise depends."""


def digest(order: TrainOrder, config: RunConfig) -> bytes:
    """SHA-256 of an order without its shares, and of the values of `BOUND`; 32 bytes.

    Args:
        order: The round's order, as it was sent.
        config: The run, as the institution follows it, or as the server has it.
    """
    values = config.flat()
    return bytes.fromhex(order.digest(json.dumps([values[key] for key in BOUND])))


def parameters(adapter: AdapterState, config: RunConfig) -> int:
    """The length of the vectors of a run: the most parameters that a round of it trains.

    Args:
        adapter: Any adapter of the run.
        config: The run.
    """
    sent = config.federation.traits.sent[: config.federation.rounds]
    return max(sum(t.numel() for t in adapter.only(parts).values()) for parts in sent)
