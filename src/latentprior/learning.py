"""Learning a prior from latents: the ladder's loop as a resumable state machine."""

from __future__ import annotations

import hashlib
import math
import platform
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from . import normalizers
from ._version import __version__
from .bases import Base, GaussianMixtureBase, fit_base
from .checkpoint import UNFIT, load_state, locked, save_state
from .errors import (
    CheckpointError,
    InvalidLatentsError,
    LatentPriorError,
    LearningDivergedError,
    LearningRetriedWarning,
    StageSaturatedWarning,
)
from .ladder import FreshParticles, Stage
from .latents import Latents, as_latents
from .prior import LatentPrior
from .ratios import Gain
from .stage import LearnedStage, StageLearner, StageSettings, Target, derived_generator
from .whitening import Kind, Whitening

__all__ = ["Callback", "Event", "fit"]

HELD_OUT_LIMIT = 10_000
BASE_ROWS = 200_000
SATURATED_GAIN = 1.2
SHORTEST_STAGE = 0.5
LEAST_ACCEPTANCE = 0.01
"""Share of moves below which particles of sequential Monte Carlo have stood still."""


@dataclass(frozen=True)
class Event:
    """What a callback hears.

    ``kind`` is ``base`` (the base is being fitted), ``stage`` (a stage begins), ``step``, ``evaluate`` (a held-out
    gain is known and, with a ``checkpoint_dir``, saved), ``learned`` (a stage joined the ladder),
    ``normalizer`` (log Z is being bracketed) or ``end``. ``gain`` is in nats; ``seconds`` since the call.
    """

    kind: Literal["base", "stage", "step", "evaluate", "learned", "normalizer", "end"]
    stage: int = 0
    step: int = 0
    steps: int = 0
    gain: float = math.nan
    gain_stderr: float = math.nan
    seconds: float = 0.0
    message: str = ""


