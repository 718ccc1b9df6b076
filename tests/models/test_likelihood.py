import math

import pytest
import torch
from torch import Tensor

from latentprior.models.inference import Posterior, log_gaussian
from latentprior.models.likelihood import annealed_log_likelihood, log_mean
from latentprior.models.model import LatentVariableModel
from linear_gaussian import LinearDecoder, images, log_evidence


@pytest.fixture
def model() -> LatentVariableModel:
    return LatentVariableModel(LinearDecoder(), sigma=0.5)


def test_log_mean_is_the_log_of_the_mean(generator: torch.Generator) -> None:
    weights = torch.rand(3, 50, generator=generator, dtype=torch.float64) + 0.1
    shift = torch.tensor([[0.0], [-2000.0], [2000.0]], dtype=torch.float64)
    value, stderr = log_mean(weights.log() + shift)
    torch.testing.assert_close(value - shift[:, 0], weights.mean(1).log())
    torch.testing.assert_close(stderr, weights.std(1) / math.sqrt(50) / weights.mean(1))


def annealed(model: LatentVariableModel, x: Tensor, temperatures: int, g: torch.Generator, chains: int = 32) -> Tensor:
    start = model.prior.sample((len(x) * chains,), g)
    posterior = Posterior(x, model.prior, model.decode, model.sigma)
    found = annealed_log_likelihood(posterior, start, chains=chains, temperatures=temperatures, generator=g)
    return torch.stack(found)


def test_annealing_at_one_temperature_is_the_mean_over_the_prior(model: LatentVariableModel) -> None:
    x, g = images(model, 3), torch.Generator().manual_seed(3)
    value = annealed(model, x, 1, g)[0]
    z = model.prior.sample((96,), torch.Generator().manual_seed(3))
    terms = log_gaussian(x.repeat_interleave(32, 0), model.decode(z).detach(), 0.5).view(3, 32)
    torch.testing.assert_close(value, torch.logsumexp(terms, 1) - math.log(32))


def test_more_temperatures_shrink_the_error(model: LatentVariableModel, generator: torch.Generator) -> None:
    x = images(model, 20)
    few, many = annealed(model, x, 5, generator), annealed(model, x, 80, generator)
    assert float(many[1].median()) < 0.5 * float(few[1].median())
    # Twenty normal z scores: none beyond 4.5 (one run in 7000), unless the bias shows.
    assert float(((many[0] - log_evidence(model, x)) / many[1]).abs().max()) < 4.5
