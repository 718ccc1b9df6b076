"""The moves of joint learning, and everything they change."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..data.images import Images
from ..density import normalizers
from ..density.ladder import Ladder, Stage, passed_afresh
from ..density.ratios import BoundedRatio, Gain, build_ratio, gain, logistic_loss
from ..density.sampling import langevin
from ..errors import LatentPriorError, LearningDivergedError
from ..models.inference import log_gaussian, posterior_density, short_run
from ..models.model import LatentVariableModel
from ..runtime.processes import Processes, agreed, joined
from ..runtime.seeding import derived_generator
from .config import UNKNOWN, TrainingConfig
from .resumable import epoch_rows

__all__ = ["JointLearner"]


class JointLearner:
    """The parts of the algorithm, and everything they change; all draws are functions of ``seed`` and the step."""

    def __init__(
        self, model: LatentVariableModel, images: Images, config: TrainingConfig, seed: int, processes: Processes
    ) -> None:
        config.check(len(images), encoder=model.encoder is not None, processes=processes.count)
        self.model, self.images, self.config, self.seed = model, images, config, seed
        self.processes = processes
        self.device = model.device
        self.whitening = model.prior.whitening
        self.first = len(model.prior.stages)
        order = torch.randperm(len(images), generator=self._draws("split", cpu=True))
        self.train_rows, self.held_out_rows = order[config.held_out :], order[: config.held_out]
        networks = [model.decoder, *([] if model.encoder is None else [model.encoder])]
        self.networks = torch.nn.ModuleDict(dict(zip(("decoder", "encoder"), networks, strict=False)))
        self.networks.requires_grad_(True).train()
        self.average = {k: v.detach().clone() for k, v in self.networks.named_parameters()}
        self.optimizer = torch.optim.Adam(self.networks.parameters(), config.learning_rate, betas=(0.5, 0.999))
        self.step = self.updates = self.settled = 0
        self.pace = 1.0
        """Factor on learning rates and step sizes: a quarter once learning has diverged."""
        self.error = model.sigma**2
        self.arrived = False
        self.latents: Tensor | None = None
        if config.posterior_start == "persistent":
            self.latents = model.prior.base.sample(len(images), self._draws("latents")).cpu()
        self._begin_stage()

    # One stage of the ladder ---------------------------------------------------------------------------------

    def _begin_stage(self) -> None:
        config = self.config
        spec = {
            "kind": "mlp",
            "event_shape": list(self.model.event_shape),
            "width": config.ratio_width,
            "depth": config.ratio_depth,
            "bound": config.bound,
        }
        weights = self._draws("weights", self.stage, cpu=True)
        self.ratio: BoundedRatio = build_ratio(spec, weights).to(device=self.device, dtype=self.model.prior.dtype)
        self.ratio_average = {k: v.detach().clone() for k, v in self.ratio.named_parameters()}
        self.ratio_optimizer = torch.optim.Adam(self.ratio.parameters(), config.ratio_learning_rate, betas=(0.5, 0.999))
        self.step, self.waited, self.best_gain, self.gain = 0, 0, -math.inf, UNKNOWN
        self.chains: Tensor | None = None
        self.pool = torch.empty(0)
        self.began = time.monotonic()

    @property
    def stage(self) -> int:
        """Index k of the stage that is being learned."""
        return len(self.model.prior.stages)

    @property
    def ladder(self) -> Ladder:
        """The ladder so far, in standardised coordinates."""
        return self.model.prior.ladder

    @property
    def stage_wanted(self) -> bool:
        """Whether another stage is to be learned."""
        return not self.arrived and self.stage - self.first < self.config.stages

    @property
    def stage_finished(self) -> bool:
        """Whether this stage's steps or, if adaptive, its patience have run out.

        A stage that the posterior has just run away from is no measure of what it can give: if adaptive, it may
        catch up for as many steps again.
        """
        if self.config.switch != "adaptive":
            return self.step >= self.config.steps
        lag = self.best_gain - self.gain.value
        if lag > max(self.best_gain / 2, 4 * self.gain.stderr):
            return self.step >= 2 * self.config.steps
        return self.waited >= self.config.patience or self.step >= self.config.steps

    # The four moves of a step --------------------------------------------------------------------------------

    def batch(self) -> tuple[Tensor, Tensor]:
        """Return this process's share of the step's images, ``(b, C, H, W)``, and their indices."""
        size = self.config.batch_size
        rows = epoch_rows(len(self.train_rows), self.updates * size, size, lambda k: self._draws("epoch", k, cpu=True))
        index = self.train_rows[rows][self.processes.rank :: self.processes.count]
        return self.images.batch(index, device=self.device).to(self.model.prior.dtype), index

    def posterior_samples(self, x: Tensor, index: Tensor | None = None, use: str = "posterior") -> Tensor:
        r"""Short-run Langevin draws ``(b, d)`` of :math:`p_\theta(x \mid z)\,p_k(z)` (eq. 5)."""
        config, draws = self.config, self._draws(use, self.updates, self.processes.rank)
        coordinates = None
        if config.posterior_start == "encoder":
            coordinates = self.model.posterior_coordinates(x)
            start = langevin.noise_like(x.new_empty(len(x), self.model.prior.whitening.loc.numel()), draws)
            if not config.precondition:
                start, coordinates = coordinates(start), None
        elif config.posterior_start == "persistent" and self.latents is not None and index is not None:
            start = self.latents[index].to(self.device)
        else:
            start = self.model.prior.base.sample(len(x), draws)
        density = posterior_density(self._decode, self._log_prior, x, self.model.sigma)
        how: dict[str, Any] = {"steps": config.posterior_steps, "step_size": self.pace * config.posterior_step_size}
        z = short_run(start, density, coordinates, **how, generator=draws)
        self._check_near(z, "posterior")
        if self.latents is not None and index is not None:
            self.latents[joined(self.processes, index)] = joined(self.processes, z).to(self.latents)
        return z

    def prior_samples(self, n: int) -> Tensor:
        r"""Draws ``(n, d)`` of :math:`p_k(z)`: exact ones of the base while there is no stage."""
        config, draws = self.config, self._draws("prior", self.updates, self.processes.rank)
        if self.ladder.length == 0:
            return self.ladder.base.sample(n, draws)
        if config.prior_sampler == "particles":
            return self._particles(n)
        start = self.chains if self.chains is not None and len(self.chains) == n else self.ladder.base.sample(n, draws)
        density = self.ladder.density(self.ladder.length)
        size = self.pace * config.prior_step_size
        z = langevin.sample(start, density, steps=config.prior_steps, step_size=size, generator=draws)
        self._check_near(z, "prior")
        self.chains = z if config.prior_sampler == "persistent" else None
        return z

    def update_ratio(self, posterior: Tensor, prior: Tensor) -> dict[str, float]:
        """Descend the logistic loss of stage k between posterior and prior samples (eq. 6)."""
        loss = logistic_loss(self.ratio(posterior), self.ratio(prior))
        self._descend(self.ratio_optimizer, self.ratio, loss, self.config.ratio_learning_rate)
        _follow(self.ratio_average, self.ratio, self.config.average, self.step)
        return {"ratio": self._finite(loss, "ratio")}

    def update_decoder(self, x: Tensor, posterior: Tensor) -> dict[str, float]:
        r"""Ascend :math:`\log p_\theta(x \mid z^+)` (eq. 8), and teach the encoder."""
        squared = (self._decode(posterior) - x).square().flatten(1).sum(1)
        loss = squared.mean() / (2 * self.model.sigma**2)
        error = squared.detach().mean() / x[0].numel()
        losses = {"reconstruction": float(error)}
        if self.config.learn_sigma:
            self.processes.average([error])
            self.error = 0.99 * self.error + 0.01 * float(error)
            self.model.sigma = max(1e-3, math.sqrt(self.error))
        if self.model.encoder is not None:
            taught = self._encoder_loss(x, posterior)
            loss = loss + taught
            losses["encoder"] = float(taught.detach())
        self._descend(self.optimizer, self.networks, loss, self.config.learning_rate)
        self._finite(loss, "decoder")
        self.updates += 1
        _follow(self.average, self.networks, self.config.average, self.updates)
        return losses

    # The end of a stage --------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self) -> None:
        """Measure the stage's gain on held-out images and as many fresh particles, in nats."""
        posterior = self._held_out_posterior(self._held_out_images())
        prior = self.ladder.fresh_particles(len(posterior), self._draws("held out", self.updates)).position
        f = [torch.func.functional_call(self.ratio, self.ratio_average, (z,)) for z in (posterior, prior)]
        measured = torch.tensor(gain(f[0], f[1]), device=self.device)
        self.processes.average([measured])
        self.gain = Gain(*measured.tolist())
        if not math.isfinite(self.gain.value):
            raise self._diverged("the held-out loss is not finite")
        self.waited += 1
        if self.gain.value > self.best_gain:
            self.best_gain, self.waited = self.gain.value, 0

    def next_stage(self) -> None:
        """Fix the stage, give it its log normaliser from particles that trained nothing, and begin the next.

        With the adaptive switch, a stage whose held-out gain is not above zero by two standard errors, or that is
        not worthwhile by the rise of the held-out log density, is left out: the ladder has arrived.
        """
        if self.step % self.config.evaluate_every:
            self.evaluate()
        adaptive = self.config.switch == "adaptive"
        if adaptive and self.gain.value <= 2 * self.gain.stderr:
            self.arrived = True
            return
        self.ratio.load_weights(self.ratio_average)
        ratio = self.ratio.eval().requires_grad_(False)
        before, after = (
            ladder.fresh_particles(8192, self._draws("normalizer", ladder.length))
            for ladder in (self.ladder, self.ladder.extended(Stage(ratio)))
        )
        rows = self._held_out_posterior(self._held_out_images())
        seconds = time.monotonic() - self.began
        passed = passed_afresh(before, after)
        ladder = self.ladder.times(ratio, passed, self.gain, rows, seconds=seconds, steps=self.step)
        votes = torch.tensor(float(ladder.stages[-1].is_worthwhile), device=self.device)
        self.processes.average([votes])
        if adaptive and votes <= 0.5:
            self.arrived = True
            return
        self.model.prior = self.model.prior.with_ladder(ladder)
        self._begin_stage()

    @torch.no_grad()
    def normalize(self) -> None:
        """Put the averaged weights in place; estimate and bracket log Z at held-out posterior samples."""
        for name, parameter in self.networks.named_parameters():
            parameter.copy_(self.average[name])
        self.networks.requires_grad_(False).eval()
        rows = self._held_out_posterior(self._held_out_images())
        prior = self.model.prior
        total = normalizers.estimate(prior.ladder, rows, self._draws("log Z"))
        info = {**prior.info, "training": asdict(self.config), "stopped": "no gain" if self.arrived else "stages"}
        self.model.prior = prior.with_ladder(prior.ladder.corrected(total.value, total.stderr), total, info)

    def _held_out_images(self) -> Tensor:
        return self.images.batch(self.held_out_rows, device=self.device).to(self.model.prior.dtype)

    def _held_out_posterior(self, x: Tensor) -> Tensor:
        # Every part draws of its own: shared starts would make rows dependent and the gain's standard error small.
        parts = enumerate(x.split(self.config.batch_size))
        return torch.cat([self.posterior_samples(part, use=f"held-out posterior {i}") for i, part in parts])

    # Pieces --------------------------------------------------------------------------------------------------

    def _decode(self, u: Tensor) -> Tensor:
        z = self.whitening.unwhiten(u).reshape(len(u), *self.model.event_shape)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.mixed_precision):
            x: Tensor = self.model.decoder(z)
        return x.to(u.dtype)

    def _log_prior(self, u: Tensor) -> Tensor:
        return self.ladder.base.log_prob(u) + self.ladder.log_potential(u)

    def _encoder_loss(self, x: Tensor, posterior: Tensor) -> Tensor:
        r"""Minus :math:`\log q(z^+ \mid x)` at the chains' ends; minus the bound under the ladder, if preconditioned.

        A diagonal q that follows the draws of a correlated posterior is as wide as its marginals: draws of it lie off
        the posterior, and chains in its scales with them. The bound makes it as narrow as the conditionals.
        """
        assert self.model.encoder is not None
        out = self.model.encoder(x)
        if not isinstance(out, tuple):
            raise LatentPriorError("joint learning needs an encoder that returns (mean, scale): give one, or none")
        mean, scale = (part.flatten(1) for part in out)
        if not self.config.precondition:
            z = self.whitening.unwhiten(posterior)
            loss: Tensor = (0.5 * ((z - mean) / scale).square() + scale.log()).sum(1).mean()
            return loss
        draws = self._draws("bound", self.updates, self.processes.rank)
        u = self.whitening.whiten(mean + scale * langevin.noise_like(mean, draws))
        # The decoder learns from the chains alone.
        self.model.decoder.requires_grad_(False)
        likelihood = log_gaussian(x, self._decode(u), self.model.sigma)
        self.model.decoder.requires_grad_(True)
        bound: Tensor = (likelihood + self._log_prior(u) + scale.log().sum(1)).mean()
        return -bound

    def _particles(self, n: int) -> Tensor:
        """Rows of a pool of fresh particles, each used once."""
        if len(self.pool) < n:
            draws = self._draws("particles", self.updates, self.processes.rank)
            self.pool = self.ladder.fresh_particles(max(64 * n, 1024), draws).position
            order = torch.randperm(len(self.pool), generator=draws, device=draws.device)
            self.pool = self.pool[order.to(self.pool.device)]
        taken, self.pool = self.pool[:n], self.pool[n:]
        return taken

    def _descend(self, optimizer: torch.optim.Optimizer, module: torch.nn.Module, loss: Tensor, rate: float) -> None:
        epochs = self.updates * self.config.batch_size // len(self.train_rows)
        for group in optimizer.param_groups:
            group["lr"] = self.pace * rate * self.config.decay**epochs
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.processes.average([p.grad for p in module.parameters() if p.grad is not None])
        optimizer.step()

    def _finite(self, loss: Tensor, name: str) -> float:
        value = float(loss.detach())
        if not math.isfinite(agreed(self.processes, value, self.device)):
            raise self._diverged(f"the {name}'s loss is not finite")
        return value

    def _check_near(self, z: Tensor, name: str) -> None:
        """Raise :class:`LearningDivergedError` where more than one chain in a hundred has left for nowhere."""
        # Of 10^8 standardised rows none lies further out; single ones of a heavy tail may.
        gone = float((~(z.detach().abs() < 1e4)).any(1).float().mean())
        if agreed(self.processes, gone, self.device) > 0.01:
            raise self._diverged(f"{gone:.0%} of the {name} chains have run away")

    def _diverged(self, what: str) -> LearningDivergedError:
        return LearningDivergedError(
            f"stage {self.stage}: {what} at step {self.step}; lower learning_rate, posterior_step_size or "
            "prior_step_size, or look for extreme images"
        )

    def _draws(self, *keys: int | str, cpu: bool = False) -> torch.Generator:
        return derived_generator(torch.device("cpu") if cpu else self.device, self.seed, "train", *keys)


@torch.no_grad()
def _follow(average: dict[str, Tensor], module: torch.nn.Module, decay: float, step: int) -> None:
    decay = min(decay, (step + 1) / (step + 10))
    for name, parameter in module.named_parameters():
        average[name].lerp_(parameter, 1 - decay)
