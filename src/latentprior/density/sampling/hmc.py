"""Hamiltonian Monte Carlo on a population, its step size adapted to an acceptance rate."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import LogDensity, mala
from .langevin import noise_like
from .mala import MALAInfo, MALAState, accept

__all__ = ["init", "sample", "step"]

TARGET_ACCEPTANCE = 0.75


def init(position: Tensor, log_density: LogDensity, step_size: float | None = None) -> MALAState:
    r"""Start chains; the default step size is :math:`0.8\, d^{-1/4}`, the scaling of a unit normal."""
    return mala.init(position, log_density, step_size or 0.8 * position.shape[1] ** -0.25)


def step(
    state: MALAState, log_density: LogDensity, leapfrog_steps: int = 8, generator: torch.Generator | None = None
) -> tuple[MALAState, MALAInfo]:
    r"""Refresh momenta, follow :math:`H(z, v) = -\log p(z) + \frac12\|v\|^2` by leapfrog, accept by Metropolis.

    Leaves p invariant for fixed step size and number of leapfrog steps (Neal 2011).
    """
    z, value, grad, s = state
    momentum = noise_like(z, generator)
    v = momentum + 0.5 * s * grad
    new_z, new_value, new_grad = z, value, grad
    for i in range(leapfrog_steps):
        new_z = new_z + s * v
        new_value, new_grad = log_density(new_z)
        v = v + (s if i < leapfrog_steps - 1 else 0.5 * s) * new_grad
    log_ratio = new_value - value + 0.5 * (momentum.square().sum(1) - v.square().sum(1))
    keep, probability = accept(log_ratio, generator)
    column = keep[:, None]
    moved = MALAState(
        torch.where(column, new_z, z), torch.where(keep, new_value, value), torch.where(column, new_grad, grad), s
    )
    return moved, MALAInfo(probability)


def sample(
    position: Tensor,
    log_density: LogDensity,
    *,
    steps: int = 40,
    leapfrog_steps: int = 8,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Run chains: half the steps adapt the step size, the rest keep it. Returns positions and mean acceptance."""
    move = partial(step, log_density=log_density, leapfrog_steps=leapfrog_steps, generator=generator)
    return mala.run(init(position, log_density, step_size), move, steps, TARGET_ACCEPTANCE)
