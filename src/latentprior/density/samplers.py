"""Draws of a ladder in standardised coordinates: sequential Monte Carlo, resampling, chains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from ..errors import LatentPriorError
from .bases.base import device_of
from .ladder import LEAST_EFFECTIVE_SHARE, MOST_DRAWN_NUMBERS, Ladder
from .sampling import hmc, langevin, mala, smc
from .sampling.resampling import effective_sample_size, systematic

__all__ = ["SAMPLERS", "SAMPLE_BLOCK", "check_options", "draw"]

OPTIONS = {
    "smc": ("ess", "moves"),
    "mala": ("candidates", "steps", "step_size"),
    "hmc": ("candidates", "steps", "step_size", "leapfrog_steps"),
    "langevin": ("steps", "step_size"),
    "sir": ("candidates",),
}
SAMPLERS = tuple(OPTIONS)
SAMPLE_BLOCK = 32_768
PROBE_DRAWS = 4096


def check_options(sampler: Any, options: Mapping[str, Any]) -> None:
    """Raise :class:`LatentPriorError` for an unknown sampler, an option it does not take, or a senseless value."""
    if sampler not in SAMPLERS:
        raise LatentPriorError(f"unknown sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
    for name, value in options.items():
        if name not in OPTIONS[sampler]:
            raise LatentPriorError(f"{sampler} has no option {name!r}; it has {', '.join(OPTIONS[sampler])}")
        number = isinstance(value, Real) and not isinstance(value, bool)
        if name == "step_size":
            if value is not None and not (number and 0 < value < math.inf):
                raise LatentPriorError(f"step_size must be positive and finite, got {value!r}")
        elif name == "ess":
            if not (number and 0 < value <= 1):
                raise LatentPriorError(f"ess must be above 0 and at most 1, got {value!r}")
        else:
            least = 0 if name in ("moves", "steps") else 1
            if not (number and isinstance(value, Integral) and int(value) >= least):
                raise LatentPriorError(f"{name} must be a whole number of {least} or more, got {value!r}")


def draw(ladder: Ladder, n: int, generator: torch.Generator | None, sampler: str, options: Mapping[str, Any]) -> Tensor:
    """Rows ``(n, d)`` of the ladder by one of :data:`SAMPLERS`, as :meth:`latentprior.LatentPrior.sample` describes."""
    if not ladder.ratios and sampler != "langevin":
        return ladder.base.sample(n, generator)
    density = ladder.density(ladder.length)
    if sampler == "smc":
        return _smc(ladder, n, generator, **options)
    if sampler == "langevin":
        return langevin.sample(ladder.base.sample(n, generator), density, generator=generator, **options)
    resampling = dict(options)
    candidates = max(int(resampling.pop("candidates", 16)) * n, 4096)
    u, log_weights = ladder.importance(candidates, generator)
    u = u[systematic(log_weights, n, generator)]
    if sampler == "sir":
        return u
    chain = mala.sample if sampler == "mala" else hmc.sample
    return chain(u, density, generator=generator, **resampling)[0]


def _smc(ladder: Ladder, n: int, generator: torch.Generator | None, ess: float = 0.5, moves: int = 6) -> Tensor:
    """Carry base draws down the ladder, or jump it at once where importance weights allow that."""
    probe, log_weights = ladder.importance(PROBE_DRAWS, generator)
    share = effective_sample_size(log_weights)
    if share >= LEAST_EFFECTIVE_SHARE:
        rows = max(1, min(n, int(share * MOST_DRAWN_NUMBERS / probe.shape[1])))
        parts = []
        for done in range(0, n, rows):
            m = min(rows, n - done)
            u, log_weights = ladder.importance(math.ceil(max(m, PROBE_DRAWS) / share), generator)
            parts.append(u[systematic(log_weights, m, generator)])
        density = ladder.density(ladder.length)
        return mala.sample(torch.cat(parts), density, steps=moves, generator=generator)[0]
    # Twice the particles, of which the draws are a random half, keep families small.
    start = ladder.start.sample(max(2 * n, PROBE_DRAWS), generator)
    result = smc.run(start, ladder.path_from(ladder.start), ess=ess, moves=moves, generator=generator)
    order = torch.randperm(len(start), generator=generator, device=device_of(generator)).to(start.device)
    return result.position[order[:n]]
