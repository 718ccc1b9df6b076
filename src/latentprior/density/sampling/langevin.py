"""Unadjusted Langevin dynamics: the paper's short-run sampler."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import LogDensity

__all__ = ["LangevinState", "init", "sample", "step"]


class LangevinState(NamedTuple):
    """Chains ``(n, d)``."""

    position: Tensor


def init(position: Tensor) -> LangevinState:
    """Start chains at ``position`` ``(n, d)``."""
    return LangevinState(position)


def step(
    state: LangevinState, log_density: LogDensity, step_size: float, generator: torch.Generator | None = None
) -> LangevinState:
    r"""One update :math:`z' = z + \frac{s^2}{2} \nabla\log p(z) + s\,\epsilon` (Xiao and Han 2022, eq. 5).

    Without a Metropolis correction: biased by an amount that grows with ``step_size``.
    """
    z = state.position
    _, grad = log_density(z)
    return LangevinState(z + 0.5 * step_size**2 * grad + step_size * noise_like(z, generator))


def sample(
    position: Tensor,
    log_density: LogDensity,
    *,
    steps: int = 60,
    step_size: float = 0.4,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Run ``steps`` updates from ``position`` and return where the chains stand (paper: 60 steps of 0.4)."""
    state = init(position)
    for _ in range(steps):
        state = step(state, log_density, step_size, generator)
    return state.position


def noise_like(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of a tensor's shape, type and device, drawn where the generator lives."""
    device = torch.device("cpu") if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)
