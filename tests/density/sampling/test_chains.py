"""MALA, HMC and Langevin dynamics on asymmetric targets with exact moments."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentprior.density.sampling import hmc, langevin, mala
from latentprior.evaluation.known_densities import Banana, SkewedProduct, Target

SKEWNESS = 12 * math.sqrt(6) * 1.2020569031595942 / math.pi**3


def value_and_grad(target: Target) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = target.log_prob(z) + 7.0  # known up to a constant only
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    return evaluate


def mala_steps(z: Tensor, log_density: Any, steps: int, size: float, g: torch.Generator) -> tuple[Tensor, float]:
    state, total = mala.init(z, log_density, size), 0.0
    for _ in range(steps):
        state, info = mala.step(state, log_density, g)
        total += info.acceptance / steps
    assert state.step_size == size
    return state.position, total


def hmc_steps(z: Tensor, log_density: Any, steps: int, size: float, g: torch.Generator) -> tuple[Tensor, float]:
    state, total = hmc.init(z, log_density, size), 0.0
    for _ in range(steps):
        state, info = hmc.step(state, log_density, 5, g)
        total += info.acceptance / steps
    return state.position, total


def assert_moments(z: Tensor, target: Target) -> None:
    # Chains are independent of one another. 4 standard errors each, a false alarm in 1 of 16,000 a number.
    n = len(z)
    assert ((z.mean(0) - target.mean).abs() <= 4 * z.std(0) / math.sqrt(n)).all()
    square = (z - target.mean).square()
    assert ((square.mean(0) - target.variance).abs() <= 4 * square.std(0) / math.sqrt(n)).all()


@pytest.mark.parametrize(
    ("kernel", "size", "steps"),
    [(mala_steps, 0.9, 12), (mala_steps, 1.6, 12), (hmc_steps, 0.6, 4), (hmc_steps, 0.8, 4)],
)
def test_skewed_target_is_invariant(kernel: Any, size: float, steps: int, generator: torch.Generator) -> None:
    target = SkewedProduct(2)
    start = target.sample((40_000,), generator=generator)
    end, acceptance = kernel(start, value_and_grad(target), steps, size, generator)
    # It moves (a frozen chain is invariant too), and is refused at times (so that the correction is at work).
    assert torch.corrcoef(torch.stack([start[:, 0], end[:, 0]]))[0, 1] < 0.5
    assert 0.2 < acceptance < 0.97
    assert_moments(end, target)
    cube = ((end - target.mean) / target.variance.sqrt()) ** 3
    assert ((cube.mean(0) - SKEWNESS).abs() <= 4 * cube.std(0) / math.sqrt(len(end))).all()


@pytest.mark.parametrize("kernel", [mala_steps, hmc_steps])
def test_bent_target_is_invariant(kernel: Any, generator: torch.Generator) -> None:
    target = Banana()
    start = target.sample((40_000,), generator=generator)
    end, acceptance = kernel(start, value_and_grad(target), 15, 0.4, generator)
    assert 0.4 < acceptance < 0.999
    assert torch.corrcoef(torch.stack([start[:, 0], end[:, 0]]))[0, 1] < 0.9
    assert_moments(end, target)


@pytest.mark.parametrize("sampler", [mala, hmc])
def test_chains_forget_their_start_and_adapt(sampler: Any, generator: torch.Generator) -> None:
    target = SkewedProduct(3, scale=0.05)
    start = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 0.02 + 0.1
    end, acceptance = sampler.sample(
        start, value_and_grad(target), steps=200 if sampler is mala else 60, generator=generator
    )
    assert abs(acceptance - sampler.TARGET_ACCEPTANCE) < 0.08
    assert_moments(end, target)


def test_acceptance_grows_as_steps_shrink(generator: torch.Generator) -> None:
    target = SkewedProduct(2)
    start = target.sample((2000,), generator=generator)
    for kernel in (mala_steps, hmc_steps):
        rates = [kernel(start, value_and_grad(target), 1, size, generator)[1] for size in (0.05, 0.5, 1.5)]
        assert rates[0] > 0.995
        assert rates[0] > rates[1] > rates[2]


def test_leapfrog_conserves_energy_to_second_order(generator: torch.Generator) -> None:
    # Halving the step divides the energy error of a fixed time by four: 1 - acceptance falls alike or faster.
    target = Banana()
    density = value_and_grad(target)
    start = target.sample((4000,), generator=generator)
    losses = []
    for steps, size in ((4, 0.2), (8, 0.1), (16, 0.05)):
        g = torch.Generator().manual_seed(1)
        losses.append(1 - hmc.step(hmc.init(start, density, size), density, steps, g)[1].acceptance)
    assert losses[0] > 3 * losses[1] > 9 * losses[2] > 0


def test_langevin_step_is_the_equation(seeded: Callable[[int], torch.Generator]) -> None:
    density = value_and_grad(Banana())
    z = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
    moved = langevin.step(langevin.init(z), density, 0.3, seeded(4)).position
    noise = torch.randn(2, 2, generator=seeded(4), dtype=torch.float64)
    torch.testing.assert_close(moved, z + 0.045 * density(z)[1] + 0.3 * noise)


@pytest.mark.parametrize(("size", "steps"), [(0.4, 60), (1.0, 20)])
def test_langevin_bias_on_a_normal_is_the_known_one(size: float, steps: int, generator: torch.Generator) -> None:
    # On N(0, 1) an update is z' = (1 - s^2/2) z + s e: mean and variance follow exactly, with limit
    # variance 1 / (1 - s^2/4).
    z = torch.full((60_000, 1), 3.0, dtype=torch.float64)
    end = langevin.sample(z, lambda x: (-0.5 * x.square().sum(1), -x), steps=steps, step_size=size, generator=generator)
    mean, variance = 3.0, 0.0
    for _ in range(steps):
        mean, variance = (1 - size**2 / 2) * mean, (1 - size**2 / 2) ** 2 * variance + size**2
    n = len(end)
    # 4.5 standard errors, sd / sqrt(n) and var sqrt(2 / n): 1 in 150,000.
    assert abs(float(end.mean()) - mean) < 4.5 * math.sqrt(variance / n)
    assert abs(float(end.var()) - variance) < 4.5 * variance * math.sqrt(2 / n)


def test_langevin_bias_on_a_skewed_target_is_small_at_small_steps_and_grows(generator: torch.Generator) -> None:
    target = SkewedProduct(1)
    start = target.sample((60_000,), generator=generator)
    density = value_and_grad(target)
    small = langevin.sample(start, density, steps=100, step_size=0.1, generator=generator)
    large = langevin.sample(start, density, steps=40, step_size=1.0, generator=generator)
    # Discretisation blurs: the variance errs upwards by O(s^2), the noise is 0.01.
    assert abs(float(small.var() - target.variance)) < 0.08
    assert float(large.var() - target.variance) > 0.1


def test_impossible_proposals_are_refused(generator: torch.Generator) -> None:
    def half_line(z: Tensor) -> tuple[Tensor, Tensor]:
        value = torch.where(z[:, 0] > 0, -z[:, 0], -math.inf)
        return value, torch.where(z > 0, -1.0, math.nan)

    start = torch.rand(2000, 1, generator=generator) + 0.01
    for kernel in (mala_steps, hmc_steps):
        end, acceptance = kernel(start, half_line, 30, 0.5, generator)
        assert (end > 0).all()
        assert torch.isfinite(end).all()
        assert 0.1 < acceptance < 0.99


def test_accept_is_metropolis(generator: torch.Generator) -> None:
    log_ratio = torch.tensor([0.0, 3.0, math.log(0.25), -math.inf, math.nan, math.inf]).repeat(20_000, 1)
    keep, probability = mala.accept(log_ratio.flatten(), generator)
    rate = keep.view(-1, 6).float().mean(0)
    assert rate[[0, 1, 5]].tolist() == [1, 1, 1]
    assert rate[[3, 4]].tolist() == [0, 0]
    # Binomial, 4.5 standard errors: 1 in 150,000.
    assert abs(float(rate[2]) - 0.25) < 4.5 * math.sqrt(0.25 * 0.75 / 20_000)
    assert probability == pytest.approx((3 + 0.25) / 6, abs=1e-4)


def test_adaptation_moves_towards_its_target() -> None:
    assert mala.adapt(1.0, 0.9) > 1 > mala.adapt(1.0, 0.1)
    assert mala.adapt(0.7, mala.TARGET_ACCEPTANCE) == 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sampler", [mala, hmc, langevin])
def test_types_starts_and_generators(
    sampler: Any, dtype: torch.dtype, seeded: Callable[[int], torch.Generator]
) -> None:
    density = value_and_grad(SkewedProduct(2))
    start = torch.zeros(5, 2, dtype=dtype)

    def run(seed: int) -> Tensor:
        out = sampler.sample(start, density, steps=3, generator=seeded(seed))
        return out if sampler is langevin else out[0]

    assert run(1).dtype == dtype
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert (start == 0).all()
