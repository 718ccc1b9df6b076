"""The part of joint learning that learns the decoder, and the encoder if there is one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..density.sampling import langevin
from ..errors import LatentPriorError
from ..models.inference import log_gaussian
from ..runtime.run import State
from .joint_task import JointTask
from .trained_network import TrainedNetwork

__all__ = ["DecoderLearner"]

NEW_ERROR_SHARE = 0.01
"""Share of the newest step in the average of the squared error that learned sigma follows: it spans 100 steps."""
LEAST_SIGMA = 1e-3


class DecoderLearner:
    """The decoder and the encoder, as they learn from posterior draws.

    Parameters
    ----------
    task : JointTask
        What the parts of joint learning share.
    """

    def __init__(self, task: JointTask) -> None:
        self.task = task
        model, config = task.model, task.config
        networks = {"decoder": model.decoder} | ({} if model.encoder is None else {"encoder": model.encoder})
        module = torch.nn.ModuleDict(networks).requires_grad_(True).train()
        optimizer = torch.optim.Adam(module.parameters(), config.learning_rate, betas=(0.5, 0.999))
        # The networks may have been trained before: their weights count as one update.
        self.networks = TrainedNetwork(module, optimizer, config.average, count=1)
        self.error = model.sigma**2
        """Moving average of the squared error a pixel."""

    def update(self, x: Tensor, posterior: Tensor) -> dict[str, float]:
        r"""Ascend :math:`\log p_\theta(x \mid z^+)` (eq. 8), and teach the encoder.

        Parameters
        ----------
        x : Tensor
            Images ``(b, C, H, W)``.
        posterior : Tensor
            Their posterior draws, standardised, ``(b, d)``.

        Returns
        -------
        dict
            The losses by name.

        Raises
        ------
        LearningDivergedError
            When the loss is not finite.
        """
        task, model = self.task, self.task.model
        squared = (task.decode(posterior) - x).square().flatten(1).sum(1)
        # Eq. 8: minus log p(x | z+), up to a constant.
        loss = squared.mean() / (2 * model.sigma**2)
        error = squared.detach().mean() / x[0].numel()
        losses = {"reconstruction": float(error)}
        if task.config.learn_sigma:
            task.processes.average([error])
            self.error = (1 - NEW_ERROR_SHARE) * self.error + NEW_ERROR_SHARE * float(error)
            model.sigma = max(LEAST_SIGMA, math.sqrt(self.error))
        if model.encoder is not None:
            encoder_loss = self.encoder_loss(x, posterior)
            loss = loss + encoder_loss
            losses["encoder"] = float(encoder_loss.detach())
        self.networks.descend(loss, task.rate(task.config.learning_rate), task.processes)
        task.finite(loss, "decoder")
        task.updates += 1
        return losses

    def encoder_loss(self, x: Tensor, posterior: Tensor) -> Tensor:
        r"""Return minus :math:`\log q(z^+ \mid x)`, or, if chains are preconditioned, minus the evidence lower bound.

        A diagonal q that follows the draws of a correlated posterior is as wide as its marginals. Draws of it then lie
        off the posterior, and so do chains in its scales. The bound makes q as narrow as the conditionals.

        Parameters
        ----------
        x : Tensor
            Images ``(b, C, H, W)``.
        posterior : Tensor
            Their posterior draws, standardised, ``(b, d)``.

        Returns
        -------
        Tensor
            A scalar in nats an image.
        """
        task, model = self.task, self.task.model
        assert model.encoder is not None
        out = model.encoder(x)
        if not isinstance(out, tuple):
            raise LatentPriorError("joint learning needs an encoder that returns (mean, scale): give one, or none")
        mean, scale = (part.flatten(1) for part in out)
        if not task.config.precondition:
            z = model.prior.whitening.unwhiten(posterior)
            loss: Tensor = (0.5 * ((z - mean) / scale).square() + scale.log()).sum(1).mean()
            return loss
        noise = langevin.noise_like(mean, task.draws_of_step("bound"))
        u = model.prior.whitening.whiten(mean + scale * noise)
        # The decoder learns from the chains alone.
        model.decoder.requires_grad_(False)
        likelihood = log_gaussian(x, task.decode(u), model.sigma)
        model.decoder.requires_grad_(True)
        bound: Tensor = (likelihood + task.log_prior(u) + scale.log().sum(1)).mean()
        return -bound

    def state(self) -> State:
        """Return what :meth:`restore` needs."""
        document, tensors = self.networks.state()
        return document | {"error": self.error, "sigma": self.task.model.sigma}, tensors

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The tensors of the state.
        """
        self.networks.restore(document, tensors)
        self.error, self.task.model.sigma = float(document["error"]), float(document["sigma"])
