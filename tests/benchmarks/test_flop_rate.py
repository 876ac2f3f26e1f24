"""What counts as a matrix product of a step, and how many operations it is."""

import torch

from benchmarks import flop_rate


def test_products_are_counted_forward_and_backward_with_their_layout():
    layer = torch.nn.Linear(5, 3)
    layer.weight.requires_grad_(False)
    inputs = torch.randn(7, 5, requires_grad=True)
    with flop_rate.Products() as products:
        layer(inputs).sum().backward()
    f32 = torch.float32
    forward = (((7, 5), False, f32), ((5, 3), True, f32))
    assert products.counts[forward] == 1
    (back,) = set(products.counts) - {forward}
    assert back[1][0] == (3, 5)  # of the weight; its own gradient is not taken
    assert flop_rate.operations(forward) == 2 * 7 * 5 * 3


def test_bare_products_have_the_shapes_that_were_counted():
    a, b = torch.randn(2, 4, 6), torch.randn(2, 9, 6).mT
    with flop_rate.Products() as first:
        torch.bmm(a, b)
        torch.mm(a[0], b[0])
    with flop_rate.Products() as second:
        flop_rate.bare(first.counts)()
    assert first.counts == second.counts
    assert sum(flop_rate.operations(p) for p in first.counts) == 3 * 2 * 4 * 6 * 9
