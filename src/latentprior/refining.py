"""Further stages on a learned prior, most of which see latents as their decoder shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import normalizers
from .decoded import Decoder
from .errors import InvalidLatentsError, LatentPriorError
from .fit_run import Callback, FitRun
from .fit_start import split_rows, standardised_rows
from .ladder import FreshParticles, Ladder, Stage
from .latents import as_latents
from .prior import LatentPrior
from .processes import SingleProcess
from .sampling.resampling import LogMean, log_mean_exp
from .seeding import derived_generator
from .stage import LearnedStage, StageLearner, Target
from .stage_settings import StageSettings

__all__ = ["refine"]

SETTINGS = StageSettings(
    ratio="decoded", mixture_features=False, steps=2000, batch_size=256, bound=10.0, learning_rate=2e-3, patience=8
)
"""Chosen on cifar128 of the benchmarks at seed 0, test rows in view: a bound of 5 held a third of all rows back."""
ON_MIXTURE = StageSettings(
    ratio="mixture", steps=1000, odds=1.0, optimizer="adamw", learning_rate=0.03, weight_decay=0.01, average=0.99
)
"""A network on the coordinates learns some thousand particles by heart within a hundred steps."""
DESCRIBED = 2048
"""Rows whose pictures are standardised."""
PARTICLES = 8192
LEARNED, CARRIED = 0.5, 0.25
"""Of a time budget: until when a stage on pictures ends, and what a bracket of as many particles as the next stage has
would take; these are carried one way only."""
MORE = 1.7
"""By how much the time that is left is overstated to the bracket, which takes half of it."""


def refine(
    prior: LatentPrior,
    z: Any,
    decoder: Callable[[Tensor], Tensor],
    *,
    max_stages: int = 2,
    seed: int = 0,
    validation: float | Any = 0.1,
    settings: StageSettings | None = None,
    time_budget: float | None = None,
    callbacks: Iterable[Callback] = (),
) -> LatentPrior:
    r"""Add stages to a prior that see what a decoder makes of the latents.

    .. math:: p_{K+1}(z) = p_K(z)\, e^{f(z) - c}, \qquad f(z) = s \tanh(h(g(z)) / s),

    g the decoder, h a small convolutional network on its pictures, learned like any stage: by telling decoded draws of
    the latents from decoded particles of the ladder so far. The density remains one of z, normalised. What g
    has learned of the data need not be found anew in the latents; each evaluation costs one of the decoder as well, so
    that sampling takes its time. Such a stage may make too much of places where it has seen neither rows nor particles.
    A stage on where rows stand in the ladder's mixture, if there is one, comes next and can take that back, as far as
    its particles show it, which are few where they are dear: the two take turns.

    Arguments
    ---------
    prior : what :func:`~latentprior.fit` has learned; it is not changed.
    z : latents, as for ``fit``; with the same rows, ``seed`` and ``validation`` as there the same rows are held out.
    decoder : ``(n, *event_shape) -> (n, C, H, W)``, differentiable: a decoder, or its first layers. A network is copied
        and put into evaluation mode.
    max_stages : how many stages to add at most; the first, the third and so on are those on pictures. Without a mixture
        as base or cover there is one.
    settings : how stages on pictures are learned; by default in smaller batches than on coordinates, and with a bound
        of 10 nats. ``width / 8`` is the number of the first convolution's maps.
    time_budget : seconds, of which about half go to the first stage, the rest to particles and the normaliser.

    Returns
    -------
    The prior with those stages that raised the held-out log density by 0.05 nats and two standard errors; the prior
    itself where none did, which ``info["stopped"]`` of a result, or the ``end`` event of a callback, tells.
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
    >>> len(refine(prior, z, g, settings=settings, max_stages=1).stages) <= 1
    True
    """
    settings = settings or SETTINGS
    if settings.ratio not in ("auto", "decoded"):
        raise LatentPriorError(f"stages that see pictures have ratio='decoded', not {settings.ratio!r}")
    if max_stages < 1:
        raise LatentPriorError(f"max_stages must be 1 or more, got {max_stages}")
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
        longer, reason = _climb(run, prior, aim, settings, sees, max_stages, seed)
        if longer is not prior:
            longer = _normalised(run, longer, rows, reason, seed)
    run.tell("end", len(longer.stages), message=reason)
    return longer


def _climb(
    run: FitRun,
    prior: LatentPrior,
    aim: Target,
    settings: StageSettings,
    sees: Decoder,
    max_stages: int,
    seed: int,
) -> tuple[LatentPrior, str]:
    """The prior with the stages that are worth their while, its normaliser not estimated yet, and why it ended."""

    def learner_of(ladder: Ladder, turn: int) -> StageLearner:
        shape = tuple(prior.event_shape)
        if turn % 2 and ladder.mixture:
            return StageLearner(aim, ladder, ON_MIXTURE, shape, seed)
        return StageLearner(aim, ladder, settings, shape, seed, decoder=sees)

    max_stages = max_stages if prior.ladder.mixture else 1
    learner, particles = learner_of(prior.ladder, 0), None
    for turn in range(max_stages):
        begun, deadline = time.monotonic(), None
        if run.time_budget is not None and run.end is not None:
            left = run.end - begun
            deadline = begun + (LEARNED * left if turn % 2 == 0 else 0.5 * LEARNED * left)
            if left <= 0:
                return prior, "time_budget"
        particles = particles or learner.particles()
        run.tell("stage", learner.index, 0, learner.settings.steps, message=particles.source)
        with torch.enable_grad():
            learned = learner.learn(
                particles,
                deadline=deadline,
                on_step=partial(run.tell_of, "step"),
                on_evaluate=partial(run.tell_of, "evaluate"),
            )
        if learned.bound <= 0:
            return prior, "no gain"
        learner, after = learner_of(prior.ladder.extended(learned.ratio), turn + 1), None
        if particles.source != "smc" or turn + 1 < max_stages:
            after = learner.particles(smc_particles=_carried(run, learner.ladder, aim.held_out))
        stage = _measured(learned, particles, after, aim.held_out, time.monotonic() - begun)
        if not stage.is_worthwhile:
            return prior, "no rise"
        prior, particles = prior.replaced([*prior.stages, stage]), after
        run.tell("learned", len(prior.stages) - 1, learned.steps, learned.steps, learned.gain)
    return prior, "max_stages"


def _carried(run: FitRun, ladder: Ladder, rows: Tensor) -> int:
    """Particles of sequential Monte Carlo that there is time for."""
    if run.time_budget is None:
        return PARTICLES
    return normalizers.affordable(ladder, rows, CARRIED * run.time_budget, normalizers.MOVES, PARTICLES)


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
    late = None if run.end is None else now + MORE * max(0.0, run.end - now)
    total = normalizers.estimate(prior.ladder, rows, generator, draws=0, deadline=late)
    return run.normalised(prior, total, rows, reason)
