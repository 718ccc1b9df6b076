"""Independent checks of a normaliser: the density is integrated from another one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import LowESSWarning, warn
from .bases import Base, GaussianMixtureBase
from .bases.full_mixture import SHRUNK_COORDINATES
from .ladder import Ladder
from .normalizers import Bracket, backwards
from .sampling import smc
from .sampling.resampling import log_mean_exp, tail_shape

__all__ = ["NormalizerCheck", "check", "check_from", "reference_mixture"]

LEAST_EFFECTIVE_DRAWS = 100
"""Effective draws below which an average of weights says little."""
INFINITE_VARIANCE_SHAPE = 0.5
"""Shape of the weights' tail above which their variance is infinite and an error bar does not hold (Vehtari et al.
2024)."""
LOW_MEAN_SHAPE = 0.7
"""Shape of the weights' tail above which their average itself is too low nearly always (Vehtari et al. 2024)."""


class NormalizerCheck(NamedTuple):
    """Estimate of a density's integral from another one: ``value`` must be 1 within a few ``stderr``.

    Parameters
    ----------
    value, stderr : float
        The integral and its standard error.
    ess : float
        Effective share of the draws.
    reference : str
        The density that was drawn from.
    method : str
        ``importance``, or ``annealing`` where the tail of the weights is too heavy for their average.
    tail_shape : float
        What :func:`~latentprior.density.sampling.resampling.tail_shape` says of the importance weights.
    """

    value: float
    stderr: float
    ess: float
    reference: str
    method: str = "importance"
    tail_shape: float = math.nan

    @property
    def passed(self) -> bool:
        """Whether 1 lies within three standard errors (or half a percent, where the error is smaller still)."""
        return math.isfinite(self.stderr) and abs(self.value - 1) <= max(3 * self.stderr, 0.005)


@torch.no_grad()
def check(
    log_prob: Callable[[Tensor], Tensor], reference_log_prob: Callable[[Tensor], Tensor], draws: Tensor, name: str
) -> NormalizerCheck:
    r""":math:`\hat Z = \frac1n \sum_i p(u_i)/h(u_i)`, :math:`u_i \sim h`, for a normalised reference density h.

    Warns :class:`LowESSWarning` where fewer than 100 effective draws carry the estimate, or where their tail is heavy
    (:func:`~latentprior.density.sampling.resampling.tail_shape` above 0.7).
    """
    weights = _weights(log_prob, reference_log_prob, draws)
    found = _by_importance(weights, name)
    effective = found.ess * len(weights)
    if effective < LEAST_EFFECTIVE_DRAWS:
        told = f"only {effective:.0f} effective draws of the reference {name!r} reach the prior"
    elif found.tail_shape > LOW_MEAN_SHAPE:
        told = (
            f"the largest weights of {name!r} follow a tail of shape {found.tail_shape:.2f}, so that Z may come out low"
        )
    else:
        return found
    warn(
        f"{told}: the check says little; try another reference (gmm, base, a Distribution of yours) or more draws",
        LowESSWarning,
    )
    return found


@torch.no_grad()
def check_from(
    ladder: Ladder,
    reference: Base,
    draws: Tensor,
    name: str,
    generator: torch.Generator | None = None,
    *,
    log_normalizer: float,
    own: Callable[[int], Tensor],
    particles: int = 8192,
    islands: int = 16,
    moves: int = 6,
) -> NormalizerCheck:
    r"""What :func:`check` says of a ladder, and by annealing where its error bar would not hold.

    Where the tail's shape is above 1/2, or fewer than 100 draws are effective, ``particles`` of the ``reference`` h are
    carried along :math:`\log h + t\,(\log p_K - \log h)` by sequential Monte Carlo in ``islands``, whose estimate is
    unbiased as well and whose weights are even (Neal 2001; Del Moral, Doucet and Jasra 2006), and as many of the
    ladder's ``own`` samples the other way. What h does not reach leaves the first estimate low and not the second, so
    that the two are a :class:`Bracket`: the value is its middle, and half its width part of the standard error.
    """
    weights = _weights(lambda u: ladder.base.log_prob(u) + ladder.log_potential(u), reference.log_prob, draws)
    found = _by_importance(weights - log_normalizer, name)
    if found.ess * len(draws) >= LEAST_EFFECTIVE_DRAWS and not found.tail_shape > INFINITE_VARIANCE_SHAPE:
        return found
    path, rows = ladder.path_from(reference), particles // islands * islands
    forward = smc.run(reference.sample(rows, generator), path, islands=islands, moves=moves, generator=generator)
    backward = backwards(own(rows), path, islands, moves, generator)
    middle = Bracket(forward.log_normalizer, backward).middle
    z = math.exp(middle.value - log_normalizer)
    return NormalizerCheck(z, z * middle.stderr, middle.ess, name, "annealing", found.tail_shape)


def reference_mixture(
    own: Callable[[int], Tensor], ladder: Ladder, generator: torch.Generator | None = None
) -> GaussianMixtureBase:
    """Fit a mixture to a ladder's ``own`` samples, and widen it so that weights under it stay bounded.

    Six tenths are the mixture widened by 3%, three tenths by a fifth, and one tenth is a single wide normal. From 32
    coordinates on, the mixture is the average of two.
    """
    d = ladder.base.dim
    if d < SHRUNK_COORDINATES:
        n, members = max(20_000, min(60_000, 10 * d * d)), 1
        # More rows a component than its covariance has parameters, or weights would be ruled by a few draws.
        k = max(1, min(32, n // max(10 * d, 5 * d * d // 8)))
    else:
        # Shrunk covariances need fewer rows, and an average varies less with the draws.
        n, members = 60_000, 2
        k = GaussianMixtureBase.plan(n, d).sizes[-1]
    u = own(n)
    parts = [GaussianMixtureBase.fit(u, u[:1], n_components=k, generator=generator) for _ in range(members)]
    fitted = GaussianMixtureBase.averaged(parts)
    spread = torch.linalg.cholesky(torch.cov(u.T).double().reshape(d, d)).to(fitted.cholesky)
    weights = torch.cat([share * fitted.log_weights.exp() for share in (0.6, 0.3)])
    means = torch.cat([fitted.means, fitted.means, u.mean(0, keepdim=True).to(fitted.means)])
    cholesky = torch.cat([1.03 * fitted.cholesky, 1.2 * fitted.cholesky, 1.5 * spread[None]])
    mixture = GaussianMixtureBase(torch.cat([weights, weights.new_tensor([0.1])]), means, cholesky)
    return mixture.to(device=u.device, dtype=u.dtype)


def _weights(log_prob: Callable[[Tensor], Tensor], reference: Callable[[Tensor], Tensor], draws: Tensor) -> Tensor:
    return torch.cat([log_prob(b).double() - reference(b).double() for b in draws.split(1 << 16)])


def _by_importance(log_weights: Tensor, name: str) -> NormalizerCheck:
    value = log_mean_exp(log_weights)
    z = math.exp(value.value)
    return NormalizerCheck(z, z * value.stderr, value.ess, name, "importance", tail_shape(log_weights))
