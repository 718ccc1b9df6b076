"""Posterior sampling: latents of given images, under a generator's likelihood and a prior."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..sampling import LogDensity, langevin, mala

__all__ = ["LogLikelihood", "annealed_log_likelihood", "log_gaussian", "maximize", "posterior_density", "short_run"]

LOG_2PI = math.log(2 * math.pi)


class LogLikelihood(NamedTuple):
    r"""Estimates of :math:`\log p(x)` and their standard errors, ``(n,)`` nats each."""

    value: Tensor
    stderr: Tensor


def log_gaussian(x: Tensor, mean: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    r""":math:`\log\mathcal N(x; m, \sigma^2 I)` of every image, ``(n, C, H, W) -> (n,)`` nats.

    With a ``mask`` (1 where a pixel is seen, any shape that broadcasts) unseen pixels say nothing.
    """
    terms = -0.5 * ((x - mean) / sigma).square() - math.log(sigma) - 0.5 * LOG_2PI
    if mask is not None:
        terms = terms * mask
    return terms.flatten(1).sum(1)


def posterior_density(
    decode: Callable[[Tensor], Tensor],
    log_prior: Callable[[Tensor], Tensor],
    x: Tensor,
    sigma: float,
    mask: Tensor | None = None,
    temperature: float = 1.0,
) -> LogDensity:
    r""":math:`\log p(u) + \beta \log\mathcal N(x; g(u), \sigma^2 I)` and its gradient, row i of u for image i.

    Source: Xiao and Han (2022), eq. 5: the posterior :math:`p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)`.
    """

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = log_prior(u) + temperature * log_gaussian(x, decode(u), sigma, mask)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    return evaluate


def short_run(
    start: Tensor,
    density: LogDensity,
    *,
    steps: int = 20,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Short-run Langevin dynamics of the posterior (paper: 20 steps of 0.1); rows ``(n, d)``."""
    return langevin.sample(start, density, steps=steps, step_size=step_size, generator=generator)


def maximize(start: Tensor, density: LogDensity, *, steps: int = 100, learning_rate: float = 0.3) -> Tensor:
    """Rows ``(n, d)`` of highest density found by Adam from ``start``, each the best on its way.

    The learning rate, falling to zero on a cosine, must carry a start across the prior: 0.05 stops short.
    """
    u = start.detach().clone()
    optimizer = torch.optim.Adam([u], lr=learning_rate)
    best, best_value = u.clone(), torch.full_like(u[:, 0], -math.inf)
    for step in range(steps + 1):
        value, grad = density(u)
        better = value > best_value
        best = torch.where(better[:, None], u, best)
        best_value = torch.where(better, value, best_value)
        if step < steps:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            u.grad = -grad
            optimizer.step()
    return best


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


def log_mean(log_weights: Tensor) -> LogLikelihood:
    """Log means of weights ``(n, m)`` and their standard errors (delta method), ``(n,)`` each."""
    m = log_weights.shape[1]
    value = torch.logsumexp(log_weights, 1) - math.log(m)
    relative = (log_weights - value[:, None]).exp()
    return LogLikelihood(value, relative.std(1) / math.sqrt(m))


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
