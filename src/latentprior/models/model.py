"""A decoder and its prior as one latent variable model: generate, reconstruct, infer, score, complete, save."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from ..data.latents import as_dense
from ..density.bases import DistributionBase, NormalBase
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.sampling import LogDensity, langevin, mala
from ..density.whitening import identity_whitening
from ..errors import CheckpointError, InvalidImagesError, LatentPriorError
from ..storage.checkpoint import UNFIT, load_state, tensors_under
from ..storage.hub import find_folder
from ..storage.sharing import Shareable
from .checks import check_chain, check_images, check_latents, check_mask
from .inference import log_gaussian, maximize, posterior_density, short_run
from .interpolation import latent_path
from .likelihood import LogLikelihood, log_likelihood
from .networks import build_decoder, build_encoder, loaded_network

__all__ = ["LatentVariableModel", "standard_normal_prior"]

Method = Literal["langevin", "mala", "map", "encoder", "tilt"]
Score = Literal["joint", "reconstruction", "prior", "marginal"]
TILT_PARTICLES = 1024
ROWS = 256
"""Images that meet the decoder at a time."""


def standard_normal_prior(event_shape: Sequence[int]) -> LatentPrior:
    r"""The prior :math:`\mathcal N(0, I)` that generators usually have: a ladder of no stages."""
    dim = math.prod(event_shape)
    return LatentPrior(Ladder(NormalBase(dim).float()), identity_whitening(dim), event_shape)


class LatentVariableModel(nn.Module, Shareable):
    r""":math:`p(x, z) = \mathcal N(x; g(z), \sigma^2 I)\; p(z)` for images in [-1, 1], log densities in nats.

    Arguments
    ---------
    decoder : maps ``(n, *event_shape)`` latents to ``(n, C, H, W)`` images in [-1, 1].
    prior : a :class:`~latentprior.LatentPrior`, any torch Distribution over latents that samples and scores, or None
        for :math:`\mathcal N(0, I)` (the decoder then needs a ``latent_shape``).
    sigma : standard deviation of a pixel around the decoder's mean.
    encoder : maps images to posterior means, to ``(mean, scale)``, or is None.

    Posterior chains run in the prior's standardised coordinates, so that step sizes mean the same for every
    autoencoder. Source: Xiao and Han (NeurIPS 2022), eqs. 1 to 5.

    Examples
    --------
    Untrained networks, and the prior N(0, I):

    >>> from latentprior.models.networks import network_spec
    >>> spec = network_spec("mlp", latent_dim=4, width=16, image_shape=(1, 8, 8))
    >>> g = torch.Generator().manual_seed(0)
    >>> model = LatentVariableModel(build_decoder(spec, g), encoder=build_encoder(spec, g))
    >>> x = model.generate(5, generator=g)
    >>> x.shape, model.infer(x, method="encoder").shape
    (torch.Size([5, 1, 8, 8]), torch.Size([5, 4]))
    >>> model.anomaly_score(x, method="map").shape, model.reconstruct(x).shape
    (torch.Size([5]), torch.Size([5, 1, 8, 8]))
    """

    kind = "model"

    def __init__(
        self,
        decoder: nn.Module,
        prior: LatentPrior | Distribution | None = None,
        sigma: float = 0.3,
        encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not (0 < sigma < math.inf):
            raise LatentPriorError(f"sigma must be positive and finite, got {sigma}")
        if prior is None:
            shape = getattr(decoder, "latent_shape", None)
            if shape is None:
                raise LatentPriorError("give a prior: this decoder has no latent_shape to make N(0, I) from")
            prior = standard_normal_prior(shape)
        elif not isinstance(prior, LatentPrior):
            event = prior.batch_shape + prior.event_shape
            flat = identity_whitening(math.prod(event))
            prior = LatentPrior(Ladder(DistributionBase(prior, flat)), flat, event)
        self.decoder = decoder
        self.encoder = encoder
        self.sigma = float(sigma)
        like = next(decoder.parameters(), prior.whitening.loc)
        # Latents meet the networks in one floating type; half precision would starve densities.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else None
        self.prior: LatentPrior = prior.to(like.device, dtype)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one latent."""
        return self.prior.event_shape

    @property
    def device(self) -> torch.device:
        """Device of the prior, and of latents and images that the model returns."""
        return self.prior.device

    def decode(self, z: Tensor) -> Tensor:
        """Mean images of latents, ``(n, *event_shape) -> (n, C, H, W)``; differentiable."""
        return torch.cat([self.decoder(block) for block in z.split(ROWS)])

    def _decode_whitened(self, u: Tensor) -> Tensor:
        return self.decode(self.prior.whitening.unwhiten(u).reshape(len(u), *self.event_shape))

    @torch.no_grad()
    def generate(
        self,
        n: int,
        *,
        generator: torch.Generator | None = None,
        sampler: str = "smc",
        **options: Any,
    ) -> Tensor:
        """``n`` images ``(n, C, H, W)``: the decoder's means at draws of the prior (``options`` for its sampler)."""
        return self.decode(self.prior.sample((n,), generator=generator, sampler=sampler, **options))

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's posterior means ``(n, *event_shape)`` and standard deviations, if it gives any."""
        if self.encoder is None:
            raise LatentPriorError("this model has no encoder: infer with method='langevin', 'mala' or 'map'")
        means, scales = [], []
        for block in self._images(x).split(ROWS):
            out = self.encoder(block)
            mean, scale = out if isinstance(out, tuple) else (out, None)
            means.append(mean.reshape(len(block), *self.event_shape))
            if scale is not None:
                scales.append(scale.reshape(len(block), *self.event_shape))
        return torch.cat(means), torch.cat(scales) if scales else None

    def posterior_coordinates(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        r"""Map coordinates in which the encoder's posterior of each image is N(0, I) to standardised ones.

        :math:`e \mapsto u = W(\mu(x) + s(x)\,e - m)`, rows ``(n, d)`` of n images. The encoder must give scales.
        """
        mean, scale = self.encode(x)
        if scale is None:
            raise LatentPriorError("this needs an encoder that returns (mean, scale)")
        mean, scale = mean.flatten(1), scale.flatten(1)
        return lambda e: self.prior.whitening.whiten(mean + scale * e)

    @torch.no_grad()
    def infer(
        self,
        x: Tensor,
        *,
        method: Method | None = None,
        steps: int | None = None,
        step_size: float = 0.1,
        precondition: bool = False,
        mask: Tensor | None = None,
        start: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Latents of images, ``(n, C, H, W) -> (n, *event_shape)``.

        Methods
        -------
        ``langevin`` : short-run dynamics (``steps`` 20 of ``step_size``), one posterior draw an image, biased. With
            ``precondition`` they begin at a draw of the encoder's posterior, move in its scales, and are
            Metropolis-corrected.
        ``mala`` : Metropolis-corrected chains (``steps`` 100), their common step size adapted in the first half.
        ``map`` : the most probable latent, by Adam (``steps`` 100).
        ``encoder`` : the encoder's mean.
        ``tilt`` : the prior tilted by each image's likelihood, by SMC: slow, and it misses no mode that the prior
            reaches.

        The default is ``mala``. Chains start at ``start``, else at the encoder's mean, else at a draw of the
        prior. With a ``mask`` (1 where a pixel is seen) the posterior is that given the seen pixels. Raises
        :class:`~latentprior.errors.InvalidImagesError` for images of another shape or with NaN.
        """
        method = method or "mala"
        if steps is None:
            steps = 20 if method == "langevin" else 100
        check_chain(steps, step_size)
        x = self._images(x)
        mask = None if mask is None else check_mask(mask, x)
        start = None if start is None else check_latents(start, len(x), self.event_shape, self.prior.whitening.loc)
        if method == "encoder":
            return self.encode(x)[0]
        if method == "tilt":
            masks = [None] * len(x) if mask is None else mask
            draws = [self._tilted(image[None], seen, generator) for image, seen in zip(x, masks, strict=True)]
            return torch.cat(draws) if draws else self.prior.sample((0,), generator)
        if method not in ("langevin", "mala", "map"):
            raise LatentPriorError(f"unknown method {method!r}: choose langevin, mala, map, encoder or tilt")
        rows = []
        for i in range(0, len(x), ROWS):
            block = x[i : i + ROWS]
            seen = None if mask is None else mask[i : i + ROWS]
            begin = self._start(block, None if start is None else start[i : i + ROWS], mask is None, generator)
            density = posterior_density(self._decode_whitened, self.prior.log_prob_whitened, block, self.sigma, seen)
            if method == "langevin":
                there = self.posterior_coordinates(block) if precondition else None
                begin = begin if there is None else langevin.noise_like(begin, generator)
                u = short_run(begin, density, there, steps=steps, step_size=step_size, generator=generator)
            elif method == "mala":
                u = mala.sample(begin, density, steps=steps, step_size=step_size, generator=generator)[0]
            else:
                u = maximize(begin, density, steps=steps)
            rows.append(self.prior.whitening.unwhiten(u).reshape(len(block), *self.event_shape))
        return torch.cat(rows) if rows else self.prior.sample((0,), generator)

    def _start(self, x: Tensor, start: Tensor | None, whole: bool, generator: torch.Generator | None) -> Tensor:
        if start is None and self.encoder is not None and whole:
            start = self.encode(x)[0]
        if start is None:
            start = self.prior.sample((len(x),), generator)
        return self.prior.whitening.whiten(start.reshape(len(x), -1).to(self.prior.whitening.loc))

    def _tilted(self, x: Tensor, mask: Tensor | None, generator: torch.Generator | None) -> Tensor:
        def potential(z: Tensor) -> Tensor:
            return log_gaussian(x, self.decode(z), self.sigma, mask)

        return self.prior.tilt(potential, particles=TILT_PARTICLES, generator=generator).sample((1,), generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, **options: Any) -> Tensor:
        """Images of the latents that :meth:`infer` finds with ``options`` (``map`` by default), ``(n, C, H, W)``."""
        options.setdefault("method", "map")
        return self.decode(self.infer(x, **options))

    @torch.no_grad()
    def anomaly_score(
        self,
        x: Tensor,
        *,
        kind: Score = "joint",
        z: Tensor | None = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Tensor:
        r"""How odd each image is, ``(n,)`` nats, higher is odder.

        Kinds
        -----
        ``joint`` : :math:`-\log p(x, z)` at the inferred latent (the paper's score, and so the default).
        ``reconstruction`` : :math:`-\log p(x \mid z)`.
        ``prior`` : :math:`-\log p(z)`. It told the odd digit better than ``joint`` for nine of MNIST's ten digits
            (``benchmarks/RESULTS.md``): where you have labels, compare.
        ``marginal`` : :math:`-\log p(x)` by :meth:`log_likelihood`; ``options`` go there.

        ``z`` are latents already inferred; else :meth:`infer` finds them with ``options``.
        """
        x = self._images(x)
        if kind == "marginal":
            return -self.log_likelihood(x, generator=generator, **options).value
        if kind not in ("joint", "reconstruction", "prior"):
            raise LatentPriorError(f"unknown score {kind!r}: choose joint, reconstruction, prior or marginal")
        if z is None:
            z = self.infer(x, generator=generator, **options)
        else:
            z = check_latents(z, len(x), self.event_shape, self.prior.whitening.loc)
        score = x.new_zeros(len(x))
        if kind != "prior":
            score = score - log_gaussian(x, self.decode(z), self.sigma)
        return score if kind == "reconstruction" else score - self.prior.log_prob(z)

    @torch.no_grad()
    def log_likelihood(
        self,
        x: Tensor,
        *,
        method: Literal["importance", "annealed"] = "importance",
        samples: int = 256,
        temperatures: int = 200,
        generator: torch.Generator | None = None,
    ) -> LogLikelihood:
        r"""Estimate :math:`\log p(x)` of each image, with a standard error; ``(n,)`` nats each.

        Methods
        -------
        ``importance`` : ``samples`` draws of a Gaussian around the posterior mode, its scales those of MALA chains
            there, a tenth of them twice as wide; reliable for small d and a posterior of one mode.
        ``annealed`` : ``samples`` chains of annealed importance sampling from the prior, ``temperatures`` each; slower,
            and right for many modes.

        Both are unbiased for :math:`p(x)`, so that their logs are low on average, most where the standard error is
        large. Source: Burda, Grosse and Salakhutdinov (2016); Wu et al. (2017).
        """
        x = self._images(x)
        return log_likelihood(
            x, self._decode_whitened, self.prior.log_prob_whitened, self.sigma,
            starts=lambda block: self._start(block, None, True, generator),
            prior_draws=lambda n: self.prior.whitening.whiten(self.prior.sample((n,), generator).flatten(1)),
            method=method, samples=samples, temperatures=temperatures, generator=generator,
        )  # fmt: skip

    @torch.no_grad()
    def inpaint(self, x: Tensor, mask: Tensor, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Fill unseen pixels: the posterior given the seen ones (``mask`` 1), decoded; seen pixels are kept.

        Shapes: ``(n, C, H, W)`` and a mask that broadcasts to it. ``options`` go to :meth:`infer`; the default
        there is MALA, from draws of the prior, so that repeated calls show what the pixels leave open.
        """
        x = as_dense(x, "images", InvalidImagesError)
        seen = check_mask(mask, x)
        # What is not seen may be anything, NaN too.
        x = self._images(torch.where(seen.bool(), x, torch.zeros_like(x)))
        seen = seen.to(x)
        options.setdefault("method", "mala")
        return seen * x + (1 - seen) * self.decode(self.infer(x, mask=seen, generator=generator, **options))

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, n: int = 8, *, relaxation: int = 50) -> Tensor:
        r"""``n`` images on a path between two latents that keeps to where the prior has mass, ends included.

        The string method: interior points follow :math:`\nabla\log p(z)` and are spread to equal distances again,
        ``relaxation`` times (0 gives the straight line). ``start`` and ``end`` have the event's shape. Source: E,
        Ren and Vanden-Eijnden (2007).
        """
        return self.decode(latent_path(self.prior, start, end, n, relaxation=relaxation))

    def log_posterior(self, x: Tensor, mask: Tensor | None = None) -> LogDensity:
        r"""Value and gradient of :math:`\log p(x, u)` in standardised coordinates, for samplers of your own."""
        x = self._images(x)
        mask = None if mask is None else check_mask(mask, x)
        return posterior_density(self._decode_whitened, self.prior.log_prob_whitened, x, self.sigma, mask)

    def _images(self, x: Tensor) -> Tensor:
        shape = getattr(self.decoder, "image_shape", None)
        return check_images(x, shape, self.device).to(self.prior.dtype)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors of the whole model."""
        config, tensors = self.prior.state()
        document: dict[str, Any] = {"sigma": self.sigma, "prior": config}
        everything = {f"prior.{k}": v for k, v in tensors.items()}
        for name, network in (("decoder", self.decoder), ("encoder", self.encoder)):
            document[name] = None if network is None else {"spec": getattr(network, "spec", None)}
            if network is not None:
                everything.update({f"{name}.{k}": v for k, v in network.state_dict().items()})
        return document, everything

    @torch.no_grad()
    def card_draws(self) -> dict[str, Tensor]:
        """36 images of latents of the prior's base, and 36 of the ladder on it, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        draws = {f"base: {self.prior.base.name}": self._decode_whitened(self.prior.base.sample(36, generator))}
        if self.prior.stages:
            draws["ladder"] = self.generate(36, generator=generator)
        return draws

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        decoder: nn.Module | None = None,
        encoder: nn.Module | None = None,
        prior: Distribution | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> LatentVariableModel:
        """Load what ``save_pretrained`` wrote, or ``"user/name"`` on the Hugging Face hub (extra ``hub``).

        Networks of your own are given again, untrained, and filled with the saved weights; so is a Distribution
        that the prior stands on. The last four arguments are as in :meth:`latentprior.LatentPrior.from_pretrained`.
        Raises :class:`~latentprior.errors.CheckpointError` for anything absent, damaged or foreign.
        """
        folder = find_folder(
            source, cls.kind, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        config, tensors = load_state(folder, "model")
        return cls.from_state(config, tensors, decoder=decoder, encoder=encoder, prior=prior).moved(device)

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        decoder: nn.Module | None = None,
        encoder: nn.Module | None = None,
        prior: Distribution | None = None,
    ) -> LatentVariableModel:
        """Rebuild from :meth:`state`."""
        try:
            # Folders written before the network had this name call it "generator".
            part = "decoder" if "decoder" in config else "generator"
            made = loaded_network(config[part], decoder, build_decoder, part, tensors)
            coded = config["encoder"] and loaded_network(config["encoder"], encoder, build_encoder, "encoder", tensors)
            saved = tensors_under(tensors, "prior.")
            learned = LatentPrior.from_state(config["prior"], saved, base=prior, decoder=made)
            return cls(made, learned, float(config["sigma"]), coded or None)
        except LatentPriorError:
            raise
        except UNFIT as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"configuration and tensors of the model do not fit together ({line})") from None

    def moved(self, device: torch.device | str | None) -> LatentVariableModel:
        """The model on another device, its prior too (which :meth:`torch.nn.Module.to` does not know)."""
        if device is not None:
            self.to(device)
            self.prior = self.prior.to(device)
        return self
