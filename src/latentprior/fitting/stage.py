"""Learning one stage: a classifier between fresh draws of the target and fresh particles of the ladder so far."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.latents import Latents
from ..density.decoded_ratio import Decoder
from ..density.ladder import FreshParticles, Ladder
from ..density.ratios import (
    BoundedRatio,
    Gain,
    build_ratio,
    gain,
    logistic_loss,
)
from ..density.whitening import Whitening
from ..errors import LearningDivergedError
from ..runtime.processes import (
    ALONE,
    Processes,
    agreed,
    joined,
)
from ..runtime.seeding import derived_generator
from .optimizers import REMEMBERED, NaturalGradient, build_optimizers
from .settings import StageSettings, multiplies_bfloat16

__all__ = ["LearnedStage", "StageLearner", "Target"]


@dataclass(frozen=True)
class Target:
    """The rows of q that a stage learns from and those that are held out, drawn in standardised coordinates."""

    latents: Latents
    train: Tensor
    """Indices of training rows ``(n,)``."""
    held_out: Tensor
    """Held-out rows, one draw each, standardised ``(m, d)``."""
    whitening: Whitening

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """``rows`` training rows without repetition until all are used; fresh posterior draws if known."""
        n = len(self.train)
        orders = []
        for start in range(0, rows, n):
            if n > 1 << 22:
                order = torch.randint(n, (min(n, rows - start),), generator=generator, device=generator.device)
            else:
                order = torch.randperm(n, generator=generator, device=generator.device)
            orders.append(order[: rows - start].to(self.train.device))
        index = self.train[torch.cat(orders)]
        loc = self.whitening.loc
        z = self.latents.draw(index, generator, device=loc.device, dtype=loc.dtype)
        return self.whitening.whiten(z)


class LearnedStage(NamedTuple):
    """A learned log ratio with its held-out gain and what its learning saw."""

    ratio: BoundedRatio
    gain: Gain
    bound: float
    """Two standard errors below the held-out gain at the odds that it was learned with."""
    steps: int
    saturated: float
    """Share of held-out rows at the bound."""
    history: list[float]


EVALUATE = 100
WARM_UP = 50
HELD_OUT_PARTICLES = 8192
METRIC_ROWS = 32_768
LAST_PARTICLES, LAST_SMC_PARTICLES = 65_536, 8192


class StageLearner:
    """Logistic learning of ``f_k`` as a state that can be saved between evaluations and resumed exactly.

    Minimises :func:`~latentprior.density.ratios.logistic_loss` at the settings' odds, by their optimizer under a cosine
    schedule; keeps the moving average of weights with the best held-out loss. Negatives are refreshed every chunk of
    steps while they come from the base.

    Of several processes each draws a share of every batch and of the held-out rows' values, from generators of its own;
    gradients are averaged, and gains and clocks agreed on, so that all learn one network.
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
        decoder: Decoder | None = None,
    ) -> None:
        """``decoder``: for a ratio of the kind ``decoded``, as :meth:`Decoder.describe` gives it."""
        self.target, self.ladder, self.settings = target, ladder, settings
        self.seed, self.index, self.processes = seed, ladder.length, processes
        self.event_shape = event_shape
        self.device, self.dtype = target.held_out.device, target.held_out.dtype
        spec = settings.spec(event_shape, ladder.mixture is not None)
        generator = derived_generator(torch.device("cpu"), seed, self.index, "weights")
        self.decoder = decoder
        spec |= {"pictures": decoder.pictures} if decoder else {}
        self.ratio = build_ratio(spec, generator, ladder.mixture, decoder).to(device=self.device, dtype=self.dtype)
        self.parameters = {name: p for name, p in self.ratio.named_parameters() if p.requires_grad}
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.best = {name: p.clone() for name, p in self.average.items()}
        self.learning_rate = learning_rate or settings.learning_rate
        network = self.ratio.network
        matrices: Callable[[], list[Tensor]] = getattr(network, "hidden_matrices", list)
        hidden = matrices() if settings.optimizer == "muon" else []
        forms: Callable[[], Sequence[Tensor]] = getattr(network, "form_parameters", tuple)
        form = forms() if settings.optimizer == "natural" else ()
        self.decay = settings.decay(1.0)
        # A quadratic form is small, and its terms cancel.
        small = spec["kind"] == "quadratic" or self.dtype != torch.float32
        native = settings.precision == "auto" and not small and multiplies_bfloat16(self.device)
        self.halved = native or settings.precision == "bfloat16"
        self.optimizers = build_optimizers(
            self.parameters.values(), hidden, form, self.learning_rate, self.decay, halved=self.halved
        )
        self.step, self.waited = 0, 0
        self.best_gain, self.best_bound = Gain(-math.inf, 0.0), -math.inf
        self.history: list[float] = []
        dim = target.held_out.shape[1]
        # Small sets take small batches: an evaluation interval then stays a few passes over the rows.
        self.batch = min(settings.batch_size, max(64, len(target.train) // 8))
        self.share = max(1, self.batch // processes.count)
        self.chunk = max(1, min(3, (1 << 25) // (self.batch * dim * EVALUATE))) * EVALUATE

    def anew(self, ladder: Ladder | None = None, *, learning_rate: float | None = None) -> StageLearner:
        """One that has learned nothing yet, from the same rows: over another ladder, or at another rate."""
        return StageLearner(
            self.target, ladder or self.ladder, self.settings, self.event_shape, self.seed,
            learning_rate=learning_rate, processes=self.processes, decoder=self.decoder,
        )  # fmt: skip

    def particles(self, last: bool = False, **how: int) -> FreshParticles:
        """The first fresh pass: negatives of this stage, and the normaliser of all stages before it.

        ``last``: no stage will learn from them, and the normaliser is all that is wanted. ``how`` goes to
        :meth:`~latentprior.density.ladder.Ladder.fresh_particles`.
        """
        rows = self.chunk * self.batch
        if last:
            few = {"smc_particles": LAST_SMC_PARTICLES}
            return self._fresh(min(rows, LAST_PARTICLES), "particles", 0, **few)
        return self._fresh(rows, "particles", 0, **how)

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

        Raises :class:`LearningDivergedError` when the held-out loss is not finite.
        """
        own, held_out, effective = self._split(first)
        self._adapt(own)
        begun, until = time.monotonic(), until or self.settings.steps
        while not self.finished and self.step < until:
            if self._late(deadline):
                break
            chunk = self.step // self.chunk
            positives = self.target.draw(self.chunk * self.share, self._draws("target", chunk))
            negatives = self._negatives(own, first.source, chunk)
            while self.step // self.chunk == chunk and not self.finished:
                for _ in range(min(EVALUATE, self.settings.steps - self.step)):
                    progress = self.step / self.settings.steps
                    if deadline is not None:
                        spent = (time.monotonic() - begun) / max(1e-9, deadline - begun)
                        progress = agreed(self.processes, min(1.0, max(progress, spent)), self.device)
                    here = (self.step % self.chunk) * self.share
                    rows = slice(here, here + self.share)
                    wrapped = torch.arange(here, here + self.share, device=self.device) % len(negatives)
                    self._update(positives[rows], negatives[wrapped], progress)
                    on_step(self)
                self._evaluate(held_out, effective)
                on_evaluate(self)
                if self._late(deadline) or self.step >= until:
                    break
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(self.best[name])
        ratio = self.ratio.eval().requires_grad_(False)
        with torch.no_grad():
            saturated = float(ratio.is_saturated(ratio(self.target.held_out)).double().mean())
        return LearnedStage(ratio, self.best_gain, self.best_bound, self.step, saturated, self.history)

    @property
    def finished(self) -> bool:
        """Whether the schedule or the patience has run out."""
        return self.step >= self.settings.steps or self.waited >= self.settings.patience

    def _draws(self, *keys: int | str) -> torch.Generator:
        return derived_generator(self.device, self.seed, self.index, *keys, *self.processes.keys)

    def _fresh(self, rows: int, *keys: int | str, **how: int) -> FreshParticles:
        return self.ladder.fresh_particles(rows, self._draws(*keys), processes=self.processes, **how)

    def _late(self, deadline: float | None) -> bool:
        return deadline is not None and self.processes.first(time.monotonic() >= deadline)

    def _adapt(self, particles: Tensor) -> None:
        """Give natural gradients the metric of rows and particles alike."""
        for optimizer in self.optimizers:
            if isinstance(optimizer, NaturalGradient):
                rows = self.target.draw(min(METRIC_ROWS, len(particles)), self._draws("metric"))
                u = torch.cat([rows, particles[:METRIC_ROWS]]).double()
                moments = [u.mean(0), u.T @ u / len(u)]
                self.processes.average(moments)
                optimizer.adapt(*moments)

    def _split(self, first: FreshParticles) -> tuple[Tensor, Tensor, int]:
        if first.source == "smc":
            # Islands are independent: the last eighth never touches the rest.
            cut = len(first.position) * 7 // 8
            effective = self.processes.count * (len(first.position) - cut)
            return first.position[:cut], first.position[cut:], effective
        rows, draws = HELD_OUT_PARTICLES, 8 * HELD_OUT_PARTICLES
        drawn = self._draws("held-out particles")
        held_out = self.ladder.held_out_particles(rows, draws, drawn, self.processes)
        effective = rows if held_out.source == "base" else min(rows, int(held_out.ess * draws))
        return first.position, held_out.position, effective

    def _negatives(self, current: Tensor, source: str, chunk: int) -> Tensor:
        if source == "smc":
            order = self._draws("order", chunk)
            return current[torch.randperm(len(current), generator=order, device=self.device)]
        if chunk == 0:
            return current
        return self._fresh(self.chunk * self.batch, "particles", chunk).position

    def _update(self, positives: Tensor, negatives: Tensor, progress: float) -> None:
        warm = min(1.0, (self.step + 1) / WARM_UP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * progress))
                group["weight_decay"] = self.decay
        u = torch.cat([positives, negatives])
        # A mixture's distances would lose too much.
        features = self.ratio.features and self.ratio.features(u)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.halved):
            f = self.ratio(u, features).to(self.dtype)
        loss = logistic_loss(f[: len(positives)], f[len(positives) :], self.settings.odds)
        self.ratio.zero_grad()
        loss.backward()
        self.processes.average([p.grad for p in self.parameters.values() if p.grad is not None])
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        decay = min(self.settings.average, self.step / (self.step + 9))
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                self.average[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def _evaluate(self, held_out: Tensor, effective: int) -> None:
        def averaged(u: Tensor) -> Tensor:
            parts = [torch.func.functional_call(self.ratio, self.average, (block,)) for block in u.split(8192)]
            return joined(self.processes, torch.cat(parts))

        rows = self.target.held_out
        own = self.processes.stripe(rows)
        f, others = averaged(own)[: len(rows)], averaged(held_out)
        known = averaged(self.target.draw(len(own), self._draws("remembered", self.step)))
        odds = self.settings.odds
        gains = gain(f, others, effective), gain(f, others, effective, odds), gain(known, others, effective, odds)
        now, learned, most = self.processes.first(gains)
        wanted = self.settings.decay(1 - learned.value / most.value if most.value > 0 else 0.0)
        # What is remembered is forgotten slowly: the decay falls by halves, and rises at once.
        self.decay = max(wanted, (self.decay + wanted) / 2)
        if not math.isfinite(now.value):
            raise LearningDivergedError(
                f"stage {self.index}: the held-out loss is not finite after {self.step} steps at learning rate "
                f"{self.learning_rate:g}; lower learning_rate, or look for extreme rows in the latents"
            )
        self.history.append(round(now.value, 5))
        self.waited += 1
        # By its lower bound: on few held-out rows a late, noisy gain must not displace a certain one.
        if learned.lower > self.best_bound:
            self.best_gain, self.best_bound, self.waited = now, learned.lower, 0
            self.best = {name: p.clone() for name, p in self.average.items()}

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything that :meth:`restore` needs, as JSON and tensors."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"now.{name}"] = parameter.detach()
            tensors[f"average.{name}"] = self.average[name]
            tensors[f"best.{name}"] = self.best[name]
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer.{key}.{name}"] = value
        config = {
            "step": self.step,
            "waited": self.waited,
            "best_gain": list(self.best_gain),
            "best_bound": self.best_bound,
            "history": self.history,
            "learning_rate": self.learning_rate,
            "decay": self.decay,
        }
        return config, tensors

    def restore(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Stand where :meth:`state` was taken."""
        self.step, self.waited = int(config["step"]), int(config["waited"])
        self.best_gain, self.best_bound = Gain(*map(float, config["best_gain"])), float(config["best_bound"])
        self.history = [float(v) for v in config["history"]]
        self.learning_rate, self.decay = float(config["learning_rate"]), float(config.get("decay", self.decay))
        names = {parameter: name for name, parameter in self.parameters.items()}
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"now.{name}"])
                self.average[name].copy_(tensors[f"average.{name}"])
                self.best[name].copy_(tensors[f"best.{name}"])
            for optimizer in self.optimizers:
                for parameter in optimizer.param_groups[0]["params"]:
                    name = names[parameter]
                    optimizer.state[parameter] = {
                        key: tensors[f"optimizer.{key}.{name}"].clone().to(self.device)
                        for key in REMEMBERED[type(optimizer)]
                    }
