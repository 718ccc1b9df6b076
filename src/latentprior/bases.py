"""Normalised densities that the ladder starts from; all live in standardised, flat coordinates."""

from __future__ import annotations

import copy
import itertools
import math
import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .errors import CheckpointError, LatentPriorError, MissingExtraError
from .whitening import Whitening

__all__ = [
    "Base",
    "BlendBase",
    "CopulaBase",
    "DistributionBase",
    "FlowBase",
    "GaussianMixtureBase",
    "NormalBase",
    "base_from_state",
    "fit_base",
]

LOG_2PI = math.log(2 * math.pi)


class Base(nn.Module):
    """A density :math:`p_0` on ``(n, d)`` rows that is normalised, can be sampled, and can be saved."""

    name: ClassVar[str]

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density in nats, ``(n, d) -> (n,)``."""
        raise LatentPriorError(f"{type(self).__name__} has no log_prob")

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Log density ``(n,)`` and its gradient ``(n, d)``; by automatic differentiation unless overridden."""
        with torch.enable_grad():
            u = u.detach().requires_grad_(True)
            value = self.log_prob(u)
            (grad,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), grad

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` independent rows ``(n, d)``."""
        raise LatentPriorError(f"{type(self).__name__} cannot be sampled")

    def config(self) -> dict[str, Any]:
        """What :func:`base_from_state` needs beside the tensors; JSON."""
        return {"name": self.name}


class NormalBase(Base):
    r"""The standard normal :math:`\log p_0(u) = -\frac12 \|u\|^2 - \frac d2 \log 2\pi`: the fitted Gaussian."""

    name = "normal"
    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(dim, dtype=torch.float64))

    def log_prob(self, u: Tensor) -> Tensor:
        return -0.5 * (u.square().sum(1) + u.shape[1] * LOG_2PI)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(u), -u

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return _normal((n, len(self.zero)), self.zero, generator)


class GaussianMixtureBase(Base):
    r"""A Gaussian mixture, :math:`\log p_0(u) = \log \sum_k \pi_k \mathcal N(u; m_k, \Sigma_k)`.

    With :math:`y_k = L_k^{-1}(u - m_k)` for all k from one matrix product, the gradient is
    :math:`-\sum_k r_k(u) L_k^{-\top} y_k`, r the responsibilities.

    Arguments
    ---------
    weights, means, cholesky : ``(K,)``, ``(K, d)``, ``(K, d, d)`` lower factors of the covariances.
    """

    name = "gmm"
    means: Tensor
    cholesky: Tensor
    log_weights: Tensor
    projection: Tensor
    offset: Tensor
    constant: Tensor

    def __init__(self, weights: Tensor, means: Tensor, cholesky: Tensor) -> None:
        super().__init__()
        k, d = means.shape
        eye = torch.eye(d, dtype=means.dtype, device=means.device).expand(k, d, d)
        inverse = torch.linalg.solve_triangular(cholesky, eye, upper=False)
        log_weights = weights.log() - weights.sum().log()
        log_det = cholesky.diagonal(dim1=1, dim2=2).log().sum(1)
        self.register_buffer("means", means)
        self.register_buffer("cholesky", cholesky.contiguous())
        self.register_buffer("log_weights", log_weights)
        self.register_buffer("projection", inverse.permute(2, 1, 0).reshape(d, d * k).contiguous())
        self.register_buffer("offset", torch.einsum("kij,kj->ik", inverse, means).reshape(-1))
        self.register_buffer("constant", log_weights - log_det - 0.5 * d * LOG_2PI)

    @property
    def n_components(self) -> int:
        """Number K of components."""
        return len(self.means)

    @classmethod
    def fit(
        cls,
        train: Tensor,
        validation: Tensor,
        *,
        n_components: int | None = None,
        generator: torch.Generator | None = None,
    ) -> GaussianMixtureBase:
        """Fit by scikit-learn's EM; ``n_components`` is chosen by held-out log density unless given.

        The search multiplies K by 4 (1, 4, 16, ...) until the held-out log density stops rising by 0.01 nats, and
        then tries the K between; or until an iteration of EM would pass a fixed amount of work. EM itself stops
        at 0.003 nats an iteration, since the ladder mends what a rough mixture leaves.
        """
        from sklearn import config_context
        from sklearn.mixture import GaussianMixture

        n, d = train.shape
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=_device(generator)))
        if n > MIXTURE_ROWS:
            train, n = train[:MIXTURE_ROWS], MIXTURE_ROWS
        x = train.cpu().float().numpy()

        def fitted(k: int) -> tuple[float, GaussianMixtureBase]:
            if k > n:
                raise LatentPriorError(f"a mixture of {k} components needs at least {k} rows, got {n}")
            mixture = GaussianMixture(k, tol=3e-3, max_iter=60, reg_covar=1e-4, random_state=seed)
            # Under a caller's array dispatch, scikit-learn refuses to start EM from k-means.
            with warnings.catch_warnings(), config_context(array_api_dispatch=False):
                warnings.simplefilter("ignore")
                mixture.fit(x)
            weights, means, covariances = (
                torch.as_tensor(v, dtype=torch.float64)
                for v in (mixture.weights_, mixture.means_, mixture.covariances_)
            )
            made = cls(weights.clamp_min(1e-12), means, torch.linalg.cholesky(covariances))
            return float(made.log_prob(validation.cpu().double()).mean()), made

        if n_components is not None:
            return fitted(n_components)[1]
        if n < 2:
            one = torch.ones(1, dtype=torch.float64)
            return cls(one, torch.zeros(1, d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)[None])
        k, best = 1, fitted(1)
        while 4 * k * n * (d * d + 60 * d) <= MIXTURE_WORK and 8 * k * (d + 1) <= n:
            k *= 4
            candidate = fitted(k)
            if candidate[0] < best[0] + 0.01:
                middle = fitted(k // 2)
                return max(best, candidate, middle, key=lambda pair: pair[0])[1]
            best = candidate
        return best[1]

    def widened(self, factors: tuple[float, ...]) -> GaussianMixtureBase:
        """Equal shares of this mixture with its components' scales multiplied by each factor: halos around modes."""
        m = len(factors)
        weights = self.log_weights.exp().repeat(m)
        cholesky = torch.cat([factor * self.cholesky for factor in factors])
        return GaussianMixtureBase(weights, self.means.repeat(m, 1), cholesky)

    def _project(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised residuals ``(n, d, K)`` and log terms ``(n, K)``; components last, so that sums are fast."""
        y = torch.addmm(-self.offset, u, self.projection).view(len(u), u.shape[1], self.n_components)
        return y, self.constant - 0.5 * y.square().sum(1)

    def log_terms(self, u: Tensor) -> Tensor:
        r""":math:`\log \pi_k \mathcal N(u; m_k, \Sigma_k)` of every component, ``(n, d) -> (n, K)``."""
        return torch.cat([self._project(block)[1] for block in u.split(self._rows())])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logsumexp(self.log_terms(u), 1)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            y, terms = self._project(block)
            value = torch.logsumexp(terms, 1)
            # Denormal numbers would slow the matrix product down many times.
            weight = (terms - value[:, None]).clamp_min(-60).exp()
            values.append(value)
            grads.append(-(y * weight[:, None]).flatten(1) @ self.projection.T)
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        # What fits a core's cache.
        return max(64, (1 << 18) // self.projection.shape[1])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        device = _device(generator)
        if n == 0:
            return self.means.new_zeros(0, self.means.shape[1])
        weights = self.log_weights.exp().to(device)
        which = torch.multinomial(weights, n, replacement=True, generator=generator).to(self.means.device)
        noise = _normal((n, self.means.shape[1]), self.means, generator)
        order = which.argsort(stable=True)
        parts = noise[order].split(torch.bincount(which, minlength=self.n_components).tolist())
        rows = torch.cat([m + e @ c.T for m, c, e in zip(self.means, self.cholesky, parts, strict=True)])
        return torch.empty_like(rows).index_copy_(0, order, rows)


MIXTURE_ROWS = 100_000
MIXTURE_WORK = 6e9


class CopulaBase(Base):
    r"""Independent smooth marginals, :math:`p_0(u) = \prod_j p_j(u_j)`: the ladder then learns the copula.

    Each marginal is an equal mixture of normals at its quantiles, each as wide as the gap to its neighbours:
    a kernel estimate whose bandwidth follows the data.

    Arguments
    ---------
    centers, widths : ``(d, M)``.
    """

    name = "copula"
    centers: Tensor
    widths: Tensor

    def __init__(self, centers: Tensor, widths: Tensor) -> None:
        super().__init__()
        self.register_buffer("centers", centers)
        self.register_buffer("widths", widths)

    @classmethod
    def fit(cls, train: Tensor, *, quantiles: int = 64) -> CopulaBase:
        """Place the kernels of every coordinate at the mid-quantiles of ``train`` ``(n, d)``."""
        x = train[:MIXTURE_ROWS].cpu().double()
        m = max(1, min(quantiles, len(x) // 4))
        levels = (torch.arange(m, dtype=torch.float64) + 0.5) / m
        centers = torch.quantile(x, levels, dim=0).T.contiguous()
        spread = x.std(0, correction=0).clamp_min(1e-6)[:, None]
        if m == 1:
            return cls(centers, spread)
        gaps = centers.diff(dim=1)
        near = torch.cat([gaps[:, :1], torch.maximum(gaps[:, 1:], gaps[:, :-1]), gaps[:, -1:]], 1)
        return cls(centers, torch.maximum(near, 0.02 * spread))

    def _terms(self, u: Tensor) -> tuple[Tensor, Tensor]:
        y = (u[:, :, None] - self.centers) / self.widths
        return y, -0.5 * y.square() - self.widths.log() - 0.5 * LOG_2PI - math.log(self.centers.shape[1])

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.cat([torch.logsumexp(self._terms(b)[1], 2).sum(1) for b in u.split(self._rows())])

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for block in u.split(self._rows()):
            y, terms = self._terms(block)
            marginal = torch.logsumexp(terms, 2)
            values.append(marginal.sum(1))
            grads.append(-((terms - marginal[:, :, None]).exp() * y / self.widths).sum(2))
        return torch.cat(values), torch.cat(grads)

    def _rows(self) -> int:
        return max(64, (1 << 22) // self.centers.numel())

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        d, m = self.centers.shape
        pick = torch.randint(m, (n, d), generator=generator, device=_device(generator)).to(self.centers.device)
        coordinate = torch.arange(d, device=self.centers.device)
        noise = _normal((n, d), self.centers, generator)
        return self.centers[coordinate, pick] + self.widths[coordinate, pick] * noise


class BlendBase(Base):
    r"""Half of one base and half of another, :math:`\log\frac12(p_a(u) + p_b(u))`: covers what either covers."""

    name = "blend"

    def __init__(self, first: Base, second: Base) -> None:
        super().__init__()
        self.first, self.second = first, second

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logaddexp(self.first.log_prob(u), self.second.log_prob(u)) - math.log(2)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        (a, grad_a), (b, grad_b) = self.first.log_prob_and_grad(u), self.second.log_prob_and_grad(u)
        share = torch.sigmoid(a - b)[:, None]
        return torch.logaddexp(a, b) - math.log(2), share * grad_a + (1 - share) * grad_b

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        coin = torch.rand(n, generator=generator, device=_device(generator)) < 0.5
        rows = torch.cat(
            [self.first.sample(int(coin.sum()), generator), self.second.sample(int((~coin).sum()), generator)]
        )
        return rows[torch.cat([coin.nonzero(), (~coin).nonzero()]).flatten().argsort().to(rows.device)]


class FlowBase(Base):
    r"""A neural spline flow (zuko; extra ``flow``), :math:`\log p_0(u) = \log N(T(u)) + \log|\det J_T(u)|`.

    Durkan, Bekasov, Murray and Papamakarios (NeurIPS 2019). Trained by maximum likelihood with Adam at 1e-3,
    stopped on held-out log density.
    """

    name = "flow"

    def __init__(self, dim: int, transforms: int = 3, hidden: tuple[int, ...] = (128, 128)) -> None:
        super().__init__()
        try:
            import zuko
        except ImportError:
            raise MissingExtraError("base='flow'", "flow") from None
        self.dim, self.transforms, self.hidden = dim, transforms, tuple(hidden)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.flow = zuko.flows.NSF(dim, transforms=transforms, hidden_features=self.hidden, bins=8)

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dim": self.dim,
            "transforms": self.transforms,
            "hidden": list(self.hidden),
            "log_prob_at_zero": self.at_zero(),
        }

    @torch.no_grad()
    def at_zero(self) -> float:
        """Log density of the origin: by it a saved flow is known again, since splines differ between zukos."""
        return float(self.log_prob(next(self.flow.parameters()).new_zeros(1, self.dim)))

    @classmethod
    @torch.enable_grad()
    def fit(
        cls,
        train: Tensor,
        validation: Tensor,
        *,
        max_epochs: int = 30,
        batch_size: int = 512,
        patience: int = 3,
        generator: torch.Generator | None = None,
    ) -> FlowBase:
        """Maximise the log density of ``train``; keep the weights best on ``validation``."""
        base = cls(train.shape[1]).to(device=train.device, dtype=train.dtype)
        optimizer = torch.optim.Adam(base.flow.parameters(), lr=1e-3)
        best, best_state, waited = -math.inf, base.state_dict(), 0
        for _ in range(max_epochs):
            order = torch.randperm(len(train), generator=generator, device=_device(generator)).to(train.device)
            for index in order.split(batch_size):
                loss = -base.flow().log_prob(train[index]).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(base.flow.parameters(), 10.0)
                optimizer.step()
            with torch.no_grad():
                score = float(base.log_prob(validation).mean())
            waited += 1
            if score > best:
                best, waited = score, 0
                best_state = {key: value.clone() for key, value in base.state_dict().items()}
            if waited >= patience:
                break
        base.load_state_dict(best_state)
        return base.requires_grad_(False)

    def log_prob(self, u: Tensor) -> Tensor:
        if not len(u):
            return u.sum(1)
        return torch.cat([self.flow().log_prob(block) for block in u.split(4096)])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        like = next(self.flow.parameters())
        with torch.no_grad():
            inverse = self.flow().transform.inv
            noise = _normal((n, self.dim), like, generator)
            return torch.cat([inverse(block) for block in noise.split(4096)])


class DistributionBase(Base):
    """Any :class:`torch.distributions.Distribution` over the user's own coordinates.

    Its draws take their seed from the generator; torch's global generator is put back as it was. It cannot be
    written to disk: give it again, ``LatentPrior.from_pretrained(folder, base=distribution)``.
    """

    name = "distribution"

    def __init__(self, distribution: torch.distributions.Distribution, whitening: Whitening) -> None:
        super().__init__()
        self.distribution = distribution
        self.whitening = whitening
        self.shape = distribution.batch_shape + distribution.event_shape
        if math.prod(self.shape) != len(whitening.loc):
            raise LatentPriorError(
                f"the base has shape {tuple(self.shape)}, the latents {len(whitening.loc)} coordinates a row: "
                "give a distribution of that many"
            )
        self.inside = self._draw(1, 0)

    def log_prob(self, u: Tensor) -> Tensor:
        if not len(u):
            return u.sum(1)
        z = self.whitening.unwhiten(u).reshape(len(u), *self.shape).to(self.inside)
        inside = self._inside(z)
        if inside is not None:
            # Out of the support a distribution raises or returns NaN: score a point within, then refuse.
            event = (1,) * len(self.distribution.event_shape)
            z = torch.where(inside.reshape(*inside.shape, *event), z, self.inside)
        value = self.distribution.log_prob(z)
        if inside is not None:
            value = torch.where(inside, value, -math.inf)
        flat = value.reshape(len(u), math.prod(self.distribution.batch_shape)).sum(1).to(u)
        return flat + 0.0 * u.sum(1) - self.whitening.log_abs_det

    def _inside(self, z: Tensor) -> Tensor | None:
        try:
            support = self.distribution.support
        except NotImplementedError:
            return None
        return None if support is None else support.check(z)

    def _draw(self, n: int, seed: int) -> Tensor:
        loc = self.whitening.loc
        with torch.random.fork_rng(devices=[loc.device] if loc.is_cuda else []):
            # Not torch.manual_seed, which would seed every accelerator as well.
            torch.default_generator.manual_seed(seed)
            if loc.is_cuda:
                torch.cuda.manual_seed(seed)
            return self.distribution.sample(torch.Size([n]))

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        seed = int(torch.randint(2**62, (), generator=generator, device=_device(generator)))
        z = self._draw(n, seed).to(self.whitening.loc)
        return self.whitening.whiten(z.reshape(n, len(self.whitening.loc)))


def fit_base(
    kind: str | torch.distributions.Distribution | Base,
    train: Tensor,
    validation: Tensor,
    whitening: Whitening,
    generator: torch.Generator | None = None,
) -> Base:
    """Make the base ``kind`` from standardised rows; ``"gmm:20"`` fixes the number of components.

    Raises :class:`LatentPriorError` for an unknown name, :class:`MissingExtraError` where an extra is absent.
    """
    if isinstance(kind, Base):
        base: Base = copy.deepcopy(kind)
    elif isinstance(kind, torch.distributions.Distribution):
        base = DistributionBase(kind, whitening)
    elif kind == "normal":
        base = NormalBase(train.shape[1])
    elif kind == "copula":
        base = CopulaBase.fit(train)
    elif kind == "flow":
        base = FlowBase.fit(train, validation, generator=generator)
    elif kind == "gmm" or (kind.startswith("gmm:") and kind[4:].isdecimal() and int(kind[4:]) > 0):
        k = int(kind[4:]) if kind != "gmm" else None
        base = GaussianMixtureBase.fit(train, validation, n_components=k, generator=generator)
    else:
        raise LatentPriorError(
            f"unknown base {kind!r}: choose normal, gmm, gmm:K, copula, flow or give a torch Distribution"
        )
    return base.to(device=train.device, dtype=train.dtype).requires_grad_(False)


def base_from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base:
    """Rebuild a saved base from its :meth:`Base.config` and state; raises :class:`CheckpointError`."""
    name = config.get("name")
    if name == "normal":
        return NormalBase(len(tensors["zero"])).to(tensors["zero"].dtype)
    if name == "gmm":
        k, d = tensors["means"].shape
        if tensors["cholesky"].shape != (k, d, d) or tensors["log_weights"].shape != (k,):
            raise ValueError("the mixture's shapes differ")
        mixture = GaussianMixtureBase(tensors["log_weights"].exp(), tensors["means"], tensors["cholesky"])
        # The derived buffers too, lest they differ in their last bits.
        mixture.load_state_dict(dict(tensors))
        return mixture
    if name == "copula":
        if tensors["centers"].shape != tensors["widths"].shape:
            raise ValueError("the copula's shapes differ")
        return CopulaBase(tensors["centers"], tensors["widths"])
    if name == "flow":
        dim, transforms, hidden = int(config["dim"]), int(config["transforms"]), tuple(map(int, config["hidden"]))
        # A line of JSON must not ask for more memory than the weights beside it fill.
        most = sum(v.numel() for v in tensors.values())
        if not 0 < transforms <= len(tensors) or any(a * b > most for a, b in itertools.pairwise((dim, *hidden, dim))):
            raise ValueError("a flow larger than its weights")
        flow = FlowBase(dim, transforms, hidden)
        dtype = next((v.dtype for v in tensors.values() if v.is_floating_point()), None)
        # Releases of zuko give the constants of N(0, I), the flow's own base, names that differ.
        constants = {k: v for k, v in flow.to(dtype).state_dict().items() if k.startswith("flow.base.")}
        learned = {k: v for k, v in tensors.items() if not k.startswith("flow.base.")}
        flow.load_state_dict({**learned, **constants})
        then, now = float(config.get("log_prob_at_zero", flow.at_zero())), flow.at_zero()
        if not abs(then - now) < 1e-3 * (1 + abs(then)):
            raise CheckpointError(
                f"flow of log density {then:.4f} at zero has {now:.4f} here: its splines are those of another release "
                "of zuko; install the one that it was saved with"
            )
        return flow.requires_grad_(False)
    if name == "distribution":
        raise CheckpointError(
            "this prior stands on a torch Distribution of yours: pass it again, from_pretrained(dir, base=...)"
        )
    raise CheckpointError(f"unknown base {name!r}: saved by another release")


def _device(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _normal(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    noise = torch.randn(shape, generator=generator, device=_device(generator), dtype=like.dtype)
    return noise.to(like.device)
