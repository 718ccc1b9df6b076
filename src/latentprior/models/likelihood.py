"""Estimates of an image's log likelihood, with error bars: importance sampling and its annealed kind."""

from __future__ import annotations

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..density.bases.base import LOG_2PI, device_of, normal_noise
from ..density.sampling import LogDensity, mala
from ..errors import LatentPriorError
from .inference import Encode, Posterior, chain_starts, maximize

__all__ = ["LogLikelihood", "annealed_log_likelihood", "importance_log_likelihood", "log_likelihood", "log_mean"]

# No measurement chose the numbers of the importance proposal. None of them biases the estimate: a proposal that fits
# the posterior badly shows as a larger standard error.
MODE_STEPS = 150
"""Steps of Adam on the way to each posterior's mode."""
ADAPTATION_MOVES = 200
"""MALA moves from the mode that adapt the step size, and as many after them that measure the proposal's moments."""
FIRST_STEP_SIZE = 0.05
"""Size of the first of these moves, in standardised coordinates."""
PROPOSAL_WIDTH = 1.2
"""Standard deviations of the proposal, in those measured: wider than the posterior, so that weights stay bounded."""
LEAST_VARIANCE = 1e-6
"""Least variance of the proposal in a standardised coordinate."""
WIDE_SHARE = 10
"""One draw of the proposal in so many is drawn wider: a defensive mixture (Hesterberg 1995)."""
WIDE_FACTOR = 2.0
"""How many times wider these draws are."""
BLOCK_DRAWS = 1 << 14
"""Draws, of all images together, that are decoded at a time."""
FIRST_MALA_SCALE = 1.2
"""First step of annealed chains in units of d^(-1/6), the scaling of MALA with dimension (Roberts, Rosenthal 1998)."""
SCHEDULE_POWER = 4
"""Temperatures rise with the fourth power of their index: most of them lie near the prior."""
ADAPTATION_RATE = 0.3
"""Change of the log step size of annealed chains for each unit by which acceptance misses its target."""


class LogLikelihood(NamedTuple):
    r"""Estimates of :math:`\log p(x)` and their standard errors, ``(n,)`` nats each.

    Parameters
    ----------
    value : Tensor
        Estimates of the log likelihoods.
    stderr : Tensor
        Their standard errors.
    """

    value: Tensor
    stderr: Tensor


@torch.no_grad()
def importance_log_likelihood(
    posterior: Posterior, start: Tensor, *, samples: int, generator: torch.Generator | None = None
) -> LogLikelihood:
    r""":math:`\log \frac1S \sum_s p(x \mid z_s)\,p(z_s) / q(z_s)` with a Gaussian q around the posterior mode.

    Parameters
    ----------
    posterior : Posterior
        The n images, with the model that explains them.
    start : Tensor
        Rows ``(n, d)`` in standardised coordinates where the search for each mode begins.
    samples : int
        Draws S of q for each image.
    generator : torch.Generator, optional
        Source of all random numbers.

    Notes
    -----
    q has the mean and 1.2 times the scales of MALA chains from the mode. A tenth of its draws are twice as wide.
    Source: Burda, Grosse and Salakhutdinov (2016), eq. 8, with a proposal of the image's own.
    """
    density = posterior.density()
    centre, scale = _proposal(maximize(start, density, steps=MODE_STEPS), density, generator)
    n, d = centre.shape
    width = torch.ones(samples, 1, dtype=scale.dtype, device=scale.device)
    width[: _wide_draws(samples)] = WIDE_FACTOR
    u = centre[:, None] + scale[:, None] * width * normal_noise((n, samples, d), scale, generator)
    log_q = _log_defensive((u - centre[:, None]) / scale[:, None], samples) - scale.log().sum(1, keepdim=True)
    flat = u.reshape(n * samples, d)
    log_joint = posterior.prior.log_prob_whitened(flat) + posterior.repeated(samples).log_likelihood(flat)
    return log_mean(log_joint.view(n, samples).double() - log_q.double())


