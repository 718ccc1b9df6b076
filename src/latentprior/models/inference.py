"""Posterior sampling: latents of given images, under a decoder's likelihood and a prior."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..density.prior import LatentPrior
from ..density.sampling import LogDensity, langevin, mala
from ..errors import LatentPriorError
from .checks import check_chain

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

LOG_2PI = math.log(2 * math.pi)
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

    Parameters
    ----------
    x : Tensor
        Images ``(n, C, H, W)``.
    prior : LatentPrior
        Density of the latents. Chains run in its standardised coordinates u.
    decode : callable
        Latents ``(n, *event_shape)`` to mean images ``(n, C, H, W)``.
    sigma : float
        Standard deviation of a pixel around its mean.
    mask : Tensor, optional
        1 where a pixel is seen and 0 where it is not, of the images' shape.
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
        """Yield the same posterior of a block of images at a time.

        Parameters
        ----------
        size : int
            Most images of a block.
        """
        for i in range(0, len(self.x), size):
            mask = None if self.mask is None else self.mask[i : i + size]
            yield replace(self, x=self.x[i : i + size], mask=mask)

    def repeated(self, times: int) -> Posterior:
        """Return the same posterior with every image so many times, its copies side by side.

        Parameters
        ----------
        times : int
            Copies of each image.
        """
        mask = None if self.mask is None else self.mask.repeat_interleave(times, 0)
        return replace(self, x=self.x.repeat_interleave(times, 0), mask=mask)

    def decode_whitened(self, u: Tensor) -> Tensor:
        """Mean images ``(n, C, H, W)``.

        Parameters
        ----------
        u : Tensor
            Rows ``(n, d)`` in standardised coordinates.
        """
        return self.decode(self.prior.whitening.unwhiten(u).reshape(len(u), *self.prior.event_shape))

    def log_likelihood(self, u: Tensor) -> Tensor:
        """Log density of each image given its own row, ``(n,)`` nats.

        Parameters
        ----------
        u : Tensor
            Rows ``(n, d)`` in standardised coordinates.
        """
        return log_gaussian(self.x, self.decode_whitened(u), self.sigma, self.mask)

    def density(self, temperature: float = 1.0) -> LogDensity:
        """Value and gradient of the unnormalised log posterior at rows ``(n, d)``; see :func:`posterior_density`.

        Parameters
        ----------
        temperature : float
            Factor on the log likelihood.
        """
        return posterior_density(
            self.decode_whitened, self.prior.log_prob_whitened, self.x, self.sigma, self.mask, temperature
        )


class Chain(NamedTuple):
    """How the latents of images are found.

    Parameters
    ----------
    method : str
        One of ``langevin``, ``mala``, ``map``, ``encoder`` and ``tilt``.
    steps : int
        Steps of the chain, or of the search for the mode.
    step_size : float
        Size of a step in standardised coordinates.
    precondition : bool
        ``langevin`` only: whether chains move in the scales of the encoder's posterior.
    """

    method: Method
    steps: int
    step_size: float
    precondition: bool = False


def chain_of(method: Method | None, steps: int | None, step_size: float, precondition: bool = False) -> Chain:
    """Return a checked chain, with the defaults of its method.

    Parameters
    ----------
    method : str or None
        None stands for ``mala``.
    steps : int or None
        None stands for 20 steps of ``langevin``, and 100 of every other method.
    step_size : float
        Size of a step in standardised coordinates.
    precondition : bool
        ``langevin`` only: whether chains move in the scales of the encoder's posterior.

    Raises
    ------
    LatentPriorError
        Where ``steps`` or ``step_size`` is a number that no chain can have.
    """
    method = method or "mala"
    if steps is None:
        steps = LANGEVIN_STEPS if method == "langevin" else CHAIN_STEPS
    check_chain(steps, step_size)
    return Chain(method, steps, step_size, precondition)


def infer(
    posterior: Posterior,
    chain: Chain,
    encode: Encode | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return a latent of every image, ``(n, *event_shape)``; :meth:`LatentVariableModel.infer` lists the methods.

    Parameters
    ----------
    posterior : Posterior
        The images, with the model that explains them.
    chain : Chain
        The method and its settings.
    encode : callable, optional
        The encoder, which gives chains their starts and, where they are preconditioned, their scales.
    start : Tensor, optional
        Latents ``(n, *event_shape)`` where chains start.
    generator : torch.Generator, optional
        Source of all random numbers.

    Raises
    ------
    LatentPriorError
        For an unknown method, or where the method needs an encoder and there is none.
    """
    if chain.method not in ("langevin", "mala", "map", "encoder", "tilt"):
        raise LatentPriorError(f"unknown method {chain.method!r}: choose langevin, mala, map, encoder or tilt")
    if chain.method == "encoder":
        return _needed(encode)(posterior.x)[0]
    shape = posterior.prior.event_shape
    if not len(posterior):
        return posterior.prior.sample((0,), generator)
    if chain.method == "tilt":
        return torch.cat([_tilted(image, generator) for image in posterior.blocks(1)])
    rows, first = [], 0
    for block in posterior.blocks(ROWS):
        begin = chain_starts(block, encode, None if start is None else start[first : first + len(block)], generator)
        u = _moved(block, begin, chain, encode, generator)
        rows.append(posterior.prior.whitening.unwhiten(u).reshape(len(block), *shape))
        first += len(block)
    return torch.cat(rows)


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

    def potential(z: Tensor) -> Tensor:
        return log_gaussian(posterior.x, posterior.decode(z), posterior.sigma, posterior.mask)

    tilted = posterior.prior.tilt(potential, particles=TILT_PARTICLES, generator=generator)
    return tilted.sample((1,), generator)


