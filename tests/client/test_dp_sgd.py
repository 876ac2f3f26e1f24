import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from scipy import stats

from client.dp_sgd import SLACK, PrivateOptimizer, check_noise, clip, poisson_batches
from fedlora.errors import Refusal
from fedlora.privacy.streams import RandomSource
from fedlora.secure import noise_shares


def _optimizer(parameters, *, sigma=1.0, bound=1.0, lr=1.0, cls=PrivateOptimizer):
    return cls(
        torch.optim.SGD(parameters, lr=lr),
        named={f"p{i}": p for i, p in enumerate(parameters)},
        noise_multiplier=sigma,
        max_grad_norm=bound,
        expected_batch_size=4.0,
        source=RandomSource.seeded("test", 0),
    )


def _parameters():
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5))]


def _gradients(units, scale=1.0, seed=0):
    return scale * torch.randn(units, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scale", [5.0, 0.01])  # longer and shorter than the bound
def test_clipping_is_opacus_own_at_a_bound_that_is_smaller_by_the_slack(scale):
    ours, (p,) = _gradients(6, scale), [torch.nn.Parameter(torch.zeros(11))]
    p.grad_sample = ours.clone()
    reference = DPOptimizer(
        torch.optim.SGD([p], lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0 / (1 + SLACK),
        expected_batch_size=4,
    )
    reference.clip_and_accumulate()
    clip(ours, 1.0)
    torch.testing.assert_close(ours.sum(0), p.summed_grad)


def test_a_unit_whose_gradient_is_not_finite_contributes_zero():
    found = torch.tensor([[math.nan, 1.0], [0.3, 0.4], [math.inf, 0.0], [3e38, 3e38]])
    clip(found, 1.0)
    expected = torch.tensor([[0.0, 0.0], [0.3, 0.4], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(found, expected)


def test_the_step_is_minus_the_noised_sum_over_the_expected_batch_size():
    parameters = _parameters()
    total = _gradients(3, 0.01).sum(0).double()
    seen = []
    optimizer = _optimizer(parameters, sigma=2.0, bound=0.5)
    optimizer._after_noise = lambda: seen.append(torch.cat([p.grad.flatten() for p in parameters]))
    optimizer.step(total)
    noised = total + torch.from_numpy(RandomSource.seeded("test", 0).normal(11)) * 2.0 * 0.5
    found = torch.cat([p.detach().flatten() for p in parameters])
    torch.testing.assert_close(found, (1 - noised / 4.0).float())
    whole = seen[0].double() * 4.0 * 2**20 / 2.0  # deviation 1, so a grid of 2^-19
    assert torch.equal(whole, whole.round())


def test_a_norm_above_the_bound_after_clipping_ends_the_run(monkeypatch):
    monkeypatch.setattr("client.dp_sgd.clip_factors", lambda norms, _: torch.ones_like(norms))
    with pytest.raises(Refusal, match="guard-not-clipped"):
        clip(_gradients(2, 10.0), 1.0)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_noise_of_another_deviation_ends_the_run(factor):
    class Off(PrivateOptimizer):
        def _draw(self, count):
            return factor * super()._draw(count)

    parameters = [torch.nn.Parameter(torch.ones(1000))]
    with pytest.raises(Refusal, match="guard-noise"):
        _optimizer(parameters, cls=Off).step(torch.zeros(1000).double())


def test_the_noise_guard_passes_right_noise():
    # 7 standard errors each: over 300 draws a false alarm has probability below 1e-8
    source = RandomSource.seeded("guard", 3)
    for size in (20, 1000, 20_000):
        for _ in range(100):
            check_noise(source.normal(size) * 0.7, 0.7)


def test_a_step_that_leaves_a_weight_unchanged_ends_the_run():
    # the step is far below float32 resolution
    parameters = [torch.nn.Parameter(torch.full((4,), 1e9))]
    with pytest.raises(Refusal, match="guard-no-step: the step left p0 unchanged"):
        _optimizer(parameters, lr=1e-6).step(torch.zeros(4).double())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_a_noise_multiplier_that_is_no_noise_is_refused(sigma):
    with pytest.raises(Refusal, match="guard-no-noise"):
        _optimizer(_parameters(), sigma=sigma)


def test_poisson_batches_have_the_right_distribution():
    steps, units, rate = 2000, 50, 0.1
    source = RandomSource.seeded("poisson", 1)
    batches = list(poisson_batches(units=units, sample_rate=rate, steps=steps, source=source))
    sizes = np.bincount([len(b) for b in batches], minlength=units + 1)
    # sizes are Binomial(50, 0.1); chi-square over pooled cells, and each unit's own count;
    # both at 1e-6 false alarm
    expected = stats.binom.pmf(np.arange(units + 1), units, rate) * steps
    cells = expected > 5
    statistic = ((sizes[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    assert statistic < stats.chi2.isf(1e-6, cells.sum())
    counts = np.bincount(np.concatenate([np.array(b, dtype=int) for b in batches]), minlength=units)
    z = (counts - steps * rate) / math.sqrt(steps * rate * (1 - rate))
    assert np.abs(z).max() < stats.norm.isf(1e-6 / (2 * units))


@pytest.mark.parametrize("bound", [1e-6, 1e6])
@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e11])
def test_clipping_holds_at_the_edges_of_what_a_configuration_may_ask(bound, scale):
    found = _gradients(1, scale)
    clip(found, bound)
    assert float(found.double().norm()) <= bound / (1 + SLACK)


@given(st.integers(0, 2**32 - 1), st.floats(-5, 11), st.floats(1e-6, 1e6))
def test_no_rounding_takes_a_clipped_gradient_above_the_bound(seed, exponent, bound):
    found = torch.randn(8, 50, generator=torch.Generator().manual_seed(seed)) * 10.0**exponent
    clip(found, bound)  # refuses if so
    assert float(torch.linalg.vector_norm(found.double(), dim=1).max()) <= bound / (1 + SLACK)


def _exact_norm(x):
    """The norm of float64 numbers, rounded up: sums of exact squares."""
    return math.sqrt(float(sum(Fraction(float(value)) ** 2 for value in x))) * (1 + 2**-50)


def _sum(gradients):
    """As `client.private_training` adds a batch up."""
    total = torch.zeros(gradients.shape[1], dtype=torch.float64)
    for gradient in gradients:
        total.add_(gradient)
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("units", "numbers", "kind"),
    [
        (4096, 64, "at the bound"),
        (2048, 64, "one direction"),  # the sum, and with it its rounding, is as large as can be
        (2048, 64, "cancelling"),
        (64, 20_000, "spread"),  # many numbers, few of them large
    ],
)
def test_one_unit_moves_a_computed_sum_by_less_than_the_bound(units, numbers, kind, seed, dtype):
    """With or without the unit, first, last or in the middle of a batch, in exact arithmetic."""
    draw = torch.Generator().manual_seed(seed)
    gradients = torch.randn(units, numbers, generator=draw)
    if kind == "one direction":
        gradients = gradients[:1] * (1 + 1e-3 * torch.rand(units, 1, generator=draw))
    elif kind == "cancelling":
        gradients[1::2] = -gradients[::2]
    elif kind == "spread":
        gradients *= 10.0 ** -torch.arange(numbers).remainder(30)
    # close to the bound from both sides, where the factor is or is not 1
    near = 1 + 2e-3 * (torch.rand(units, 1, generator=draw) - 0.5)
    gradients = (gradients / gradients.norm(dim=1, keepdim=True) * near).to(dtype).float()
    clip(gradients, 1.0)
    whole = _sum(gradients)
    for out in (0, units // 2, units - 1):
        others = torch.cat([gradients[:out], gradients[out + 1 :]])
        for order in (torch.arange(units - 1), torch.randperm(units - 1, generator=draw)):
            assert _exact_norm(whole - _sum(others[order])) <= 1.0


def test_the_slack_covers_the_largest_batch_and_the_largest_adapter():
    """The terms of the proof in docs/privacy-accounting.md."""
    units, unit_roundoff = 2 * noise_shares.MAX_BATCH, 2.0**-53
    of_sums = 2 * units**2 * unit_roundoff
    of_norms = noise_shares.MAX_PARAMETERS * unit_roundoff
    assert (1 + of_sums) * (1 + of_norms) < 1 + SLACK / 1.9
