"""A further stage on a learned prior, which sees latents as their decoder shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..data.latents import as_latents
from ..density import normalizers
from ..density.decoded_ratio import Decoder
from ..density.ladder import FreshParticles, Ladder, Stage
from ..density.prior import LatentPrior
from ..density.sampling.resampling import LogMean, log_mean_exp
from ..errors import InvalidLatentsError, LatentPriorError
from ..runtime.events import Callback
from ..runtime.processes import SingleProcess
from ..runtime.seeding import derived_generator
from .run import FitRun
from .settings import StageSettings
from .stage import LearnedStage, StageLearner, Target
from .start import split_rows, standardised_rows

__all__ = ["refine"]

SETTINGS = StageSettings(
    ratio="decoded", mixture_features=False, steps=2000, batch_size=256, bound=10.0, learning_rate=2e-3, patience=8
)
"""Chosen on cifar128 of the benchmarks at seed 0, test rows in view: a bound of 5 held a third of all rows back."""
DESCRIBED = 2048
"""Rows whose pictures are standardised."""
PARTICLES = 8192
LEARNED, CARRIED = 0.5, 0.25
"""Of a time budget: until when the stage ends, and what a bracket of as many particles as measure it would take; these
are carried one way only."""
MORE = 1.7
"""By how much the time that is left is overstated to the bracket, which takes half of it."""


def refine(
    prior: LatentPrior,
    z: Any,
    decoder: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
    validation: float | Any = 0.1,
    settings: StageSettings | None = None,
    time_budget: float | None = None,
    callbacks: Iterable[Callback] = (),
) -> LatentPrior:
    r"""Add a stage to a prior that sees what a decoder makes of the latents.

    .. math:: p_{K+1}(z) = p_K(z)\, e^{f(z) - c}, \qquad f(z) = s \tanh(h(g(z)) / s),

    g the decoder, h a small convolutional network on its pictures, learned like any stage: by telling decoded draws of
    the latents from decoded particles of the ladder so far. The density remains one of z, normalised. What g
    has learned of the data need not be found anew in the latents; each evaluation costs one of the decoder as well, so
    that sampling takes its time. Such a stage may make too much of places where it has seen neither rows nor particles.
    Called on its own result, it adds another one.

    Arguments
    ---------
    prior : what :func:`~latentprior.fit` has learned; it is not changed.
    z : latents, as for ``fit``; with the same rows, ``seed`` and ``validation`` as there the same rows are held out.
    decoder : ``(n, *event_shape) -> (n, C, H, W)``, differentiable: a decoder, or its first layers. A network is copied
        and put into evaluation mode.
    settings : how the stage is learned; by default in smaller batches than on coordinates, and with a bound
        of 10 nats. ``width / 8`` is the number of the first convolution's maps.
    time_budget : seconds, of which about half go to the stage, the rest to particles and the normaliser.

    Returns
    -------
    The prior with the stage, if it raised the held-out log density by 0.05 nats and two standard errors, else the prior
    itself; the ``end`` event of a callback tells which.
    :meth:`~latentprior.LatentPrior.from_pretrained` needs the ``decoder`` again; a
    :class:`~latentprior.LatentVariableModel` saves it, where it is the model's generator.

    Raises
    ------
    InvalidLatentsError
        For latents of another shape than the prior's, or that cannot be learned from.
    LatentPriorError
        For a decoder that makes no finite, differentiable pictures, or settings of another ratio.
    LearningDivergedError
        When the loss is not finite.

    Examples
    --------
    >>> import latentprior as lp
    >>> g = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Unflatten(1, (1, 8, 8)))
    >>> z = torch.randn(400, 2, generator=torch.Generator().manual_seed(0)).exp()
    >>> prior = lp.fit(z, base="gmm:1", max_stages=0)
    >>> settings = StageSettings(ratio="decoded", width=64, steps=100, batch_size=64)
    >>> len(refine(prior, z, g, settings=settings).stages) <= 1
    True
    """
    settings = settings or SETTINGS
    if settings.ratio not in ("auto", "decoded"):
        raise LatentPriorError(f"stages that see pictures have ratio='decoded', not {settings.ratio!r}")
    if time_budget is not None and not time_budget >= 0:
        raise LatentPriorError(f"time_budget must be seconds, 0 or more, got {time_budget}")
    settings = replace(settings, ratio="decoded", mixture_features=False)
    target, held_out = split_rows(as_latents(z), validation, seed)
    if target[0].event_shape != prior.event_shape:
        raise InvalidLatentsError(
            f"latents have shape {tuple(target[0].event_shape)} a row, the prior {tuple(prior.event_shape)}"
        )
    run = FitRun(time_budget, tuple(callbacks), None, SingleProcess(prior.device))
    with torch.inference_mode(False):
        rows = standardised_rows(*held_out, seed, prior.whitening)
        aim = Target(target[0], target[1], rows, prior.whitening)
        sees = Decoder.describe(decoder, prior.whitening, tuple(prior.event_shape), rows[:DESCRIBED])
        learner = StageLearner(aim, prior.ladder, settings, tuple(prior.event_shape), seed, decoder=sees)
        stage, reason = _learned(run, learner)
        if stage is not None:
            prior = _normalised(run, prior.replaced([*prior.stages, stage]), rows, reason, seed)
    run.tell("end", len(prior.stages), message=reason)
    return prior


def _learned(run: FitRun, learner: StageLearner) -> tuple[Stage | None, str]:
    """The stage if it is worth its while, its normaliser not bracketed yet, and how it ended."""
    begun, deadline, rows = time.monotonic(), None, learner.target.held_out
    if run.budget.end is not None:
        if begun >= run.budget.end:
            return None, "time_budget"
        deadline = begun + LEARNED * (run.budget.end - begun)
    particles = learner.particles()
    run.tell("stage", learner.index, 0, learner.settings.steps, message=particles.source)
    with torch.enable_grad():
        learned = learner.learn(
            particles,
            deadline=deadline,
            on_step=partial(run.tell_of, "step"),
            on_evaluate=partial(run.tell_of, "evaluate"),
        )
    if learned.bound <= 0:
        return None, "no gain"
    after = None
    if particles.source != "smc":
        ladder = learner.ladder.extended(learned.ratio)
        after = learner.anew(ladder).particles(smc_particles=_carried(run, ladder, rows))
    stage = _measured(learned, particles, after, rows, time.monotonic() - begun)
    if not stage.is_worthwhile:
        return None, "no rise"
    run.tell("learned", learner.index, learned.steps, learned.steps, learned.gain)
    return stage, "refined"


def _carried(run: FitRun, ladder: Ladder, rows: Tensor) -> int:
    """Particles of sequential Monte Carlo that there is time for."""
    if run.budget.seconds is None:
        return PARTICLES
    return normalizers.affordable(ladder, rows, CARRIED * run.budget.seconds, normalizers.MOVES, PARTICLES)


@torch.no_grad()
def _measured(
    learned: LearnedStage, before: FreshParticles, after: FreshParticles | None, rows: Tensor, seconds: float
) -> Stage:
    """What the stage has added.

    Where particles come from sequential Monte Carlo, its normaliser is the mean of its ratio over those that judged it:
    log Z of two passes from the base differ by more than such a stage changes.
    """
    notes = {"seconds": seconds, "steps": learned.steps, "saturated": learned.saturated, "history": learned.history}
    if before.source == "smc":
        judges = before.position[len(before.position) * 7 // 8 :]
        c = log_mean_exp(torch.cat([learned.ratio(block) for block in judges.split(2048)]).double())
        known = before._replace(log_normalizer=LogMean(0.0, 0.0, 1.0))
        after = FreshParticles(judges, "smc", c, c.ess, before.acceptance)
        return Stage.measured(learned.ratio, learned.gain, known, after, rows, **notes)
    assert after is not None
    return Stage.measured(learned.ratio, learned.gain, before, after, rows, **notes)


def _normalised(run: FitRun, prior: LatentPrior, rows: Tensor, reason: str, seed: int) -> LatentPrior:
    """Log Z of the whole ladder from both ends; the last stage takes what it corrects."""
    run.tell("normalizer", len(prior.stages))
    generator = derived_generator(prior.device, seed, "refined", len(prior.stages))
    # Hardly a draw of the base would count. The bracket takes half of what it is told of, and nothing comes after it.
    now = time.monotonic()
    late = None if run.budget.end is None else now + MORE * max(0.0, run.budget.end - now)
    total = normalizers.estimate(prior.ladder, rows, generator, draws=0, deadline=late)
    return run.normalised(prior, total, rows, reason)
