"""Adapters of one layer and a head with random values."""

import torch

from fedlora.models.adapters import AdapterState

LAYER = "base.q"
A, B = f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight"
MAGNITUDE, HEAD = f"{LAYER}.lora_magnitude_vector", "base.score.weight"
D_OUT, D_IN = 14, 11


def normal(draw, *shape):
    """Standard normal values, float32."""
    return torch.from_numpy(draw.normal(size=shape)).float()


def random_adapter(draw, rank, d_out=D_OUT, d_in=D_IN):
    """Factors, magnitude and head, drawn in this order."""
    return AdapterState(
        {
            A: normal(draw, rank, d_in),
            B: normal(draw, d_out, rank),
            MAGNITUDE: normal(draw, d_out),
            HEAD: normal(draw, 3, d_in),
        }
    )


def product(state):
    """B A without its scale, float64."""
    return state[B].double() @ state[A].double()
