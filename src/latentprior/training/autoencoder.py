"""Learning an autoencoder: the decoder and the encoder of a model, before there is a prior."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.images import Images
from ..errors import LatentPriorError, LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.events import Callback
from ..runtime.run import Run, State
from ..runtime.seeding import derived_generator
from .config import AutoencoderConfig
from .resumable import epoch_rows, images_identity, keep_snapshot, learn_with_one_retry
from .trained_network import TrainedNetwork, cosine_rate

__all__ = ["AutoencoderConfig", "train_autoencoder"]

SAVE_STEPS = 250
SAVE_SECONDS = 20.0
"""The state is saved after so many steps, or so many seconds if the steps take longer."""
ERROR_DECAY = 0.99
"""Decay of the moving average of the squared error: it spans 100 steps."""
WARM_UP_UPDATES = 9
"""At step i the decay is at most i / (i + 9): the error of untrained networks would otherwise stay in sigma for
hundreds of steps."""
LEAST_SIGMA = 1e-3


def train_autoencoder(
    model: LatentVariableModel,
    images: Images,
    config: AutoencoderConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callback] = (),
) -> LatentVariableModel:
    r"""Learn the decoder and the encoder of a model; its prior is left as it is.

    The kind ``"vae"`` ascends
    :math:`\mathbb E_{q(z \mid x)} \log\mathcal N(x; g(z), \sigma^2 I) - KL(q(z \mid x)\,\|\,N(0, I))`. Its
    :math:`\sigma^2` stands at its optimum, the mean squared error (Rybkin, Daniilidis and Levine 2021, eq. 6), unless
    it is kept fixed. The kind ``"ae"`` descends
    :math:`\|x - g(e(x) + s\,\epsilon)\|^2 + \lambda \|e(x)\|^2 / 2` (Ghosh et al. 2020, eq. 8, with noise).

    Parameters
    ----------
    model : LatentVariableModel
        The model, with an encoder; it is changed. For the kind ``"vae"`` the encoder must return ``(mean, scale)``.
    images : Images
        What it learns from.
    config : AutoencoderConfig, optional
        The settings.
    seed : int
        Seed of all random draws.
    checkpoint_dir : str or Path, optional
        Folder where the state is saved every 250 steps or 20 seconds.
    resume : bool
        Whether to go on from the state in ``checkpoint_dir``, if there is one.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event`. What they raise ends the run, which can then be resumed.

    Returns
    -------
    LatentVariableModel
        ``model``; its networks have the moving average of their weights.

    Raises
    ------
    CheckpointError
        For a ``checkpoint_dir`` of another run, or one that another run is writing to.
    LearningDivergedError
        When the loss is not finite for the second time.
    LatentPriorError
        For a model without an encoder, or with one that does not serve.

    Warns
    -----
    LearningRetriedWarning
        When the loss is not finite for the first time: learning goes back by 250 steps at most and continues at a
        quarter of the rate.
    """
    learner = AutoencoderLearner(model, images, config or AutoencoderConfig(), seed)
    run = Run(checkpoint_dir, "autoencoder", learner.identity, callbacks)
    with run.lock():
        saved = run.load() if resume else None
        if saved is not None:
            with run.restoring():
                learner.restore(*saved)
        keep_snapshot(run, learner)
        learn_with_one_retry(run, learner, lambda: _learn(run, learner))
    learner.finish()
    return model


def _learn(run: Run, learner: AutoencoderLearner) -> None:
    """Take all steps that are left."""
    steps, saved = learner.config.steps, time.monotonic()
    while learner.step < steps:
        losses = learner.update()
        if learner.step % SAVE_STEPS == 0:
            keep_snapshot(run, learner)
        if learner.step % SAVE_STEPS == 0 or learner.step == steps or time.monotonic() - saved > SAVE_SECONDS:
            if run.folder is not None:
                run.save(*learner.state())
            saved = time.monotonic()
        run.tell("autoencoder", 0, learner.step, steps, losses=losses, model=learner.model)


class AutoencoderLearner:
    """A decoder and an encoder as they learn; all draws are functions of the seed and the step.

    Parameters
    ----------
    model : LatentVariableModel
        The model, with an encoder.
    images : Images
        What it learns from.
    config : AutoencoderConfig
        The settings.
    seed : int
        Seed of all random draws.
    """

    def __init__(self, model: LatentVariableModel, images: Images, config: AutoencoderConfig, seed: int) -> None:
        if model.encoder is None:
            raise LatentPriorError("two-phase learning needs a model with an encoder")
        self.model, self.encoder, self.images, self.config, self.seed = model, model.encoder, images, config, seed
        module = torch.nn.ModuleDict({"decoder": model.decoder, "encoder": model.encoder})
        module.requires_grad_(True).train()
        groups: list[dict[str, Any]] = [
            {"params": list(model.decoder.parameters()), "weight_decay": config.weight_decay},
            {"params": list(model.encoder.parameters()), "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        self.networks = TrainedNetwork(module, optimizer, config.average)
        shapes = [(k, tuple(v.shape)) for k, v in module.named_parameters()]
        self.identity = images_identity(("autoencoder", asdict(config), seed, model.sigma, shapes), images)
        self.step, self.pace = 0, 1.0
        self.error = 0.0
        """Moving average of the squared error a pixel."""

    @property
    def place(self) -> str:
        """How far learning is, in words."""
        return f"step {self.step}"

    def update(self) -> dict[str, float]:
        """Take one step.

        Returns
        -------
        dict
            The losses: ``"reconstruction"`` a pixel, and ``"divergence"`` in nats an image.

        Raises
        ------
        LearningDivergedError
            When the loss is not finite.
        """
        config, step = self.config, self.step
        rows = epoch_rows(len(self.images), step * config.batch_size, config.batch_size, self._order)
        x = self.images.batch(rows, device=self.model.device).to(self.model.prior.dtype)
        loss, losses = self._loss(x)
        if not math.isfinite(float(loss.detach())):
            raise LearningDivergedError(f"the autoencoder's loss is not finite at step {step}; lower learning_rate")
        self.networks.descend(loss, cosine_rate(self.pace * config.learning_rate, step, config.steps))
        self.step += 1
        return losses

    def _loss(self, x: Tensor) -> tuple[Tensor, dict[str, float]]:
        """The loss of a batch, and its parts for people; learned sigma follows the squared error."""
        config, model, step = self.config, self.model, self.step
        draws = derived_generator(model.device, self.seed, "autoencoder", step)
        out = self.encoder(x)
        if config.kind == "vae" and not isinstance(out, tuple):
            raise LatentPriorError("kind='vae' needs an encoder that returns (mean, scale): give one, or kind='ae'")
        mean, scale = out if isinstance(out, tuple) else (out, torch.zeros_like(out))
        noise = torch.randn(mean.shape, generator=draws, device=draws.device, dtype=mean.dtype)
        z = mean + (scale if config.kind == "vae" else config.noise) * noise
        squared = (model.decoder(z.reshape(len(x), *model.event_shape)) - x).square().flatten(1).sum(1).mean()
        reconstruction = float(squared.detach()) / x[0].numel()
        decay = min(ERROR_DECAY, step / (step + WARM_UP_UPDATES))
        self.error = decay * self.error + (1 - decay) * reconstruction
        if config.kind == "ae":
            penalty = 0.5 * mean.square().flatten(1).sum(1).mean()
            return squared + config.latent_penalty * penalty, {"reconstruction": reconstruction}
        if config.learn_sigma:
            model.sigma = max(LEAST_SIGMA, math.sqrt(self.error))
        divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).flatten(1).sum(1).mean()
        losses = {"reconstruction": reconstruction, "divergence": float(divergence.detach())}
        return squared / (2 * model.sigma**2) + divergence, losses

    def _order(self, epoch: int) -> torch.Generator:
        return derived_generator(torch.device("cpu"), self.seed, "epoch", epoch)

    def finish(self) -> None:
        """Give the networks their averaged weights."""
        self.networks.finish()
        if self.config.kind == "ae":
            self.model.sigma = max(LEAST_SIGMA, math.sqrt(self.error))

    def state(self) -> State:
        """Return what :meth:`restore` needs."""
        document, tensors = self.networks.state()
        own = {"step": self.step, "error": self.error, "pace": self.pace, "sigma": self.model.sigma}
        return document | own, tensors

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The second part of the state.
        """
        self.networks.restore(document, tensors)
        self.step, self.error = int(document["step"]), float(document["error"])
        self.pace, self.model.sigma = float(document["pace"]), float(document["sigma"])
