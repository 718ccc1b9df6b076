"""Densities whose log density and draws are exact, to judge a prior by.

Each is a torch Distribution on events ``(d,)`` whose ``sample`` takes a generator and gives float64. Log densities are
in nats; they are computed in float64 and returned in the type of their input.

Examples
--------
>>> target = Banana()
>>> z = target.sample((4,), generator=torch.Generator().manual_seed(0))
>>> z.shape, target.log_prob(z).shape
(torch.Size([4, 2]), torch.Size([4]))
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from ..errors import InvalidLatentsError

__all__ = [
    "Banana",
    "BoundedCube",
    "CorrelatedGaussian",
    "Funnel",
    "GaussianMixture",
    "Rings",
    "SkewedProduct",
    "Spikes",
    "StudentT",
    "Target",
    "ten_component_mixture",
    "two_component_mixture",
]

LOG_2PI = math.log(2 * math.pi)
EULER_GAMMA = 0.5772156649015329


class Target(Distribution, ABC):
    """A density on events ``(d,)`` that is known exactly, with the exact mean and variance of every coordinate."""

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    support = constraints.real_vector
    has_rsample = False

    def __init__(self, dim: int, mean: float | Tensor = 0.0, variance: float | Tensor = 1.0) -> None:
        super().__init__(torch.Size(), torch.Size([dim]), validate_args=False)
        self._mean = torch.as_tensor(mean, dtype=torch.float64).expand(dim)
        self._variance = torch.as_tensor(variance, dtype=torch.float64).expand(dim)

    @property
    def mean(self) -> Tensor:
        """Exact means of the coordinates, ``(d,)``."""
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Exact variances of the coordinates, ``(d,)``."""
        return self._variance

    @property
    def dim(self) -> int:
        """Number of coordinates d."""
        return self.event_shape[0]

    def log_prob(self, value: Tensor) -> Tensor:
        """Exact log density of points ``(..., d)`` in nats, ``(...)``; raises InvalidLatentsError for another d."""
        if value.ndim == 0 or value.shape[-1] != self.dim:
            raise InvalidLatentsError(f"points have shape {tuple(value.shape)}, expected (..., {self.dim})")
        dtype = value.dtype if value.is_floating_point() else torch.float64
        return self._log_density(value.double()).to(dtype)

    def sample(self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None) -> Tensor:
        """Draw exactly and independently, float64 ``(*sample_shape, d)``; without a generator from the global one."""
        return self._draw(math.prod(sample_shape), generator).reshape(*sample_shape, self.dim)

    @abstractmethod
    def _log_density(self, z: Tensor) -> Tensor:
        """Log density of rows ``(..., d)`` in double precision."""

    @abstractmethod
    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Exact independent draws ``(n, d)``."""


class CorrelatedGaussian(Target):
    r"""Standard normals of which :math:`a_i = z_{2i}` and :math:`b_i = z_{2i+1}` have the correlation :math:`\rho`.

    :math:`-2\log p(z) = \sum_i [(a_i^2 - 2\rho a_i b_i + b_i^2) / (1-\rho^2) + 2\log 2\pi + \log(1-\rho^2)]`
    (Rhodes, Xu and Gutmann, NeurIPS 2020, section 4.2). The number of coordinates is even.
    """

    def __init__(self, dim: int = 2, rho: float = 0.8) -> None:
        super().__init__(dim)
        self.rho = rho

    @property
    def mutual_information(self) -> float:
        r"""Between even and odd coordinates, :math:`-\frac d4 \log(1 - \rho^2)` nats."""
        return -0.25 * self.dim * math.log1p(-(self.rho**2))

    def _log_density(self, z: Tensor) -> Tensor:
        a, b = z[..., ::2], z[..., 1::2]
        square = (a.square() - 2 * self.rho * a * b + b.square()) / (1 - self.rho**2)
        return -0.5 * (square + 2 * LOG_2PI + math.log1p(-(self.rho**2))).sum(-1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        e = _normal((n, self.dim), generator)
        e[:, 1::2] = self.rho * e[:, ::2] + math.sqrt(1 - self.rho**2) * e[:, 1::2]
        return e


class GaussianMixture(Target):
    r"""A mixture of round Gaussians, :math:`\log p(z) = \log \sum_k w_k \mathcal N(z; m_k, s_k^2 I)`.

    Means are ``(K, d)``, scales and weights ``(K,)``. One scale may stand for all, weights are equal by default, and
    they need not add up to 1.
    """

    def __init__(self, means: Tensor, scale: float | Tensor = 1.0, weights: Tensor | None = None) -> None:
        self.means = means.double()
        self.scale = torch.as_tensor(scale, dtype=torch.float64).expand(len(means)).to(means.device)
        w = torch.ones(len(means)) if weights is None else weights
        self.weights = w.double().to(means.device) / w.double().sum()
        mean = self.weights @ self.means
        square = self.weights @ (self.means.square() + self.scale[:, None].square())
        super().__init__(means.shape[1], mean, square - mean.square())

    def component(self, value: Tensor) -> Tensor:
        """Return which component of points ``(..., d)`` is nearest in scaled distance, to count modes."""
        return self._terms(value.double()).argmax(-1)

    def _terms(self, z: Tensor) -> Tensor:
        means, scale, weights = (v.to(z.device) for v in (self.means, self.scale, self.weights))
        square = (z[..., None, :] - means).square().sum(-1) / scale.square()
        return weights.log() - 0.5 * square - self.dim * (scale.log() + 0.5 * LOG_2PI)

    def _log_density(self, z: Tensor) -> Tensor:
        return torch.logsumexp(self._terms(z), -1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        noise = _normal((n, self.dim), generator)
        k = _pick(self.weights, _uniform((n,), generator))
        return self.means.to(noise.device)[k] + self.scale.to(noise.device)[k, None] * noise


def two_component_mixture(
    dim: int = 2, distance: float = 5.0, ratio: float = 1.0, scale: float = 1.0
) -> GaussianMixture:
    """Make two modes on the diagonal; ``ratio`` is the weight of the first over that of the second."""
    means = torch.tensor([[-0.5], [0.5]], dtype=torch.float64).repeat(1, dim) * distance / math.sqrt(dim)
    return GaussianMixture(means, scale, torch.tensor([ratio, 1.0]))


def ten_component_mixture(dim: int = 16, scale: float = 0.3, seed: int = 39) -> GaussianMixture:
    r"""Make ten equal modes, whose centres are drawn once from :math:`\mathcal N(0, I)`.

    At the defaults the centres are 15 scales s apart. The mean log density of separate modes is
    :math:`-\log 10 - \frac d2 \log(2\pi e s^2) = -5.742`; in coordinates divided by their standard deviations it is
    -5.506.
    """
    generator = torch.Generator().manual_seed(seed)
    return GaussianMixture(torch.randn(10, dim, generator=generator, dtype=torch.float64), scale)


class Funnel(Target):
    r"""Neal's funnel: :math:`v = z_1 \sim \mathcal N(0, s^2)`, and the other coordinates :math:`\mathcal N(0, e^v)`."""

    def __init__(self, dim: int = 2, scale: float = 1.0) -> None:
        rest = torch.full((dim - 1,), math.exp(0.5 * scale**2), dtype=torch.float64)
        super().__init__(dim, 0.0, torch.cat([rest.new_tensor([scale**2]), rest]))
        self.scale = scale

    def _log_density(self, z: Tensor) -> Tensor:
        v, x = z[..., 0], z[..., 1:]
        first = -0.5 * (v / self.scale).square() - math.log(self.scale)
        rest = -0.5 * (x.square().sum(-1) * (-v).exp() + (self.dim - 1) * v)
        return first + rest - 0.5 * self.dim * LOG_2PI

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        e = _normal((n, self.dim), generator)
        v = self.scale * e[:, :1]
        return torch.cat([v, (0.5 * v).exp() * e[:, 1:]], 1)


