"""Hamiltonian Monte Carlo on a population, its step size adapted to an acceptance rate."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import LogDensity
from .langevin import noise_like
from .mala import accept, adapt

__all__ = ["HMCInfo", "HMCState", "init", "sample", "step"]

TARGET_ACCEPTANCE = 0.75


class HMCState(NamedTuple):
    """Chains ``(n, d)``, their log densities ``(n,)`` and gradients ``(n, d)``, and the common step size."""

    position: Tensor
    log_density: Tensor
    grad: Tensor
    step_size: float


class HMCInfo(NamedTuple):
    """Mean acceptance probability of the update."""

    acceptance: float


def init(position: Tensor, log_density: LogDensity, step_size: float | None = None) -> HMCState:
    r"""Start chains; the default step size is :math:`0.8\, d^{-1/4}`, the scaling of a unit normal."""
    value, grad = log_density(position)
    return HMCState(position, value, grad, step_size or 0.8 * position.shape[1] ** -0.25)


def step(
    state: HMCState,
    log_density: LogDensity,
    leapfrog_steps: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[HMCState, HMCInfo]:
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
    moved = HMCState(
        torch.where(column, new_z, z),
        torch.where(keep, new_value, value),
        torch.where(column, new_grad, grad),
        s,
    )
    return moved, HMCInfo(probability)


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
    state = init(position, log_density, step_size)
    total, adapting = 0.0, steps // 2
    for i in range(steps):
        state, info = step(state, log_density, leapfrog_steps, generator)
        if i < adapting:
            rate = 1 / math.sqrt(i + 1)
            state = state._replace(step_size=adapt(state.step_size, info.acceptance, TARGET_ACCEPTANCE, rate))
        else:
            total += info.acceptance
    return state.position, total / max(1, steps - adapting)
