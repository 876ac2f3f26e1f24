"""The rate of a training step over that of bare matrix products of the same shapes and dtypes.

Usage: python -m benchmarks.flop_rate [--model NAME] [--dtype bf16] [--rows 64] [--tokens 40]

The benchmark records every matrix product of one DP step, forward and backward. Then it times, in
turn, the step and the same products alone, one after the other on existing operands of the same
layout. Both take the same floating-point operations, so the share of the rate is the products' time
over the step's.
"""

import collections
import json
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import dp_step

aten = torch.ops.aten
Operand = tuple[tuple[int, ...], bool, torch.dtype]  # shape, whether transposed in memory, dtype
Product = tuple[Operand, Operand]


class Products(TorchDispatchMode):
    """Counts the matrix products that are computed while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[Product] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
            left, right = args[-2:]  # after the added tensor
            self.counts[_operand(left), _operand(right)] += 1
        return func(*args, **(kwargs or {}))


def _operand(tensor: torch.Tensor) -> Operand:
    return tuple(tensor.shape), tensor.stride(-1) != 1 and tensor.shape[-1] > 1, tensor.dtype


def _made(operand: Operand) -> torch.Tensor:
    shape, transposed, dtype = operand
    if transposed:
        return torch.randn(*shape[:-2], shape[-1], shape[-2], dtype=dtype).mT
    return torch.randn(*shape, dtype=dtype)


def operations(product: Product) -> int:
    """Floating-point operations of one product."""
    (left, _, _), (right, _, _) = product
    return 2 * math.prod(left) * right[-1]


def bare(counts: collections.Counter[Product]) -> Callable[[], None]:
    """The products alone."""
    work = [
        (torch.bmm if len(left[0]) == 3 else torch.mm, _made(left), _made(right), count)
        for (left, right), count in counts.items()
    ]

    def take() -> None:
        for multiply, left, right, count in work:
            for _ in range(count):
                multiply(left, right)

    return take


def main() -> None:
    parser = dp_step.parser()
    arguments = parser.parse_args()
    (step,) = dp_step.sides(arguments, "dp")
    step()
    with Products() as products:
        step()
    sides = {"step": step, "products": bare(products.counts)}
    seconds = dp_step.in_turn(sides, arguments.turns)
    shares = [b / s for s, b in zip(seconds["step"], seconds["products"], strict=True)]
    low, middle, high = statistics.quantiles(shares, n=4)
    total = sum(operations(product) * count for product, count in products.counts.items())
    gigaflops = {name: total / statistics.median(taken) / 1e9 for name, taken in seconds.items()}
    print(
        json.dumps(
            {
                **{k: v for k, v in vars(arguments).items() if k not in ("turns", "against")},
                "products": sum(products.counts.values()),
                "step_gflops": round(gigaflops["step"], 1),
                "bare_gflops": round(gigaflops["products"], 1),
                "share": round(middle, 3),
                "share_quartiles": [round(low, 3), round(high, 3)],
            }
        )
    )


if __name__ == "__main__":
    main()
