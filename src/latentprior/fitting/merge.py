"""Merging: a ladder folded into one stage, so that its cost no longer grows with the number of stages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..data.latents import as_latents
from ..density import normalizers
from ..density.ladder import Ladder, Stage
from ..density.prior import LatentPrior
from ..density.ratios import BoundedRatio, build_ratio, gain
from ..errors import MergeError
from ..runtime.seeding import derived_generator
from .settings import StageSettings

__all__ = ["merge"]

WARM_UP = 100
FLOOR = 12.0


def merge(
    prior: LatentPrior,
    held_out: Any = None,
    *,
    tolerance: float = 0.02,
    settings: StageSettings | None = None,
    pool: int = 1 << 16,
    seed: int = 0,
) -> LatentPrior:
    r"""Fold the stages into one, :math:`F(u) \approx \sum_{k<K} f_k(u)`, when that costs no density.

    F descends :math:`\mathbb E\,(F - \sum_k f_k)^2 + \frac1d \|\nabla F - \nabla\sum_k f_k\|^2` over particles of the
    ladder and draws of its base (values and gradients: Czarnecki et al. 2017, Sobolev training). Its log normaliser
    is estimated afresh, on draws that F was not fitted to, and bracketed like that of any ladder.

    Arguments
    ---------
    held_out : latents on which the densities are compared; by default fresh samples of the ladder itself.
    tolerance : most nats a row that the mean log density may fall by, a standard error included.
    settings : network and schedule of F; by default those of a stage, 1.5 times as wide.
    pool : particles, and as many base draws, that F is fitted to.

    A ladder of one stage, or none, is returned as it is. ``info["merged"]`` of the result holds the number of
    ``stages``, the fall of the log density (``drop``) and its standard error, in nats.

    Raises
    ------
    MergeError
        When the log density falls by more than the tolerance; the ladder is left as it was.
    """
    if len(prior.stages) < 2:
        return prior
    settings = settings or StageSettings(width=384, steps=3000, learning_rate=2e-3)

    def draws(*keys: int | str) -> torch.Generator:
        return derived_generator(prior.device, seed, "merge", *keys)

    if held_out is None:
        rows = prior.ladder.fresh_particles(8192, draws("compared")).position
    else:
        latents = as_latents(held_out)
        index = torch.arange(len(latents))
        z = latents.draw(index, draws("held out"), device=prior.device, dtype=prior.dtype)
        rows = prior.whitening.whiten(z)
    ratio = _distilled(prior, settings, pool, seed)
    total = normalizers.estimate(Ladder(prior.base, [ratio], prior.cover), rows, draws("normalizer"))
    with torch.no_grad():
        base = prior.base.sample(len(rows), draws("base rows"))
        told = gain(ratio(rows) - total.value, ratio(base) - total.value)
    notes = {"merged": len(prior.stages), "particles": "base", "ess": total.ess, "acceptance": 1.0}
    stage = Stage(ratio, total.value, total.stderr, told.value, told.stderr, notes)
    merged = prior.replaced([stage], total)
    with torch.no_grad():
        fall = (prior.log_prob_whitened(rows) - merged.log_prob_whitened(rows)).double()
    drop = float(fall.mean())
    stderr = math.hypot(float(fall.std(correction=0)) / math.sqrt(len(fall)), prior.normalizer.stderr, total.stderr)
    if not drop + stderr <= tolerance:
        raise MergeError(
            f"merged into one stage, the log density falls by {drop:.3f} +- {stderr:.3f} nats a row, {tolerance:g} are "
            "allowed: keep the ladder, or give a wider network or more steps (settings)"
        )
    info = {**prior.info, "merged": {"stages": len(prior.stages), "drop": drop, "stderr": stderr}}
    return prior.replaced([stage], total, info)


def _distilled(prior: LatentPrior, settings: StageSettings, pool: int, seed: int) -> BoundedRatio:
    """Fit one network to the sum of the log ratios and its gradient."""
    ladder, device = prior.ladder, prior.device
    known = [ratio for ratio in ladder.ratios if isinstance(ratio, BoundedRatio)]
    if len(known) < ladder.length:
        raise MergeError("a tilted prior holds a function of yours: merge the prior before it is tilted")
    spec = settings.spec(tuple(prior.event_shape), ladder.mixture is not None)
    spec["bound"] = sum(ratio.bound for ratio in known)
    weights = derived_generator(torch.device("cpu"), seed, "merge", "weights")
    ratio = build_ratio(spec, weights, ladder.mixture).to(device=device, dtype=prior.dtype)
    u, value, slope = _lessons(ladder, pool, derived_generator(device, seed, "merge", "lessons"))
    parameters = dict(ratio.named_parameters())
    average = {name: p.detach().clone() for name, p in parameters.items()}
    # Values are exact and particles many: there is little to be remembered.
    decay = 1e-4 if settings.weight_decay is None else settings.weight_decay
    optimizer = torch.optim.AdamW(ratio.parameters(), settings.learning_rate, weight_decay=decay)
    order = derived_generator(device, seed, "merge", "order")
    for step in range(settings.steps):
        rate = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / settings.steps))
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * rate
        index = torch.randint(len(u), (settings.batch_size,), generator=order, device=device)
        x = u[index].requires_grad_(True)
        found = ratio(x)
        (inclined,) = torch.autograd.grad(found.sum(), x, create_graph=True)
        missed = (found - value[index]).square() + (inclined - slope[index]).square().mean(1)
        # Where the ladder has next to no mass, only that it has none matters.
        loss = (missed / (1 + (-value[index] - FLOOR).clamp_min(0))).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        decay = min(settings.average, (step + 1) / (step + 10))
        with torch.no_grad():
            for name, parameter in parameters.items():
                average[name].lerp_(parameter, 1 - decay)
    ratio.load_weights(average)
    return ratio.eval().requires_grad_(False)


def _lessons(ladder: Ladder, pool: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Particles of the ladder and draws of where it starts ``(n, d)``, sums of log ratios ``(n,)`` and gradients."""
    particles = ladder.fresh_particles(pool, generator).position
    u = torch.cat([particles, ladder.start.sample(pool, generator)])
    values, slopes = [], []
    for block in u.split(8192):
        x = block.detach().requires_grad_(True)
        value = ladder.log_potential(x)
        (slope,) = torch.autograd.grad(value.sum(), x)
        values.append(value.detach())
        slopes.append(slope)
    return u, torch.cat(values), torch.cat(slopes)
