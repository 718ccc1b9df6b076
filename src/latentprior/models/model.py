"""A decoder and its prior as one latent variable model: generate, reconstruct, infer, score, complete, save."""

from __future__ import annotations

import functools
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
from ..density.samplers import check_options
from ..density.whitening import identity_whitening
from ..errors import CheckpointError, InvalidImagesError, LatentPriorError
from ..storage.checkpoint import UNFIT, load_state, tensors_under
from ..storage.hub import find_folder
from ..storage.sharing import Shareable
from . import inference
from .checks import check_images, check_latents, check_mask
from .inference import ROWS, Method, Posterior, chain_of, log_gaussian
from .interpolation import latent_path
from .likelihood import LogLikelihood, log_likelihood
from .networks import build_decoder, build_encoder, loaded_network

__all__ = ["ROWS", "LatentVariableModel", "standard_normal_prior"]

Score = Literal["joint", "reconstruction", "prior", "marginal"]
CARD_IMAGES = 36
"""Images of each kind that a model card shows."""


def standard_normal_prior(event_shape: Sequence[int]) -> LatentPrior:
    r"""The prior :math:`\mathcal N(0, I)` that decoders usually have: a ladder of no stages.

    Parameters
    ----------
    event_shape : sequence of int
        Shape of one latent.
    """
    dim = math.prod(event_shape)
    return LatentPrior(Ladder(NormalBase(dim).float()), identity_whitening(dim), event_shape)


