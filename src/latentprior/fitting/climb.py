"""The one loop that climbs: learn a log ratio, measure it on fresh particles, keep it where it is worth its while."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from functools import partial

import torch

from ..density.ladder import FreshParticles, Ladder, Pass, Stage, passed_afresh
from ..errors import LearningDivergedError, LearningRetriedWarning, warn
from .particles import StageParticles
from .run import FitRun
from .stage import LearnedStage, StageLearner

__all__ = ["Measure", "climb", "measured_afresh"]

LEAST_ACCEPTANCE = 0.01
"""Share of accepted moves below which particles of sequential Monte Carlo have stood still."""
RETRY_FACTOR = 0.25
"""Factor on the learning rate of a stage that has diverged and is learned once more."""

Measure = Callable[[StageLearner, LearnedStage, FreshParticles, bool], tuple[Pass, FreshParticles | None]]
"""How a learned stage's constant is found: from its learner, what it has learned, the particles that it learned from,
and whether it is the last one. Returns the pass and the particles of the longer ladder, None where no stage can
follow."""


def climb(
    run: FitRun,
    ladder: Ladder,
    begin_stage: Callable[[Ladder], StageLearner],
    most_stages: int,
    *,
    measure: Measure | None = None,
    deadline: Callable[[StageLearner], float | None] = lambda learner: None,
    save: Callable[[Ladder, StageLearner | None], None] = lambda ladder, learner: None,
) -> tuple[Ladder, str]:
    """Add stages until there is a reason to stop; return the ladder and the reason.

    The reasons are ``max_stages``; ``time_budget``; ``no gain``, where a stage does not tell held-out rows from
    particles by two standard errors; ``no rise``, where it does not raise the held-out log density by 0.05 nats and two
    standard errors (:attr:`Stage.is_worthwhile`); and ``few draws``, where no particles can be had for another stage.

    ``begin_stage`` makes the learner of the next stage from the ladder below it, ``measure`` finds its constant (by
    default :func:`measured_afresh`), ``deadline`` says when its learning must end, and ``save`` is called with the
    ladder and the learner at every evaluation, and with the ladder alone after every stage. Raises
    :class:`LearningDivergedError` where a stage has diverged twice.
    """
    particles: FreshParticles | None = None
    seconds = 0.0
    while ladder.length < most_stages:
        if not run.budget.time_for(seconds):
            return ladder, "time_budget"
        begin, learner = time.monotonic(), begin_stage(ladder)
        limit = deadline(learner)
        before = particles or learner.particles()
        run.tell("stage", learner.index, learner.step, learner.settings.steps, message=before.source)
        learned, found = _learned(
            run, learner, before, limit, measure or measured_afresh, ladder.length + 1 == most_stages,
            partial(save, ladder),
        )  # fmt: skip
        if found is None:
            return ladder, "no gain" if learned.history else "time_budget"
        passed, particles = found
        seconds = time.monotonic() - begin
        longer = ladder.times(
            learned.ratio, passed, learned.gain, learner.target.held_out,
            seconds=seconds, steps=learned.steps, saturated=learned.saturated, history=learned.history,
        )  # fmt: skip
        if not run.processes.first(longer.stages[-1].is_worthwhile):
            return ladder, "no rise"
        ladder = longer
        save(ladder, None)
        run.tell("learned", learner.index, learner.step, learner.settings.steps, learned.gain)
        if particles is None and ladder.length < most_stages:
            return ladder, "few draws"
    return ladder, "max_stages"


def _learned(
    run: FitRun,
    learner: StageLearner,
    before: FreshParticles,
    deadline: float | None,
    measure: Measure,
    last: bool,
    save: Callable[[StageLearner], None],
) -> tuple[LearnedStage, tuple[Pass, FreshParticles | None] | None]:
    """Learn a stage, and measure it if it has gained; once more at a quarter of the rate where it diverges."""
    begin = time.monotonic()

    def on_evaluate(now: StageLearner) -> None:
        save(now)
        run.tell_of("evaluate", now)

    while True:
        try:
            # Callers encode and fit in one torch.no_grad() block.
            with torch.enable_grad():
                learned = learner.learn(
                    before, deadline=deadline, on_step=partial(run.tell_of, "step"), on_evaluate=on_evaluate
                )
            if not learned.has_gained:
                return learned, None
            last = last or not run.budget.time_for(time.monotonic() - begin)
            return learned, measure(learner, learned, before, last)
        except LearningDivergedError as error:
            # This also holds for a run that was resumed at its second attempt.
            if learner.learning_rate < learner.settings.learning_rate:
                raise
            rate = RETRY_FACTOR * learner.learning_rate
            warn(f"{error}; learned once more at {rate:g}", LearningRetriedWarning)
            learner = learner.anew(learning_rate=rate)


def measured_afresh(
    learner: StageLearner, learned: LearnedStage, before: FreshParticles, last: bool
) -> tuple[Pass, FreshParticles]:
    """Compare log Z of a fresh pass with the stage to that of the pass it learned from.

    Raises :class:`LearningDivergedError` for particles that follow no density.
    """
    longer = learner.ladder.extended(Stage(learned.ratio))
    above = StageParticles(longer, learner.seed, learner.device, learner.processes)
    after = above.measuring(learner.chunk_rows) if last else above.teaching(learner.chunk_rows)
    c = after.log_normalizer.value
    if not math.isfinite(c) or not after.acceptance >= LEAST_ACCEPTANCE:
        raise LearningDivergedError(
            f"stage {learner.index}: its particles cannot be moved (log Z {c:.3g}, acceptance {after.acceptance:.3f}) "
            f"at learning rate {learner.learning_rate:g}; lower learning_rate or bound, or look for extreme rows in "
            "the latents"
        )
    return passed_afresh(before, after), after