class Banana(Target):
    r"""A bent normal in the plane: :math:`z = (e_1,\; s\,e_2 + b\,(e_1^2 - 1))` with e standard normal.

    Parameters
    ----------
    curvature, scale : float
        b and s.
    """

    def __init__(self, curvature: float = 1.0, scale: float = 0.5) -> None:
        super().__init__(2, 0.0, torch.tensor([1.0, scale**2 + 2 * curvature**2], dtype=torch.float64))
        self.curvature, self.scale = curvature, scale

    def _log_density(self, z: Tensor) -> Tensor:
        x = z[..., 0]
        y = (z[..., 1] - self.curvature * (x.square() - 1)) / self.scale
        return -0.5 * (x.square() + y.square()) - LOG_2PI - math.log(self.scale)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        e = _normal((n, 2), generator)
        return torch.stack([e[:, 0], self.scale * e[:, 1] + self.curvature * (e[:, 0].square() - 1)], 1)


class Rings(Target):
    r"""Rings in the plane: the radius is :math:`\mathcal N(r_k, s^2)`, cut off at 0, and the angle is uniform.

    :math:`p(z) = \sum_k w_k \mathcal N(\|z\|; r_k, s^2) / (2\pi \|z\| \Phi(r_k/s))`. Every radius is at least 6 s, and
    the weights need not add up to 1.
    """

    def __init__(
        self, radii: Sequence[float] = (1.0, 3.0), scale: float = 0.15, weights: Sequence[float] = (1.0, 3.0)
    ) -> None:
        self.radii = torch.tensor(radii, dtype=torch.float64)
        self.weights = torch.tensor(weights, dtype=torch.float64) / sum(weights)
        self.scale = scale
        super().__init__(2, 0.0, 0.5 * self.weights @ (self.radii.square() + scale**2))

    def _log_density(self, z: Tensor) -> Tensor:
        radii, weights = self.radii.to(z.device), self.weights.to(z.device)
        radius = z.norm(dim=-1).clamp_min(1e-6)
        y = (radius[..., None] - radii) / self.scale
        terms = weights.log() - 0.5 * y.square() - torch.special.log_ndtr(radii / self.scale)
        mixed: Tensor = torch.logsumexp(terms, -1) - radius.log()
        return mixed - 1.5 * LOG_2PI - math.log(self.scale)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        pick, level, turn = _uniform((3, n), generator)
        radii = self.radii.to(pick.device)[_pick(self.weights, pick)]
        low = torch.special.ndtr(-radii / self.scale)
        radius: Tensor = radii + self.scale * torch.special.ndtri(low + (1 - low) * level)
        return radius[:, None] * torch.stack([(2 * math.pi * turn).cos(), (2 * math.pi * turn).sin()], 1)


