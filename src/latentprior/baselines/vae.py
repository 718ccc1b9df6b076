"""The variational autoencoder, under N(0, I) and under a mixture or a flow that is fitted to its latents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.images import Images
from ..data.latents import Latents
from ..errors import LatentPriorError
from ..models.model import LatentVariableModel, standard_normal_prior
from ..runtime.events import Callback
from ..training.config import AutoencoderConfig
from ..training.resumable import phase_folder
from ..training.two_phase import aggregate_posterior, refit_prior, train_autoencoder

__all__ = [
    "LatentFlowConfig",
    "LatentGMMConfig",
    "VAEConfig",
    "fit_prior",
    "start_over",
    "train_latent_flow",
    "train_latent_gmm",
    "train_vae",
]


@dataclass(frozen=True)
class VAEConfig:
    """How the autoencoder is learned; a cosine schedule and averaged weights as for the package's own.

    Parameters
    ----------
    steps : int
        Steps of Adam.
    batch_size : int
        Images of a step.
    learning_rate : float
        Adam's rate at the first step, which falls to zero on a cosine.
    learn_sigma : bool
        Whether sigma is kept at its optimum (Rybkin, Daniilidis and Levine 2021), which makes the stronger VAE; else
        it stays the model's own.
    average : float
        Decay of the moving average of weights that is returned.
    """

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    learn_sigma: bool = True
    average: float = 0.999

    def autoencoder(self) -> AutoencoderConfig:
        """The same settings for :func:`~latentprior.training.two_phase.train_autoencoder`."""
        return AutoencoderConfig(
            "vae", self.steps, self.batch_size, self.learning_rate, self.learn_sigma, average=self.average
        )


@dataclass(frozen=True)
class LatentGMMConfig(VAEConfig):
    """How the VAE and the mixture are learned.

    Parameters
    ----------
    steps, batch_size, learning_rate, learn_sigma, average
        As in :class:`VAEConfig`.
    components : int, optional
        Full-covariance components of the mixture; None chooses their number by held-out log density.
    """

    components: int | None = None


@dataclass(frozen=True)
class LatentFlowConfig(VAEConfig):
    """How the VAE is learned; the flow's own training ends on held-out log density.

    Parameters
    ----------
    steps, batch_size, learning_rate, learn_sigma, average
        As in :class:`VAEConfig`.
    """


def train_vae(
    model: LatentVariableModel,
    images: Images,
    config: VAEConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
    autoencoder: LatentVariableModel | None = None,
) -> LatentVariableModel:
    r"""Ascend :math:`\mathbb E_{q(z \mid x)}\log p(x \mid z) - KL(q(z \mid x)\,\|\,N(0, I))`; returns ``model``.

    The prior is :math:`N(0, I)`.

    Parameters
    ----------
    model : LatentVariableModel
        The model to learn, with an encoder. Its networks are changed and its prior is replaced.
    images : Images
        What is learned from.
    config : VAEConfig, optional
        Settings of the learning.
    seed : int
        Seed of all random numbers.
    checkpoint_dir : str or Path, optional
        Folder that the state is saved in.
    resume : bool
        Whether to go on from the state in ``checkpoint_dir``, to the same weights.
    callbacks : iterable of callable
        Called with a :class:`~latentprior.Event` after every step.
    autoencoder : LatentVariableModel, optional
        A trained model whose weights and sigma are copied, so that no autoencoder is learned.

    Raises
    ------
    LatentPriorError
        Where ``model`` or ``autoencoder`` has no encoder, or their networks differ.

    Notes
    -----
    Source: Kingma and Welling (2014), eq. 3.
    """
    if model.encoder is None:
        raise LatentPriorError("an autoencoder needs a model with an encoder")
    start_over(model)
    if autoencoder is not None:
        _copy_networks(autoencoder, model)
        return model
    return train_autoencoder(
        model,
        images,
        (config or VAEConfig()).autoencoder(),
        seed=seed,
        checkpoint_dir=phase_folder(checkpoint_dir, "autoencoder"),
        resume=resume,
        callbacks=callbacks,
    )


def train_latent_gmm(
    model: LatentVariableModel, images: Images, config: LatentGMMConfig | None = None, **options: Any
) -> LatentVariableModel:
    r"""A VAE, then :math:`p(z) = \sum_k \pi_k \mathcal N(z; m_k, \Sigma_k)` on its aggregate posterior, by EM.

    What a user would try first. Returns ``model`` with that prior.

    Parameters
    ----------
    model, images
        As in :func:`train_vae`.
    config : LatentGMMConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume``, ``callbacks`` and ``autoencoder`` of :func:`train_vae`. With an
        ``autoencoder`` only the mixture is learned.

    Notes
    -----
    Source: Ghosh et al. (2020), section 4, for variational autoencoders.
    """
    config = config or LatentGMMConfig()
    train_vae(model, images, config, **options)
    base = "gmm" if config.components is None else f"gmm:{config.components}"
    return fit_prior(model, aggregate_posterior(model, images), options, base=base, max_stages=0)


def train_latent_flow(
    model: LatentVariableModel, images: Images, config: LatentFlowConfig | None = None, **options: Any
) -> LatentVariableModel:
    r"""A VAE, then :math:`\log p(z) = \log N(T(z); 0, I) + \log|\det J_T(z)|` on its aggregate posterior.

    What a user would try for more than a mixture: a neural spline flow T (zuko). Returns ``model`` with that prior.

    Parameters
    ----------
    model, images
        As in :func:`train_vae`.
    config : LatentFlowConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume``, ``callbacks`` and ``autoencoder`` of :func:`train_vae`. With an
        ``autoencoder`` only the flow is learned.

    Raises
    ------
    MissingExtraError
        Without the extra ``flow``.

    Notes
    -----
    Source: Durkan, Bekasov, Murray and Papamakarios (NeurIPS 2019).
    """
    train_vae(model, images, config or LatentFlowConfig(), **options)
    return fit_prior(model, aggregate_posterior(model, images), options, base="flow", max_stages=0)


def start_over(model: LatentVariableModel) -> None:
    """Give ``model`` the prior N(0, I) and the default sampler, whatever it had before.

    Parameters
    ----------
    model : LatentVariableModel
        The model, whose networks stay as they are.
    """
    model.prior = standard_normal_prior(model.event_shape).to(model.device, model.prior.dtype)
    model.sampler = {"sampler": "smc"}


def fit_prior(
    model: LatentVariableModel, latents: Latents, options: Mapping[str, Any], **fit_options: Any
) -> LatentVariableModel:
    """Give ``model`` the prior that :func:`latentprior.fit` learns on ``latents``; returns ``model``.

    Parameters
    ----------
    model : LatentVariableModel
        The model, whose networks stay as they are.
    latents : Latents
        What the prior is learned from.
    options : mapping
        Options of the rival's training function: ``seed``, ``checkpoint_dir`` and ``resume`` count here.
    **fit_options
        Options of :func:`latentprior.fit`.
    """
    return refit_prior(
        model,
        latents,
        seed=options.get("seed", 0),
        checkpoint_dir=phase_folder(options.get("checkpoint_dir"), "prior"),
        resume=options.get("resume", False),
        **fit_options,
    )


def _copy_networks(source: LatentVariableModel, target: LatentVariableModel) -> None:
    """Give ``target`` the weights and sigma of ``source``."""
    if source.encoder is None or target.encoder is None:
        raise LatentPriorError("the given autoencoder has no encoder: train one with train_autoencoder")
    try:
        target.decoder.load_state_dict(source.decoder.state_dict())
        target.encoder.load_state_dict(source.encoder.state_dict())
    except RuntimeError:
        raise LatentPriorError("the given autoencoder has other networks: build both from one network_spec") from None
    target.sigma = source.sigma
    target.requires_grad_(False).eval()
