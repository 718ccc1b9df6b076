"""Estimates of an image's log likelihood, with error bars: importance sampling and its annealed kind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..density.sampling import mala
from ..errors import LatentPriorError
from .inference import log_gaussian, maximize, posterior_density

__all__ = ["LogLikelihood", "annealed_log_likelihood", "importance_log_likelihood", "log_likelihood", "log_mean"]


class LogLikelihood(NamedTuple):
    r"""Estimates of :math:`\log p(x)` and their standard errors, ``(n,)`` nats each."""

    value: Tensor
    stderr: Tensor


@torch.no_grad()
def importance_log_likelihood(
    start: Tensor,
    decode: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    *,
    samples: int,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r""":math:`\log \frac1S \sum_s p(x \mid z_s)\,p(z_s) / q(z_s)` with a Gaussian q around the posterior mode.

    Arguments
    ---------
    start : where the search for each mode begins, ``(n, d)``.
    x : ``(n, C, H, W)``.

    q has the mean and 1.2 times the scales of MALA chains from the mode; a tenth of its draws are twice as wide.
    Source: Burda, Grosse and Salakhutdinov (2016), eq. 8, with a proposal of the image's own.
    """
    density = posterior_density(decode, log_prior, x, sigma)
    centre = maximize(start, density, steps=150)
    total, square, moves = torch.zeros_like(centre), torch.zeros_like(centre), 200
    chains = mala.init(centre, density, 0.05)
    for i in range(2 * moves):
        chains, info = mala.step(chains, density, generator)
        if i < moves:
            chains = chains._replace(step_size=mala.adapt(chains.step_size, info.acceptance, rate=0.2))
        else:
            total, square = total + chains.position, square + chains.position.square()
    centre = total / moves
    scale = 1.2 * (square / moves - centre.square()).clamp_min(1e-6).sqrt()
    n, d = centre.shape
    wide = torch.ones(samples, 1, dtype=scale.dtype, device=scale.device)
    wide[: max(1, samples // 10)] = 2.0
    noise = torch.randn(n, samples, d, generator=generator, device=_device(generator), dtype=scale.dtype)
    u = centre[:, None] + scale[:, None] * wide * noise.to(scale)
    log_q = _log_defensive((u - centre[:, None]) / scale[:, None], samples) - scale.log().sum(1, keepdim=True)
    flat = u.reshape(n * samples, d)
    joint = log_prior(flat) + log_gaussian(x.repeat_interleave(samples, 0), decode(flat), sigma)
    return log_mean(joint.view(n, samples).double() - log_q.double())


@torch.no_grad()
def annealed_log_likelihood(
    start: Tensor,
    decode: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    *,
    chains: int,
    temperatures: int = 200,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    r"""Annealed importance sampling of :math:`\log p(x) = \log \int p(x \mid z)\,p(z)\,dz`.

    Arguments
    ---------
    start : exact draws of the prior, ``(n * chains, d)``, the chains of one image side by side.
    x : ``(n, C, H, W)``.

    Along :math:`p(z)\,p(x \mid z)^{\beta}`, :math:`\beta` from 0 to 1 on a quartic schedule, one MALA update a
    temperature, its step size adapted to each image's own acceptance. :math:`\mathbb E\,\hat p(x) = p(x)` up to that
    adaptation, so that the log is low on average; the standard error is that of the mean of ``chains`` weights.

    Source: Neal (2001); Wu, Burda, Salakhutdinov and Grosse (2017) for decoders.
    """
    n, (rows, d) = len(x), start.shape
    wide = x.repeat_interleave(chains, 0)
    u = start
    log_weights = torch.zeros(rows, dtype=torch.float64, device=start.device)
    size = torch.full((n, 1), 1.2 * d ** (-1 / 6), dtype=start.dtype, device=start.device)
    levels = [((t / temperatures) ** 4) for t in range(temperatures + 1)]
    for before, now in itertools.pairwise(levels):
        log_weights += (now - before) * log_gaussian(wide, decode(u), sigma).double()
        s = size.repeat_interleave(chains, 0)
        density = posterior_density(decode, log_prior, wide, sigma, temperature=now)
        value, grad = density(u)
        noise = torch.randn(u.shape, generator=generator, device=_device(generator), dtype=u.dtype).to(u.device)
        proposal = u + 0.5 * s * s * grad + s * noise
        new_value, new_grad = density(proposal)
        backward = (u - proposal - 0.5 * s * s * new_grad) / s
        log_ratio = new_value - value + 0.5 * (noise.square().sum(1) - backward.square().sum(1))
        keep, _ = mala.accept(log_ratio, generator)
        u = torch.where(keep[:, None], proposal, u)
        accepted = torch.nan_to_num(log_ratio, nan=-math.inf).clamp_max(0).exp().view(n, chains).mean(1, keepdim=True)
        size = size * torch.exp(0.3 * (accepted - mala.TARGET_ACCEPTANCE))
    return log_mean(log_weights.view(n, chains))


@torch.no_grad()
def log_likelihood(
    x: Tensor,
    decode: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    sigma: float,
    *,
    starts: Callable[[Tensor], Tensor],
    prior_draws: Callable[[int], Tensor],
    method: Literal["importance", "annealed"],
    samples: int,
    temperatures: int,
    generator: torch.Generator | None = None,
) -> LogLikelihood:
    """Either estimate, of any number of images, a block of them at a time.

    Arguments
    ---------
    starts : maps images to where the search for the posterior's mode begins, ``(n, d)``.
    prior_draws : maps n to ``(n, d)`` exact draws of the prior.
    """
    if method not in ("importance", "annealed"):
        raise LatentPriorError(f"unknown method {method!r}: choose importance or annealed")
    if samples < 2:
        raise LatentPriorError(f"samples must be 2 or more, got {samples}")
    if temperatures < 1:
        raise LatentPriorError(f"temperatures must be 1 or more, got {temperatures}")
    images = max(1, (1 << 14) // samples)
    parts = []
    for block in x.split(images) if len(x) else ():
        if method == "annealed":
            parts.append(
                annealed_log_likelihood(
                    prior_draws(len(block) * samples), decode, log_prior, block, sigma,
                    chains=samples, temperatures=temperatures, generator=generator,
                )
            )  # fmt: skip
        else:
            parts.append(
                importance_log_likelihood(
                    starts(block), decode, log_prior, block, sigma, samples=samples, generator=generator
                )
            )
    empty = x.new_zeros(0, dtype=torch.float64)
    return LogLikelihood(
        torch.cat([empty, *(part.value for part in parts)]), torch.cat([empty, *(part.stderr for part in parts)])
    )


def log_mean(log_weights: Tensor) -> LogLikelihood:
    """Log means of weights ``(n, m)`` and their standard errors (delta method), ``(n,)`` each."""
    m = log_weights.shape[1]
    value = torch.logsumexp(log_weights, 1) - math.log(m)
    relative = (log_weights - value[:, None]).exp()
    return LogLikelihood(value, relative.std(1) / math.sqrt(m))


def _log_defensive(y: Tensor, samples: int) -> Tensor:
    """Log density of the mixture that drew standardised ``y`` ``(n, samples, d)``: a share of it twice as wide."""
    d, share = y.shape[-1], max(1, samples // 10) / samples
    square = y.square().sum(-1)
    narrow = math.log1p(-share) - 0.5 * square
    broad = math.log(share) - 0.125 * square - d * math.log(2)
    return torch.logaddexp(narrow, broad) - 0.5 * d * math.log(2 * math.pi)


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
