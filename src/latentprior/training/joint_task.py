"""What the parts of joint learning share, and how far learning is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..data.images import Images
from ..density.ladder import Ladder
from ..errors import LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.processes import Processes, agreed
from ..runtime.seeding import derived_generator
from .config import TrainingConfig
from .resumable import epoch_rows

__all__ = ["JointTask"]

FARTHEST_STANDARDISED = 1e4
"""Of 10^8 standardised rows none lies farther out; single ones of a heavy tail may."""
MOST_RUNAWAY_SHARE = 0.01
"""Share of chains that may be farther out before learning counts as diverged."""


class JointTask:
    """What the parts of joint learning share: model, images, settings, processes, and the numbers of steps so far.

    Every random draw is a function of the seed, its use and these numbers.

    Parameters
    ----------
    model : LatentVariableModel
        The model that learns.
    images : Images
        What it learns from. After a shuffle the first ``config.held_out`` of them are held out.
    config : TrainingConfig
        The settings.
    seed : int
        Seed of all random draws.
    processes : Processes
        Those that learn one model together.
    """

    def __init__(
        self, model: LatentVariableModel, images: Images, config: TrainingConfig, seed: int, processes: Processes
    ) -> None:
        config.check(len(images), encoder=model.encoder is not None, processes=processes.count)
        self.model, self.images, self.config, self.seed = model, images, config, seed
        self.processes, self.device = processes, model.device
        order = torch.randperm(len(images), generator=self.draws("split", cpu=True))
        self.train_rows, self.held_out_rows = order[config.held_out :], order[: config.held_out]
        self.step = 0
        """Steps of the stage that is being learned."""
        self.updates = 0
        """Steps of the decoder, in all stages and after them."""
        self.settled = 0
        """Steps of the decoder after the last stage."""
        self.pace = 1.0
        """Factor on learning rates and step sizes: a quarter once learning has diverged."""

    @property
    def stage(self) -> int:
        """Index k of the stage that is being learned."""
        return len(self.model.prior.stages)

    @property
    def ladder(self) -> Ladder:
        """The ladder so far, in standardised coordinates."""
        return self.model.prior.ladder

    def draws(self, *keys: int | str, cpu: bool = False) -> torch.Generator:
        """Return the generator of one use.

        Parameters
        ----------
        *keys : int or str
            What the draws are for.
        cpu : bool
            Whether to draw on the CPU, and not on the device of the model.

        Returns
        -------
        torch.Generator
            The same generator for the same keys.
        """
        return derived_generator(torch.device("cpu") if cpu else self.device, self.seed, "train", *keys)

    def draws_of_step(self, use: str) -> torch.Generator:
        """Return the generator of one use in the current step; each process has another one.

        Parameters
        ----------
        use : str
            What the draws are for.

        Returns
        -------
        torch.Generator
            The same generator in the same step.
        """
        return self.draws(use, self.updates, self.processes.rank)

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return the images of the current step, ``(b, C, H, W)``, and their indices: this process's share of both."""
        size = self.config.batch_size
        rows = epoch_rows(len(self.train_rows), self.updates * size, size, lambda k: self.draws("epoch", k, cpu=True))
        index = self.train_rows[rows][self.processes.rank :: self.processes.count]
        return self._read(index), index

    def held_out_images(self) -> Tensor:
        """Return the images that train nothing, ``(held_out, C, H, W)``."""
        return self._read(self.held_out_rows)

    def decode(self, u: Tensor) -> Tensor:
        """Return the images of latents.

        Parameters
        ----------
        u : Tensor
            Standardised latents ``(n, d)``.

        Returns
        -------
        Tensor
            Images ``(n, C, H, W)``.
        """
        prior = self.model.prior
        x: Tensor = self.model.decoder(prior.whitening.unwhiten(u).reshape(len(u), *self.model.event_shape))
        return x

    def log_prior(self, u: Tensor) -> Tensor:
        r"""Return :math:`\log p_k` of latents, up to a constant.

        Parameters
        ----------
        u : Tensor
            Standardised latents ``(n, d)``.

        Returns
        -------
        Tensor
            Log densities ``(n,)``, nats.
        """
        return self.ladder.base.log_prob(u) + self.ladder.log_potential(u)

    def rate(self, rate: float) -> float:
        """Return a learning rate as it is in the current epoch.

        Parameters
        ----------
        rate : float
            The rate of the first epoch.

        Returns
        -------
        float
            The rate, which falls from epoch to epoch.
        """
        epochs = self.updates * self.config.batch_size // len(self.train_rows)
        return self.pace * rate * self.config.decay**epochs

    def finite(self, loss: Tensor, name: str) -> float:
        """Return the number of a loss, after a check.

        Parameters
        ----------
        loss : Tensor
            A scalar.
        name : str
            What the loss is of.

        Returns
        -------
        float
            The loss of this process.

        Raises
        ------
        LearningDivergedError
            Where the loss of any process is not finite.
        """
        value = float(loss.detach())
        if not math.isfinite(agreed(self.processes, value, self.device)):
            raise self.diverged(f"the {name}'s loss is not finite")
        return value

    def check_near(self, u: Tensor, name: str) -> None:
        """Check that chains have stayed where latents are.

        Parameters
        ----------
        u : Tensor
            Where the chains stand, standardised, ``(n, d)``.
        name : str
            What the chains are of.

        Raises
        ------
        LearningDivergedError
            Where more than one chain in a hundred has run away.
        """
        gone = float((~(u.detach().abs() < FARTHEST_STANDARDISED)).any(1).float().mean())
        if agreed(self.processes, gone, self.device) > MOST_RUNAWAY_SHARE:
            raise self.diverged(f"{gone:.0%} of the {name} chains have run away")

    def diverged(self, what: str) -> LearningDivergedError:
        """Return the error that says what has diverged, where, and how to mend it.

        Parameters
        ----------
        what : str
            What has happened.

        Returns
        -------
        LearningDivergedError
            The error, to be raised.
        """
        return LearningDivergedError(
            f"stage {self.stage}: {what} at step {self.step}; lower learning_rate, posterior_step_size or "
            "prior_step_size, or look for extreme images"
        )

    def state(self) -> dict[str, Any]:
        """Return what :meth:`restore` needs."""
        return {"step": self.step, "updates": self.updates, "settled": self.settled, "pace": self.pace}

    def restore(self, document: Mapping[str, Any]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        document : mapping
            The state.
        """
        self.step, self.updates = int(document["step"]), int(document["updates"])
        self.settled, self.pace = int(document["settled"]), float(document["pace"])

    def _read(self, index: Tensor) -> Tensor:
        return self.images.batch(index, device=self.device).to(self.model.prior.dtype)
