"""Learning a prior from latents: the ladder's loop as a resumable state machine."""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .._version import __version__
from ..data.latents import as_latents
from ..density import normalizers
from ..density.bases import Base
from ..density.ladder import FreshParticles, Stage
from ..density.prior import LatentPrior
from ..density.whitening import Kind
from ..errors import (
    InvalidLatentsError,
    LatentPriorError,
    LearningDivergedError,
    LearningRetriedWarning,
    StageSaturatedWarning,
    warn,
)
from ..runtime.events import Callback, Event
from ..runtime.processes import Processes, in_unison, launched_processes
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import locked
from .run import FitRun, SavedFit
from .settings import StageSettings
from .stage import LearnedStage, StageLearner, Target
from .start import (
    Rows,
    checked_device,
    fit_identity,
    split_rows,
    standardised_rows,
    start_ladder,
)
from .waypoints import learn_waypoints

__all__ = ["Callback", "Event", "fit"]

SATURATED_GAIN = 1.2
LEAST_ACCEPTANCE = 0.01
"""Share of moves below which particles of sequential Monte Carlo have stood still."""


def fit(
    z: Any,
    *,
    base: str | torch.distributions.Distribution | Base = "gmm",
    max_stages: int = 20,
    seed: int = 0,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    validation: float | Any = 0.1,
    whitening: Kind | None = None,
    settings: StageSettings | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    time_budget: float | None = None,
    callbacks: Iterable[Callback] = (),
    processes: Processes | None = None,
) -> LatentPrior:
    r"""Learn :math:`p_K(z) = p_0(z) \prod_{k<K} e^{f_k(z) - c_k}` on latents.

    Stage k learns :math:`f_k \approx \log q / p_k` by classification between fresh draws of the latents and
    fresh particles of the ladder so far (Xiao and Han, NeurIPS 2022, algorithm 1, with the latents fixed). A
    pass of fresh particles that trained nothing yields :math:`c_k`. The ladder ends when the held-out gain, at the
    odds of the settings, is not above zero by two standard errors, when a stage does not raise the held-out log density
    by 0.05 nats and two standard errors (the stage is then left out), at ``max_stages``, or when ``time_budget`` runs
    out.

    Arguments
    ---------
    z : ``(n, *event_shape)`` tensor or array, a path (.npy, .npz, .safetensors), or :class:`~latentprior.Latents`.
    base : ``"gmm"`` (components chosen on held-out rows; of low-rank covariances from 192 coordinates on),
        ``"gmm:K"``, ``"gmm-lowrank"``, ``"normal"``, ``"copula"``, ``"flow"`` (extra ``flow``), or a torch Distribution
        over the user's coordinates.
    validation : share of rows held out (10,000 at most), or held-out latents of their own.
    whitening : ``"full"``, ``"diagonal"`` or ``"none"``; by default full, diagonal for the base ``"copula"``.
    settings : how a stage is learned, :class:`~latentprior.StageSettings`.
    checkpoint_dir : where the state is saved at every evaluation; with ``resume=True`` a run goes on from there
        and ends, on a CPU with the same number of threads, with the same bytes as one never stopped.
    time_budget : seconds this call may take, the normaliser included, for which what it is expected to take is kept. A
        stage that has begun is shortened to fit, and a mixture as base does without the components that time does not
        allow, and without an average of mixtures where a stage's first steps gain much; other bases take their time.
    callbacks : called with every :class:`Event`; what they raise ends the run, which can then be resumed.
    processes : which ones learn this prior together; by default all that ``accelerate launch`` or ``torchrun`` started.

    Several processes
    -----------------
    Under a launcher every process makes this call, with the same latents and arguments, and returns the same prior.
    The first one fits the base, saves and calls the callbacks; each draws its share of batches, particles and islands
    on the device that accelerate gives it. A run goes on in any number of processes. Where only one is to call, it
    passes :class:`SingleProcess() <latentprior.runtime.processes.SingleProcess>`, lest it wait for the others.

    Returns
    -------
    LatentPrior on ``device``, in ``dtype``.

    Raises
    ------
    InvalidLatentsError
        For latents that cannot be learned from.
    CheckpointError
        For a ``checkpoint_dir`` of another run, or one that another run is writing to.
    LearningDivergedError
        When a stage's loss is not finite or its particles cannot be moved, also after a retry at a quarter of the
        learning rate.
    ProcessLostError
        When another process of the run has ended.

    Warns
    -----
    LearningRetriedWarning
        When a stage diverged and is learned once more.
    StageSaturatedWarning
        When the ladder ends before it has arrived.
    NormalizerBracketWarning
        When log Z from the base and from the data differ by more than 0.1 nats.

    Examples
    --------
    >>> z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0))
    >>> settings = StageSettings(width=16, depth=1, steps=200, batch_size=64)
    >>> prior = fit(z, base="normal", max_stages=1, settings=settings)
    >>> prior.log_prob(z).shape, prior.sample((10,), generator=torch.Generator().manual_seed(1)).shape
    (torch.Size([300]), torch.Size([10, 2]))

    No stage is kept where the base has all there is to learn.

    >>> len(prior.stages), prior.base.name
    (0, 'normal')
    """
    if max_stages < 0:
        raise InvalidLatentsError(f"max_stages must not be negative, got {max_stages}")
    settings = settings or StageSettings()
    if settings.waypoints > max_stages:
        raise LatentPriorError(f"{settings.waypoints} waypoints need as many stages: raise max_stages ({max_stages})")
    if settings.ratio == "decoded":
        raise LatentPriorError('ratio="decoded" needs a decoder: fit first, and give it to latentprior.refine')
    where = checked_device(device, dtype)
    processes = processes or launched_processes(device)
    if settings.waypoints and processes.count > 1:
        raise LatentPriorError("stages between waypoints are learned in one process: pass processes=SingleProcess()")
    if processes.count > 1 or device is None:
        where = processes.device
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    run = FitRun(time_budget, tuple(callbacks), folder, processes)
    if whitening not in (None, *get_args(Kind)):
        raise LatentPriorError(f"unknown whitening {whitening!r}: choose {', '.join(get_args(Kind))}")
    if time_budget is not None and not time_budget >= 0:
        raise LatentPriorError(f"time_budget must be seconds, 0 or more, got {time_budget}")
    target, held_out = split_rows(as_latents(z), validation, seed)
    run.identity = fit_identity(target, held_out, base, seed, dtype, whitening, settings)
    if len(set(processes.gather((run.identity, max_stages, time_budget is None)))) > 1:
        raise InvalidLatentsError(
            "the processes were given different latents or settings: give the same to all, drawn with one seed"
        )
    with contextlib.ExitStack() as stack:
        with in_unison(processes):
            stack.enter_context(locked(run.folder))
        # Nothing can be learned in a caller's torch.inference_mode().
        stack.enter_context(torch.inference_mode(False))
        return _climb(run, target, held_out, base, max_stages, seed, where, dtype, whitening, settings, resume)