class LatentVariableModel(nn.Module, Shareable):
    r""":math:`p(x, z) = \mathcal N(x; g(z), \sigma^2 I)\; p(z)` for images in [-1, 1], log densities in nats.

    Parameters
    ----------
    decoder : torch.nn.Module
        Maps latents ``(n, *event_shape)`` to images ``(n, C, H, W)`` in [-1, 1].
    prior : LatentPrior or torch.distributions.Distribution, optional
        Density of the latents: a learned prior, or any Distribution that samples and scores. None stands for
        :math:`\mathcal N(0, I)`; the decoder then needs a ``latent_shape``.
    sigma : float
        Standard deviation of a pixel around the decoder's mean.
    encoder : torch.nn.Module, optional
        Maps images to posterior means, or to ``(mean, scale)``.

    Notes
    -----
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
        self.sampler = {"sampler": "smc"}
        like = next(decoder.parameters(), prior.whitening.loc)
        # Latents and networks share one floating type; half precision is too coarse for log densities.
        dtype = like.dtype if like.dtype in (torch.float32, torch.float64) else None
        self.prior: LatentPrior = prior.to(like.device, dtype)

    @property
    def event_shape(self) -> torch.Size:
        """Shape of one latent."""
        return self.prior.event_shape

    @functools.cached_property
    def image_shape(self) -> torch.Size:
        """Shape (C, H, W) of one image: the decoder's ``image_shape``, else that of the image of a zero latent."""
        shape = getattr(self.decoder, "image_shape", None)
        if shape is None:
            with torch.no_grad():
                zero = torch.zeros(1, *self.event_shape, dtype=self.prior.dtype, device=self.device)
                shape = self.decoder(zero).shape[1:]
        return torch.Size(shape)

    @property
    def device(self) -> torch.device:
        """Device of the prior, and of latents and images that the model returns."""
        return self.prior.device

    @property
    def sampler(self) -> dict[str, Any]:
        """How :meth:`generate` draws latents by default: arguments of :meth:`latentprior.LatentPrior.sample`.

        The name stands under ``"sampler"``, its options beside it, as in ``{"sampler": "sir", "candidates": 256}``.
        It is saved with the model. A new model has ``{"sampler": "smc"}``; a rival has the sampler of its paper.
        Assigning another raises :class:`LatentPriorError` where the sampler or an option is unknown.
        """
        return dict(self._sampler)

    @sampler.setter
    def sampler(self, sampler: Mapping[str, Any]) -> None:
        if not isinstance(sampler, Mapping):
            raise LatentPriorError(f"a sampler is a mapping such as {{'sampler': 'smc'}}, got {sampler!r}")
        options = {name: value for name, value in sampler.items() if name != "sampler"}
        check_options(sampler.get("sampler"), options)
        self._sampler = dict(sampler)

    def decode(self, z: Tensor) -> Tensor:
        """Mean images of latents, ``(n, C, H, W)``; differentiable.

        Parameters
        ----------
        z : Tensor
            Latents ``(n, *event_shape)``.
        """
        return torch.cat([self.decoder(block) for block in z.split(ROWS)])

    @torch.no_grad()
    def generate(
        self, n: int, *, generator: torch.Generator | None = None, sampler: str | None = None, **options: Any
    ) -> Tensor:
        """``n`` images ``(n, C, H, W)``: the decoder's means at draws of the prior.

        Parameters
        ----------
        n : int
            Number of images.
        generator : torch.Generator, optional
            Source of all random numbers.
        sampler : str, optional
            A sampler of :meth:`latentprior.LatentPrior.sample`. None takes the model's own, with its options.
        **options
            Options of the sampler.
        """
        chosen = {**self.sampler, **options} if sampler is None else {"sampler": sampler, **options}
        return self.decode(self.prior.sample((n,), generator=generator, **chosen))

    @torch.no_grad()
    def encode(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The encoder's posterior means ``(n, *event_shape)`` and standard deviations, if it gives any.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].

        Raises
        ------
        LatentPriorError
            Where the model has no encoder.
        """
        if self.encoder is None:
            raise LatentPriorError(inference.NO_ENCODER)
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

        :math:`e \mapsto u = W(\mu(x) + s(x)\,e - m)`, rows ``(n, d)`` of n images.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].

        Raises
        ------
        LatentPriorError
            Where the encoder gives no standard deviations.
        """
        return inference.encoder_coordinates(self.prior, *self.encode(x))

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
        """Latents of images, ``(n, *event_shape)``.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        method : {"mala", "langevin", "map", "encoder", "tilt"}, optional
            ``mala`` (the default) runs Metropolis-corrected chains, whose common step size is adapted in their first
            half. ``langevin`` runs short-run dynamics: one posterior draw an image, biased. ``map`` finds the most
            probable latent by Adam. ``encoder`` returns the encoder's mean. ``tilt`` draws from the prior tilted by
            each image's likelihood, by sequential Monte Carlo: slow, and it misses no mode that the prior reaches.
        steps : int, optional
            Steps of a chain or of the search: 20 of ``langevin`` and 100 of ``mala`` and ``map`` by default.
        step_size : float
            Size of a step of a chain in standardised coordinates.
        precondition : bool
            ``langevin`` only: chains begin at a draw of the encoder's posterior, move in its scales, and are
            Metropolis-corrected.
        mask : Tensor, optional
            1 where a pixel is seen and 0 where it is not, of a shape that broadcasts to the images. The posterior is
            then that given the seen pixels.
        start : Tensor, optional
            Latents ``(n, *event_shape)`` where chains start; by default the encoder's means, or without an encoder
            draws of the prior.
        generator : torch.Generator, optional
            Source of all random numbers.

        Raises
        ------
        InvalidImagesError
            For images or a mask of another shape, or with NaN.
        InvalidLatentsError
            For a ``start`` of another shape, or with NaN.
        LatentPriorError
            For an unknown method, or steps that no chain can have.
        """
        chain = chain_of(method, steps, step_size, precondition)
        posterior = self._posterior(x, mask)
        if start is not None:
            start = check_latents(start, len(posterior), self.event_shape, self.prior.whitening.loc)
        return inference.infer(posterior, chain, self._encode, start, generator)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, **options: Any) -> Tensor:
        """Images of the latents that :meth:`infer` finds, ``(n, C, H, W)``.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        **options
            Options of :meth:`infer`; its ``method`` is ``map`` here by default.
        """
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
        r"""How odd each image is, ``(n,)`` nats; a higher score is odder.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        kind : {"joint", "reconstruction", "prior", "marginal"}
            ``joint`` is :math:`-\log p(x, z)` at the inferred latent, the paper's score. ``reconstruction`` is
            :math:`-\log p(x \mid z)`. ``prior`` is :math:`-\log p(z)`; it told the odd digit better than ``joint``
            for nine of MNIST's ten digits (``benchmarks/RESULTS.md``), so compare them where you have labels.
            ``marginal`` is :math:`-\log p(x)` by :meth:`log_likelihood`.
        z : Tensor, optional
            Latents ``(n, *event_shape)`` that are already inferred; by default :meth:`infer` finds them.
        generator : torch.Generator, optional
            Source of all random numbers.
        **options
            Options of :meth:`infer`, or of :meth:`log_likelihood` where ``kind`` is ``marginal``.

        Raises
        ------
        LatentPriorError
            For an unknown ``kind``.
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

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1].
        method : {"importance", "annealed"}
            ``importance`` draws from a Gaussian around the posterior mode, whose scales are those of MALA chains
            there, a tenth of the draws twice as wide; it is reliable for few coordinates and a posterior of one mode.
            ``annealed`` runs annealed importance sampling from the prior: slower, and right for many modes.
        samples : int
            Draws of the Gaussian, or annealed chains, for each image.
        temperatures : int
            ``annealed`` only: steps of a chain from the prior to the posterior.
        generator : torch.Generator, optional
            Source of all random numbers.

        Notes
        -----
        Both are unbiased for :math:`p(x)`, so that their logs are low on average, most where the standard error is
        large. Source: Burda, Grosse and Salakhutdinov (2016); Wu et al. (2017).
        """
        return log_likelihood(
            self._posterior(x), self._encode, method=method, samples=samples, temperatures=temperatures,
            generator=generator,
        )  # fmt: skip

    @torch.no_grad()
    def inpaint(self, x: Tensor, mask: Tensor, *, generator: torch.Generator | None = None, **options: Any) -> Tensor:
        """Fill unseen pixels with the decoded posterior given the seen ones, ``(n, C, H, W)``; seen pixels stay.

        Parameters
        ----------
        x : Tensor
            Images ``(n, C, H, W)`` in [-1, 1]. What is not seen may be anything, NaN too.
        mask : Tensor
            1 where a pixel is seen and 0 where it is not, of a shape that broadcasts to the images.
        generator : torch.Generator, optional
            Source of all random numbers.
        **options
            Options of :meth:`infer`. Its default here is ``mala`` from draws of the prior, so that repeated calls
            show what the pixels leave open.
        """
        x = as_dense(x, "images", InvalidImagesError)
        mask = check_mask(mask, x)
        x = self._images(torch.where(mask.bool(), x, torch.zeros_like(x)))
        mask = mask.to(x)
        return mask * x + (1 - mask) * self.decode(self.infer(x, mask=mask, generator=generator, **options))

    @torch.no_grad()
    def interpolate(self, start: Tensor, end: Tensor, n: int = 8, *, relaxation: int = 50) -> Tensor:
        r"""``n`` images on a path between two latents that keeps to where the prior has mass, ends included.

        Parameters
        ----------
        start, end : Tensor
            Two latents of the event's shape.
        n : int
            Images on the path, 2 or more.
        relaxation : int
            How often interior points follow :math:`\nabla\log p(z)` and are spread to equal distances again; 0
            gives the straight line.

        Notes
        -----
        The string method. Source: E, Ren and Vanden-Eijnden (2007).
        """
        return self.decode(latent_path(self.prior, start, end, n, relaxation=relaxation))

    def _images(self, x: Tensor) -> Tensor:
        return check_images(x, self.image_shape, self.device).to(self.prior.dtype)

    def _posterior(self, x: Tensor, mask: Tensor | None = None) -> Posterior:
        x = self._images(x)
        return Posterior(x, self.prior, self.decode, self.sigma, None if mask is None else check_mask(mask, x))

    @property
    def _encode(self) -> inference.Encode | None:
        return None if self.encoder is None else self.encode

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors of the whole model."""
        config, tensors = self.prior.state()
        document: dict[str, Any] = {"sigma": self.sigma, "sampler": self.sampler, "prior": config}
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
        z = self.prior.whitening.unwhiten(self.prior.base.sample(CARD_IMAGES, generator))
        draws = {f"base: {self.prior.base.name}": self.decode(z.reshape(CARD_IMAGES, *self.event_shape))}
        if self.prior.stages:
            draws["ladder"] = self.generate(CARD_IMAGES, generator=generator)
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
        """Load what ``save_pretrained`` wrote, from a folder or the Hugging Face hub.

        Parameters
        ----------
        source : str or Path
            A folder, or ``"user/name"`` on the hub (extra ``hub``).
        decoder, encoder : torch.nn.Module, optional
            Networks of your own, untrained, which are filled with the saved weights. Networks of
            :mod:`latentprior.models.networks` are rebuilt without them.
        prior : torch.distributions.Distribution, optional
            The Distribution that the saved prior stands on, where it stands on one.
        device : torch.device or str, optional
            Where the model is put; by default the CPU.
        revision : str, optional
            Branch, tag or commit on the hub.
        token : str or bool, optional
            Token of the hub, as in :meth:`latentprior.LatentPrior.from_pretrained`.
        cache_dir : str or Path, optional
            Where files of the hub are kept.
        local_files_only : bool
            Whether to read from that folder alone, without a connection.

        Raises
        ------
        CheckpointError
            For anything absent, damaged or foreign.
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
        """Rebuild from :meth:`state`.

        Parameters
        ----------
        config : mapping
            The JSON document. One without a ``"sampler"`` gives a model with the default sampler.
        tensors : mapping
            Tensors by name.
        decoder, encoder : torch.nn.Module, optional
            Networks of your own, as in :meth:`from_pretrained`.
        prior : torch.distributions.Distribution, optional
            The Distribution that the saved prior stands on.

        Raises
        ------
        CheckpointError
            Where the document and the tensors do not fit together.
        """
        try:
            # Folders written before the network had this name call it "generator".
            part = "decoder" if "decoder" in config else "generator"
            own_decoder = loaded_network(config[part], decoder, build_decoder, part, tensors)
            own_encoder = None
            if config["encoder"]:
                own_encoder = loaded_network(config["encoder"], encoder, build_encoder, "encoder", tensors)
            saved = tensors_under(tensors, "prior.")
            own_prior = LatentPrior.from_state(config["prior"], saved, base=prior, decoder=own_decoder)
            model = cls(own_decoder, own_prior, float(config["sigma"]), own_encoder)
        except LatentPriorError:
            raise
        except UNFIT as error:
            line = " ".join(str(error).split())[:200]
            raise CheckpointError(f"configuration and tensors of the model do not fit together ({line})") from None
        try:
            model.sampler = config.get("sampler", model.sampler)
        except LatentPriorError as error:
            raise CheckpointError(f"the model's own sampler cannot be used ({error})") from None
        return model

    def moved(self, device: torch.device | str | None) -> LatentVariableModel:
        """The model on another device, its prior too (which :meth:`torch.nn.Module.to` does not know).

        Parameters
        ----------
        device : torch.device or str or None
            Where the model is moved; None leaves it where it is.
        """
        if device is not None:
            self.to(device)
            self.prior = self.prior.to(device)
        return self
