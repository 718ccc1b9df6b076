"""Posterior sampling: latents of given images, under a decoder's likelihood and a prior."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..density.sampling import LogDensity, langevin, mala

__all__ = ["log_gaussian", "maximize", "posterior_density", "short_run"]

LOG_2PI = math.log(2 * math.pi)


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
    coordinates: Callable[[Tensor], Tensor] | None = None,
    *,
    steps: int = 20,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Short-run Langevin dynamics of the posterior (paper: 20 steps of 0.1); rows ``(n, d)``.

    With ``coordinates``, an affine map of every row to where the density lives, the chains begin at ``start`` and move
    before the map, and are returned after it: preconditioned dynamics. They are Metropolis-corrected: a start from an
    encoder that is taught with where its chains end must not let it run away with a few of them.
    """
    if coordinates is None:
        return langevin.sample(start, density, steps=steps, step_size=step_size, generator=generator)

    def pulled_back(e: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            e = e.detach().requires_grad_(True)
            u = coordinates(e)
            value, slope = density(u.detach())
            (grad,) = torch.autograd.grad(u, e, slope)
        return value, grad

    state = mala.init(start, pulled_back, step_size)
    for _ in range(steps):
        state, _ = mala.step(state, pulled_back, generator)
    return coordinates(state.position)


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