def _climb(
    run: FitRun,
    target: Rows,
    held_out: Rows,
    base: str | torch.distributions.Distribution | Base,
    max_stages: int,
    seed: int,
    where: torch.device,
    dtype: torch.dtype,
    whitening: Kind | None,
    settings: StageSettings,
    resume: bool,
) -> LatentPrior:
    """Stand where the run was saved, or fit the base; then add stages until there is a reason to stop."""
    given = base if isinstance(base, torch.distributions.Distribution) else None
    saved, begun, tried = None, None, None
    with in_unison(run.processes):
        if run.processes.rank == 0:
            saved = run.load_fit() if resume else None
            if saved is None:
                run.tell("base", message=base if isinstance(base, str) else type(base).__name__)
                # Stages between waypoints are a path of their own: sampling needs no cover.
                climb = max_stages > 0 and settings.waypoints == 0
                begun, tried = start_ladder(
                    target, held_out, base, seed, where, dtype, whitening, climb, settings, run.budget.deadline
                )
                saved = None if tried is None else SavedFit.of(begun, tried)
    saved = run.processes.first(saved)
    prior = run.shared(begun, given, where) if saved is None else saved.prior(given, where)
    rows = standardised_rows(*held_out, seed, prior.whitening)
    aim = Target(target[0], target[1], rows, prior.whitening)

    if settings.waypoints > len(prior.stages):
        prior = _start_on_waypoints(run, prior, aim, settings, seed)
    reason, particles = "max_stages", None
    while len(prior.stages) < max_stages:
        if not run.budget.time_for(prior.stages[-1].diagnostics.get("seconds", 0.0) if prior.stages else 0.0):
            reason = "time_budget"
            break
        learner = StageLearner(aim, prior.ladder, settings, tuple(prior.event_shape), seed, processes=run.processes)
        if run.budget.end is not None:
            extended = prior.ladder.extended(learner.ratio)
            run.budget.reserve(normalizers.expected_seconds(extended, rows, run.processes))
        if saved is not None:
            saved.restore(learner)
            saved = None
        particles = particles or learner.particles()
        run.tell("stage", learner.index, learner.step, settings.steps, message=particles.source)
        started = time.monotonic()
        learned, after = _learn(run, prior, learner, particles, len(prior.stages) + 1 == max_stages)
        if after is None:
            reason = "no gain" if learned.history else "time_budget"
            break
        stage = Stage.measured(
            learned.ratio, learned.gain, particles, after, rows,
            seconds=time.monotonic() - started, steps=learned.steps, saturated=learned.saturated,
            history=learned.history,
        )  # fmt: skip
        if not run.processes.first(stage.is_worthwhile):
            reason = "no rise"
            break
        particles = after
        prior = prior.replaced([*prior.stages, stage])
        run.save_fit(prior, None)
        run.tell("learned", learner.index, learner.step, settings.steps, learned.gain)
    return run.shared(_finish(run, prior, rows, seed, reason), given, where)


