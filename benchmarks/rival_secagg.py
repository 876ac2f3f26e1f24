"""One round of Flower's own SecAgg+ on the complete graph, by Flower's own functions.

The institutions' steps are those of ``secaggplus_mod``; the server's loop is that of
``secaggplus_workflow`` over Flower's functions, without messages. Flower makes new keys in each
round, so its round has the setup in it. Its masks are 32-bit numbers from numpy's generator under a
seed of 32 bits, and nothing is signed.
"""

import importlib
import logging
import time
from statistics import median

import numpy as np
from flwr.app import ConfigRecord
from flwr.common import bytes_to_ndarray, ndarrays_to_parameters
from flwr.common.secure_aggregation import ndarrays_arithmetic as arithmetic
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key

# the package's attribute of this name is a function
secaggplus_mod = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

CLIPPING, TARGET, MODULUS = 8.0, 2**22, 2**32
"""Defaults of Flower's workflow."""


def size(value) -> int:
    """Bytes of what a message carries, without Flower's own framing."""
    if isinstance(value, dict):
        return sum(map(size, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(size, value))
    return len(value) if isinstance(value, bytes) else 8


class Clock:
    """Seconds and bytes of each institution, and the server's seconds."""

    def __init__(self, count: int) -> None:
        self.seconds, self.up, self.down = ([0.0] * count for _ in range(3))
        self.server = 0.0

    def ask(self, i: int, step, state, order, *rest):
        """One step of an institution."""
        started = time.perf_counter()
        answer = step(state, order, *rest)
        self.seconds[i] += time.perf_counter() - started
        self.up[i] += size(answer)
        self.down[i] += size(dict(order))
        return answer


def one_round(count: int, parameters: int, lost: int, threshold: int) -> dict[str, float]:
    """A round in which ``lost`` institutions vanish before their masked vectors.

    Returns:
        Median seconds and bytes of an institution, and the server's seconds.
    """
    logging.getLogger("flwr").setLevel(logging.ERROR)
    clock = Clock(count)
    states = [secaggplus_mod.SecAggPlusState() for i in range(count)]
    setup = ConfigRecord(
        {
            Key.SAMPLE_NUMBER: count,
            Key.SHARE_NUMBER: count,
            Key.THRESHOLD: threshold,
            Key.CLIPPING_RANGE: CLIPPING,
            Key.TARGET_RANGE: TARGET,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: 1000.0,
        }
    )
    keys = {}
    for i, state in enumerate(states):
        state.nid = i
        answer = clock.ask(i, secaggplus_mod._setup, state, setup)
        keys[i] = (answer[Key.PUBLIC_KEY_1], answer[Key.PUBLIC_KEY_2])
    order = ConfigRecord({str(i): list(pair) for i, pair in keys.items()})
    sealed: dict[int, list[tuple[int, bytes]]] = {i: [] for i in range(count)}
    for i, state in enumerate(states):
        answer = clock.ask(i, secaggplus_mod._share_keys, state, order)
        for to, part in zip(answer[Key.DESTINATION_LIST], answer[Key.CIPHERTEXT_LIST], strict=True):
            sealed[to].append((i, part))
    survivors = [i for i in range(count) if i >= lost]
    draw = np.random.default_rng(1)
    vector = [draw.uniform(-1, 1, parameters).astype(np.float32)]
    total: list[np.ndarray] = []
    for i in survivors:
        order = ConfigRecord(
            {
                Key.SOURCE_LIST: [source for source, _ in sealed[i]],
                Key.CIPHERTEXT_LIST: [part for _, part in sealed[i]],
            }
        )
        step, given = secaggplus_mod._collect_masked_vectors, ndarrays_to_parameters(vector)
        answer = clock.ask(i, step, states[i], order, 1000, given)
        started = time.perf_counter()
        masked = [bytes_to_ndarray(part) for part in answer[Key.MASKED_PARAMETERS]]
        total = arithmetic.parameters_addition(total, masked) if total else masked
        clock.server += time.perf_counter() - started
    shares: dict[int, list[bytes]] = {i: [] for i in range(count)}
    order = ConfigRecord(
        {Key.ACTIVE_NODE_ID_LIST: survivors, Key.DEAD_NODE_ID_LIST: list(range(lost))}
    )
    for i in survivors:
        answer = clock.ask(i, secaggplus_mod._unmask, states[i], order)
        for owner, share in zip(answer[Key.NODE_ID_LIST], answer[Key.SHARE_LIST], strict=True):
            shares[owner].append(share)
    started = time.perf_counter()
    total = _unmasked(total, shares, survivors, keys)
    clock.server += time.perf_counter() - started
    _check(total, len(survivors), parameters)
    alive = slice(lost, None)
    return {
        "institution_seconds": median(clock.seconds[alive]),
        "server_seconds": clock.server,
        "up_bytes": median(clock.up[alive]),
        "down_bytes": median(clock.down[alive]),
    }


def _unmasked(total, shares, survivors, keys):
    """The server's loop of ``secaggplus_workflow.unmask_stage``."""
    shapes = arithmetic.get_parameters_shape(total)
    for owner, parts in shares.items():
        secret = combine_shares(parts)
        if owner in survivors:
            mask = pseudo_rand_gen(secret, MODULUS, shapes)
            total = arithmetic.parameters_subtraction(total, mask)
            continue
        for other in (i for i in keys if i in survivors):
            shared = generate_shared_key(
                bytes_to_private_key(secret), bytes_to_public_key(keys[other][0])
            )
            mask = pseudo_rand_gen(shared, MODULUS, shapes)
            change = (
                arithmetic.parameters_addition
                if owner > other
                else arithmetic.parameters_subtraction
            )
            total = change(total, mask)
    return arithmetic.parameters_mod(total, MODULUS)


def _check(total: list[np.ndarray], survivors: int, parameters: int) -> None:
    """The sum must be that of the quantised vectors, which are equal up to random rounding."""
    draw = np.random.default_rng(1)
    vector = [draw.uniform(-1, 1, parameters).astype(np.float32)]
    _, found = arithmetic.factor_extract(total)
    expected = quantize(vector, CLIPPING, TARGET)[0].astype(np.int64) * survivors
    assert np.abs(found[0] - expected).max() <= survivors
