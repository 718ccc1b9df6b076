"""Draws that joint learning contrasts: latents of images under the posterior, and latents under the ladder."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..density.sampling import langevin
from ..models.inference import posterior_density, short_run
from ..runtime.processes import joined
from .joint_task import JointTask

__all__ = ["PosteriorChains", "PriorChains"]

POOL_BATCHES = 64
LEAST_POOL_ROWS = 1024
"""Size of a pool of fresh particles. Drawn for many batches at once, they cost less each."""


class PosteriorChains:
    r"""Short runs of Langevin dynamics that draw latents of images from their posteriors (eq. 5).

    Parameters
    ----------
    task : JointTask
        What the parts of joint learning share.
    """

    def __init__(self, task: JointTask) -> None:
        self.task = task
        self.latents: Tensor | None = None
        """Where the chain of every image stands, ``(images, d)`` on the CPU, if chains persist."""
        if task.config.posterior_start == "persistent":
            self.latents = task.model.prior.base.sample(len(task.images), task.draws("latents")).cpu()

    def sample(self, x: Tensor, index: Tensor | None = None, use: str = "posterior") -> Tensor:
        r"""Return draws of :math:`p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)`.

        Parameters
        ----------
        x : Tensor
            Images ``(b, C, H, W)``.
        index : Tensor, optional
            Indices ``(b,)`` of the images, for chains that persist.
        use : str
            What the draws are for; each use has random numbers of its own.

        Returns
        -------
        Tensor
            Standardised latents ``(b, d)``.

        Raises
        ------
        LearningDivergedError
            When chains have run away.
        """
        task, config = self.task, self.task.config
        draws = task.draws_of_step(use)
        coordinates = None
        if config.posterior_start == "encoder":
            coordinates = task.model.posterior_coordinates(x)
            start = langevin.noise_like(x.new_empty(len(x), task.model.prior.whitening.loc.numel()), draws)
            if not config.precondition:
                start, coordinates = coordinates(start), None
        elif config.posterior_start == "persistent" and self.latents is not None and index is not None:
            start = self.latents[index].to(task.device)
        else:
            start = task.model.prior.base.sample(len(x), draws)
        density = posterior_density(task.decode, task.log_prior, x, task.model.sigma)
        size = task.pace * config.posterior_step_size
        # Eq. 5: z <- z + s^2 / 2 grad log p(x | z) p_k(z) + s noise.
        u = short_run(start, density, coordinates, steps=config.posterior_steps, step_size=size, generator=draws)
        task.check_near(u, "posterior")
        if self.latents is not None and index is not None:
            self.latents[joined(task.processes, index)] = joined(task.processes, u).to(self.latents)
        return u

    def sample_held_out(self, use: str = "held-out posterior") -> Tensor:
        """Return one draw for every held-out image, ``(held_out, d)``.

        Parameters
        ----------
        use : str
            What the draws are for.
        """
        # Each part has draws of its own: with shared starts the rows would depend on one another, and the standard
        # error of the gain would be too small.
        parts = enumerate(self.task.held_out_images().split(self.task.config.batch_size))
        return torch.cat([self.sample(part, use=f"{use} {i}") for i, part in parts])

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`restore` needs."""
        return {} if self.latents is None else {"latents": self.latents}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The tensors of the state.
        """
        if self.latents is not None:
            self.latents = tensors["latents"].clone()


class PriorChains:
    r"""Draws of the ladder so far, :math:`p_k`, to contrast those of the posterior with.

    Parameters
    ----------
    task : JointTask
        What the parts of joint learning share.
    """

    def __init__(self, task: JointTask) -> None:
        self.task = task
        self.restart()

    def restart(self) -> None:
        """Forget all chains and particles: the ladder has changed."""
        self.chains: Tensor | None = None
        """Where the chains stand, ``(b, d)``, if they persist."""
        self.pool = torch.empty(0)
        """Fresh particles that were not used yet, ``(n, d)``."""

    def sample(self, n: int) -> Tensor:
        r"""Return draws of :math:`p_k`: exact ones of the base while there is no stage.

        Parameters
        ----------
        n : int
            Number of draws.

        Returns
        -------
        Tensor
            Standardised latents ``(n, d)``.

        Raises
        ------
        LearningDivergedError
            When chains have run away.
        """
        task, config, ladder = self.task, self.task.config, self.task.ladder
        draws = task.draws_of_step("prior")
        if ladder.length == 0:
            return ladder.base.sample(n, draws)
        if config.prior_sampler == "particles":
            return self._particles(n)
        start = self.chains if self.chains is not None and len(self.chains) == n else ladder.base.sample(n, draws)
        size = task.pace * config.prior_step_size
        density = ladder.density(ladder.length)
        u = langevin.sample(start, density, steps=config.prior_steps, step_size=size, generator=draws)
        task.check_near(u, "prior")
        self.chains = u if config.prior_sampler == "persistent" else None
        return u

    def _particles(self, n: int) -> Tensor:
        """Rows of a pool of fresh particles, each used once."""
        if len(self.pool) < n:
            draws = self.task.draws_of_step("particles")
            rows = max(POOL_BATCHES * n, LEAST_POOL_ROWS)
            self.pool = self.task.ladder.fresh_particles(rows, draws).position
            order = torch.randperm(len(self.pool), generator=draws, device=draws.device)
            self.pool = self.pool[order.to(self.pool.device)]
        taken, self.pool = self.pool[:n], self.pool[n:]
        return taken

    def state(self) -> dict[str, Tensor]:
        """Return what :meth:`restore` needs."""
        tensors = {} if self.chains is None else {"chains": self.chains}
        return tensors | ({"pool": self.pool} if len(self.pool) else {})

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was called, in the first process.

        Parameters
        ----------
        tensors : mapping of str to Tensor
            The tensors of the state.
        """
        self.restart()
        # The chains are those of the first process. Another one would use the same particles twice.
        if self.task.processes.rank == 0:
            self.chains = tensors["chains"].clone().to(self.task.device) if "chains" in tensors else None
            self.pool = tensors["pool"].clone().to(self.task.device) if "pool" in tensors else self.pool