def _start_on_waypoints(
    run: FitRun, prior: LatentPrior, aim: Target, settings: StageSettings, seed: int
) -> LatentPrior:
    """Learn the stages between waypoints, saved when all of them are learned."""
    shape = tuple(prior.event_shape)
    with torch.enable_grad():
        stages = learn_waypoints(
            aim, prior.ladder, settings, shape, seed, deadline=run.budget.deadline,
            on_step=partial(run.tell_of, "step"), on_learned=partial(run.tell_of, "learned"),
        )  # fmt: skip
    prior = prior.replaced(stages)
    run.save_fit(prior, None)
    return prior


def _learn(
    run: FitRun, prior: LatentPrior, learner: StageLearner, particles: FreshParticles, last: bool
) -> tuple[LearnedStage, FreshParticles | None]:
    """Learn a stage, and draw particles of the ladder with it if it has gained; retried once where it diverges.

    The last good state is the ladder before the stage: from there it is learned at a quarter of the learning rate.
    """
    on_step, started = partial(run.tell_of, "step"), time.monotonic()

    def on_evaluate(now: StageLearner) -> None:
        run.save_fit(prior, now)
        run.tell_of("evaluate", now)

    for attempt in range(2):
        try:
            # Callers encode and fit in one torch.no_grad() block.
            with torch.enable_grad():
                learned = learner.learn(
                    particles, deadline=run.budget.deadline, on_step=on_step, on_evaluate=on_evaluate
                )
            if learned.bound <= 0:
                return learned, None
            ladder = prior.ladder.extended(learned.ratio)
            last = last or not run.budget.time_for(time.monotonic() - started)
            after = learner.anew(ladder).particles(last)
            _check_moved(after, learner.index, learner.learning_rate)
            return learned, after
        except LearningDivergedError as error:
            # A run that was resumed may be at its second attempt already.
            if attempt == 1 or learner.learning_rate < learner.settings.learning_rate:
                raise
            rate = learner.learning_rate / 4
            warn(f"{error}; learned once more at {rate:g}", LearningRetriedWarning)
            learner = learner.anew(learning_rate=rate)
    raise AssertionError("unreachable")


def _check_moved(particles: FreshParticles, stage: int, rate: float) -> None:
    """Raise :class:`LearningDivergedError` for particles that follow no density."""
    c = particles.log_normalizer.value
    if not math.isfinite(c) or not particles.acceptance >= LEAST_ACCEPTANCE:
        raise LearningDivergedError(
            f"stage {stage}: its particles cannot be moved (log Z {c:.3g}, acceptance {particles.acceptance:.3f}) at "
            f"learning rate {rate:g}; lower learning_rate or bound, or look for extreme rows in the latents"
        )


def _finish(run: FitRun, prior: LatentPrior, rows: Tensor, seed: int, reason: str) -> LatentPrior:
    """Estimate and bracket log Z on particles that trained nothing; the last stage takes what it corrects."""
    run.tell("normalizer", len(prior.stages))
    generator = derived_generator(prior.device, seed, "normalizer", *run.processes.keys)
    total = normalizers.estimate(prior.ladder, rows, generator, deadline=run.budget.end, processes=run.processes)
    if prior.stages and reason in ("max_stages", "time_budget") and prior.stages[-1].gain > SATURATED_GAIN:
        warn(
            f"the ladder ended ({reason}) while stage {len(prior.stages) - 1} still told data from samples almost "
            f"perfectly (gain {prior.stages[-1].gain:.2f} of 1.39): raise max_stages or use a better base (base='gmm')",
            StageSaturatedWarning,
        )
    done = run.normalised(prior, total, rows, reason, versions=_versions())
    run.save_fit(done, None)
    run.tell("end", len(done.stages), message=reason)
    return done


def _versions() -> dict[str, str]:
    return {"latentprior": __version__, "torch": torch.__version__, "python": platform.python_version()}
