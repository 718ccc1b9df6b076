"""A further stage on a learned prior, which sees latents as their decoder shows them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data.latents import as_latents
from ..density import normalizers
from ..density.decoded_ratio import StandardisedDecoder
from ..density.ladder import FreshParticles, Ladder, Pass, Stage, passed_afresh
from ..density.prior import LatentPrior
from ..density.sampling.resampling import log_mean_exp
from ..errors import InvalidLatentsError, LatentPriorError
from ..runtime.events import Callback
from ..runtime.processes import SingleProcess
from ..runtime.seeding import derived_generator
from .climb import climb
from .fit import normalised
from .particles import StageParticles
from .rows import Target
from .run import FitRun
from .settings import StageSettings
from .stage import LearnedStage, StageLearner
from .start import Rows, split_rows, standardised_rows

__all__ = ["refine"]

SETTINGS = StageSettings(
    ratio="decoded", mixture_features=False, steps=2000, batch_size=256, bound=10.0, learning_rate=2e-3, patience=8
)
"""Chosen on cifar128 of the benchmarks at seed 0, with test rows in view: a bound of 5 held back a third of all
rows."""
DESCRIBED_ROWS = 2048
"""Rows whose pictures are standardised."""
MOST_PARTICLES = 8192
"""Particles of sequential Monte Carlo that measure the stage."""
STAGE_SHARE = 0.5
"""Share of a time budget after which the stage's learning ends."""
PARTICLES_SHARE = 0.25
"""Share of a time budget that a bracket of as many particles as measure the stage would take; they go one way only."""
BRACKET_SHARE = 0.85
"""Share of the time that is left then which the bracket takes: nothing comes after it."""
JUDGING_BLOCK_ROWS = 2048


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

    Here g is the decoder and h a small convolutional network on its pictures. h is learned like any stage: it tells
    decoded draws of the latents from decoded particles of the ladder so far. The density remains one of z, normalised.
    What g has learned of the data need not be found anew in the latents. Each evaluation costs one of the decoder as
    well, so that sampling takes longer. Such a stage may overrate places where it has seen neither rows nor particles.
    A call on the result adds another stage.

    Parameters
    ----------
    prior : LatentPrior
        What :func:`~latentprior.fit` has learned; it is not changed.
    z : Tensor, array, path or Latents
        Latents, as for ``fit``. With the same rows, ``seed`` and ``validation`` as there, the same rows are held out.
    decoder : callable
        ``(n, *event_shape) -> (n, C, H, W)``, differentiable: a decoder, or its first layers. A network is copied and
        put into evaluation mode.
    seed : int
        Seed of every random draw.
    validation : float or latents
        Share of the rows that is held out, or held-out latents of their own.
    settings : StageSettings, optional
        How the stage is learned; by default in smaller batches than on coordinates, and with a bound of 10 nats.
        ``width / 8`` is the number of maps of the first convolution.
    time_budget : float, optional
        Seconds that this call may take: about half go to the stage, the rest to particles and the normaliser.
    callbacks : iterable of callable
        Called with every :class:`~latentprior.Event`; the ``end`` event tells whether the stage was kept.

    Returns
    -------
    LatentPrior
        The prior with the stage, if it raised the held-out log density by 0.05 nats and two standard errors, else the
        prior itself. :meth:`~latentprior.LatentPrior.from_pretrained` needs the ``decoder`` again; a
        :class:`~latentprior.LatentVariableModel` saves it, where it is the model's decoder.

    Raises
    ------
    InvalidLatentsError
        For latents of another shape than the prior's, or that cannot be learned from.
    LatentPriorError
        For a decoder that makes no finite, differentiable pictures, or settings of another ratio.
    LearningDivergedError
        When the loss is not finite, also after a retry at a quarter of the learning rate.

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
        prior, reason = _refined(run, prior, target, held_out, decoder, settings, seed)
    run.tell("end", len(prior.stages), message=reason)
    return prior


def _refined(
    run: FitRun,
    prior: LatentPrior,
    target: Rows,
    held_out: Rows,
    decoder: Callable[[Tensor], Tensor],
    settings: StageSettings,
    seed: int,
) -> tuple[LatentPrior, str]:
    """Climb one stage; the prior with it, or the prior itself, and why."""
    rows = standardised_rows(*held_out, seed, prior.whitening)
    aim = Target(target[0], target[1], rows, prior.whitening)
    shape = tuple(prior.event_shape)
    pictures = StandardisedDecoder.describe(decoder, prior.whitening, shape, rows[:DESCRIBED_ROWS])
    begin = time.monotonic()
    limit = None if run.budget.end is None else begin + STAGE_SHARE * (run.budget.end - begin)

    def begin_stage(ladder: Ladder) -> StageLearner:
        return StageLearner(aim, ladder, settings, shape, seed, decoder=pictures)

    def measure(
        learner: StageLearner, learned: LearnedStage, before: FreshParticles, last: bool
    ) -> tuple[Pass, FreshParticles | None]:
        if before.source == "smc":
            return reweighed(learned.ratio, before), None
        longer = learner.ladder.extended(Stage(learned.ratio))
        above = StageParticles(longer, seed, learner.device, learner.processes)
        after = above.teaching(learner.chunk_rows, _affordable_particles(run, longer, rows))
        return passed_afresh(before, after), None

    most = prior.ladder.length + 1
    ladder, reason = climb(run, prior.ladder, begin_stage, most, measure=measure, deadline=lambda learner: limit)
    if ladder.length < most:
        return prior, reason
    run.tell("normalizer", most)
    generator = derived_generator(prior.device, seed, "refined", most)
    # Hardly a draw of the base would count: the bracket is all that there is.
    deadline = None if run.budget.end is None else _bracket_deadline(time.monotonic(), run.budget.end)
    total = normalizers.estimate(ladder, rows, generator, draws=0, deadline=deadline)
    facts = {"stopped": "refined", "total_seconds": run.seconds()}
    return normalised(prior.with_ladder(ladder), total, rows, **facts), "refined"


def _affordable_particles(run: FitRun, ladder: Ladder, rows: Tensor) -> int:
    """Particles of sequential Monte Carlo that there is time for."""
    if run.budget.seconds is None:
        return MOST_PARTICLES
    seconds = PARTICLES_SHARE * run.budget.seconds
    return normalizers.affordable(ladder, rows, seconds, normalizers.BRACKET_MOVES, MOST_PARTICLES)


def _bracket_deadline(now: float, end: float) -> float:
    """When an estimate must end that gives the bracket 85% of the time left until ``end``."""
    return now + BRACKET_SHARE / normalizers.BRACKET_SHARE * max(0.0, end - now)


@torch.no_grad()
def reweighed(factor: nn.Module, before: FreshParticles) -> Pass:
    """Find a constant as the mean of the factor over the particles that judged it.

    log Z of two passes of sequential Monte Carlo from the base differ by more than a stage on pictures changes.
    """
    judging = before.split()[1]
    c = log_mean_exp(torch.cat([factor(block) for block in judging.split(JUDGING_BLOCK_ROWS)]).double())
    return Pass(c, c.ess, before.acceptance, before.source)
