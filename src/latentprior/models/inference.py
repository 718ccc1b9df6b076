"""Posterior sampling: latents of given images, under a decoder's likelihood and a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..density.bases.base import LOG_2PI
from ..density.prior import LatentPrior
from ..density.sampling import LogDensity, langevin, mala
from ..errors import LatentPriorError

__all__ = [
    "ROWS",
    "Chain",
    "Encode",
    "Method",
    "Posterior",
    "chain_of",
    "chain_starts",
    "encoder_coordinates",
    "infer",
    "log_gaussian",
    "maximize",
    "posterior_density",
    "short_run",
]

Method = Literal["langevin", "mala", "map", "encoder", "tilt"]
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Maps images to the means and, where the encoder gives any, the standard deviations of their posteriors."""

ROWS = 256
"""Images that pass through the decoder at a time."""
NO_ENCODER = "this model has no encoder: infer with method='langevin', 'mala' or 'map'"
TILT_PARTICLES = 1024
"""Particles with which the prior is tilted by the likelihood of one image."""
LANGEVIN_STEPS = 20
"""Steps of short-run dynamics; the paper's number."""
CHAIN_STEPS = 100
"""Steps of Metropolis-corrected chains and of the search for the mode."""


@dataclass(frozen=True)
class Posterior:
    r"""The posterior :math:`p(z \mid x) \propto \mathcal N(x; g(z), \sigma^2 I)\,p(z)` of each of n images.

    Images are ``(n, C, H, W)``. Rows ``(n, d)`` are in the prior's standardised coordinates u. The mask is 1 where a
    pixel is seen, 0 where it is not.
    """

    x: Tensor
    prior: LatentPrior
    decode: Callable[[Tensor], Tensor]
    sigma: float
    mask: Tensor | None = None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.x)

    def blocks(self, size: int) -> Iterator[Posterior]:
        """Yield the posterior of ``size`` images, or fewer, at a time."""
        for i in range(0, len(self.x), size):
            mask = None if self.mask is None else self.mask[i : i + size]
            yield replace(self, x=self.x[i : i + size], mask=mask)

    def repeated(self, times: int) -> Posterior:
        """Return the same posterior with every image so many times, its copies side by side."""
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return replace(self, x=self.x.repeat_interleave(times, 0), mask=mask)

    def decode_whitened(self, u: Tensor) -> Tensor:
        """Mean images ``(n, C, H, W)`` of rows ``(n, d)``."""
        return self.decode(self.prior.whitening.unwhiten(u).reshape(len(u), *self.prior.event_shape))

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Log density of each image given its own row, ``(n,)`` nats."""
        return log_gaussian(self.x, self.decode_whitened(u), self.sigma, self.mask)

    def density(self, temperature: float = 1.0) -> LogDensity:
        """Value and gradient of the unnormalised log posterior at rows ``(n, d)``; see :func:`posterior_density`."""
        return posterior_density(
            self.decode_whitened, self.prior.log_prob_whitened, self.x, self.sigma, self.mask, temperature
        )


class Chain(NamedTuple):
    """How the latents of images are found; :meth:`LatentVariableModel.infer` describes the settings."""

    method: Method
    steps: int
    step_size: float
    precondition: bool


def chain_of(method: Method | None, steps: int | None, step_size: float, precondition: bool) -> Chain:
    """Return a chain with the defaults of its method, or raise for numbers that no chain can have."""
    method = method or "mala"
    if steps is None:
        steps = LANGEVIN_STEPS if method == "langevin" else CHAIN_STEPS
    if not isinstance(steps, (int, np.integer)) or steps < 0:
        raise LatentPriorError(f"steps must be a whole number of 0 or more, got {steps!r}")
    if not isinstance(step_size, (int, float, np.number)) or not 0 < step_size < math.inf:
        raise LatentPriorError(f"step_size must be positive and finite, got {step_size!r}")
    return Chain(method, steps, step_size, precondition)


def infer(
    posterior: Posterior,
    chain: Chain,
    encode: Encode | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a latent of every image, ``(n, *event_shape)``; :meth:`LatentVariableModel.infer` lists the methods.

    It raises :class:`LatentPriorError` for an unknown method, and where the method needs an encoder and there is none.
    """
    if chain.method not in ("langevin", "mala", "map", "encoder", "tilt"):
        raise LatentPriorError(f"unknown method {chain.method!r}: choose langevin, mala, map, encoder or tilt")
    if chain.method == "encoder":
        return _needed(encode)(posterior.x)[0]
    if not len(posterior):
        return posterior.prior.sample((0,), generator)
    if chain.method == "tilt":
        return torch.cat([_tilted(image, generator) for image in posterior.blocks(1)])
    rows = []
    for i, block in enumerate(posterior.blocks(ROWS)):
        begin = chain_starts(block, encode, None if start is None else start[ROWS * i :][: len(block)], generator)
        rows.append(posterior.prior.whitening.unwhiten(_moved(block, begin, chain, encode, generator)))
    return torch.cat(rows).reshape(len(posterior), *posterior.prior.event_shape)


