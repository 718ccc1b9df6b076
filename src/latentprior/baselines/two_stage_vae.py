"""The two-stage VAE: a second VAE on the latents of the first is its prior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..data.images import Images
from ..data.latents import Latents
from ..density.bases import DistributionBase
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.whitening import identity_whitening
from ..errors import CheckpointError, LatentPriorError, LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.events import TrainingEvent
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import UNFIT, load_state, locked, save_state
from ..training.resumable import foreign, images_identity, network_state, phase_folder, restore_network
from ..training.two_phase import SAVE_EVERY, aggregate_posterior
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
    with locked(folder):
        second = _learn_second(
            aggregate_posterior(model, images),
            config,
            model,
            seed,
            callbacks,
            folder,
            identity,
            options.get("resume", False),
        )
    flat = identity_whitening(math.prod(model.event_shape)).to(device=model.device, dtype=model.prior.dtype)
    model.prior = LatentPrior(Ladder(DistributionBase(second, flat)), flat, model.event_shape)
    return model


def _learn_second(
    latents: Latents,
    config: TwoStageVAEConfig,
    model: LatentVariableModel,
    seed: int,
    callbacks: Sequence[Callable[[TrainingEvent], None]],
    folder: Path | None,
    identity: str,
    resume: bool,
) -> TwoStageDistribution:
    r"""Ascend :math:`\mathbb E_{q(u|z)} \log N(z; g(u), \gamma^2 I) - KL(q(u|z)\,\|\,N(0, I))`, gamma optimal."""
    d, device, dtype = latents.dim, model.device, model.prior.dtype
    weights = derived_generator(torch.device("cpu"), seed, "second vae", "weights")
    networks = second_vae(d, config.width, config.depth, weights).to(device=device, dtype=dtype)
    encoder, decoder = networks["encoder"], networks["decoder"]
    average = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.second_learning_rate)
    everything = ("networks", networks, average, optimizer)
    begun, first, error = time.monotonic(), 0, math.nan
    if resume and folder is not None and (folder / "config.json").exists():
        document, tensors = load_state(folder, "second")
        if document.get("identity") != identity:
            raise foreign(folder)
        try:
            restore_network(*everything, tensors)
            first, error = int(document["step"]), float(document["error"])
        except UNFIT as damage:
            raise CheckpointError(f"{folder}: its checkpoint is damaged ({type(damage).__name__})") from None
    for step in range(first, config.second_steps):
        draws = derived_generator(device, seed, "second vae", step)
        rows = torch.randint(len(latents), (config.second_batch_size,), generator=draws, device=device).cpu()
        z = latents.draw(rows, draws, device=device, dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = config.second_learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.second_steps))
        mean, scale = posterior(encoder, z)
        u = mean + scale * torch.randn(mean.shape, generator=draws, device=device, dtype=dtype)
        squared = (decoder(u) - z).square().mean()
        now = float(squared.detach())
        if not math.isfinite(now):
            raise LearningDivergedError(f"the second VAE is not finite at step {step}; lower second_learning_rate")
        error = now if math.isnan(error) else (1 - ERROR_SHARE) * error + ERROR_SHARE * now
        divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).sum(1).mean()
        loss = 0.5 * d * squared / max(error, LEAST_ERROR) + divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(config.average, (step + 1) / (step + 10))
            for name, parameter in networks.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        losses: dict[str, Any] = {"reconstruction": now, "divergence": float(divergence.detach())}
        event = TrainingEvent(
            "prior", 0, step + 1, config.second_steps, losses, seconds=time.monotonic() - begun, model=model
        )
        for callback in callbacks:
            callback(event)
        if folder is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == config.second_steps):
            document = {"identity": identity, "step": step + 1, "error": error}
            save_state(folder, "second", document, network_state(*everything))
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            parameter.copy_(average[name])
    networks.requires_grad_(False).eval()
    draws = derived_generator(device, seed, "second vae", "bound")
    noise = torch.randn(config.samples, d, generator=draws, device=device, dtype=dtype)
    return TwoStageDistribution(encoder, decoder, math.sqrt(max(error, LEAST_ERROR)), noise, latents.event_shape)
