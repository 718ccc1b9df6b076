"""Metropolis-adjusted Langevin algorithm on a population, its step size adapted to an acceptance rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import LogDensity
from .langevin import noise_like

__all__ = ["MALAInfo", "MALAState", "accept", "adapt", "init", "run", "sample", "step"]

TARGET_ACCEPTANCE = 0.574


class MALAState(NamedTuple):
    """Chains ``(n, d)``, their log densities ``(n,)`` and gradients ``(n, d)``, and the common step size."""

    position: Tensor
    log_density: Tensor
    grad: Tensor
    step_size: float


class MALAInfo(NamedTuple):
    """Mean acceptance probability of the update."""

    acceptance: float


def init(position: Tensor, log_density: LogDensity, step_size: float | None = None) -> MALAState:
    r"""Start chains; the default step size is the optimal scaling :math:`1.2\, d^{-1/6}` of a unit normal."""
    value, grad = log_density(position)
    return MALAState(position, value, grad, step_size or 1.2 * position.shape[1] ** (-1 / 6))


def step(
    state: MALAState, log_density: LogDensity, generator: torch.Generator | None = None
) -> tuple[MALAState, MALAInfo]:
    r"""Propose :math:`z' = z + \frac{s^2}2 \nabla\log p(z) + s\epsilon` and accept by Metropolis-Hastings.

    Leaves p invariant for a fixed step size (Roberts and Tweedie 1996).
    """
    z, value, grad, s = state
    noise = noise_like(z, generator)
    proposal = z + 0.5 * s * s * grad + s * noise
    new_value, new_grad = log_density(proposal)
    backward = (z - proposal - 0.5 * s * s * new_grad) / s
    log_ratio = new_value - value + 0.5 * (noise.square().sum(1) - backward.square().sum(1))
    keep, probability = accept(log_ratio, generator)
    column = keep[:, None]
    moved = MALAState(
        torch.where(column, proposal, z), torch.where(keep, new_value, value), torch.where(column, new_grad, grad), s
    )
    return moved, MALAInfo(probability)


def accept(log_ratio: Tensor, generator: torch.Generator | None) -> tuple[Tensor, float]:
    """Metropolis decisions ``(n,)`` and the mean acceptance probability; a NaN ratio is refused."""
    log_ratio = torch.nan_to_num(log_ratio, nan=-math.inf)
    device = torch.device("cpu") if generator is None else generator.device
    uniform = torch.rand(log_ratio.shape, generator=generator, device=device, dtype=log_ratio.dtype)
    keep = uniform.to(log_ratio.device).log() < log_ratio
    return keep, float(log_ratio.clamp_max(0).exp().mean())


def adapt(step_size: float, acceptance: float, target: float = TARGET_ACCEPTANCE, rate: float = 1.0) -> float:
    """Move a step size towards its target acceptance (Robbins-Monro on the log scale)."""
    return step_size * math.exp(rate * (acceptance - target))


def sample(
    position: Tensor,
    log_density: LogDensity,
    *,
    steps: int = 200,
    step_size: float | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, float]:
    """Run chains: half the steps adapt the step size, the rest keep it. Returns positions and mean acceptance."""
    return run(
        init(position, log_density, step_size), partial(step, log_density=log_density, generator=generator), steps
    )


def run(
    state: MALAState,
    step: Callable[[MALAState], tuple[MALAState, MALAInfo]],
    steps: int,
    target: float = TARGET_ACCEPTANCE,
) -> tuple[Tensor, float]:
    """Take ``steps`` of chains; half of them adapt the step size to the ``target`` acceptance, the rest keep it."""
    total, adapting = 0.0, steps // 2
    for i in range(steps):
        state, info = step(state)
        if i < adapting:
            rate = 1 / math.sqrt(i + 1)
            state = state._replace(step_size=adapt(state.step_size, info.acceptance, target, rate))
        else:
            total += info.acceptance
    return state.position, total / max(1, steps - adapting)