def _proposal(mode: Tensor, density: LogDensity, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Means and standard deviations ``(n, d)`` of a Gaussian around each mode, from MALA chains that begin there."""
    total, square = torch.zeros_like(mode), torch.zeros_like(mode)
    chains = mala.init(mode, density, FIRST_STEP_SIZE)
    for i in range(2 * ADAPTATION_MOVES):
        chains, info = mala.step(chains, density, generator)
        if i < ADAPTATION_MOVES:
            chains = chains._replace(step_size=mala.adapt(chains.step_size, info.acceptance, rate=0.2))
        else:
            total, square = total + chains.position, square + chains.position.square()
    centre = total / ADAPTATION_MOVES
    variance = (square / ADAPTATION_MOVES - centre.square()).clamp_min(LEAST_VARIANCE)
    return centre, PROPOSAL_WIDTH * variance.sqrt()


@torch.no_grad()
def annealed_log_likelihood(
    posterior: Posterior,
    start: Tensor,
    *,
    chains: int,
    temperatures: int = 200,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r"""Annealed importance sampling of :math:`\log p(x) = \log \int p(x \mid z)\,p(z)\,dz`.

    Parameters
    ----------
    posterior : Posterior
        The n images, with the model that explains them.
    start : Tensor
        Exact draws of the prior in standardised coordinates, ``(n * chains, d)``, the chains of one image side by
        side.
    chains : int
        Chains of each image.
    temperatures : int
        Steps from the prior to the posterior.
    generator : torch.Generator, optional
        Source of all random numbers.

    Notes
    -----
    Along :math:`p(z)\,p(x \mid z)^{\beta}`, :math:`\beta` from 0 to 1 on a quartic schedule, one MALA update a
    temperature, its step size adapted to each image's own acceptance. :math:`\mathbb E\,\hat p(x) = p(x)` up to that
    adaptation, so that the log is low on average; the standard error is that of the mean of ``chains`` weights.

    Source: Neal (2001); Wu, Burda, Salakhutdinov and Grosse (2017) for decoders.
    """
    n, (rows, d) = len(posterior), start.shape
    repeated = posterior.repeated(chains)
    u = start
    log_weights = torch.zeros(rows, dtype=torch.float64, device=start.device)
    size = torch.full((n, 1), FIRST_MALA_SCALE * d ** (-1 / 6), dtype=start.dtype, device=start.device)
    levels = [(t / temperatures) ** SCHEDULE_POWER for t in range(temperatures + 1)]
    for before, now in itertools.pairwise(levels):
        log_weights += (now - before) * repeated.log_likelihood(u).double()
        s = size.repeat_interleave(chains, 0)
        density = repeated.density(now)
        value, grad = density(u)
        noise = torch.randn(u.shape, generator=generator, device=device_of(generator), dtype=u.dtype).to(u.device)
        proposal = u + 0.5 * s * s * grad + s * noise
        new_value, new_grad = density(proposal)
        backward = (u - proposal - 0.5 * s * s * new_grad) / s
        log_ratio = new_value - value + 0.5 * (noise.square().sum(1) - backward.square().sum(1))
        keep, _ = mala.accept(log_ratio, generator)
        u = torch.where(keep[:, None], proposal, u)
        accepted = torch.nan_to_num(log_ratio, nan=-math.inf).clamp_max(0).exp().view(n, chains).mean(1, keepdim=True)
        size = size * torch.exp(ADAPTATION_RATE * (accepted - mala.TARGET_ACCEPTANCE))
    return log_mean(log_weights.view(n, chains))


@torch.no_grad()
def log_likelihood(
    posterior: Posterior,
    encode: Encode | None,
    *,
    method: Literal["importance", "annealed"],
    samples: int,
    temperatures: int,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Either estimate, of any number of images, a block of them at a time.

    Parameters
    ----------
    posterior : Posterior
        The n images, with the model that explains them.
    encode : callable or None
        The encoder, at whose means the search for the posterior's mode begins.
    method : {"importance", "annealed"}
        :func:`importance_log_likelihood` or :func:`annealed_log_likelihood`.
    samples : int
        Draws of the proposal, or chains, for each image.
    temperatures : int
        ``annealed`` only: steps from the prior to the posterior.
    generator : torch.Generator, optional
        Source of all random numbers.

    Raises
    ------
    LatentPriorError
        For an unknown method or too few samples or temperatures.
    """
    if method not in ("importance", "annealed"):
        raise LatentPriorError(f"unknown method {method!r}: choose importance or annealed")
    if samples < 2:
        raise LatentPriorError(f"samples must be 2 or more, got {samples}")
    if temperatures < 1:
        raise LatentPriorError(f"temperatures must be 1 or more, got {temperatures}")
    prior, parts = posterior.prior, []
    for block in posterior.blocks(max(1, BLOCK_DRAWS // samples)):
        if method == "annealed":
            start = prior.whitening.whiten(prior.sample((len(block) * samples,), generator).flatten(1))
            options = {"chains": samples, "temperatures": temperatures}
            parts.append(annealed_log_likelihood(block, start, **options, generator=generator))
        else:
            start = chain_starts(block, encode, generator=generator)
            parts.append(importance_log_likelihood(block, start, samples=samples, generator=generator))
    empty = posterior.x.new_zeros(0, dtype=torch.float64)
    return LogLikelihood(
        torch.cat([empty, *(part.value for part in parts)]), torch.cat([empty, *(part.stderr for part in parts)])
    )


def log_mean(log_weights: Tensor) -> LogLikelihood:
    """Log means of weights and their standard errors by the delta method, ``(n,)`` each.

    Parameters
    ----------
    log_weights : Tensor
        Logs of m weights for each of n images, ``(n, m)``.
    """
    m = log_weights.shape[1]
    value = torch.logsumexp(log_weights, 1) - math.log(m)
    relative = (log_weights - value[:, None]).exp()
    return LogLikelihood(value, relative.std(1) / math.sqrt(m))


def _wide_draws(samples: int) -> int:
    return max(1, samples // WIDE_SHARE)


def _log_defensive(y: Tensor, samples: int) -> Tensor:
    """Log density of the mixture that drew standardised ``y`` ``(n, samples, d)``: some of its draws are wider."""
    d, share = y.shape[-1], _wide_draws(samples) / samples
    square = y.square().sum(-1)
    narrow = math.log1p(-share) - 0.5 * square
    broad = math.log(share) - 0.5 * square / WIDE_FACTOR**2 - d * math.log(WIDE_FACTOR)
    return torch.logaddexp(narrow, broad) - 0.5 * d * LOG_2PI