class StudentT(Target):
    r"""The multivariate t distribution, which has heavy tails; its degrees of freedom :math:`\nu` are above 2.

    :math:`p(z) = \Gamma(\frac{\nu+d}2) / \Gamma(\frac\nu2)\, (\pi\nu)^{-d/2} (1 + \|z\|^2/\nu)^{-(\nu+d)/2}`.
    """

    def __init__(self, dim: int = 2, df: int = 5) -> None:
        super().__init__(dim, 0.0, df / (df - 2))
        self.df = df

    def _log_density(self, z: Tensor) -> Tensor:
        half = 0.5 * (self.df + self.dim)
        constant = math.lgamma(half) - math.lgamma(half - 0.5 * self.dim)
        constant -= 0.5 * self.dim * math.log(math.pi * self.df)
        return constant - half * torch.log1p(z.square().sum(-1) / self.df)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        chi = _normal((n, self.df), generator).square().mean(1, keepdim=True)
        return _normal((n, self.dim), generator) / chi.sqrt()


class BoundedCube(Target):
    r"""Independent :math:`\mathrm{Beta}(a, b)`; the log density is minus infinity outside the unit cube."""

    support = constraints.independent(constraints.unit_interval, 1)

    def __init__(self, dim: int = 2, a: int = 2, b: int = 5) -> None:
        super().__init__(dim, a / (a + b), a * b / ((a + b) ** 2 * (a + b + 1)))
        self.a, self.b = a, b

    def _log_density(self, z: Tensor) -> Tensor:
        inside = ((z >= 0) & (z <= 1)).all(-1)
        x, a, b = z.clamp(0, 1), z.new_tensor(self.a - 1.0), z.new_tensor(self.b - 1.0)
        constant = math.lgamma(self.a + self.b) - math.lgamma(self.a) - math.lgamma(self.b)
        value = torch.xlogy(a, x) + torch.xlogy(b, 1 - x) + constant
        return torch.where(inside, value.sum(-1), -math.inf)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        # The a-th smallest of a + b - 1 uniforms is Beta(a, b).
        return _uniform((n, self.dim, self.a + self.b - 1), generator).sort(-1).values[..., self.a - 1]


class SkewedProduct(Target):
    r"""Independent Gumbels, :math:`\log p(z) = -\sum_j (y_j + e^{-y_j} + \log s)` with :math:`y = z / s`.

    Their skewness is 1.14.
    """

    def __init__(self, dim: int = 2, scale: float = 1.0) -> None:
        super().__init__(dim, scale * EULER_GAMMA, (scale * math.pi) ** 2 / 6)
        self.scale = scale

    def entropy(self) -> Tensor:
        r"""Exact entropy, :math:`d (\log s + \gamma + 1)` nats."""
        return torch.tensor(self.dim * (math.log(self.scale) + EULER_GAMMA + 1), dtype=torch.float64)

    def _log_density(self, z: Tensor) -> Tensor:
        y = z / self.scale
        return (-y - (-y).exp()).sum(-1) - self.dim * math.log(self.scale)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return -self.scale * (-_uniform((n, self.dim), generator).log()).log()


class Spikes(Target):
    r"""A nearly discrete density: each coordinate is -1, 0 or 2 plus :math:`\mathcal N(0, s^2)`.

    The three points have the probabilities 0.5, 0.3 and 0.2.
    """

    def __init__(self, dim: int = 2, scale: float = 0.02) -> None:
        points, probabilities = torch.tensor([[-1.0], [0.0], [2.0]]), torch.tensor([0.5, 0.3, 0.2])
        self.marginal = GaussianMixture(points, scale, probabilities)
        super().__init__(dim, self.marginal.mean, self.marginal.variance)

    def _log_density(self, z: Tensor) -> Tensor:
        return self.marginal._log_density(z[..., None]).sum(-1)

    def _draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        return self.marginal._draw(n * self.dim, generator).reshape(n, self.dim)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randn(shape, generator=generator, device=device, dtype=torch.float64)


def _pick(weights: Tensor, u: Tensor) -> Tensor:
    """Return the index that each uniform number picks in proportion to the weights."""
    return torch.searchsorted(weights.cumsum(0)[:-1].to(u.device), u)


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Uniform on the open interval (0, 1), so that logs and quantiles stay finite."""
    device = torch.device("cpu") if generator is None else generator.device
    u = torch.rand(shape, generator=generator, device=device, dtype=torch.float64)
    return u.clamp(2.0**-54, 1 - 2.0**-53)