Callback = Callable[[Event], None]


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
) -> LatentPrior:
    r"""Learn :math:`p_K(z) = p_0(z) \prod_{k<K} e^{f_k(z) - c_k}` on latents.

    Stage k learns :math:`f_k \approx \log q / p_k` by classification between fresh draws of the latents and
    fresh particles of the ladder so far (Xiao and Han, NeurIPS 2022, algorithm 1, with the latents fixed). A
    pass of fresh particles that trained nothing yields :math:`c_k`. The ladder ends when the held-out gain is
    not above zero by two standard errors, when a stage does not raise the held-out log density by 0.05 nats and
    two standard errors (the stage is then left out), at ``max_stages``, or when ``time_budget`` runs out.

    Arguments
    ---------
    z : ``(n, *event_shape)`` tensor or array, a path (.npy, .npz, .safetensors), or :class:`~latentprior.Latents`.
    base : ``"gmm"`` (components chosen on held-out rows), ``"gmm:K"``, ``"normal"``, ``"copula"``,
        ``"flow"`` (extra ``flow``), or a torch Distribution over the user's coordinates.
    validation : share of rows held out (10,000 at most), or held-out latents of their own.
    whitening : ``"full"``, ``"diagonal"`` or ``"none"``; by default full, diagonal for the base ``"copula"``.
    settings : how a stage is learned, :class:`~latentprior.StageSettings`.
    checkpoint_dir : where the state is saved at every evaluation; with ``resume=True`` a run goes on from there
        and ends, on a CPU with the same number of threads, with the same bytes as one never stopped.
    time_budget : seconds this call may take, normaliser included; a stage that has begun is shortened to fit, the
        base is not.
    callbacks : called with every :class:`Event`; what they raise ends the run, which can then be resumed.

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
    run = _Run(time_budget, tuple(callbacks), None if checkpoint_dir is None else Path(checkpoint_dir))
    settings = settings or StageSettings()
    where = _checked_device(device, dtype)
    if whitening not in (None, *get_args(Kind)):
        raise LatentPriorError(f"unknown whitening {whitening!r}: choose {', '.join(get_args(Kind))}")
    if time_budget is not None and not time_budget >= 0:
        raise LatentPriorError(f"time_budget must be seconds, 0 or more, got {time_budget}")
    target, held_out = _split(as_latents(z), validation, seed)
    run.identity = _identity(target, held_out, base, seed, dtype, whitening, settings)
    with locked(run.folder):
        return _climb(run, target, held_out, base, max_stages, seed, where, dtype, whitening, settings, resume)


def _climb(
    run: _Run,
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
    saved = run.load() if resume else None
    if saved is not None:
        prior = saved.prior(base if isinstance(base, torch.distributions.Distribution) else None, where)
        rows = _rows(*held_out, seed, prior.whitening)
    else:
        run.tell("base", message=str(base) if isinstance(base, str) else type(base).__name__)
        prior, rows = _start(target, held_out, base, seed, where, dtype, whitening, max_stages > 0)
        prior.info["log_prob_base"] = float(prior.log_prob_whitened(rows).mean())
    aim = Target(target[0], target[1], rows, prior.whitening)

    reason, particles = "max_stages", None
    while len(prior.stages) < max_stages:
        if not run.time_for(prior.stages):
            reason = "time_budget"
            break
        learner = StageLearner(aim, prior.ladder, settings, tuple(prior.event_shape), seed)
        if saved is not None:
            saved.restore(learner)
            saved = None
        particles = particles or learner.particles()
        run.tell("stage", learner.index, learner.step, settings.steps, message=particles.source)
        started = time.monotonic()
        learned, after = _learn(run, prior, learner, particles)
        if after is None:
            reason = "no gain" if learned.history else "time_budget"
            break
        stage = Stage.measured(
            learned.ratio, learned.gain, particles, after, rows,
            seconds=time.monotonic() - started, steps=learned.steps, saturated=learned.saturated,
            history=learned.history,
        )  # fmt: skip
        if not stage.is_worthwhile:
            reason = "no rise"
            break
        particles = after
        prior = prior.replaced([*prior.stages, stage])
        run.save(prior, None)
        run.tell("learned", learner.index, learner.step, settings.steps, learned.gain)
    return _finish(run, prior, rows, seed, reason)


def _learn(
    run: _Run, prior: LatentPrior, learner: StageLearner, particles: FreshParticles
) -> tuple[LearnedStage, FreshParticles | None]:
    """Learn a stage, and draw particles of the ladder with it if it has gained; retried once where it diverges.

    The last good state is the ladder before the stage: from there it is learned at a quarter of the learning rate.
    """
    steps, shape = learner.settings.steps, tuple(prior.event_shape)

    def on_step(now: StageLearner) -> None:
        run.tell("step", now.index, now.step, steps, now.best_gain)

    def on_evaluate(now: StageLearner) -> None:
        run.save(prior, now)
        run.tell("evaluate", now.index, now.step, steps, now.best_gain)

    for attempt in range(2):
        try:
            # Callers encode and fit in one torch.no_grad() block.
            with torch.enable_grad():
                learned = learner.learn(particles, deadline=run.deadline, on_step=on_step, on_evaluate=on_evaluate)
            if learned.gain.value <= 2 * learned.gain.stderr:
                return learned, None
            ladder = prior.ladder.extended(learned.ratio)
            after = StageLearner(learner.target, ladder, learner.settings, shape, learner.seed).particles()
            _check_moved(after, learner.index, learner.learning_rate)
            return learned, after
        except LearningDivergedError as error:
            # A run that was resumed may be at its second attempt already.
            if attempt == 1 or learner.learning_rate < learner.settings.learning_rate:
                raise
            rate = learner.learning_rate / 4
            warnings.warn(f"{error}; learned once more at {rate:g}", LearningRetriedWarning, stacklevel=4)
            learner = StageLearner(
                learner.target, learner.ladder, learner.settings, shape, learner.seed, learning_rate=rate
            )
    raise AssertionError("unreachable")


def _check_moved(particles: FreshParticles, stage: int, rate: float) -> None:
    """Raise :class:`LearningDivergedError` for particles that follow no density."""
    c = particles.log_normalizer.value
    if not math.isfinite(c) or not particles.acceptance >= LEAST_ACCEPTANCE:
        raise LearningDivergedError(
            f"stage {stage}: its particles cannot be moved (log Z {c:.3g}, acceptance {particles.acceptance:.3f}) at "
            f"learning rate {rate:g}; lower learning_rate or bound, or look for extreme rows in the latents"
        )


def _checked_device(device: torch.device | str | None, dtype: torch.dtype) -> torch.device:
    """The device to compute on; raises :class:`LatentPriorError` where nothing of this type can be."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LatentPriorError(f"dtype must be a floating type such as torch.float32, got {dtype}")
    try:
        where = torch.device(device or "cpu")
        torch.zeros(1, device=where, dtype=dtype).cpu()
        return where
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise LatentPriorError(f"cannot compute on device {device}: {str(error).partition(chr(10))[0]}") from None


