"""The two-stage VAE: a second VAE on the latents of the first is its prior."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..data.images import Images
from ..data.latents import Latents
from ..density.bases import DistributionBase
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.whitening import identity_whitening
from ..errors import LatentPriorError, LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.run import Run
from ..runtime.seeding import derived_generator
from ..training.autoencoder import SAVE_STEPS
from ..training.resumable import images_identity, phase_folder
from ..training.trained_network import TrainedNetwork, cosine_rate
from ..training.two_phase import aggregate_posterior
from .two_stage_distribution import TwoStageDistribution, posterior, second_vae
from .vae import VAEConfig, train_vae

__all__ = ["TwoStageVAEConfig", "train_two_stage_vae"]

LEAST_ERROR = 1e-6
"""Least mean squared error of the second decoder: its root, gamma, divides."""
ERROR_SHARE = 0.01
"""Share of the newest step in the moving average of the second decoder's squared error."""


@dataclass(frozen=True)
class TwoStageVAEConfig(VAEConfig):
    """How both VAEs are learned.

    Parameters
    ----------
    steps, batch_size, learning_rate, learn_sigma, average
        As in :class:`~latentprior.baselines.VAEConfig`; ``average`` is that of the second VAE too.
    second_steps : int
        Steps of Adam on the second VAE.
    second_batch_size : int
        Latents of one of these steps.
    second_learning_rate : float
        Adam's rate at the first of these steps, which falls to zero on a cosine.
    width : int
        Units of a hidden layer of the second VAE (paper: 1,024).
    depth : int
        Hidden layers of either half of the second VAE.
    samples : int
        Draws in the bound that ``log_prob`` returns.
    """

    second_steps: int = 6000
    second_batch_size: int = 256
    second_learning_rate: float = 1e-3
    width: int = 256
    depth: int = 3
    samples: int = 64

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that nothing can be learned with."""
        for name in ("second_steps", "second_batch_size", "width", "depth", "samples"):
            if getattr(self, name) < 1:
                raise LatentPriorError(f"{name} must be 1 or more, got {getattr(self, name)}")


def train_two_stage_vae(
    model: LatentVariableModel, images: Images, config: TwoStageVAEConfig | None = None, **options: Any
) -> LatentVariableModel:
    """A VAE with learned sigma, then a second VAE of the same dimension on fresh draws of its posteriors.

    Returns ``model``, whose prior stands on a :class:`TwoStageDistribution`. A folder of it needs that distribution
    again: ``LatentVariableModel.from_pretrained(folder, prior=distribution)`` with ``model.prior.base.distribution``.

    Parameters
    ----------
    model, images
        As in :func:`~latentprior.baselines.train_vae`.
    config : TwoStageVAEConfig, optional
        Settings of the learning.
    **options
        ``seed``, ``checkpoint_dir``, ``resume``, ``callbacks`` and ``autoencoder`` of
        :func:`~latentprior.baselines.train_vae`. With an ``autoencoder`` only the second VAE is learned.

    Raises
    ------
    LearningDivergedError
        When a loss is not finite.

    Notes
    -----
    Source: Dai and Wipf (ICLR 2019), section 4.
    """
    config = config or TwoStageVAEConfig()
    options["callbacks"] = callbacks = tuple(options.get("callbacks", ()))
    train_vae(model, images, config, **options)
    folder, seed = phase_folder(options.get("checkpoint_dir"), "second"), options.get("seed", 0)
    identity = images_identity(("second", asdict(config), seed, model.sigma), images)
    run = Run(folder, "second", identity, callbacks)
    with run.lock():
        resume = options.get("resume", False)
        second = _learn_second(run, aggregate_posterior(model, images), config, model, seed, resume)
    flat = identity_whitening(math.prod(model.event_shape)).to(device=model.device, dtype=model.prior.dtype)
    model.prior = LatentPrior(Ladder(DistributionBase(second, flat)), flat, model.event_shape)
    return model


def _learn_second(
    run: Run, latents: Latents, config: TwoStageVAEConfig, model: LatentVariableModel, seed: int, resume: bool
) -> TwoStageDistribution:
    r"""Ascend :math:`\mathbb E_{q(u|z)} \log N(z; g(u), \gamma^2 I) - KL(q(u|z)\,\|\,N(0, I))`, gamma optimal."""
    d, device, dtype = latents.dim, model.device, model.prior.dtype
    weights = derived_generator(torch.device("cpu"), seed, "second vae", "weights")
    networks = second_vae(d, config.width, config.depth, weights).to(device=device, dtype=dtype)
    encoder, decoder = networks["encoder"], networks["decoder"]
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.second_learning_rate)
    second = TrainedNetwork(networks, optimizer, config.average)
    first, error = 0, math.nan
    saved = run.load() if resume and run.folder is not None else None
    if saved is not None:
        document, tensors = saved
        with run.restoring():
            second.restore(document, tensors)
            first, error = int(document["step"]), float(document["error"])
    for step in range(first, config.second_steps):
        draws = derived_generator(device, seed, "second vae", step)
        rows = torch.randint(len(latents), (config.second_batch_size,), generator=draws, device=device).cpu()
        z = latents.draw(rows, draws, device=device, dtype=dtype)
        mean, scale = posterior(encoder, z)
        u = mean + scale * torch.randn(mean.shape, generator=draws, device=device, dtype=dtype)
        squared = (decoder(u) - z).square().mean()
        now = float(squared.detach())
        if not math.isfinite(now):
            raise LearningDivergedError(f"the second VAE is not finite at step {step}; lower second_learning_rate")
        error = now if math.isnan(error) else (1 - ERROR_SHARE) * error + ERROR_SHARE * now
        divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).sum(1).mean()
        loss = 0.5 * d * squared / max(error, LEAST_ERROR) + divergence
        second.descend(loss, cosine_rate(config.second_learning_rate, step, config.second_steps))
        losses = {"reconstruction": now, "divergence": float(divergence.detach())}
        run.tell("prior", 0, step + 1, config.second_steps, losses=losses, model=model)
        if run.folder is not None and ((step + 1) % SAVE_STEPS == 0 or step + 1 == config.second_steps):
            document, tensors = second.state()
            run.save({**document, "step": step + 1, "error": error}, tensors)
    second.finish()
    draws = derived_generator(device, seed, "second vae", "bound")
    noise = torch.randn(config.samples, d, generator=draws, device=device, dtype=dtype)
    return TwoStageDistribution(encoder, decoder, math.sqrt(max(error, LEAST_ERROR)), noise, latents.event_shape)
