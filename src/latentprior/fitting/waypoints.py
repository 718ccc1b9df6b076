"""Waypoints between base and target: first stages for a target that one classifier tells from the base at once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..density.bases import Base
from ..density.ladder import FreshParticles, Ladder, Stage, carried
from ..density.sampling.resampling import LogMean
from ..runtime.processes import ALONE
from ..runtime.seeding import derived_generator
from .particles import StageParticles
from .rows import Target
from .settings import StageSettings
from .stage import LearnedStage, StageLearner

__all__ = ["Waypoint", "learn_waypoints"]

ISLANDS = 16
PARTICLES = 4096
MOVES = 8


class Waypoint:
    r"""Draws of :math:`u_\theta = \cos\theta\, u_0 + \sin\theta\, u`, with :math:`u_0 \sim p_0` and :math:`u \sim q`.

    The base at :math:`\theta = 0`, the target at :math:`\pi / 2`; neighbours overlap even where base and target do
    not. Source: Rhodes, Xu and Gutmann (NeurIPS 2020), eq. 5, spaced evenly in the angle.
    """

    def __init__(self, target: Target, base: Base, angle: float) -> None:
        self.target, self.base = target, base
        self.near, self.far = math.cos(angle), math.sin(angle)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows ``(n, d)`` made of training rows."""
        return self._between(self.target.draw(n, generator), generator)

    def held_out(self, n: int, generator: torch.Generator) -> Tensor:
        """``n`` rows ``(n, d)`` made of held-out rows, each of them used in turn."""
        rows = self.target.held_out
        order = torch.arange(n, device=rows.device) % len(rows)
        return self._between(rows[order], generator)

    def _between(self, u: Tensor, generator: torch.Generator) -> Tensor:
        return self.near * self.base.sample(len(u), generator) + self.far * u


@dataclass(frozen=True)
class _Positives(Target):
    """A waypoint where a stage learner looks for its target."""

    waypoint: Waypoint

    @classmethod
    def at(cls, waypoint: Waypoint, generator: torch.Generator) -> _Positives:
        target = waypoint.target
        held_out = waypoint.held_out(len(target.held_out), generator)
        return cls(target.latents, target.train, held_out, target.whitening, waypoint)

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        return self.waypoint.draw(rows, generator)


class _WaypointParticles(StageParticles):
    """Draws of a waypoint in the place of particles of the ladder: exact, and normalised like the base."""

    def __init__(self, waypoint: Waypoint, ladder: Ladder, seed: int, device: torch.device) -> None:
        super().__init__(ladder, seed, device, ALONE)
        self.waypoint = waypoint

    def fresh(self, n: int, *keys: int | str, draws: int | None = None, smc_particles: int = 0) -> FreshParticles:
        return _exact(self.waypoint.draw(n, self.generator(*keys)))

    def held_out(self, n: int, draws: int) -> FreshParticles:
        return _exact(self.waypoint.held_out(n, self.generator("held-out particles")))


def _exact(rows: Tensor) -> FreshParticles:
    return FreshParticles(rows, "base", LogMean(0.0, 0.0, 1.0), 1.0, 1.0)


def learn_waypoints(
    target: Target,
    ladder: Ladder,
    settings: StageSettings,
    event_shape: tuple[int, ...],
    seed: int,
    *,
    deadline: float | None = None,
    on_step: Callable[[StageLearner], None] = lambda learner: None,
    on_learned: Callable[[StageLearner], None] = lambda learner: None,
) -> Ladder:
    r"""Learn K = ``settings.waypoints`` stages on a ladder that has none yet.

    Stage k learns :math:`f_k \approx \log q_{k+1} / q_k` between neighbouring waypoints at the angles
    :math:`\theta_k = \frac\pi2 \frac kK`, so that :math:`\sum_k f_k \approx \log q / p_0`. No particles are needed on
    the way, and no stage sees the errors of those before it: later stages of :func:`~latentprior.fit` mend them. One
    pass of sequential Monte Carlo through all of them, on particles that trained nothing, yields every :math:`c_k`.
    What is left before the ``deadline`` (:func:`time.monotonic`) is shared out evenly.

    Raises :class:`~latentprior.errors.LearningDivergedError` when a loss is not finite.
    """
    device, base, count = target.held_out.device, ladder.base, settings.waypoints
    path = [Waypoint(target, base, 0.5 * math.pi * k / count) for k in range(count + 1)]
    learned: list[tuple[LearnedStage, float]] = []
    below = ladder
    for k in range(count):
        begin = time.monotonic()
        until = None if deadline is None else begin + (deadline - begin) / (count - k)
        positives = _Positives.at(path[k + 1], derived_generator(device, seed, k, "held-out waypoint"))
        source = _WaypointParticles(path[k], below, seed, device)
        learner = StageLearner(positives, below, settings, event_shape, seed, source=source)
        found = learner.learn(learner.particles(), deadline=until, on_step=on_step)
        learned.append((found, time.monotonic() - begin))
        below = below.extended(Stage(found.ratio))
        on_learned(learner)
    return _measured(target, ladder, learned, seed)


@torch.no_grad()
def _measured(target: Target, ladder: Ladder, learned: list[tuple[LearnedStage, float]], seed: int) -> Ladder:
    """Carry fresh particles up the ladder in one pass, which finds the constant of every stage."""
    generator = derived_generator(target.held_out.device, seed, "waypoints")
    position = ladder.base.sample(PARTICLES, generator)
    for found, seconds in learned:
        position, passed = carried(ladder, found.ratio, position, islands=ISLANDS, moves=MOVES, generator=generator)
        ladder = ladder.times(
            found.ratio, passed._replace(source="waypoints"), found.gain, target.held_out,
            seconds=seconds, steps=found.steps, saturated=found.saturated, history=found.history,
        )  # fmt: skip
    return ladder
