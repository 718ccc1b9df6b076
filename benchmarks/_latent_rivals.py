"""Rivals of the ladder as densities on latents, one class each: ``fit``, ``log_prob`` and ``sample``.

All live in the standardised coordinates of :class:`Rows`; log densities are in nats there. Those that learn by
gradients learn for the seconds they are given, on fresh posterior draws where posteriors are known, and keep the
weights that were best on validation rows. Of pythae's samplers the Gaussian mixture and the masked autoregressive
flow are the methods ``GMM`` and ``flow (MAF)``; its inverse autoregressive flow is run with pythae's own network.
The rest need autoencoders of their own (hypersphere, Poincare, discrete codes, Riemannian) or give no density
(2-stage VAE).
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import zuko
from sklearn.mixture import GaussianMixture
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from tqdm import tqdm

import latentprior as lp
from latentprior.density import normalizers
from latentprior.density.bases.base import NormalBase
from latentprior.density.ladder import Ladder, Stage
from latentprior.density.prior import LatentPrior
from latentprior.density.ratios import build_ratio
from latentprior.density.sampling import langevin
from latentprior.density.whitening import Whitening, identity_whitening
from latentprior.errors import LearningDivergedError
from latentprior.fitting.rows import Target
from latentprior.fitting.settings import StageSettings
from latentprior.fitting.stage import StageLearner
from latentprior.runtime.seeding import derived_generator

__all__ = ["RIVALS", "Rows"]

CPU = torch.device("cpu")
BATCH = 1024


class Rows:
    """Training rows, in the coordinates that ``whitening`` standardises."""

    def __init__(self, latents: lp.Latents, whitening: Whitening, seed: int) -> None:
        self.latents, self.whitening, self.seed = latents, whitening, seed
        self.generator = derived_generator(CPU, seed, "rows of rivals")

    def __call__(self, n: int) -> Tensor:
        """``n`` rows with repetition: fresh posterior draws, if posteriors are known."""
        return self._draw(torch.randint(len(self.latents), (n,), generator=self.generator))

    def every(self) -> Tensor:
        """One draw of each row."""
        return self._draw(torch.arange(len(self.latents)))

    def _draw(self, index: Tensor) -> Tensor:
        return self.whitening.whiten(self.latents.draw(index, self.generator))


class _Learned:
    """A rival that learns by gradients, by AdamW with a cosine rate; the best weights on validation rows stay."""

    rate = 2e-3
    name = "rival"
    network: nn.Module

    def density(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def start(self, draw: Rows) -> None:
        """Make the network."""
        raise NotImplementedError

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        start_time = time.monotonic()
        self.start(draw)
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.rate, weight_decay=1e-4)
        best, best_at, kept, steps = -math.inf, 0.0, _copied(self.network), 0
        # Validation takes a tenth of the time at most.
        checked, next_check = 0.0, 0.0
        for spent in _ticks(seconds, start_time, self.name):
            for group in optimizer.param_groups:
                group["lr"] = 0.5 * self.rate * (1 + math.cos(math.pi * spent / seconds))
            loss = -self.density(draw(BATCH)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
            optimizer.step()
            steps += 1
            now = time.monotonic() - start_time
            if now >= next_check or now >= seconds:
                score = self.log_prob(validation).mean().item()
                took = time.monotonic() - start_time - now
                checked += took
                next_check = now + max(0.01 * seconds, 10 * took)
                if score > best:
                    best, best_at, kept = score, now, _copied(self.network)
        self.network.load_state_dict(kept)
        return {"best_at": best_at, "steps": steps}

    @torch.no_grad()
    def log_prob(self, u: Tensor) -> Tensor:
        return torch.cat([self.density(block) for block in u.split(2048)])


class Gaussian:
    """The fitted Gaussian."""

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        u = draw.every()
        self.gaussian = MultivariateNormal(u.mean(0), torch.cov(u.T))
        return {}

    def log_prob(self, u: Tensor) -> Tensor:
        return self.gaussian.log_prob(u)

    def sample(self, n: int) -> Tensor:
        return self.gaussian.sample((n,))


class StandardNormal:
    """N(0, I) in the latents' own coordinates, where a VAE's prior lives."""

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        self.whitening = draw.whitening
        return {}

    def log_prob(self, u: Tensor) -> Tensor:
        z = self.whitening.unwhiten(u)
        normal = -0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)
        return normal - self.whitening.log_abs_det

    def sample(self, n: int) -> Tensor:
        return self.whitening.whiten(torch.randn(n, len(self.whitening.loc)))


class Mixture:
    """scikit-learn's Gaussian mixture, full covariances; components doubled until validation rows lose.

    No further number is tried when the seconds are over.
    """

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        u, held_out, start_time = draw.every().numpy(), validation.numpy(), time.monotonic()
        best, tried, k = -math.inf, [], 16 if u.shape[1] <= 64 else 2
        while time.monotonic() - start_time < seconds or not tried:
            mixture = GaussianMixture(k, random_state=draw.seed, reg_covar=1e-4, max_iter=100).fit(u)
            score = float(mixture.score(held_out))
            tried.append([k, score])
            if score < best:
                break
            best, self.mixture, k = score, mixture, 2 * k
        return {"components": self.mixture.n_components, "tried": tried}

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.from_numpy(self.mixture.score_samples(u.numpy()))

    def sample(self, n: int) -> Tensor:
        return torch.from_numpy(self.mixture.sample(n)[0]).float()[torch.randperm(n)]


class Kernels:
    r"""Gaussian kernels, :math:`\frac1n \sum_i N(u; u_i, h^2 I)`; h lowered by an eighth until validation rows lose.

    The numbers of scikit-learn's ``KernelDensity``, by matrix products: its trees prune nothing in so many dimensions.
    """

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        self.rows, self.bandwidth = draw.every(), 1.0
        best, width = -math.inf, 1.0
        while (score := self._log_prob(validation[:2000], width).mean().item()) >= best:
            best, self.bandwidth, width = score, width, width * 0.875
        return {"bandwidth": self.bandwidth}

    def log_prob(self, u: Tensor) -> Tensor:
        return self._log_prob(u, self.bandwidth)

    def _log_prob(self, u: Tensor, width: float) -> Tensor:
        parts = [torch.logsumexp(-0.5 * (torch.cdist(block, self.rows) / width).square(), 1) for block in u.split(500)]
        n, d = self.rows.shape
        return torch.cat(parts) - math.log(n) - d * (math.log(width) + 0.5 * math.log(2 * math.pi))

    def sample(self, n: int) -> Tensor:
        some = self.rows[torch.randint(len(self.rows), (n,))]
        return some + self.bandwidth * torch.randn_like(some)


class _Flow(_Learned):
    """A zuko flow by maximum likelihood."""

    def build(self, dim: int) -> nn.Module:
        raise NotImplementedError

    def start(self, draw: Rows) -> None:
        self.network = self.build(len(draw.whitening.loc))

    def density(self, u: Tensor) -> Tensor:
        log_prob: Tensor = self.network().log_prob(u)
        return log_prob

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        return torch.cat([self.network().sample((min(4096, n - i),)) for i in range(0, n, 4096)])


class SplineFlow(_Flow):
    """zuko's neural spline flow: three transforms, 256 x 2, the best on validation rows of three settings on mnist16.

    Autoregressive up to 64 dimensions; coupling above, where drawing from it would take d passes.
    """

    name = "NSF"

    def build(self, dim: int) -> nn.Module:
        passes = None if dim <= 64 else 2
        return zuko.flows.NSF(dim, transforms=3, hidden_features=(256, 256), bins=8, passes=passes)


class AutoregressiveFlow(_Flow):
    """zuko's masked autoregressive flow: five transforms, 256 x 2."""

    name = "MAF"

    def build(self, dim: int) -> nn.Module:
        return zuko.flows.MAF(dim, transforms=5, hidden_features=(256, 256))


