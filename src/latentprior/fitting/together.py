"""Fresh particles and normalisers by several processes, each of which makes a share and learns what all have found."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from ..density import normalizers
from ..density.ladder import HELD_OUT_FRACTION, LEAST_EFFECTIVE_SHARE, PROBE_DRAWS, FreshParticles, Ladder
from ..density.normalizers import Bracket, Normalizer
from ..density.sampling.resampling import combine_parts
from ..runtime.processes import Processes, in_unison

__all__ = ["estimate", "expected_seconds", "fresh_particles"]

ISLANDS = 16
"""Independent islands of sequential Monte Carlo, over all processes."""


def fresh_particles(
    ladder: Ladder,
    n: int,
    generator: torch.Generator,
    processes: Processes,
    *,
    draws: int | None = None,
    smc_particles: int = 32_768,
) -> FreshParticles:
    """Make this process's share of ``n`` rows as :meth:`Ladder.fresh_particles` does; all decide the same.

    log Z, the effective share and the acceptance are those of all processes together. Raises
    :class:`LearningDivergedError` in all processes where one cannot go on.
    """
    if processes.count == 1:
        return ladder.fresh_particles(n, generator, draws=draws, smc_particles=smc_particles)
    rows = processes.share(n)
    with in_unison(processes):
        if not ladder.ratios:
            return ladder.exact_particles(rows, generator)
        probe = processes.share(PROBE_DRAWS)
        expected = combine_parts(processes.gather(ladder.probe(probe, generator)), probe)
        if expected.ess >= LEAST_EFFECTIVE_SHARE:
            own_draws = processes.share(draws or 2 * n)
            own = ladder.resampled_particles(rows, generator, own_draws)
            total = combine_parts(processes.gather(own.log_normalizer), own_draws)
            if total.ess >= LEAST_EFFECTIVE_SHARE:
                return own._replace(log_normalizer=total, ess=total.ess)
        # An eighth of each process's islands is held out whole.
        islands = max(processes.share(ISLANDS), HELD_OUT_FRACTION)
        own = ladder.carried_particles(min(rows, processes.share(smc_particles)), generator, islands=islands)
    total = combine_parts(processes.gather(own.log_normalizer), islands)
    acceptance = processes.gather(own.acceptance)
    return own._replace(
        log_normalizer=total, ess=min(processes.gather(own.ess)), acceptance=sum(acceptance) / len(acceptance)
    )


def estimate(
    ladder: Ladder, held_out: Tensor, generator: torch.Generator, processes: Processes, *, deadline: float | None = None
) -> Normalizer:
    """Estimate log Z as :func:`~latentprior.density.normalizers.estimate` does, from all processes' islands."""
    if processes.count == 1 or ladder.length == 0:
        return normalizers.estimate(ladder, held_out, generator, deadline=deadline)
    count, islands = processes.count, processes.share(ISLANDS)
    particles = normalizers.BRACKET_PARTICLES
    if deadline is not None:
        half = normalizers.BRACKET_SHARE * count * (deadline - time.monotonic())
        affordable = normalizers.affordable(ladder, held_out, half, normalizers.BRACKET_MOVES, particles)
        particles = processes.first(affordable)
    with in_unison(processes):
        own = normalizers.bracket(
            ladder, processes.stripe(held_out), generator, particles=processes.share(particles), islands=islands
        )
    forward = combine_parts(processes.gather(own.forward), islands)
    # The islands of the data's end estimate 1 / Z: it is these that are averaged.
    inverse = combine_parts([part._replace(value=-part.value) for part in processes.gather(own.reverse)], islands)
    ends = Bracket(forward, inverse._replace(value=-inverse.value))
    draws = processes.share(normalizers.MOST_DRAWS)
    with in_unison(processes):
        # The mean of several estimates has an error smaller by the root of their number.
        part = normalizers.importance_estimate(
            ladder, generator, draws=draws, tolerance=normalizers.TOLERANCE_NATS * count**0.5, deadline=deadline
        )
    direct = combine_parts(processes.gather(part), draws)
    result = normalizers.concluded(direct, ends, count * islands)
    normalizers.warn_of_bracket(result, count * islands)
    return result


def expected_seconds(ladder: Ladder, held_out: Tensor, processes: Processes) -> float:
    """About what :func:`estimate` takes; the same in every process."""
    return processes.first(normalizers.expected_seconds(ladder, held_out) / processes.count)
