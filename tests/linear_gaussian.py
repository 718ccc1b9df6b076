"""A linear decoder with Gaussian noise under a Gaussian prior: posteriors and likelihoods in closed form."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.prior import LatentPrior
from latentprior.density.whitening import Whitening
from latentprior.models.model import LatentVariableModel

PIXELS = (1, 2, 3)


class LinearDecoder(nn.Module):
    """``(n, *event_shape)`` to ``(n, 1, 2, 3)``: x = A z + b."""

    def __init__(self, dim: int = 3, seed: int = 0, scale: float = 0.5) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        pixels = math.prod(PIXELS)
        self.matrix = nn.Parameter(scale * torch.randn(pixels, dim, generator=g, dtype=torch.float64))
        self.shift = nn.Parameter(0.3 * torch.randn(pixels, generator=g, dtype=torch.float64))
        self.latent_shape, self.image_shape = torch.Size([dim]), torch.Size(PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return (z.flatten(1) @ self.matrix.T + self.shift).reshape(-1, *PIXELS)


def correlated_prior(event_shape: Sequence[int] = (3,)) -> LatentPrior:
    """A Gaussian off the origin whose standardised coordinates are not the user's."""
    g = torch.Generator().manual_seed(5)
    dim = math.prod(event_shape)
    mix = torch.eye(dim, dtype=torch.float64) + 0.4 * torch.randn(dim, dim, generator=g, dtype=torch.float64)
    rows = torch.randn(400, dim, generator=g, dtype=torch.float64) @ mix.T + torch.arange(dim) / 2
    return LatentPrior(Ladder(NormalBase(dim)), Whitening.fit([rows], "full"), event_shape)


def moments(model: LatentVariableModel) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a prior without stages on a normal base."""
    inverse = model.prior.whitening.inverse
    return model.prior.whitening.loc, inverse @ inverse.T


def posterior(model: LatentVariableModel, x: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Means ``(n, d)`` and the common covariance of p(z | x), or of p(z | seen pixels), ``seen`` of one image."""
    mean, covariance = moments(model)
    a, b = model.decoder.matrix.detach(), model.decoder.shift.detach()
    weight = torch.ones(len(b), dtype=a.dtype) if seen is None else seen.expand(PIXELS).flatten().to(a)
    precision = covariance.inverse()
    spread = (precision + (a.T * weight) @ a / model.sigma**2).inverse()
    pull = precision @ mean + ((x.flatten(1) - b) * weight) @ a / model.sigma**2
    return pull @ spread, spread


def log_evidence(model: LatentVariableModel, x: Tensor) -> Tensor:
    """Exact log p(x), ``(n,)`` nats."""
    mean, covariance = moments(model)
    a, b = model.decoder.matrix.detach(), model.decoder.shift.detach()
    noise = model.sigma**2 * torch.eye(len(b), dtype=a.dtype)
    return MultivariateNormal(a @ mean + b, a @ covariance @ a.T + noise).log_prob(x.flatten(1))


def images(model: LatentVariableModel, n: int, seed: int = 1) -> Tensor:
    """Draws of the model, ``(n, 1, 2, 3)``."""
    g = torch.Generator().manual_seed(seed)
    x = model.generate(n, generator=g)
    return x + model.sigma * torch.randn(x.shape, generator=g, dtype=x.dtype)


def assert_standard_normal(rows: Tensor, deviations: float = 4.5) -> None:
    """Mean and covariance of ``(n, d)`` rows are those of N(0, I).

    Every one of the d + d (d + 1) / 2 numbers strays by 4.5 standard errors in 7 of a million correct runs.
    """
    n, d = rows.shape
    assert float(rows.mean(0).abs().max()) < deviations / math.sqrt(n)
    second = rows.T @ rows / n - torch.eye(d, dtype=rows.dtype)
    error = (1 + torch.eye(d, dtype=rows.dtype)).sqrt() / math.sqrt(n)
    assert float((second / error).abs().max()) < deviations


def residuals(z: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """What is N(0, I) if ``z`` is a draw of N(mean, covariance), row by row."""
    factor = torch.linalg.cholesky(covariance)
    return torch.linalg.solve_triangular(factor, (z.flatten(1) - mean).T, upper=False).T
