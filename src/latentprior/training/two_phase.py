"""Two-phase learning: an autoencoder first, then the ladder on its aggregate posterior."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.images import Images
from ..data.latents import Latents
from ..errors import LatentPriorError
from ..fitting.fit import fit
from ..models.model import LatentVariableModel
from ..runtime.events import Callback
from .autoencoder import train_autoencoder
from .config import AutoencoderConfig
from .resumable import phase_folder

__all__ = ["AutoencoderConfig", "aggregate_posterior", "refit_prior", "train_autoencoder", "train_two_phase"]


def aggregate_posterior(
    model: LatentVariableModel,
    images: Images,
    *,
    source: Literal["encoder", "means", "posterior"] = "encoder",
    noise: float = 0.0,
    draws: int = 1,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Latents:
    r"""Return the latents of images, for a prior to be learned on.

    Parameters
    ----------
    model : LatentVariableModel
        The model.
    images : Images
        The images.
    source : str
        Where the latents come from. ``"encoder"``: the encoder's posteriors, drawn afresh at every use. ``"means"``:
        the encoder's means, with ``noise`` on them. ``"posterior"``: draws of
        :meth:`~latentprior.LatentVariableModel.infer`.
    noise : float
        ``"means"``: standard deviation of the noise.
    draws : int
        ``"posterior"``: number m of draws for each image. Of more than one, the latents are the mean
        :math:`\bar z` and, drawn afresh at every use, normal noise of their own scale
        :math:`\sqrt{\sum_j (z_j - \bar z)^2 / m}`, which gives the mixture of all images the right second moments.
    batch_size : int
        Number of images that are encoded at a time.
    generator : torch.Generator, optional
        Random numbers of ``"posterior"``.
    **options
        ``"posterior"``: options of :meth:`~latentprior.LatentVariableModel.infer`.

    Returns
    -------
    Latents
        One row for each image.

    Raises
    ------
    LatentPriorError
        For an unknown ``source``, or ``draws`` below 1.
    """
    if source not in ("encoder", "means", "posterior"):
        raise LatentPriorError(f"unknown source {source!r}: choose encoder, means or posterior")
    if draws < 1:
        raise LatentPriorError(f"draws must be 1 or more, got {draws}")
    means, scales = [], []
    for x in images.batches(batch_size, device=model.device):
        if source == "posterior":
            z = torch.stack([model.infer(x, generator=generator, **options).cpu() for _ in range(draws)])
            means.append(z.mean(0))
            if draws > 1:
                scales.append(z.std(0, correction=0))
            continue
        mean, scale = model.encode(x)
        means.append(mean.cpu())
        if source == "encoder" and scale is not None:
            scales.append(scale.cpu())
        elif noise > 0:
            scales.append(torch.full_like(means[-1], noise))
    return Latents(torch.cat(means), torch.cat(scales) if scales else None)


def train_two_phase(
    model: LatentVariableModel,
    images: Images,
    config: AutoencoderConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    **fit_options: Any,
) -> LatentVariableModel:
    """Learn an autoencoder, then the prior of its latents: two functions of this package in one call.

    The first is :func:`~latentprior.train_autoencoder`, the second :func:`~latentprior.fit` on the aggregate posterior,
    with fresh draws.

    Parameters
    ----------
    model : LatentVariableModel
        The model, with an encoder; it is changed.
    images : Images
        What it learns from.
    config : AutoencoderConfig, optional
        Settings of the autoencoder.
    seed : int
        Seed of all random draws.
    checkpoint_dir : str or Path, optional
        Folder in which each phase saves its state, in a folder of its own.
    resume : bool
        Whether to go on in the phase that was stopped, if the folder holds one.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event` of both phases. What they raise ends the run.
    **fit_options
        Options of :func:`~latentprior.fit`, such as ``base``, ``settings`` and ``time_budget``.

    Returns
    -------
    LatentVariableModel
        ``model``, whose prior is the learned ladder.

    Raises
    ------
    LatentPriorError
        What the two functions raise.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from latentprior.models.networks import build_encoder, build_decoder, network_spec
    >>> images = Images((load_digits().images[:200] * 15).astype("uint8"))
    >>> spec = network_spec("mlp", latent_dim=2, width=16, image_shape=images.shape)
    >>> g = torch.Generator().manual_seed(0)
    >>> model = LatentVariableModel(build_decoder(spec, g), encoder=build_encoder(spec, g))
    >>> model = train_two_phase(model, images, AutoencoderConfig(steps=20), base="gmm:2", max_stages=0)
    >>> model.prior.base.name, model.generate(3, generator=g).shape
    ('gmm', torch.Size([3, 1, 8, 8]))
    """
    config, callbacks = config or AutoencoderConfig(), tuple(callbacks)
    phases = [phase_folder(checkpoint_dir, name) for name in ("autoencoder", "prior")]
    train_autoencoder(model, images, config, seed=seed, checkpoint_dir=phases[0], resume=resume, callbacks=callbacks)
    noisy = config.kind == "ae"
    latents = aggregate_posterior(model, images, source="means" if noisy else "encoder", noise=config.noise * noisy)
    return refit_prior(
        model, latents, seed=seed, checkpoint_dir=phases[1], resume=resume, callbacks=callbacks, **fit_options
    )


def refit_prior(
    model: LatentVariableModel, latents: Latents, *, seed: int = 0, **fit_options: Any
) -> LatentVariableModel:
    """Learn another prior for a model, whose networks stay as they are.

    Joint learning can end with it: a last ladder on posterior draws of the finished decoder, from a mixture.

    Parameters
    ----------
    model : LatentVariableModel
        The model; its prior is replaced.
    latents : Latents
        Latents of the model's images, such as :func:`aggregate_posterior` gives.
    seed : int
        Seed of all random draws.
    **fit_options
        Options of :func:`~latentprior.fit`.

    Returns
    -------
    LatentVariableModel
        ``model``.
    """
    model.prior = fit(latents, seed=seed, device=model.device, **fit_options)
    return model