class InverseFlow(_Learned):
    """pythae's inverse autoregressive flow at its sampler's defaults; its density takes d passes of each layer."""

    name = "IAF"
    rate = 1e-3

    def start(self, draw: Rows) -> None:
        from pythae.models.normalizing_flows import IAF, IAFConfig

        self.dim = len(draw.whitening.loc)
        self.network = IAF(IAFConfig(input_dim=(self.dim,)))

    def density(self, u: Tensor) -> Tensor:
        out = self.network(u)
        normal = -0.5 * out.out.square().sum(1) - 0.5 * self.dim * math.log(2 * math.pi)
        log_prob: Tensor = normal + out.log_abs_det_jac
        return log_prob

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        drawn: Tensor = self.network.inverse(torch.randn(n, self.dim)).out
        return drawn


class PseudoPosteriors(_Learned):
    r"""The VampPrior on given latents: :math:`\frac1K \sum_k N(z; m_k, \mathrm{diag}\, s_k^2)`, K = 500.

    Its components are diagonal in the latents' own coordinates, as posteriors are, and learned themselves, not
    through an encoder's images of pseudo-inputs, which such latents do not have; they begin at training rows.
    """

    name = "VampPrior"
    rate = 1e-2
    components = 500

    def start(self, draw: Rows) -> None:
        self.whitening = draw.whitening
        z = self.whitening.unwhiten(draw(max(5000, self.components)))
        spread = z.std(0)
        self.scale, self.shift = spread, z.mean(0)
        y = (z - self.shift) / spread
        self.network = nn.Module()
        self.network.means = nn.Parameter(y[: self.components].clone())
        self.network.log_scales = nn.Parameter(torch.full((self.components, y.shape[1]), math.log(0.5)))

    def density(self, u: Tensor) -> Tensor:
        y = (self.whitening.unwhiten(u) - self.shift) / self.scale
        precision = (-2 * self.network.log_scales).exp()
        means = self.network.means
        square = y.square() @ precision.T - 2 * y @ (means * precision).T + (means.square() * precision).sum(1)
        terms = -0.5 * square - self.network.log_scales.sum(1) - 0.5 * y.shape[1] * math.log(2 * math.pi)
        mixed = torch.logsumexp(terms, 1) - math.log(self.components)
        log_prob: Tensor = mixed - self.scale.log().sum() - self.whitening.log_abs_det
        return log_prob

    @torch.no_grad()
    def sample(self, n: int) -> Tensor:
        index = torch.randint(self.components, (n,))
        noise = torch.randn(n, len(self.scale)) * self.network.log_scales.exp()[index]
        return self.whitening.whiten((self.network.means[index] + noise) * self.scale + self.shift)


