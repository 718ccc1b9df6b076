"""Bounded log density ratios, the mixture's features that they read, and the logistic loss that learns them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, LatentPriorError
from .bases import MixtureBase
from .bases.mixture_base import responsibilities
from .decoded_ratio import DecodedNet, StandardisedDecoder
from .ratio_networks import MLP, ConvNet, Quadratic, RatioNetwork, ResidualMLP

__all__ = ["BoundedRatio", "Gain", "MixtureFeatures", "build_ratio", "gain", "logistic_loss"]

NOT_LEARNED = ("features.", "network.decoder.")
"""How the names begin of what a ratio reads and has not learned: the ladder's mixture, a decoder."""


class MixtureFeatures(nn.Module):
    r"""Where a row stands in a Gaussian mixture: ``(n, d) -> (n, 2 K + 1)``.

    The responsibilities :math:`r_k(u)`; the squared Mahalanobis distance to each component, standardised, where
    that component is responsible, :math:`r_k(u)\,(\|y_k\|^2 - d) / \sqrt{2 d}`; and the standardised
    :math:`\log p(u)`. What a mixture gets wrong is mostly radial and differs from component to component, which a
    perceptron on the coordinates alone finds slowly and from many rows. Of an average of mixtures the first one is
    read: more of them would say little more, and take most of a step's time.
    """

    center: Tensor
    spread: Tensor

    def __init__(self, mixture: MixtureBase) -> None:
        super().__init__()
        self.mixture = mixture
        self.read = mixture.first_member()
        # Moments of log p where components do not overlap.
        dim, weights = mixture.means.shape[1], self.read.log_weights.exp()
        level = self.read.constant
        center = (weights * level).sum()
        self.register_buffer("center", center - 0.5 * dim, persistent=False)
        spread = (0.5 * dim + (weights * (level - center).square()).sum()).sqrt()
        self.register_buffer("spread", spread, persistent=False)

    @property
    def size(self) -> int:
        """Number of features."""
        return 2 * self.read.n_components + 1

    def forward(self, u: Tensor) -> Tensor:
        return self.of_terms(self.read.log_terms(u), u.shape[1])

    def terms_read(self, terms: Tensor) -> Tensor:
        """Log terms ``(n, K)`` of the mixture that is read, from those of the whole average."""
        members = self.mixture.members
        return terms if members == 1 else terms[:, : self.read.n_components] + math.log(members)

    def of_terms(self, terms: Tensor, dim: int) -> Tensor:
        """Features of rows from the log terms ``(n, K)`` there of the mixture that is read."""
        log_prob, share = responsibilities(terms)
        radius = (2 * (self.read.constant - terms) - dim) / math.sqrt(2 * dim)
        return torch.cat([share, share * radius, ((log_prob - self.center) / self.spread)[:, None]], 1)

    def pull_back(self, features: Tensor, slope: Tensor, terms: Tensor, dim: int) -> Tensor:
        """Slopes in the log terms ``(n, K)`` of what has ``slope`` ``(n, 2 K + 1)`` in the features there."""
        k = self.read.n_components
        share, by_share, by_radius, by_level = features[:, :k], slope[:, :k], slope[:, k:-1], slope[:, -1:]
        scale = 2 / math.sqrt(2 * dim)
        radius = scale * (self.read.constant - terms) - dim / math.sqrt(2 * dim)
        along = torch.addcmul(by_share, by_radius, radius)
        mean = (share * along).sum(1, keepdim=True)
        return share * (along - mean + by_level / self.spread - scale * by_radius)


