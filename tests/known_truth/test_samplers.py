"""Samplers against the truth: rank statistics of simulated posteriors, split R-hat and effective sample sizes."""

import math
import warnings
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

import latentprior as lp
from latentprior.density.sampling import hmc, mala
from latentprior.evaluation.known_densities import Banana, SkewedProduct, Target

DRAWS, NOISE = 31, 0.4


def ranks(sampler: str, flaw: float = 1.0, simulations: int = 160, **options: Any) -> Tensor:
    r"""Ranks ``(simulations, 3)`` of true latents among draws of their posterior, in each coordinate and their product.

    Simulation-based calibration (Talts et al. 2018): :math:`z \sim p`, :math:`x \sim \mathcal N(z_2, s^2)`, then draws
    of the prior tilted by the likelihood; ranks are uniform on 0 to DRAWS if, and only if in these numbers, tilt and
    sampler are right. ``flaw`` misstates the noise to the tilt.
    """
    target = Banana()
    g = torch.Generator().manual_seed(7)
    rows = torch.randn(64, 2, generator=g)
    prior = lp.fit(rows, base=target, whitening="none", max_stages=0)
    found = []
    for _ in range(simulations):
        z = target.sample((1,), g).float()
        x = float(z[0, 1] + NOISE * torch.randn((), generator=g))
        wrong = flaw * NOISE
        posterior = prior.tilt(lambda z, x=x, s=wrong: -0.5 * ((z[:, 1] - x) / s) ** 2, particles=1024, generator=g)
        draws = posterior.sample((DRAWS,), g, sampler, **options)
        both = [torch.cat([v, v.prod(1, keepdim=True)], 1) for v in (draws, z)]
        found.append((both[0] < both[1]).sum(0))
    return torch.stack(found)


def uniformity(found: Tensor) -> list[float]:
    """P-value of a chi-square test in eight classes, for each column of ranks."""
    counts = [torch.bincount(column // ((DRAWS + 1) // 8), minlength=8) for column in found.T]
    return [float(chisquare(count.numpy()).pvalue) for count in counts]


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        ("smc", {}),
        ("sir", {"candidates": 256}),
        pytest.param("mala", {"steps": 40}, marks=pytest.mark.slow),
        pytest.param("hmc", {"steps": 10}, marks=pytest.mark.slow),
    ],
)
def test_ranks_of_the_truth_among_posterior_draws_are_uniform(sampler: str, options: dict[str, Any]) -> None:
    # Three tests a sampler, four samplers, at 1e-4 each: a false alarm in 1 of 800 seeds.
    assert min(uniformity(ranks(sampler, **options))) > 1e-4


def test_rank_statistics_see_a_posterior_that_is_too_narrow() -> None:
    assert min(uniformity(ranks("smc", flaw=0.3, simulations=80))) < 1e-6


def histories(kernel: Any, target: Target, size: float, chains: int, steps: int, *more: int) -> Tensor:
    """Chains ``(chains, steps, d)`` from starts far and wide, the first quarter left out."""
    g = torch.Generator().manual_seed(3)

    def density(z: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            z = z.detach().requires_grad_(True)
            value = target.log_prob(z)
            (grad,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), grad

    # Wide to the right: on the steep side of a Gumbel gradients explode and no proposal is accepted.
    wide = 4 * target.variance.sqrt() * torch.rand(chains, target.dim, generator=g, dtype=torch.float64)
    start = target.mean + wide
    state, kept = kernel.init(start, density, size), []
    for i in range(steps):
        state, _ = kernel.step(state, density, *more, g)
        if i >= steps // 4:
            kept.append(state.position)
    return torch.stack(kept, 1)


@pytest.mark.parametrize(("kernel", "size", "more"), [(mala, 0.9, ()), (hmc, 0.6, (5,))])
def test_chains_mix_and_their_means_are_right_within_their_own_error(
    kernel: Any, size: float, more: tuple[int, ...]
) -> None:
    stats = pytest.importorskip("arviz_stats.base").array_stats
    target = SkewedProduct(3)
    chains = histories(kernel, target, size, 8, 2400, *more).numpy()
    for j in range(3):
        draws = chains[:, :, j]
        assert stats.rhat(draws) < 1.01
        effective = float(stats.ess(draws, method="mean"))
        # 8 chains of 1800: one draw in fifty at worst counts, and none counts for much more than one (HMC may).
        assert 14_400 / 50 < effective < 3 * 14_400
        # 4.5 standard errors with the chains' own correlation: 1 in 150,000 a number.
        assert abs(draws.mean() - float(target.mean[j])) < 4.5 * draws.std() / math.sqrt(effective)


def test_r_hat_sees_chains_that_do_not_mix() -> None:
    stats = pytest.importorskip("arviz_stats.base").array_stats
    assert stats.rhat(histories(mala, SkewedProduct(1), 0.02, 8, 400)[:, :, 0].numpy()) > 1.1


# Differences of log densities below this many nats are cut: claims that are too high lie above.
CUT = -1.0


@pytest.mark.parametrize(("rows", "most"), [(40, 0.7), (200, 0.3)])
def test_no_density_is_claimed_above_what_the_data_support(rows: int, most: float, tiny: lp.StageSettings) -> None:
    """From few rows in six dimensions a flexible network could claim anything; held out rows say otherwise."""
    target, held_out = SkewedProduct(6), rows // 10
    excess, variances = [], []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        z, few, test = (target.sample((n,), g) for n in (rows - held_out, held_out, 4000))
        with warnings.catch_warnings():
            # Twenty held-out rows are a poor end of a bracket, and fit says so.
            warnings.simplefilter("ignore", lp.NormalizerBracketWarning)
            prior = lp.fit(z, validation=few, base="normal", max_stages=3, seed=seed, settings=tiny)
        claimed, fresh = (prior.log_prob(x).double() - target.log_prob(x) for x in (few, test))
        # No density beats the truth on fresh rows: 4 standard errors, 1 in 30,000 a seed.
        assert float(fresh.mean()) < 4 * math.hypot(float(fresh.std()) / math.sqrt(len(fresh)), prior.log_prob_stderr)
        claim = prior.info["log_prob_held_out"] + float(prior.whitening.log_abs_det)
        assert claim == pytest.approx(float((claimed + target.log_prob(few)).mean()), abs=1e-3)
        excess.append(float(claimed.clamp_min(CUT).mean() - fresh.clamp_min(CUT).mean()))
        variances.append(float(fresh.clamp_min(CUT).var()) / held_out)
    # What fit states of its few held-out rows, beside the truth on the very same rows, is what fresh rows show:
    # six fits together, 4 standard errors by the scatter of fresh rows, 1 in 30,000.
    noise = math.sqrt(sum(variances)) / 6
    assert 4 * noise < most
    assert sum(excess) / 6 < 4 * noise, (excess, noise)
