"""Learning one stage: a classifier between fresh draws of the target and fresh particles of the ladder so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..density.decoded_ratio import StandardisedDecoder
from ..density.ladder import FreshParticles, Ladder
from ..density.ratios import BoundedRatio, Gain, build_ratio, gain, logistic_loss
from ..errors import LearningDivergedError
from ..runtime.processes import ALONE, Processes, agreed, joined
from ..runtime.seeding import derived_generator
from .optimisation import Optimisation
from .particles import Negatives, StageParticles
from .rows import Target
from .settings import StageSettings, multiplies_bfloat16

__all__ = ["LearnedStage", "StageLearner"]

EVALUATION_STEPS = 100
MOST_CHUNK_NUMBERS = 1 << 25
"""Numbers in the rows of a chunk of steps: 128 MiB of float32."""
MOST_EVALUATIONS_A_CHUNK = 3
ROWS_A_BATCH = 8
"""Small sets take batches of an eighth of their rows: an evaluation interval then stays a few passes over them."""
LEAST_BATCH_ROWS = 64
METRIC_ROWS = 32_768


class LearnedStage(NamedTuple):
    """A learned log ratio with its held-out gain and what its learning has shown."""

    ratio: BoundedRatio
    gain: Gain
    bound: float
    """Two standard errors below the held-out gain at the odds that it was learned with."""
    steps: int
    saturated: float
    """Share of held-out rows at the bound."""
    history: list[float]

    @property
    def has_gained(self) -> bool:
        """Whether the stage tells held-out rows from particles beyond doubt."""
        return self.bound > 0


class StageLearner:
    """Logistic learning of ``f_k`` as a state that can be saved between evaluations and resumed exactly.

    Minimises :func:`~latentprior.density.ratios.logistic_loss` at the settings' odds, and keeps the moving average of
    weights with the best held-out loss. Several processes each draw a share of every batch from random streams of their
    own; gradients are averaged, and gains and clocks agreed on, so that all learn one network. ``decoder`` is for a
    ratio of the kind ``decoded``; ``source`` yields particles, by default fresh passes of the ladder.
    """

    def __init__(
        self,
        target: Target,
        ladder: Ladder,
        settings: StageSettings,
        event_shape: tuple[int, ...],
        seed: int,
        *,
        learning_rate: float | None = None,
        processes: Processes = ALONE,
        decoder: StandardisedDecoder | None = None,
        source: StageParticles | None = None,
    ) -> None:
        self.target, self.ladder, self.settings = target, ladder, settings
        self.event_shape, self.seed, self.processes, self.decoder = event_shape, seed, processes, decoder
        self.device, self.dtype = target.held_out.device, target.held_out.dtype
        self.source = source or StageParticles(ladder, seed, self.device, processes)
        spec = settings.spec(event_shape, ladder.mixture is not None)
        spec |= {"pictures": decoder.pictures} if decoder else {}
        weights = derived_generator(torch.device("cpu"), seed, ladder.length, "weights")
        ratio = build_ratio(spec, weights, ladder.mixture, decoder).to(device=self.device, dtype=self.dtype)
        # A quadratic form is small, and its terms cancel.
        small = spec["kind"] == "quadratic" or self.dtype != torch.float32
        native = settings.precision == "auto" and not small and multiplies_bfloat16(self.device)
        self.half_precision = native or settings.precision == "bfloat16"
        rate = learning_rate or settings.learning_rate
        self.optimisation = Optimisation(ratio, settings, rate, self.half_precision)
        self.step, self.idle_evaluations = 0, 0
        self.best_gain, self.best_bound = Gain(-math.inf, 0.0), -math.inf
        self.history: list[float] = []
        self.batch = min(settings.batch_size, max(LEAST_BATCH_ROWS, len(target.train) // ROWS_A_BATCH))
        self.share = max(1, self.batch // processes.count)
        evaluations = MOST_CHUNK_NUMBERS // (self.batch * target.held_out.shape[1] * EVALUATION_STEPS)
        self.chunk_steps = max(1, min(MOST_EVALUATIONS_A_CHUNK, evaluations)) * EVALUATION_STEPS

    @property
    def index(self) -> int:
        """Number k of the stage."""
        return self.ladder.length

    @property
    def ratio(self) -> BoundedRatio:
        """The network that is learned."""
        return self.optimisation.ratio

    @property
    def learning_rate(self) -> float:
        """The highest rate of the schedule."""
        return self.optimisation.learning_rate

    @property
    def finished(self) -> bool:
        """Whether the schedule or the patience has run out."""
        return self.step >= self.settings.steps or self.idle_evaluations >= self.settings.patience

    @property
    def chunk_rows(self) -> int:
        """Rows of a chunk of steps, over all processes."""
        return self.chunk_steps * self.batch

    def anew(self, ladder: Ladder | None = None, *, learning_rate: float | None = None) -> StageLearner:
        """One that has learned nothing yet, from the same rows: over another ladder, or at another rate."""
        return StageLearner(
            self.target, ladder or self.ladder, self.settings, self.event_shape, self.seed,
            learning_rate=learning_rate, processes=self.processes, decoder=self.decoder,
        )  # fmt: skip

    def particles(self, smc_particles: int = 32_768) -> FreshParticles:
        """The first fresh pass: negatives of this stage, and the normaliser of all stages below it."""
        return self.source.teaching(self.chunk_rows, smc_particles)

    def learn(
        self,
        first: FreshParticles,
        *,
        deadline: float | None = None,
        until: int | None = None,
        on_step: Callable[[StageLearner], None] = lambda learner: None,
        on_evaluate: Callable[[StageLearner], None] = lambda learner: None,
    ) -> LearnedStage:
        """Go on until the schedule, the patience or the ``deadline`` (:func:`time.monotonic`) ends, or a step's number.

        ``first`` is the first pass of particles. Raises :class:`LearningDivergedError` where the held-out loss is not
        finite.
        """
        negatives = Negatives(self.source, first, self.chunk_rows)
        self._adapt_metric(negatives.teaching)
        begin, until = time.monotonic(), until or self.settings.steps
        while not self.finished and self.step < until and not self._late(deadline):
            chunk = self.step // self.chunk_steps
            positives = self.target.draw(self.chunk_steps * self.share, self.source.generator("target", chunk))
            particles = negatives.chunk(chunk)
            while self.step // self.chunk_steps == chunk and not self.finished:
                for _ in range(min(EVALUATION_STEPS, self.settings.steps - self.step)):
                    self._update(positives, particles, self._progress(begin, deadline))
                    on_step(self)
                self._evaluate(negatives)
                on_evaluate(self)
                if self._late(deadline) or self.step >= until:
                    break
        return self._learned()

    def _learned(self) -> LearnedStage:
        ratio = self.optimisation.finish()
        with torch.no_grad():
            saturated = float(ratio.is_saturated(ratio(self.target.held_out)).double().mean())
        return LearnedStage(ratio, self.best_gain, self.best_bound, self.step, saturated, self.history)

    def _late(self, deadline: float | None) -> bool:
        return deadline is not None and self.processes.first(time.monotonic() >= deadline)

    def _progress(self, begin: float, deadline: float | None) -> float:
        """Where the schedule stands, from 0 to 1: by steps, or by time where that runs out first."""
        progress = self.step / self.settings.steps
        if deadline is None:
            return progress
        spent = (time.monotonic() - begin) / max(1e-9, deadline - begin)
        return agreed(self.processes, min(1.0, max(progress, spent)), self.device)

    def _adapt_metric(self, particles: Tensor) -> None:
        """Give natural gradients the metric of rows and particles alike."""
        for optimizer in self.optimisation.natural_gradients:
            rows = self.target.draw(min(METRIC_ROWS, len(particles)), self.source.generator("metric"))
            u = torch.cat([rows, particles[:METRIC_ROWS]]).double()
            moments = [u.mean(0), u.T @ u / len(u)]
            self.processes.average(moments)
            optimizer.adapt(*moments)

    def _update(self, positives: Tensor, particles: Tensor, progress: float) -> None:
        """Take one step on the rows that belong to it in the chunk."""
        here = (self.step % self.chunk_steps) * self.share
        wrapped = torch.arange(here, here + self.share, device=self.device) % len(particles)
        rows = positives[here : here + self.share]
        u = torch.cat([rows, particles[wrapped]])
        self.optimisation.schedule(self.step, progress)
        # In half precision a mixture's distances would lose too much: its features are evaluated apart.
        features = self.ratio.features and self.ratio.features(u)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half_precision):
            f = self.ratio(u, features).to(self.dtype)
        # Eq. 6 of Xiao and Han (2022), at the odds of the settings.
        loss = logistic_loss(f[: len(rows)], f[len(rows) :], self.settings.odds)
        self.processes.average(self.optimisation.gradients(loss))
        self.step += 1
        self.optimisation.update(self.step)

    @torch.no_grad()
    def _evaluate(self, negatives: Negatives) -> None:
        """Measure the gain on held-out rows and on rows that were learned from; keep the average where it is best."""
        odds, rows = self.settings.odds, self.target.held_out
        own = self.processes.stripe(rows)
        seen = self.target.draw(len(own), self.source.generator("remembered", self.step))
        f, f_particles, f_seen = (
            joined(self.processes, self.optimisation.averaged(u)) for u in (own, negatives.judging, seen)
        )
        f = f[: len(rows)]
        now, at_odds, on_seen = self.processes.first(
            (
                gain(f, f_particles, negatives.effective),
                gain(f, f_particles, negatives.effective, odds),
                gain(f_seen, f_particles, negatives.effective, odds),
            )
        )
        self.optimisation.adapt_decay(1 - at_odds.value / on_seen.value if on_seen.value > 0 else 0.0)
        if not math.isfinite(now.value):
            raise LearningDivergedError(
                f"stage {self.index}: the held-out loss is not finite after {self.step} steps at learning rate "
                f"{self.learning_rate:g}; lower learning_rate, or look for extreme rows in the latents"
            )
        self.history.append(round(now.value, 5))
        self.idle_evaluations += 1
        # By its lower bound: on few held-out rows a late, noisy gain must not displace a certain one.
        if at_odds.lower > self.best_bound:
            self.best_gain, self.best_bound, self.idle_evaluations = now, at_odds.lower, 0
            self.optimisation.keep_best()

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that :meth:`restore` needs, as JSON and tensors."""
        config = {
            "step": self.step,
            "waited": self.idle_evaluations,
            "best_gain": list(self.best_gain),
            "best_bound": self.best_bound,
            "history": self.history,
            "learning_rate": self.learning_rate,
            "decay": self.optimisation.weight_decay,
        }
        return config, self.optimisation.state()

    def restore(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was taken."""
        self.step, self.idle_evaluations = int(config["step"]), int(config["waited"])
        self.best_gain, self.best_bound = Gain(*map(float, config["best_gain"])), float(config["best_bound"])
        self.history = [float(v) for v in config["history"]]
        self.optimisation.learning_rate = float(config["learning_rate"])
        self.optimisation.weight_decay = float(config["decay"])
        self.optimisation.restore(tensors)