def chain_starts(
    posterior: Posterior,
    encode: Encode | None = None,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Rows ``(n, d)`` in standardised coordinates where chains start.

    Parameters
    ----------
    posterior : Posterior
        The images, with the model that explains them.
    encode : callable, optional
        The encoder, whose means are taken where there is no ``start`` and all pixels are seen: unseen pixels would
        mislead it.
    start : Tensor, optional
        Latents ``(n, *event_shape)`` to start at. Without these and an encoder chains start at draws of the prior.
    generator : torch.Generator, optional
        Source of the draws of the prior.
    """
    if start is None and encode is not None and posterior.mask is None:
        start = encode(posterior.x)[0]
    if start is None:
        start = posterior.prior.sample((len(posterior),), generator)
    whitening = posterior.prior.whitening
    return whitening.whiten(start.reshape(len(posterior), -1).to(whitening.loc))


def encoder_coordinates(prior: LatentPrior, mean: Tensor, scale: Tensor | None) -> Callable[[Tensor], Tensor]:
    r"""Map coordinates in which the encoder's posterior of each image is N(0, I) to standardised ones.

    :math:`e \mapsto u = W(\mu(x) + s(x)\,e - m)`, rows ``(n, d)`` of n images.

    Parameters
    ----------
    prior : LatentPrior
        The prior that defines the standardised coordinates.
    mean, scale : Tensor
        Means and standard deviations of the encoder's posteriors, each ``(n, *event_shape)``.

    Raises
    ------
    LatentPriorError
        Where the encoder gives no standard deviations.
    """
    if scale is None:
        raise LatentPriorError("this needs an encoder that returns (mean, scale)")
    flat_mean, flat_scale = mean.flatten(1), scale.flatten(1)
    return lambda e: prior.whitening.whiten(flat_mean + flat_scale * e)


def log_gaussian(x: Tensor, mean: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    r""":math:`\log\mathcal N(x; m, \sigma^2 I)` of every image, ``(n, C, H, W) -> (n,)`` nats.

    Parameters
    ----------
    x, mean : Tensor
        Images and their means, ``(n, C, H, W)``.
    sigma : float
        Standard deviation of a pixel.
    mask : Tensor, optional
        1 where a pixel is seen and 0 where it is not, of any shape that broadcasts. Unseen pixels add nothing.
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

    Parameters
    ----------
    decode : callable
        Rows ``(n, d)`` to mean images ``(n, C, H, W)``.
    log_prior : callable
        Rows ``(n, d)`` to log densities ``(n,)`` in nats.
    x : Tensor
        Images ``(n, C, H, W)``.
    sigma : float
        Standard deviation of a pixel around its mean.
    mask : Tensor, optional
        1 where a pixel is seen and 0 where it is not.
    temperature : float
        The factor :math:`\beta` on the log likelihood.

    Notes
    -----
    Source: Xiao and Han (2022), eq. 5: the posterior :math:`p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)`.
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
    """Short-run Langevin dynamics of the posterior, rows ``(n, d)``.

    Parameters
    ----------
    start : Tensor
        Rows ``(n, d)`` where the chains begin.
    density : callable
        Value and gradient of the log posterior.
    coordinates : callable, optional
        An affine map of every row to where the density lives. Chains begin at ``start`` and move before the map, and
        are returned after it: preconditioned dynamics. They are Metropolis-corrected, so that an encoder which learns
        from where chains end, and gives them their starts, cannot run away with a few of them.
    steps : int
        Steps of a chain; the paper's number by default.
    step_size : float
        Size of a step; the paper's number by default.
    generator : torch.Generator, optional
        Source of all random numbers.
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

    Parameters
    ----------
    start : Tensor
        Rows ``(n, d)`` where the search begins.
    density : callable
        Value and gradient of the log density.
    steps : int
        Steps of Adam.
    learning_rate : float
        Adam's rate at the first step, which falls to zero on a cosine. It must carry a start across the prior: 0.05
        stops short.
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
