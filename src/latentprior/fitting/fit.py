"""Learning a prior from latents: the base, the climb and the normaliser, as a run that can be resumed."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from .._version import __version__
from ..data.latents import as_latents
from ..density.bases import Base
from ..density.ladder import Ladder, Stage
from ..density.normalizers import Normalizer
from ..density.prior import LatentPrior
from ..density.whitening import Kind
from ..errors import InvalidLatentsError, LatentPriorError, StageSaturatedWarning, warn
from ..runtime.events import Callback
from ..runtime.processes import Processes, in_unison, launched_processes
from ..runtime.seeding import derived_generator
from .climb import climb
from .rows import Target
from .run import FitRun, restored
from .settings import StageSettings
from .stage import StageLearner
from .start import FitTask, checked_device, split_rows
from .together import estimate, expected_seconds
from .waypoints import learn_waypoints

__all__ = ["fit", "normalised"]

SATURATED_GAIN_NATS = 1.2
"""Gain from which on a stage tells data from samples almost perfectly; 1.386 is the most."""


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
    pass of fresh particles that trained nothing yields :math:`c_k`. The ladder ends

    - when the held-out gain of a stage, at the odds of the settings, is not above zero by two standard errors;
    - when a stage does not raise the held-out log density by 0.05 nats and two standard errors: it is then left out;
    - at ``max_stages``;
    - when ``time_budget`` runs out.

    Parameters
    ----------
    z : Tensor, array, path or Latents
        Latents ``(n, *event_shape)``; a path leads to a .npy, .npz or .safetensors file.
    base : str, Distribution or Base
        ``"gmm"`` (components chosen on held-out rows; low-rank covariances from 192 coordinates on), ``"gmm:K"``,
        ``"gmm-lowrank"``, ``"normal"``, ``"copula"``, ``"flow"`` (extra ``flow``), or a torch Distribution over the
        user's coordinates.
    max_stages : int
        Most stages of the ladder, 0 or more.
    seed : int
        Seed of every random draw; no global random state is touched.
    device : device, optional
        Where to learn, by default the CPU.
    dtype : torch.dtype
        Floating type of the prior.
    validation : float or latents
        Share of the rows that is held out (10,000 at most), or held-out latents of their own.
    whitening : {"full", "diagonal", "none"}, optional
        How latents are standardised; by default full, and diagonal for the base ``"copula"``.
    settings : StageSettings, optional
        How a stage is learned.
    checkpoint_dir : path, optional
        Folder in which the state is saved at every evaluation.
    resume : bool
        Go on from ``checkpoint_dir``. On a CPU with the same number of threads the result has the same bytes as that of
        a run that was never stopped.
    time_budget : float, optional
        Seconds that this call may take. Time for the normaliser is reserved. A stage that has begun is shortened to
        fit; a mixture as base leaves out the components that time does not allow, and the average of mixtures where a
        stage's first steps gain more. Other bases take the time that they need.
    callbacks : iterable of callable
        Called with every :class:`~latentprior.Event`. An exception that they raise ends the run, which can then be
        resumed.
    processes : Processes, optional
        The processes that learn this prior together; by default all that ``accelerate launch`` or ``torchrun`` started.

    Returns
    -------
    LatentPrior
        On ``device``, in ``dtype``.

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

    Notes
    -----
    Under a launcher every process makes this call, with the same latents and arguments, and returns the same prior. The
    first process fits the base, saves and calls the callbacks. Each process draws its share of batches, particles and
    islands on the device that accelerate gives it. A run can go on in any number of processes. Where only one process
    is to call, it passes :class:`SingleProcess() <latentprior.runtime.processes.SingleProcess>`, so that it does not
    wait for the others.

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
    task = FitTask(target, held_out, base, seed, where, dtype, whitening, settings)
    run.identity = task.identity()
    if len(set(processes.gather((run.identity, max_stages, time_budget is None)))) > 1:
        raise InvalidLatentsError(
            "the processes were given different latents or settings: give the same to all, drawn with one seed"
        )
    with contextlib.ExitStack() as stack:
        with in_unison(processes):
            stack.enter_context(run.lock())
        # Nothing can be learned in a caller's torch.inference_mode().
        stack.enter_context(torch.inference_mode(False))
        return _fitted(run, task, max_stages, resume)


def _fitted(run: FitRun, task: FitTask, max_stages: int, resume: bool) -> LatentPrior:
    """Stand where the run was saved, or fit the base; then climb, and estimate log Z."""
    saved, start, stage_state = None, None, None
    with in_unison(run.processes):
        if run.processes.rank == 0:
            saved = run.load_fit() if resume else None
            if saved is None:
                name = task.base if isinstance(task.base, str) else type(task.base).__name__
                run.tell("base", message=name)
                # Stages between waypoints are a path of their own: sampling needs no cover.
                with_stages = max_stages > 0 and task.settings.waypoints == 0
                start, learner = task.start(with_stages, run.budget.deadline)
                stage_state = None if learner is None else learner.state()
    saved = run.processes.first(saved)
    if saved is None:
        prior = run.shared(start, task.given_distribution, task.device)
        stage_state = run.processes.first(stage_state)
    else:
        prior, stage_state = saved.prior(task.given_distribution, task.device), saved.stage_state()
    aim = task.aim(prior.whitening)

    def begin_stage(ladder: Ladder) -> StageLearner:
        nonlocal stage_state
        learner = task.learner(aim, ladder, processes=run.processes)
        if stage_state is not None:
            restored(learner, stage_state)
            stage_state = None
        return learner

    def deadline(learner: StageLearner) -> float | None:
        if run.budget.end is not None:
            longer = learner.ladder.extended(Stage(learner.ratio))
            run.budget.reserve(expected_seconds(longer, aim.held_out, run.processes))
        return run.budget.deadline

    def save(ladder: Ladder, learner: StageLearner | None) -> None:
        run.save_fit(prior.with_ladder(ladder), learner)

    if task.settings.waypoints > len(prior.stages):
        prior = prior.with_ladder(_waypoint_ladder(run, task, aim, prior.ladder))
        run.save_fit(prior, None)
    ladder, reason = climb(run, prior.ladder, begin_stage, max_stages, deadline=deadline, save=save)
    prior = _normalised(run, prior.with_ladder(ladder), aim.held_out, task.seed, reason)
    return run.shared(prior, task.given_distribution, task.device)


def _waypoint_ladder(run: FitRun, task: FitTask, aim: Target, ladder: Ladder) -> Ladder:
    """Learn the stages between waypoints."""
    with torch.enable_grad():
        return learn_waypoints(
            aim, ladder, task.settings, task.event_shape, task.seed, deadline=run.budget.deadline,
            on_step=partial(run.tell_of, "step"), on_learned=partial(run.tell_of, "learned"),
        )  # fmt: skip


def _normalised(run: FitRun, prior: LatentPrior, rows: Tensor, seed: int, reason: str) -> LatentPrior:
    """Estimate and bracket log Z on particles that trained nothing."""
    run.tell("normalizer", len(prior.stages))
    generator = derived_generator(prior.device, seed, "normalizer", *run.processes.keys)
    total = estimate(prior.ladder, rows, generator, run.processes, deadline=run.budget.end)
    if prior.stages and reason in ("max_stages", "time_budget") and prior.stages[-1].gain > SATURATED_GAIN_NATS:
        warn(
            f"the ladder ended ({reason}) while stage {len(prior.stages) - 1} still told data from samples almost "
            f"perfectly (gain {prior.stages[-1].gain:.2f} of 1.39): raise max_stages or use a better base (base='gmm')",
            StageSaturatedWarning,
        )
    prior = normalised(prior, total, rows, stopped=reason, total_seconds=run.seconds(), versions=_versions())
    run.save_fit(prior, None)
    run.tell("end", len(prior.stages), message=reason)
    return prior


def normalised(prior: LatentPrior, total: Normalizer, held_out: Tensor, **facts: Any) -> LatentPrior:
    """The prior with log Z of its whole ladder, whose last stage absorbs the correction; ``facts`` join its info."""
    ladder = prior.ladder.corrected(total.value, total.stderr)
    prior = prior.with_ladder(ladder, total, {**prior.info, **facts})
    with torch.no_grad():
        prior.info["log_prob_held_out"] = float(prior.log_prob_whitened(held_out).mean())
    return prior


def _versions() -> dict[str, str]:
    return {"latentprior": __version__, "torch": torch.__version__, "python": platform.python_version()}
