"""The variational autoencoder, whose prior is N(0, I)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.images import Images
from ..errors import LatentPriorError
from ..models.model import LatentVariableModel, standard_normal_prior
from ..runtime.events import Callback
from ..training.config import AutoencoderConfig
from ..training.resumable import phase_folder
from ..training.two_phase import train_autoencoder

__all__ = ["VAEConfig", "learn_vae", "train_vae"]


@dataclass(frozen=True)
class VAEConfig:
    """How the autoencoder is learned; a cosine schedule and averaged weights as for the package's own."""

    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    learn_sigma: bool = True
    """Sigma at its optimum (Rybkin, Daniilidis and Levine 2021), the stronger VAE; else the model's own, fixed."""
    average: float = 0.999

    def autoencoder(self) -> AutoencoderConfig:
        """The same for :func:`~latentprior.training.two_phase.train_autoencoder`."""
        return AutoencoderConfig(
            "vae", self.steps, self.batch_size, self.learning_rate, self.learn_sigma, average=self.average
        )


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

    The prior stays :math:`N(0, I)`. With a trained ``autoencoder`` its weights and sigma are taken in and nothing is
    learned. Source: Kingma and Welling (2014), eq. 3.
    """
    learn_vae(model, images, config or VAEConfig(), autoencoder, seed, callbacks, checkpoint_dir, resume)
    model.prior.info["sampler"] = {"sampler": "smc"}
    return model


def learn_vae(
    model: LatentVariableModel,
    images: Images,
    config: VAEConfig,
    autoencoder: LatentVariableModel | None,
    seed: int,
    callbacks: Iterable[Callback],
    checkpoint_dir: str | Path | None,
    resume: bool,
) -> None:
    """Give ``model`` the networks of a VAE, by training or from a trained one, and the prior N(0, I).

    Raises :class:`LatentPriorError` for an ``autoencoder`` whose networks are others.
    """
    if model.encoder is None:
        raise LatentPriorError("an autoencoder needs a model with an encoder")
    model.prior = standard_normal_prior(model.event_shape).to(model.device, model.prior.dtype)
    if autoencoder is None:
        folder = phase_folder(checkpoint_dir, "autoencoder")
        train_autoencoder(
            model,
            images,
            config.autoencoder(),
            seed=seed,
            checkpoint_dir=folder,
            resume=resume,
            callbacks=callbacks,
        )
        return
    if autoencoder.encoder is None:
        raise LatentPriorError("the given autoencoder has no encoder: train one with train_autoencoder")
    try:
        model.decoder.load_state_dict(autoencoder.decoder.state_dict())
        model.encoder.load_state_dict(autoencoder.encoder.state_dict())
    except RuntimeError:
        raise LatentPriorError("the given autoencoder has other networks: build both from one network_spec") from None
    model.sigma = autoencoder.sigma
    model.requires_grad_(False).eval()
