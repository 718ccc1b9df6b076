import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal

from latentprior.density.sampling import mala
from latentprior.models.inference import Posterior, log_gaussian, maximize, posterior_density, short_run
from latentprior.models.model import LatentVariableModel
from linear_gaussian import (
    LinearDecoder,
    assert_standard_normal,
    correlated_prior,
    images,
    log_evidence,
    posterior,
    residuals,
)


@pytest.fixture
def model() -> LatentVariableModel:
    return LatentVariableModel(LinearDecoder(), sigma=0.5)


def test_log_gaussian_is_the_normal_density(generator: torch.Generator) -> None:
    x, mean = torch.randn(2, 5, 3, 2, 2, generator=generator, dtype=torch.float64)
    exact = Normal(mean, 0.3).log_prob(x)
    torch.testing.assert_close(log_gaussian(x, mean, 0.3), exact.sum((1, 2, 3)))
    mask = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(log_gaussian(x, mean, 0.3, mask), (exact * mask).sum((1, 2, 3)))
    assert log_gaussian(x, mean, 0.3, torch.zeros(2, 2)).tolist() == [0.0] * 5


@pytest.mark.parametrize("temperature", [0.0, 0.3, 1.0])
def test_posterior_density_and_gradient(
    model: LatentVariableModel, generator: torch.Generator, temperature: float
) -> None:
    x, u = images(model, 4), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    value, grad = posterior_density(model.decode, model.prior.log_prob, x, 0.5, temperature=temperature)(u)
    miss = x - model.decode(u).detach()
    exact = -0.5 * u.square().sum(1) - 1.5 * math.log(2 * math.pi)
    exact = exact + temperature * Normal(0.0, 0.5).log_prob(miss).sum((1, 2, 3))
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(grad, -u + temperature * (miss.flatten(1) @ model.decoder.matrix.detach()) / 0.25)
    assert not value.requires_grad
    assert not grad.requires_grad


def test_the_posterior_peaks_at_its_mean_in_standardised_coordinates() -> None:
    model = LatentVariableModel(LinearDecoder(), correlated_prior(), sigma=0.5)
    x = images(model, 3)
    mean, covariance = posterior(model, x)
    u = model.prior.whitening.whiten(mean)
    value, grad = Posterior(x, model.prior, model.decode, 0.5).density()(u)
    torch.testing.assert_close(grad, torch.zeros_like(grad), atol=1e-9, rtol=0)
    # log p(x, u) at the mode is log p(x) plus the posterior's peak in the standardised coordinates.
    whitened = model.prior.whitening.matrix @ covariance @ model.prior.whitening.matrix.T
    peak = MultivariateNormal(torch.zeros(3, dtype=torch.float64), whitened).log_prob(torch.zeros(3).double())
    torch.testing.assert_close(value, log_evidence(model, x) + peak)


def test_posterior_density_leaves_weights_without_gradients(model: LatentVariableModel) -> None:
    with torch.no_grad():
        posterior_density(model.decode, model.prior.log_prob, images(model, 2), 0.5)(torch.zeros(2, 3).double())
    assert model.decoder.matrix.grad is None


def test_one_step_of_langevin(model: LatentVariableModel) -> None:
    x, u = images(model, 4), torch.ones(4, 3, dtype=torch.float64)
    density = posterior_density(model.decode, model.prior.log_prob, x, 0.5)
    noise = torch.randn(4, 3, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    moved = short_run(u, density, steps=1, step_size=0.2, generator=torch.Generator().manual_seed(7))
    pull = (x - model.decode(u).detach()).flatten(1) @ model.decoder.matrix.detach() / 0.25
    torch.testing.assert_close(moved, u + 0.02 * (-u + pull) + 0.2 * noise)


def test_langevin_has_the_variance_of_its_step_size(generator: torch.Generator) -> None:
    # Where the posterior is N(m, 1/c), steps of s settle at the variance 1 / (c (1 - s^2 c / 4)).
    narrow = LatentVariableModel(LinearDecoder(1, scale=1.0), sigma=0.5)
    x = images(narrow, 1).expand(6000, -1, -1, -1)
    mean, covariance = posterior(narrow, x[:1])
    step_size = math.sqrt(4 * 0.3 * float(covariance))
    density = posterior_density(narrow.decode, narrow.prior.log_prob, x, 0.5)
    start = torch.zeros(6000, 1, dtype=torch.float64)
    z = short_run(start, density, steps=40, step_size=step_size, generator=generator)
    assert_standard_normal(residuals(z, mean, covariance / 0.7))
    with pytest.raises(AssertionError):
        assert_standard_normal(residuals(z, mean, covariance))


def test_maximize_finds_the_mode_and_keeps_the_best(model: LatentVariableModel) -> None:
    x = images(model, 6)
    density = posterior_density(model.decode, model.prior.log_prob, x, 0.5)
    mean, covariance = posterior(model, x)
    found = maximize(torch.zeros(6, 3, dtype=torch.float64), density, steps=200)
    assert float(residuals(found, mean, covariance).abs().max()) < 0.01
    # From the mode itself, huge steps lead away: the start is what comes back.
    torch.testing.assert_close(maximize(mean, density, steps=5, learning_rate=5.0), mean)
    assert torch.equal(maximize(mean + 1, density, steps=0), mean + 1)


def test_mala_from_the_prior_reaches_the_posterior(model: LatentVariableModel, generator: torch.Generator) -> None:
    x = images(model, 1500)
    density = posterior_density(model.decode, model.prior.log_prob, x, 0.5)
    start = torch.randn(1500, 3, generator=generator, dtype=torch.float64)
    z, acceptance = mala.sample(start, density, steps=80, step_size=0.1, generator=generator)
    assert 0.4 < acceptance < 0.8
    assert_standard_normal(residuals(z, *posterior(model, x)))
