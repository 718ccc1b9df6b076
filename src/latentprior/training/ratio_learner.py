"""The part of joint learning that learns the log ratio of one stage, and says when the stage is finished."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..density.ratios import BoundedRatio, Gain, build_ratio, gain, logistic_loss
from ..runtime.run import State
from .joint_task import JointTask
from .trained_network import TrainedNetwork

__all__ = ["RatioLearner"]

UNKNOWN = Gain(math.nan, math.nan)


class RatioLearner:
    r"""The log ratio :math:`f_k` of one stage, as it learns, with its held-out gain.

    Parameters
    ----------
    task : JointTask
        What the parts of joint learning share.
    """

    def __init__(self, task: JointTask) -> None:
        self.task = task
        config = task.config
        spec = {
            "kind": "mlp",
            "event_shape": list(task.model.event_shape),
            "width": config.ratio_width,
            "depth": config.ratio_depth,
            "bound": config.bound,
        }
        weights = task.draws("weights", task.stage, cpu=True)
        self.ratio: BoundedRatio = build_ratio(spec, weights).to(device=task.device, dtype=task.model.prior.dtype)
        optimizer = torch.optim.Adam(self.ratio.parameters(), config.ratio_learning_rate, betas=(0.5, 0.999))
        self.network = TrainedNetwork(self.ratio, optimizer, config.average)
        self.gain = UNKNOWN
        """The last held-out gain, nats."""
        self.best_gain = -math.inf
        self.waited = 0
        """Evaluations since the best one."""
        self.began = time.monotonic()

    @property
    def finished(self) -> bool:
        """Whether the stage's steps or, with the adaptive switch, its patience have run out.

        A stage whose gain has just fallen by half does not show what it can give: the posterior has moved away from
        it. With the adaptive switch it may take as many steps again.
        """
        config, step = self.task.config, self.task.step
        if config.switch != "adaptive":
            return step >= config.steps
        fall = self.best_gain - self.gain.value
        if fall > max(self.best_gain / 2, 4 * self.gain.stderr):
            return step >= 2 * config.steps
        return self.waited >= config.patience or step >= config.steps

    def update(self, posterior: Tensor, prior: Tensor) -> dict[str, float]:
        """Descend the logistic loss of the stage between posterior and prior draws (eq. 6).

        Parameters
        ----------
        posterior : Tensor
            Standardised latents ``(b, d)``.
        prior : Tensor
            Standardised latents ``(b, d)``.

        Returns
        -------
        dict
            The loss, in nats.

        Raises
        ------
        LearningDivergedError
            When the loss is not finite.
        """
        # Eq. 6.
        loss = logistic_loss(self.ratio(posterior), self.ratio(prior))
        self.descend(loss)
        return {"ratio": self.task.finite(loss, "ratio")}

    def descend(self, loss: Tensor) -> None:
        """Take one step down a loss of the ratio.

        Parameters
        ----------
        loss : Tensor
            A scalar.
        """
        self.network.descend(loss, self.task.rate(self.task.config.ratio_learning_rate), self.task.processes)

    @torch.no_grad()
    def measure(self, posterior: Tensor, prior: Tensor) -> None:
        """Measure the gain of the averaged weights, in nats, on rows that trained nothing.

        Parameters
        ----------
        posterior : Tensor
            Posterior draws of held-out images, standardised, ``(n, d)``.
        prior : Tensor
            Fresh particles of the ladder, ``(n, d)``.

        Raises
        ------
        LearningDivergedError
            When the gain is not finite.
        """
        f = [torch.func.functional_call(self.ratio, self.network.average.weights, (z,)) for z in (posterior, prior)]
        measured = torch.tensor(gain(f[0], f[1]), device=self.task.device)
        self.task.processes.average([measured])
        self.gain = Gain(*measured.tolist())
        if not math.isfinite(self.gain.value):
            raise self.task.diverged("the held-out loss is not finite")
        self.waited += 1
        if self.gain.value > self.best_gain:
            self.best_gain, self.waited = self.gain.value, 0

    def averaged_ratio(self) -> BoundedRatio:
        """Return the ratio with its averaged weights, which learn no more."""
        self.network.finish()
        return self.ratio

    def state(self) -> State:
        """Return what :meth:`restore` needs."""
        document, tensors = self.network.state()
        # JSON has neither NaN nor infinity.
        known = {
            "gain": list(self.gain) if math.isfinite(self.gain.value) else None,
            "best_gain": self.best_gain if math.isfinite(self.best_gain) else None,
        }
        return document | known | {"waited": self.waited}, tensors

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The first part of the state.
        tensors : mapping of str to Tensor
            The tensors of the state.
        """
        self.network.restore(document, tensors)
        self.gain = UNKNOWN if document["gain"] is None else Gain(*map(float, document["gain"]))
        self.best_gain = -math.inf if document["best_gain"] is None else float(document["best_gain"])
        self.waited = int(document["waited"])
