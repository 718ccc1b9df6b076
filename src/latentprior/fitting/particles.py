"""The particles that a stage tells the rows from: refreshed while it learns, and others that judge it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..density.ladder import FreshParticles, Ladder
from ..runtime.processes import Processes
from ..runtime.seeding import derived_generator
from .together import fresh_particles

__all__ = ["Negatives", "StageParticles"]

HELD_OUT_PARTICLES = 8192
DRAWS_A_HELD_OUT_PARTICLE = 8
LAST_PARTICLES, LAST_SMC_PARTICLES = 65_536, 8192
"""Particles of a pass that yields a normaliser and teaches no further stage."""


class StageParticles:
    """Where a stage's particles come from: fresh passes of the ladder below it, by random streams of its own."""

    def __init__(self, ladder: Ladder, seed: int, device: torch.device, processes: Processes) -> None:
        self.ladder, self.seed, self.device, self.processes = ladder, seed, device, processes

    def generator(self, *keys: int | str) -> torch.Generator:
        """The random stream of this stage, process and purpose."""
        return derived_generator(self.device, self.seed, self.ladder.length, *keys, *self.processes.keys)

    def fresh(self, n: int, *keys: int | str, draws: int | None = None, smc_particles: int = 32_768) -> FreshParticles:
        """A pass of about ``n`` rows over all processes, of which this one keeps its share."""
        return fresh_particles(
            self.ladder, n, self.generator(*keys), self.processes, draws=draws, smc_particles=smc_particles
        )

    def teaching(self, n: int, smc_particles: int = 32_768) -> FreshParticles:
        """The first pass, from which the stage learns and which measures all stages below it."""
        return self.fresh(n, "particles", 0, smc_particles=smc_particles)

    def measuring(self, n: int) -> FreshParticles:
        """A pass that measures the stages below and teaches none."""
        return self.fresh(min(n, LAST_PARTICLES), "particles", 0, smc_particles=LAST_SMC_PARTICLES)

    def held_out(self, n: int, draws: int) -> FreshParticles:
        """A pass that judges the stage and never teaches it."""
        return self.fresh(n, "held-out particles", draws=draws)


class Negatives:
    """The particles of one stage while it learns: some teach, refreshed every ``rows`` rows, others judge."""

    def __init__(self, source: StageParticles, first: FreshParticles, rows: int) -> None:
        self.source, self.rows, self.made_by = source, rows, first.source
        if first.source == "smc":
            # Sequential Monte Carlo is too slow to be repeated: one pass serves both purposes.
            self.teaching, self.judging = first.split()
            self.effective = source.processes.count * len(self.judging)
        else:
            draws = DRAWS_A_HELD_OUT_PARTICLE * HELD_OUT_PARTICLES
            held_out = source.held_out(HELD_OUT_PARTICLES, draws)
            self.teaching, self.judging = first.position, held_out.position
            exact = held_out.source == "base"
            self.effective = HELD_OUT_PARTICLES if exact else min(HELD_OUT_PARTICLES, int(held_out.ess * draws))

    def chunk(self, k: int) -> Tensor:
        """The rows that teach during chunk ``k``: new ones while the base yields them, else in a new order."""
        if self.made_by == "smc":
            generator = self.source.generator("order", k)
            return self.teaching[torch.randperm(len(self.teaching), generator=generator, device=generator.device)]
        if k == 0:
            return self.teaching
        return self.source.fresh(self.rows, "particles", k).position
