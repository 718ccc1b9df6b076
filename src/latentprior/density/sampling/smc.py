"""Sequential Monte Carlo along a path of tempered densities, in independent islands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...errors import LearningDivergedError
from . import LogDensity, mala
from .resampling import LogMean, combine_islands, effective_sample_size, systematic

__all__ = ["SMCInfo", "SMCState", "TemperedPath", "init", "run", "step"]


class TemperedPath(Protocol):
    r"""A path :math:`\log p_t(z) = \log p_0(z) + \sum_j \mathrm{clip}(t - j, 0, 1)\, f_j(z)`, t in [0, length]."""

    @property
    def length(self) -> int:
        """Number of log ratios on the path."""

    def log_ratios(self, u: Tensor) -> Tensor:
        """All :math:`f_j` at ``(n, d)``: ``(n, length)``."""

    def density(self, t: float) -> LogDensity:
        r"""Value and gradient of :math:`\log p_t`, up to a constant."""


class SMCState(NamedTuple):
    """Particles ``(n, d)`` in ``islands`` equal runs of rows, standing at ``t`` on the path."""

    position: Tensor
    t: float
    log_normalizer: Tensor
    """``(islands,)`` log ratio of normalisers gathered since the start."""
    step_size: float | None


class SMCInfo(NamedTuple):
    """Effective share of weights at a level, mean acceptance of its moves."""

    ess: float
    acceptance: float


class SMCResult(NamedTuple):
    """Particles at the path's end, the log ratio of normalisers end/start, and diagnostics."""

    position: Tensor
    log_normalizer: LogMean
    ess: float
    """Smallest effective share met at a level."""
    acceptance: float


def init(position: Tensor, t: float, islands: int = 1) -> SMCState:
    """Start from particles of :math:`p_t`; their number must be a multiple of ``islands``."""
    n = len(position)
    if n % islands:
        raise ValueError(f"{n} particles do not divide into {islands} islands")
    zeros = torch.zeros(islands, dtype=torch.float64, device=position.device)
    return SMCState(position, t, zeros, None)


def step(
    state: SMCState,
    path: TemperedPath,
    end: float,
    *,
    ess: float = 0.5,
    moves: int = 8,
    generator: torch.Generator | None = None,
) -> tuple[SMCState, SMCInfo]:
    r"""Reweigh as far towards ``end`` as the effective share of weights allows, resample, rejuvenate.

    The next t solves :math:`\mathrm{ESS}(w_t) = \alpha` by bisection (Jasra, Stephens, Doucet and Tsagaris
    2011); each island is resampled systematically within itself; then ``moves`` MALA updates of :math:`p_t`,
    their step size adapted on the way. Raises :class:`LearningDivergedError` where no weight is a number.
    """
    islands = len(state.log_normalizer)
    ratios = path.log_ratios(state.position)
    t = _next(ratios, state.t, end, ess)
    log_weights = (ratios @ _slope(state.t, t, path.length, ratios)).view(islands, -1)
    share = effective_sample_size(log_weights.flatten())
    if not math.isfinite(share):
        raise LearningDivergedError(
            f"weights of sequential Monte Carlo are not finite at {t:.3g} of its path: its log ratios have run away"
        )
    rows = log_weights.shape[1]
    gained = torch.logsumexp(log_weights.double(), 1) - math.log(rows)
    index = systematic(log_weights, rows, generator)
    index = (index + torch.arange(islands, device=index.device)[:, None] * rows).flatten()
    density = path.density(t)
    chains = mala.init(state.position[index], density, state.step_size)
    acceptance = 0.0
    for _ in range(moves):
        chains, info = mala.step(chains, density, generator)
        chains = chains._replace(step_size=mala.adapt(chains.step_size, info.acceptance, rate=0.5))
        acceptance += info.acceptance / moves
    moved = SMCState(chains.position, t, state.log_normalizer + gained, chains.step_size)
    return moved, SMCInfo(share, acceptance)


def run(
    position: Tensor,
    path: TemperedPath,
    *,
    start: float = 0.0,
    end: float | None = None,
    islands: int = 1,
    ess: float = 0.5,
    moves: int = 8,
    generator: torch.Generator | None = None,
    on_level: Callable[[int], None] | None = None,
) -> SMCResult:
    r"""Carry particles of :math:`p_{start}` to :math:`p_{end}` (backwards too) and estimate the normaliser.

    :math:`\widehat{Z_{end}/Z_{start}}` is unbiased for each island (Del Moral 2004) up to the adaptation of
    levels and step sizes; their spread gives the standard error. ``on_level`` is called before each level with the
    number of those that are done.
    """
    end = float(path.length if end is None else end)
    state = init(position, start, islands)
    lowest, acceptance, levels = 1.0, 0.0, 0
    while state.t != end:
        if on_level is not None:
            on_level(levels)
        state, info = step(state, path, end, ess=ess, moves=moves, generator=generator)
        lowest, acceptance, levels = min(lowest, info.ess), acceptance + info.acceptance, levels + 1
    mean_acceptance = acceptance / levels if levels else 1.0
    return SMCResult(state.position, combine_islands(state.log_normalizer), lowest, mean_acceptance)


def _slope(t: float, target: float, length: int, like: Tensor) -> Tensor:
    """Weights of the log ratios in ``log p_target - log p_t``."""
    stages = torch.arange(length, dtype=like.dtype, device=like.device)
    return (target - stages).clamp(0, 1) - (t - stages).clamp(0, 1)


def _next(ratios: Tensor, t: float, end: float, ess: float) -> float:
    def share(target: float) -> float:
        return effective_sample_size(ratios @ _slope(t, target, ratios.shape[1], ratios))

    if share(end) >= ess:
        return end
    near, far = t, end
    for _ in range(24):
        middle = 0.5 * (near + far)
        near, far = (middle, far) if share(middle) >= ess else (near, middle)
    return near if abs(near - t) > 1e-4 else t + math.copysign(min(1e-3, abs(end - t)), end - t)
