import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from opacus.optimizers import DPOptimizer
from scipy import stats

from client.dp_sgd import Clipping, PoissonSampler, PrivateOptimizer, check_noise
from fedlora.errors import Refusal
from fedlora.privacy.streams import RandomSource


def _optimizer(parameters, *, sigma=1.0, clipping="flat", bound=1.0, lr=1.0, cls=PrivateOptimizer):
    return cls(
        torch.optim.SGD(parameters, lr=lr),
        names={p: f"p{i}" for i, p in enumerate(parameters)},
        noise_multiplier=sigma,
        clipping=Clipping(max_grad_norm=bound, kind=clipping),
        expected_batch_size=4.0,
        source=RandomSource.seeded("test", 0),
    )


def _parameters():
    return [torch.nn.Parameter(torch.ones(3, 2)), torch.nn.Parameter(torch.ones(5))]


def _gradients(units, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(units, 3, 2, generator=generator),
        scale * torch.randn(units, 5, generator=generator),
    ]


def test_flat_clipping_is_opacus_own():
    ours, theirs = _parameters(), _parameters()
    mine = _optimizer(ours)
    reference = DPOptimizer(
        torch.optim.SGD(theirs, lr=1.0),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        expected_batch_size=4,
    )
    for seed, scale in ((1, 5.0), (2, 0.01)):  # longer and shorter than the bound
        for p, q, g in zip(ours, theirs, _gradients(6, scale, seed), strict=True):
            p.grad_sample, q.grad_sample = g.clone(), g.clone()
        for optimizer in (mine, reference):
            optimizer.clip_and_accumulate()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p.summed_grad.float(), q.summed_grad)


def test_automatic_clipping_normalises_by_norm_plus_gamma():
    (p,) = parameters = [torch.nn.Parameter(torch.zeros(2))]
    p.grad_sample = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    _optimizer(parameters, clipping="automatic", bound=2.0).clip_and_accumulate()
    torch.testing.assert_close(p.summed_grad.float(), torch.tensor([3.0, 4.0]) * 2.0 / 5.01)


def test_a_unit_whose_gradient_is_not_finite_contributes_zero():
    (p,) = parameters = [torch.nn.Parameter(torch.zeros(2))]
    p.grad_sample = torch.tensor([[math.nan, 1.0], [0.3, 0.4], [math.inf, 0.0], [3e38, 3e38]])
    _optimizer(parameters).clip_and_accumulate()
    torch.testing.assert_close(p.summed_grad.float(), torch.tensor([0.3, 0.4]))


def test_the_step_is_minus_the_noised_sum_over_the_expected_batch_size():
    parameters = _parameters()
    optimizer = _optimizer(parameters, sigma=2.0, bound=0.5)
    for p, g in zip(parameters, _gradients(3, 0.01), strict=True):
        p.grad_sample = g.clone()
    optimizer.step()
    noise = torch.from_numpy(RandomSource.seeded("test", 0).normal(11)) * 2.0 * 0.5
    for p, g, n in zip(
        parameters, _gradients(3, 0.01), (noise[:6].view(3, 2), noise[6:]), strict=True
    ):
        torch.testing.assert_close(p.detach(), (1 - (g.sum(0) + n) / 4.0).float())
        whole = p.grad.double() * 4.0 * 2**20 / 2.0  # deviation 1, so a grid of 2^-19
        assert torch.equal(whole, whole.round())


def test_a_missing_per_example_gradient_ends_the_run():
    parameters = _parameters()
    parameters[0].grad_sample = torch.zeros(2, 3, 2)
    with pytest.raises(Refusal, match="guard-no-gradient: p1"):
        _optimizer(parameters).step()


def test_a_norm_above_the_bound_after_clipping_ends_the_run():
    class Unclipped(Clipping):
        def factors(self, norms):
            return torch.ones_like(norms)

    with pytest.raises(Refusal, match="guard-not-clipped"):
        Unclipped(max_grad_norm=1.0, kind="flat").clip(_gradients(2, 10.0))


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0])
def test_noise_of_another_deviation_ends_the_run(factor):
    class Off(PrivateOptimizer):
        def _draw(self, count):
            return factor * super()._draw(count)

    parameters = [torch.nn.Parameter(torch.ones(1000))]
    parameters[0].grad_sample = torch.zeros(0, 1000)
    with pytest.raises(Refusal, match="guard-noise"):
        _optimizer(parameters, cls=Off).step()


def test_the_noise_guard_passes_right_noise():
    # 7 standard errors each: over 300 draws a false alarm has probability below 1e-8
    source = RandomSource.seeded("guard", 3)
    for size in (20, 1000, 20_000):
        for _ in range(100):
            check_noise(source.normal(size) * 0.7, 0.7)


def test_a_step_that_leaves_a_weight_unchanged_ends_the_run():
    parameters = [
        torch.nn.Parameter(torch.full((4,), 1e9))
    ]  # the step is far below float32 resolution
    parameters[0].grad_sample = torch.zeros(1, 4)
    with pytest.raises(Refusal, match="guard-no-step: the step left p0 unchanged"):
        _optimizer(parameters, lr=1e-6).step()


def test_a_step_that_opacus_skips_ends_the_run():
    parameters = _parameters()
    for p, g in zip(parameters, _gradients(2), strict=True):
        p.grad_sample = g
    optimizer = _optimizer(parameters)
    optimizer.signal_skip_step(True)
    with pytest.raises(Refusal, match="guard-no-step: the step left p0 unchanged"):
        optimizer.step()


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_a_noise_multiplier_that_is_no_noise_is_refused(sigma):
    with pytest.raises(Refusal, match="guard-no-noise"):
        _optimizer(_parameters(), sigma=sigma)


def test_poisson_batches_have_the_right_distribution():
    steps, units, rate = 2000, 50, 0.1
    sampler = PoissonSampler(
        units=units, sample_rate=rate, steps=steps, source=RandomSource.seeded("poisson", 1)
    )
    batches = list(sampler)
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
@pytest.mark.parametrize("clipping", ["flat", "automatic"])
def test_clipping_holds_at_the_edges_of_what_a_configuration_may_ask(bound, scale, clipping):
    parameters = _parameters()
    for p, g in zip(parameters, _gradients(1, scale), strict=True):
        p.grad_sample = g.clone()
    _optimizer(parameters, clipping=clipping, bound=bound).clip_and_accumulate()
    norm = math.sqrt(sum(float(p.summed_grad.square().sum()) for p in parameters))
    assert norm <= bound * (1 + 1e-6)


@given(
    st.integers(0, 2**32 - 1),
    st.floats(-5, 11),
    st.floats(1e-6, 1e6),
    st.sampled_from(["flat", "automatic"]),
)
def test_no_rounding_takes_a_clipped_gradient_above_the_bound(seed, exponent, bound, clipping):
    draw = torch.Generator().manual_seed(seed)
    (p,) = parameters = [torch.nn.Parameter(torch.zeros(50))]
    p.grad_sample = torch.randn(8, 50, generator=draw) * 10.0**exponent
    _optimizer(parameters, clipping=clipping, bound=bound).clip_and_accumulate()  # refuses if so
    assert float(torch.linalg.vector_norm(p.grad_sample.double(), dim=1).max()) <= bound