def _moved(
    posterior: Posterior, start: Tensor, chain: Chain, encode: Encode | None, generator: torch.Generator | None
) -> Tensor:
    """Rows ``(n, d)`` where the chains from ``start`` end."""
    density = posterior.density()
    if chain.method == "mala":
        return mala.sample(start, density, steps=chain.steps, step_size=chain.step_size, generator=generator)[0]
    if chain.method == "map":
        return maximize(start, density, steps=chain.steps)
    coordinates = None
    if chain.precondition:
        coordinates = encoder_coordinates(posterior.prior, *_needed(encode)(posterior.x))
        start = langevin.noise_like(start, generator)
    return short_run(start, density, coordinates, steps=chain.steps, step_size=chain.step_size, generator=generator)


def _needed(encode: Encode | None) -> Encode:
    if encode is None:
        raise LatentPriorError(NO_ENCODER)
    return encode


def _tilted(posterior: Posterior, generator: torch.Generator | None) -> Tensor:
    """One draw of the prior tilted by the likelihood of a single image, ``(1, *event_shape)``."""
    tilted = posterior.prior.tilt(
        lambda z: log_gaussian(posterior.x, posterior.decode(z), posterior.sigma, posterior.mask),
        particles=TILT_PARTICLES,
        generator=generator,
    )
    return tilted.sample((1,), generator)


def chain_starts(
    posterior: Posterior,
    encode: Encode | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows ``(n, d)`` where chains start: at ``start``, else the encoder's means, else draws of the prior.

    With a mask the encoder is not asked: unseen pixels would mislead it.
    """
    if start is None and encode is not None and posterior.mask is None:
        start = encode(posterior.x)[0]
    if start is None:
        start = posterior.prior.sample((len(posterior),), generator)
    whitening = posterior.prior.whitening
    return whitening.whiten(start.reshape(len(posterior), -1).to(whitening.loc))


def encoder_coordinates(prior: LatentPrior, mean: Tensor, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    r"""Map coordinates in which the encoder's posterior of each image is N(0, I) to standardised ones.

    :math:`e \mapsto u = W(\mu(x) + s(x)\,e - m)`, rows ``(n, d)`` of n images; ``mean`` and ``scale`` are those of the
    encoder, each ``(n, *event_shape)``. It raises :class:`LatentPriorError` where the encoder gives no ``scale``.
    """
    if scale is None:
        raise LatentPriorError("this needs an encoder that returns (mean, scale)")
    flat_mean, flat_scale = mean.flatten(1), scale.flatten(1)
    return lambda e: prior.whitening.whiten(flat_mean + flat_scale * e)


def log_gaussian(x: Tensor, mean: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    r""":math:`\log\mathcal N(x; m, \sigma^2 I)` of every image, ``(n, C, H, W) -> (n,)`` nats.

    Pixels add nothing where the mask, of any shape that broadcasts, is 0.
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

    ``temperature`` is :math:`\beta`, and ``decode`` maps rows ``(n, d)`` to mean images ``(n, C, H, W)``. Source: Xiao
    and Han (2022), eq. 5: the posterior :math:`p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)`.
    """

    def evaluate(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            # Eq. 5: the log posterior up to a constant, whose gradient drives the chains.
            value = log_prior(u) + temperature * log_gaussian(x, decode(u), sigma, mask)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    return evaluate


def short_run(
    start: Tensor,
    density: LogDensity,
    coordinates: Callable[[Tensor], Tensor] | None = None,
    *,
    steps: int = LANGEVIN_STEPS,
    step_size: float = 0.1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Short-run Langevin dynamics of the posterior, rows ``(n, d)``; the defaults are the paper's numbers.

    With ``coordinates``, an affine map of every row to where the density lives, chains move before the map and are
    returned after it: preconditioned dynamics. They are then Metropolis-corrected, so that an encoder which learns from
    where chains end, and gives them their starts, cannot run away with a few of them.
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


def maximize(start: Tensor, density: LogDensity, *, steps: int = CHAIN_STEPS, learning_rate: float = 0.3) -> Tensor:
    """Rows ``(n, d)`` of highest density that Adam finds from ``start``, each the best on its way.

    The learning rate falls to zero on a cosine. It must carry a start across the prior: 0.05 stops short.
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
            optimizer.param_groups[0]["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / steps))
            u.grad = -grad
            optimizer.step()
    return best