class _Energy:
    """A single unbounded log ratio on N(0, I), normalised as a ladder is; N(0, I) here is the fitted Gaussian."""

    prior: LatentPrior

    def log_prob(self, u: Tensor) -> Tensor:
        return self.prior.log_prob_whitened(u)

    def normalizer(self) -> dict[str, Any]:
        """How the density was normalised, with its error."""
        c = self.prior.normalizer
        ends = c.bracket and [list(c.bracket.forward), list(c.bracket.reverse)]
        return {"log_normalizer_stderr": c.stderr, "log_normalizer_from": c.source, "bracket": ends}


class SingleRatio(_Energy):
    """The prior of NCP-VAE: one unbounded ratio learned by noise contrastive estimation against N(0, I).

    N(0, I) stands in standardised coordinates, which is kinder to it than the latents' own.
    """

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        start_time, d = time.monotonic(), validation.shape[1]
        settings = StageSettings(
            bound=50.0,
            mixture_features=False,
            steps=1_000_000,
            ratio="residual",
            odds=1.0,
            optimizer="adamw",
            weight_decay=0.1,
        )
        aim = Target(draw.latents, torch.arange(len(draw.latents)), validation, draw.whitening)
        base = NormalBase(d).float()
        learner = StageLearner(aim, Ladder(base), settings, (d,), draw.seed)
        learned = learner.learn(learner.particles(), deadline=start_time + seconds)
        self.prior = _normalised(base, learned.ratio, validation, learner.seed)
        return {"steps": learned.steps, "gain": learned.gain.value, **self.normalizer()}

    def sample(self, n: int) -> Tensor:
        return self.prior.sample((n,), generator=derived_generator(CPU, 0, "NCE"))