def _finish(run: _Run, prior: LatentPrior, rows: Tensor, seed: int, reason: str) -> LatentPrior:
    """Estimate and bracket log Z on particles that trained nothing; the last stage takes what it corrects."""
    run.tell("normalizer", len(prior.stages))
    stages = list(prior.stages)
    generator = derived_generator(prior.device, seed, "normalizer")
    total = normalizers.estimate(prior.ladder, rows, generator, deadline=run.end)
    if stages:
        last = stages[-1]
        rest = sum(stage.log_normalizer for stage in stages[:-1])
        stages[-1] = Stage(
            last.network,
            total.value - rest,
            math.hypot(total.stderr, *(s.log_normalizer_stderr for s in stages[:-1])),
            last.gain,
            last.gain_stderr,
            last.diagnostics,
        )
        if reason in ("max_stages", "time_budget") and last.gain > SATURATED_GAIN:
            warnings.warn(
                f"the ladder ended ({reason}) while stage {len(stages) - 1} still told data from samples almost "
                f"perfectly (gain {last.gain:.2f} of 1.39): raise max_stages or use a better base (base='gmm')",
                StageSaturatedWarning,
                stacklevel=4,
            )
    info = {
        **prior.info,
        "stopped": reason,
        "total_seconds": run.seconds(),
        "versions": _versions(),
    }
    done = prior.replaced(stages, total, info)
    done.info["log_prob_held_out"] = float(done.log_prob_whitened(rows).mean())
    run.save(done, None)
    run.tell("end", len(stages), message=reason)
    return done


Rows = tuple[Latents, Tensor]


