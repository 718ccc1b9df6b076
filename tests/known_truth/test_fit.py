"""Fits judged against targets whose log density is known exactly."""

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import latentprior as lp
from latentprior.evaluation.known_densities import (
    Banana,
    CorrelatedGaussian,
    GaussianMixture,
    Rings,
    SkewedProduct,
    StudentT,
    Target,
    ten_component_mixture,
    two_component_mixture,
)
from quadrature import integral

SETTINGS = lp.StageSettings(width=64, steps=400, batch_size=256, average=0.99)

# Target, options of the fit, and the largest divergence KL(truth, model) in nats that passes: at most three times what
# was measured when this was written, and below a half of what the base alone leaves.
CASES: dict[str, tuple[Target, dict[str, Any], float]] = {
    "banana": (Banana(), {"base": "normal", "max_stages": 2}, 0.10),
    "rings": (Rings(), {"base": "normal", "max_stages": 1}, 0.10),
    "skewed": (SkewedProduct(2), {"base": "normal", "max_stages": 2}, 0.04),
    "unbalanced": (two_component_mixture(2, distance=6.0, ratio=20.0), {"base": "normal", "max_stages": 2}, 0.04),
    "heavy tails": (StudentT(2, df=4), {"base": "normal", "max_stages": 2}, 0.06),
    "correlated": (CorrelatedGaussian(2, rho=0.95), {"base": "normal", "max_stages": 1}, 0.01),
    "mixture base": (two_component_mixture(2, distance=6.0, ratio=20.0), {"base": "gmm", "max_stages": 1}, 0.02),
}


# Nats. ``fit`` draws until log Z is known to 0.005; what its bracket adds would show here, and must not widen the
# bounds below, which scale with this error. Measured: 0.002 at most.
MOST_STDERR = 0.006


SLOW = ("rings", "heavy tails", "correlated", "unbalanced")


@pytest.fixture(scope="module", params=[pytest.param(c, marks=[pytest.mark.slow] * (c in SLOW)) for c in CASES])
def fitted(request: pytest.FixtureRequest) -> tuple[str, lp.LatentPrior, Tensor]:
    target, options, _ = CASES[request.param]
    g = torch.Generator().manual_seed(0)
    z, test = target.sample((5000,), generator=g), target.sample((10_000,), generator=g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.NormalizerBracketWarning)
        prior = lp.fit(z, settings=SETTINGS, **options)
    return request.param, prior, test


def divergence(target: Target, prior: lp.LatentPrior, test: Tensor) -> tuple[float, float]:
    """KL(truth, model) and its standard error, the normaliser's included."""
    gap = target.log_prob(test) - prior.log_prob(test).double()
    return float(gap.mean()), math.hypot(float(gap.std()) / math.sqrt(len(gap)), prior.log_prob_stderr)


def test_divergence_is_small_and_not_negative(fitted: tuple[str, lp.LatentPrior, Tensor]) -> None:
    name, prior, test = fitted
    target, _, bound = CASES[name]
    value, stderr = divergence(target, prior, test)
    assert prior.log_prob_stderr < MOST_STDERR
    # No density beats the truth: below zero by 4 standard errors in 1 of 30,000.
    assert value > -4 * stderr
    assert value < bound + 2 * stderr


def test_log_normaliser_is_right_within_its_error(fitted: tuple[str, lp.LatentPrior, Tensor]) -> None:
    name, prior, _ = fitted
    half = 40 if name == "heavy tails" else 14
    total = integral(lambda u: prior.log_prob_whitened(u.float()), -half, half, 2, 1200)
    assert prior.log_prob_stderr < MOST_STDERR
    # 3 standard errors: a false alarm in 1 of 370; the grid and the tails beyond it err by less than 2e-3.
    assert abs(math.log(total)) < 3 * prior.log_prob_stderr + 2e-3


def test_samples_keep_modes_and_moments(fitted: tuple[str, lp.LatentPrior, Tensor]) -> None:
    name, prior, _ = fitted
    target = CASES[name][0]
    z = prior.sample((6000,), torch.Generator().manual_seed(1))
    scale = target.variance.sqrt()
    assert ((z.double().mean(0) - target.mean).abs() < 0.12 * scale).all()
    if isinstance(target, GaussianMixture):
        share = torch.bincount(target.component(z), minlength=2) / len(z)
        # Weights (20, 1) / 21: binomial error 0.0028 of 6000 rows, as much again from the 6000 learned from, and bias.
        assert abs(float(share[1]) - 1 / 21) < 0.02


def gap_of_case_c(base: str, **options: Any) -> tuple[lp.LatentPrior, float, float]:
    target = ten_component_mixture()
    g = torch.Generator().manual_seed(0)
    z, test = target.sample((16_000,), generator=g), target.sample((8000,), generator=g)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.NormalizerBracketWarning)
        prior = lp.fit(z, base=base, **options)
    value, stderr = divergence(target, prior, test)
    # The truth, wider modes and a wide normal: weights p / h are bounded where p leaks out of the modes.
    means = torch.cat([target.means, target.means, target.mean[None]])
    scales = torch.tensor([0.3] * 10 + [0.5] * 10 + [1.3])
    cover = GaussianMixture(means, scales, torch.tensor([0.05] * 10 + [0.03] * 10 + [0.2]))
    check = prior.check_normalizer(cover, draws=100_000)
    # Beside the truth's own draws: an integral that is one within errors.
    assert abs(check.value - 1) < 4 * math.hypot(check.stderr, prior.log_prob_stderr), (check, prior.normalizer)
    return prior, value, stderr


@pytest.mark.slow
def test_case_c_from_a_mixture() -> None:
    prior, value, stderr = gap_of_case_c("gmm", max_stages=1, settings=SETTINGS)
    assert prior.log_prob_stderr < MOST_STDERR
    assert value > -4 * stderr
    assert value < 0.1 + 2 * stderr


@pytest.mark.slow
def test_case_c_from_a_normal() -> None:
    prior, value, stderr = gap_of_case_c("normal", max_stages=12)
    assert prior.log_prob_stderr < MOST_STDERR
    assert value > -4 * stderr
    # Half a nat bounds what 14,400 rows allow without a mixture (measured: 0.18); its honesty is the point.
    assert value < 0.5, (value, stderr, [s.gain for s in prior.stages], prior.normalizer)
