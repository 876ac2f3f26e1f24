"""Packed rows: examples without padding, one after the other in a single row.

Rows of financial text are short and differ in length, so much of a padded batch is padding. In a
packed row, layers on single tokens compute real tokens only. Attention, pooling and per-example
gradients work on whole examples: they take examples of similar length from the row, pad them, and
put the result back. `active` gives a model's layers the packing of the present row.

An example's result does not depend on the other examples, to the last bit, if the row has the same
number of tokens: products with the base then have the same number of rows, and products per example
have the shape of the example's padded length.

Reference: Krell et al. (2021), Efficient Sequence Packing, arXiv 2107.02027.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import itertools
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from fedlora.arrays import Int64

TOKENS_MULTIPLE = 64
"""The length of a packed row is a multiple of this number. Kernels are compiled and cached for each
size, and compute the last rows of an odd size differently."""


def row_size(tokens: int) -> int:
    """The length of the smallest packed row for this number of tokens."""
    return -(-tokens // TOKENS_MULTIPLE) * TOKENS_MULTIPLE


@dataclass(frozen=True, kw_only=True)
class _Group:
    """Examples of one padded width."""

    examples: slice
    width: int

    @property
    def places(self) -> int:
        """The number of their padded tokens."""
        return (self.examples.stop - self.examples.start) * self.width


class Packing:
    """The places of each example's tokens in a packed row.

    Outputs and gradients of an example's tokens depend on that example only. Filler gets zeros in
    every operation per example, and no gradient.

    Args:
        lengths: The number of tokens in each example ``(n,)``, at least 1.
        widths: The padded width of each example ``(n,)``. Examples of equal width are computed
            together; a row whose widths ascend needs no sorting of results.
        total: The number of tokens in the row, T; tokens after the examples are filler.
        slots: The largest number of examples in a packed row, at least n.
        device: The row's device.
    """

    def __init__(
        self, lengths: Int64, widths: Int64, *, total: int, slots: int, device: torch.device
    ) -> None:
        self.examples, self.total = len(lengths), total
        self.lengths: list[int] = lengths.tolist()
        self.used = sum(self.lengths)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        order = np.argsort(widths, kind="stable")  # of the examples among the padded places
        widths = widths[order]
        within = np.concatenate([np.arange(width) for width in widths])  # a place in its example
        of_place = np.repeat(order, widths)
        padding = within >= lengths[of_place]
        # Padding repeats its own example's first token, so no other example has a part in it.
        token = starts[of_place] + np.where(padding, 0, within)
        place = np.zeros(total, dtype=np.int64)
        place[token[~padding]] = np.flatnonzero(~padding)
        self._token = torch.from_numpy(token).to(device)  # (P,) of each padded place
        self._place = torch.from_numpy(place).to(device)  # (T,) of each token
        self._padding = torch.from_numpy(padding).to(device)[:, None]
        of_token = np.zeros(total, dtype=np.int64)
        of_token[: self.used] = np.repeat(np.arange(len(lengths)), lengths)
        self._example = torch.from_numpy(of_token).to(device)  # (T,)
        self._counts = torch.from_numpy(lengths).to(device)[:, None]
        last = np.resize(starts[1:] - 1, slots)
        self.last = torch.from_numpy(last).to(device)
        """The last token of each example ``(slots,)``; after n they repeat."""
        bounds = [0, *(np.flatnonzero(np.diff(widths)) + 1).tolist(), len(widths)]
        self._groups = [
            _Group(examples=slice(a, b), width=int(widths[a]))
            for a, b in itertools.pairwise(bounds)
        ]
        self._masks: dict[bool, list[torch.Tensor]] = {}
        self._number = None  # None: the examples are sorted by width
        if (order[:-1] > order[1:]).any():
            self._number = torch.from_numpy(np.argsort(order)).to(device)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """``(T, f)`` to the padded places ``(P, f)``; padding holds its example's first token.

        The caller must ignore padding: it passes no gradient back.
        """
        return _linear(x, self._padded, self._packed)

    def unpad(self, y: torch.Tensor) -> torch.Tensor:
        """``(P, f)`` back to ``(T, f)``, with zeros at filler."""
        return _linear(y, self._packed, lambda g: self._zeroed(self._padded(g)))

    def sums(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of each example's tokens: ``(T, f)`` to ``(n, f)``."""
        return _linear(x, self._summed, self._repeated)

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Each example's values, repeated at its tokens: ``(n, f)`` to ``(T, f)``."""
        return _linear(x, self._repeated, self._summed)

    def means(self, x: torch.Tensor) -> torch.Tensor:
        """Mean of each example's tokens: ``(T, f)`` to ``(n, f)``."""
        return self.sums(x) / self._counts

    def groups(self, y: torch.Tensor) -> Iterator[tuple[slice, torch.Tensor]]:
        """For each width its examples and their part of ``(P, ...)``: ``(m, width, ...)``.

        The examples are a slice of all in ascending order of width.
        """
        parts = y.split([group.places for group in self._groups])  # with one backward for all
        for group, part in zip(self._groups, parts, strict=True):
            yield group.examples, part.unflatten(0, (-1, group.width))

    def masks(self, causal: bool) -> list[torch.Tensor]:
        """The additive attention mask of each group, float32 ``(m, 1, width, width)``."""
        if causal not in self._masks:
            masks: list[torch.Tensor] = []
            for _, padding in self.groups(self._padding[:, 0]):
                m, width = padding.shape
                hidden = padding[:, None, None, :].expand(m, 1, width, width)
                if causal:
                    later = torch.ones(width, width, dtype=torch.bool, device=padding.device)
                    hidden = hidden | later.triu(1)
                least = torch.finfo(torch.float32).min
                masks.append(torch.zeros(hidden.shape, device=hidden.device))
                masks[-1].masked_fill_(hidden, least)
            self._masks[causal] = masks
        return self._masks[causal]

    def outer(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Sum ``left_t^T right_t`` over each example's tokens, float32.

        Args:
            left: ``(T, p)``.
            right: ``(T, q)``.

        Returns:
            ``(n, p, q)``.
        """
        lefts, rights = self._padded(left).float(), self._padded(right).float()
        self._zeroed(lefts if left.shape[1] <= right.shape[1] else rights)  # one is enough
        found = lefts.new_empty(self.examples, left.shape[1], right.shape[1])
        pairs = zip(self.groups(lefts), self.groups(rights), strict=True)
        for (examples, a), (_, b) in pairs:
            torch.bmm(a.mT, b, out=found[examples])
        return self._numbered(found)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, self._token)

    def _packed(self, y: torch.Tensor) -> torch.Tensor:
        return self._without_filler(y.index_select(0, self._place))

    def _summed(self, x: torch.Tensor) -> torch.Tensor:
        parts = self.groups(self._zeroed(self._padded(x)))
        return self._numbered(torch.cat([part.sum(1) for _, part in parts]))

    def _numbered(self, y: torch.Tensor) -> torch.Tensor:
        """``(n, ...)`` in ascending order of width, in the order of the examples."""
        return y if self._number is None else y[self._number]

    def _repeated(self, x: torch.Tensor) -> torch.Tensor:
        return self._without_filler(x.index_select(0, self._example))

    def _zeroed(self, y: torch.Tensor) -> torch.Tensor:
        return y.masked_fill_(self._padding, 0.0)

    def _without_filler(self, x: torch.Tensor) -> torch.Tensor:
        x[self.used :] = 0.0
        return x


Map = Callable[[torch.Tensor], torch.Tensor]


class _Linear(torch.autograd.Function):
    """A linear map with its transpose."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: Map, back: Map) -> torch.Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.back(grads[0]), None, None


def _linear(x: torch.Tensor, there: Map, back: Map) -> torch.Tensor:
    return cast(torch.Tensor, _Linear.apply(x, there, back))


_active: list[Packing] = []


def active() -> Packing | None:
    """The packing of the row in the present pass; None in padded passes."""
    return _active[-1] if _active else None


@contextmanager
def use(packing: Packing) -> Generator[None]:
    """Set the packing for the forward and backward of one row."""
    _active.append(packing)
    try:
        yield
    finally:
        _active.pop()