def _split(latents: Latents, validation: Any, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to hold out."""
    n = len(latents)
    if not isinstance(validation, (int, float)):
        held_out = as_latents(validation)
        if held_out.event_shape != latents.event_shape:
            raise InvalidLatentsError(
                f"held-out latents have shape {tuple(held_out.event_shape)} a row, latents {tuple(latents.event_shape)}"
            )
        return (latents, torch.arange(n)), (held_out, torch.arange(len(held_out)))
    if n < 2:
        raise InvalidLatentsError(f"need at least 2 rows to learn a prior, got {n}")
    if not 0 < validation < 1:
        raise InvalidLatentsError(f"validation must be a share between 0 and 1, got {validation}")
    m = max(1, min(HELD_OUT_LIMIT, round(validation * n), n - 1))
    order = torch.randperm(n, generator=derived_generator(torch.device("cpu"), seed, "split"))
    return (latents, order[m:]), (latents, order[:m])


def _rows(latents: Latents, index: Tensor, seed: int, whitening: Whitening) -> Tensor:
    """Draw rows once and standardise them."""
    loc = whitening.loc
    z = latents.draw(index, derived_generator(loc.device, seed, "held-out"), device=loc.device, dtype=loc.dtype)
    return whitening.whiten(z)


def _start(
    target: Rows,
    held_out: Rows,
    base: str | torch.distributions.Distribution | Base,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind | None,
    climb: bool,
) -> tuple[LatentPrior, Tensor]:
    """Standardise, and fit the base: a ladder of no stages.

    A base that is no mixture gets one beside it, as cover for importance sampling on the way up.
    """
    latents, train = target
    kind = kind or ("diagonal" if base == "copula" else "full")
    streams = derived_generator(torch.device("cpu"), seed, "whitening")
    whitening = Whitening.fit(latents.blocks(streams), kind).to(device=device, dtype=dtype)
    _check_precision(whitening)
    rows = _rows(*held_out, seed, whitening)
    generator = derived_generator(device, seed, "base")
    pick = torch.randperm(len(train), generator=derived_generator(torch.device("cpu"), seed, "base rows"))
    some = train[pick[:BASE_ROWS]]
    u = whitening.whiten(latents.draw(some, generator, device=device, dtype=dtype))
    fitted = fit_base(base, u, rows, whitening, generator)
    cover = None
    if climb and fitted.name != "gmm":
        near = fit_base("gmm", u, rows, whitening, derived_generator(device, seed, "cover"))
        cover = near if isinstance(near, GaussianMixtureBase) else None
    return LatentPrior(fitted, (), whitening, latents.event_shape, cover=cover), rows


def _check_precision(whitening: Whitening) -> None:
    """Raise where rounding in the prior's floating type is coarser than a hundredth of a standard deviation."""
    info = torch.finfo(whitening.loc.dtype)
    spread, centre = whitening.inverse.double().norm(dim=1), whitening.loc.double().abs()
    lost = ~((spread > 100 * info.tiny) & (spread < 0.001 * info.max) & (info.eps * centre < 0.01 * spread))
    if lost.any():
        raise InvalidLatentsError(
            f"latent coordinate(s) {lost.nonzero().flatten().tolist()[:5]} are too large, small or far from zero for "
            f"{whitening.loc.dtype}: shift and rescale them, or pass dtype=torch.float64"
        )


def _identity(
    target: Rows,
    held_out: Rows,
    base: str | torch.distributions.Distribution | Base,
    seed: int,
    dtype: torch.dtype,
    whitening: Kind | None,
    settings: StageSettings,
) -> str:
    """A digest of everything that decides the outcome: settings, and a sample of the rows."""
    digest = hashlib.sha256()
    name = base if isinstance(base, str) else type(base).__name__
    if isinstance(base, torch.distributions.Distribution):
        plain = Whitening.fit(target[0].blocks(torch.Generator().manual_seed(0)), "none")
        rows = target[0].draw(target[1][:16], torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(fit_base(base, rows, rows, plain).log_prob(rows).detach().numpy().tobytes())
    digest.update(repr((name, seed, str(dtype), whitening, asdict(settings))).encode())
    for latents, index in (target, held_out):
        digest.update(repr((tuple(latents.event_shape), len(index), latents.is_posterior)).encode())
        some = index[torch.linspace(0, len(index) - 1, min(64, len(index))).long()]
        rows = latents.draw(some, torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    return {"latentprior": __version__, "torch": torch.__version__, "python": platform.python_version()}


class _Run:
    """Clock, callbacks and checkpoints of one call."""

    def __init__(self, time_budget: float | None, callbacks: tuple[Callback, ...], folder: Path | None) -> None:
        self.begun = time.monotonic()
        self.before = 0.0
        self.time_budget = time_budget
        self.end = None if time_budget is None else self.begun + time_budget
        # The rest is kept for the normaliser.
        self.deadline = None if time_budget is None else self.begun + 0.8 * time_budget
        self.callbacks, self.folder = callbacks, folder
        self.identity = ""

    def seconds(self) -> float:
        return self.before + time.monotonic() - self.begun

    def tell(
        self,
        kind: Literal["base", "stage", "step", "evaluate", "learned", "normalizer", "end"],
        stage: int = 0,
        step: int = 0,
        steps: int = 0,
        gain: Gain | None = None,
        message: str = "",
    ) -> None:
        value, stderr = gain or Gain(math.nan, math.nan)
        for callback in self.callbacks:
            callback(Event(kind, stage, step, steps, value, stderr, self.seconds(), message))

    def time_for(self, stages: tuple[Stage, ...]) -> bool:
        if self.deadline is None:
            return True
        left = self.deadline - time.monotonic()
        last = stages[-1].diagnostics.get("seconds", 0.0) if stages else 0.0
        return left > SHORTEST_STAGE * last and left > 0

    def save(self, prior: LatentPrior, learner: StageLearner | None) -> None:
        if self.folder is None:
            return
        config, tensors = prior.state()
        document: dict[str, Any] = {"identity": self.identity, "seconds": self.seconds(), "prior": config}
        everything = {f"prior.{k}": v for k, v in tensors.items()}
        if learner is not None:
            document["learner"], part = learner.state()
            everything.update({f"learner.{k}": v for k, v in part.items()})
        save_state(self.folder, "fit", document, everything)

    def load(self) -> _Saved | None:
        if self.folder is None:
            raise CheckpointError("resume=True needs the checkpoint_dir of the run to go on with")
        if not (self.folder / "config.json").exists():
            return None
        document, tensors = load_state(self.folder, "fit")
        if document.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.folder}: holds a run on other latents or settings; choose another folder, or do not resume"
            )
        try:
            self.before = float(document["seconds"])
        except UNFIT:
            raise CheckpointError(f"{self.folder}: its checkpoint is damaged; start afresh in another folder") from None
        return _Saved(document, tensors)


@dataclass(frozen=True)
class _Saved:
    document: dict[str, Any]
    tensors: dict[str, Tensor]

    def _part(self, prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def prior(self, base: torch.distributions.Distribution | None, device: torch.device) -> LatentPrior:
        config = self.document.get("prior")
        if not isinstance(config, dict):
            raise CheckpointError("the checkpoint holds no prior")
        return LatentPrior.from_state(config, self._part("prior."), base=base, where="the checkpoint").to(device)

    def restore(self, learner: StageLearner) -> None:
        if "learner" in self.document:
            try:
                learner.restore(self.document["learner"], self._part("learner."))
            except UNFIT as error:
                raise CheckpointError(f"the checkpoint's learner is damaged ({type(error).__name__})") from None