class BoundedRatio(nn.Module):
    r"""A log ratio that cannot run away, :math:`f(u) = s \tanh(h(u) / s)` with h a network.

    No stage reweighs a point by more than :math:`e^{s}`, so that a density chasm is crossed in several stages
    instead of by one saturated classifier (Rhodes, Xu and Gutmann, NeurIPS 2020, describe the chasm).
    Shapes: ``(n, d) -> (n,)``, in nats. With ``features`` the network reads these beside the coordinates; whoever
    has evaluated them already (several stages share a mixture) passes them on.
    """

    def __init__(
        self,
        network: RatioNetwork,
        bound: float = 5.0,
        spec: Mapping[str, Any] | None = None,
        features: MixtureFeatures | None = None,
    ) -> None:
        super().__init__()
        if not 0 < bound < math.inf:
            raise LatentPriorError(f"the bound of a log ratio must be positive and finite, got {bound}")
        self.network = network
        self.features = features
        self.bound = float(bound)
        self.spec = dict(spec or {})

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        if self.features is None:
            value = self.network(u)
        else:
            value = self.network(u, self.features(u) if features is None else features)
        return self.bound * torch.tanh(value / self.bound)

    def weights(self) -> dict[str, Tensor]:
        """The state to be saved: all that was learned."""
        return {k: v for k, v in self.state_dict().items() if not k.startswith(NOT_LEARNED)}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take in what :meth:`weights` gave; raises :class:`RuntimeError` where names or shapes differ."""
        missing, unexpected = self.load_state_dict(dict(weights), strict=False)
        wrong = [k for k in missing if not k.startswith(NOT_LEARNED)] + list(unexpected)
        if wrong:
            raise RuntimeError(f"weights that do not fit: {', '.join(sorted(wrong)[:5])}")

    def is_saturated(self, f: Tensor) -> Tensor:
        """Which values stand within 2% of the bound."""
        return f.abs() > 0.98 * self.bound


def build_ratio(
    spec: Mapping[str, Any],
    generator: torch.Generator | None = None,
    mixture: MixtureBase | None = None,
    decoder: StandardisedDecoder | None = None,
) -> BoundedRatio:
    """Make a bounded ratio from a JSON specification.

    ``kind`` is ``mlp``, ``residual``, ``quadratic``, ``conv`` or ``decoded``; with ``event_shape``,
    ``width``, ``depth``, ``bound`` and, where the network reads :class:`MixtureFeatures`, ``features`` true; of
    ``decoded`` with ``pictures``. Raises :class:`CheckpointError` for a kind it does not know, or if the mixture or
    decoder is absent.
    """
    kind, shape = spec.get("kind"), tuple(spec["event_shape"])
    width, depth = int(spec["width"]), int(spec["depth"])
    features = None
    if spec.get("features"):
        if mixture is None:
            raise CheckpointError("this ratio network reads features of a mixture, and there is none")
        features = MixtureFeatures(mixture)
    extra = features.size if features is not None else 0
    network: RatioNetwork
    if kind == "mlp":
        network = MLP(math.prod(shape), width, depth, generator, extra)
    elif kind == "residual":
        network = ResidualMLP(math.prod(shape), width, depth, generator, extra)
    elif kind == "quadratic":
        network = Quadratic(math.prod(shape), generator, extra)
    elif kind == "conv":
        network = ConvNet(shape, width, depth, generator, extra)
    elif kind == "decoded":
        if decoder is None:
            raise CheckpointError("a stage reads what a decoder makes of the latents: pass decoder= to from_pretrained")
        channels, height, breadth = map(int, spec["pictures"]["shape"])
        network = DecodedNet((channels, height, breadth), decoder, max(1, width // 8), generator)
    else:
        raise CheckpointError(f"unknown ratio network {kind!r}: choose mlp, residual, quadratic, conv or decoded")
    return BoundedRatio(network, float(spec["bound"]), spec, features)


def logistic_loss(f_target: Tensor, f_particles: Tensor, odds: float = 1.0) -> Tensor:
    r"""The logistic loss of telling rows of q from ``odds`` times as many particles, in nats.

    :math:`\mathbb E_q[-\log\sigma(f - \log\nu)] + \nu\,\mathbb E_{p_k}[-\log\sigma(\log\nu - f)]`, whose
    minimiser is :math:`f^* = \log q/p_k` whatever the odds :math:`\nu` (Xiao and Han 2022, eq. 6, have 1); at
    :math:`f = 0` and odds of 1 it is :math:`2\log 2`. The larger they are, the closer comes what a given number of
    rows of q teaches to maximum likelihood (Gutmann and Hyvarinen, JMLR 2012). Shapes: ``(n,)`` and ``(m,)`` to a
    scalar.
    """
    shift = math.log(odds)
    return F.softplus(shift - f_target).mean() + odds * F.softplus(f_particles - shift).mean()


class Gain(NamedTuple):
    """The logistic loss of knowing nothing less that on held-out rows, and its standard error, in nats."""

    value: float
    stderr: float

    @property
    def lower(self) -> float:
        """Two standard errors below."""
        return self.value - 2 * self.stderr


def gain(f_target: Tensor, f_particles: Tensor, effective: int | None = None, odds: float = 1.0) -> Gain:
    r"""How well a stage tells q from :math:`p_k`: 0 for no difference to 1.386 for perfect separation.

    At the optimum it is twice the Jensen-Shannon divergence. The standard error is that of two independent
    means, where resampled particles count as their ``effective`` number. Shapes: ``(n,)`` and ``(m,)``.
    With ``odds`` other than 1 it is the gain in the loss at these, which tends to :math:`\mathrm{KL}(q \| p_k)`.
    """
    rows, shift = effective or len(f_particles), math.log(odds)
    a, b = F.softplus(shift - f_target.double()), odds * F.softplus(f_particles.double() - shift)
    variance = a.var(correction=0) / max(1, len(a) - 1) + b.var(correction=0) / max(1, rows - 1)
    nothing = math.log1p(odds) + odds * math.log1p(1 / odds)
    return Gain(nothing - float(a.mean() + b.mean()), float(variance.sqrt()))