class ShortRun(_Energy):
    """LEBM's prior: an energy on N(0, I) by maximum likelihood, negatives by short-run Langevin dynamics.

    60 steps of 0.4 from N(0, I), batches of 100, Adam (0.5, 0.999); the network is that of a ladder's stage, without
    a bound. Its samples are those of the short run, as published. The weights kept are those of the moving average with
    the best validation log density, its normaliser the larger of two estimates (importance sampling and SMC).
    """

    rate = 2e-4
    checks = 12

    def fit(self, draw: Rows, validation: Tensor, seconds: float) -> dict[str, Any]:
        start_time, d = time.monotonic(), validation.shape[1]
        spec = StageSettings(bound=1e6, ratio="residual", mixture_features=False).spec((d,))
        self.energy = build_ratio(spec, derived_generator(CPU, draw.seed, "energy"))
        self.base, self.generator = NormalBase(d).float(), derived_generator(CPU, draw.seed, "short run")
        self.ladder = Ladder(self.base, [Stage(self.energy)])
        parameters = dict(self.energy.named_parameters())
        average = {k: p.detach().clone() for k, p in parameters.items()}
        optimizer = torch.optim.Adam(self.energy.parameters(), lr=self.rate, betas=(0.5, 0.999))
        best, best_at, kept, steps, due = -math.inf, 0.0, average, 0, seconds / self.checks
        for spent in _ticks(seconds, start_time, "LEBM"):
            negatives = self.short_run(100)
            loss = self.energy(negatives).mean() - self.energy(draw(100)).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * spent / seconds))
            optimizer.step()
            steps += 1
            decay = min(0.999, steps / (steps + 9))
            with torch.no_grad():
                for name, parameter in parameters.items():
                    average[name].lerp_(parameter, 1 - decay)
            if time.monotonic() - start_time >= min(due, seconds):
                due += seconds / self.checks
                now = {k: p.detach().clone() for k, p in parameters.items()}
                self.energy.load_weights(average)
                score = self._score(validation)
                if score > best:
                    best, best_at, kept = score, spent, {k: v.clone() for k, v in average.items()}
                self.energy.load_weights(now)
        self.energy.load_weights(kept)
        self.energy.eval().requires_grad_(False)
        self.prior = _normalised(self.base, self.energy, validation, draw.seed)
        return {"best_at": best_at, "steps": steps, **self.normalizer()}

    def short_run(self, n: int) -> Tensor:
        """Return the ends of 60 Langevin steps from N(0, I)."""
        start = self.base.sample(n, self.generator)
        return langevin.sample(start, self.ladder.density(1.0), generator=self.generator)

    def sample(self, n: int) -> Tensor:
        return self.short_run(n)

    @torch.no_grad()
    def _score(self, validation: Tensor) -> float:
        ladder = self.ladder
        rows = validation[:2000]
        potential = ladder.base.log_prob(rows) + ladder.log_potential(rows)
        _, weights = ladder.importance(1 << 15, self.generator)
        direct = float(torch.logsumexp(weights.double(), 0)) - math.log(len(weights))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ends = normalizers.bracket(ladder, rows, self.generator, particles=512, islands=4, moves=4)
        except LearningDivergedError:
            return -math.inf
        log_z = max(direct, ends.forward.value, ends.reverse.value)
        return float(potential.double().mean()) - log_z if math.isfinite(log_z) else -math.inf


RIVALS: dict[str, Callable[[], Any]] = {
    "N(0,I)": StandardNormal,
    "Gaussian": Gaussian,
    "GMM": Mixture,
    "KDE": Kernels,
    "VampPrior": PseudoPosteriors,
    "flow (NSF)": SplineFlow,
    "flow (MAF)": AutoregressiveFlow,
    "flow (IAF, pythae)": InverseFlow,
    "NCE, one ratio": SingleRatio,
    "LEBM": ShortRun,
}


def _normalised(base: NormalBase, ratio: nn.Module, held_out: Tensor, seed: int) -> LatentPrior:
    """One log ratio on a base, its normaliser by importance sampling, or bracketed by SMC where that fails."""
    generator, d = derived_generator(CPU, seed, "normaliser"), held_out.shape[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        c = normalizers.estimate(Ladder(base, [Stage(ratio)]), held_out, generator)
    stage = Stage(ratio, c.value, c.stderr, 0.0, 0.0)
    return LatentPrior(Ladder(base, [stage]), identity_whitening(d), (d,), c)


def _copied(network: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in network.state_dict().items()}


def _ticks(seconds: float, start_time: float, name: str) -> Iterator[float]:
    """Seconds spent, again and again until they are over."""
    with tqdm(total=round(seconds), desc=name, unit="s", mininterval=5) as bar:
        while (spent := time.monotonic() - start_time) < seconds:
            bar.n = round(spent)
            yield spent
