"""Stage networks: bounded log density ratios, and the logistic loss that learns them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, LatentPriorError
from ..storage.sized_networks import blank
from .bases import MixtureBase
from .bases.mixture_base import responsibilities
from .decoded_ratio import DecodedNet, Decoder

__all__ = [
    "MLP",
    "BoundedRatio",
    "ConvNet",
    "Gain",
    "MixtureFeatures",
    "Quadratic",
    "ResidualMLP",
    "build_ratio",
    "gain",
    "logistic_loss",
]

FIRST_LAYER_SCALE = 1.0
NOT_LEARNED = ("features.", "network.decoder.")
"""How the names begin of what a ratio reads and has not learned: the ladder's mixture, a decoder."""


def _linear(fan_in: int, fan_out: int, std: float, bias_std: float, g: torch.Generator | None) -> nn.Linear:
    layer: nn.Linear = blank(nn.Linear, fan_in, fan_out)
    nn.init.normal_(layer.weight, std=std, generator=g)
    nn.init.normal_(layer.bias, std=bias_std, generator=g)
    return layer


def _first(fan_in: int, fan_out: int, g: torch.Generator | None) -> nn.Linear:
    """Features of standardised inputs with kinks all over the data, not only where they are linear.

    Smaller weights leave the logistic loss on a plateau for the first hundreds of steps.
    """
    return _linear(fan_in, fan_out, FIRST_LAYER_SCALE / math.sqrt(fan_in), FIRST_LAYER_SCALE, g)


def _beside(features: int, width: int, g: torch.Generator | None) -> nn.Linear | None:
    """Where a hidden layer takes in features; nothing if there are none."""
    return _linear(features, width, 0.5 / math.sqrt(features), 0.0, g) if features else None


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


class MLP(nn.Module):
    """A plain perceptron ``(n, d) -> (n,)``: ``depth`` hidden layers of ``width`` SiLU units.

    The first takes in ``features`` more inputs, if there are any.
    """

    def __init__(
        self,
        dim: int,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator | None = None,
        features: int = 0,
    ) -> None:
        super().__init__()
        self.first = _first(dim, width, generator)
        self.beside = _beside(features, width, generator)
        layers: list[nn.Module] = [nn.SiLU()]
        for _ in range(depth - 1):
            layers += [_linear(width, width, math.sqrt(2 / width), 0.0, generator), nn.SiLU()]
        self.layers = nn.Sequential(*layers, _linear(width, 1, 1 / math.sqrt(width), 0.0, generator))

    def hidden_matrices(self) -> list[Tensor]:
        """Weights from hidden layer to hidden layer."""
        return [layer.weight for layer in list(self.layers)[:-1] if isinstance(layer, nn.Linear)]

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        h = self.first(u)
        if self.beside is not None:
            h = h + self.beside(features)
        return self.layers(h).squeeze(1)  # type: ignore[no-any-return]


class _ResidualBlock(nn.Module):
    def __init__(self, width: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.inner = _linear(width, width, 1 / math.sqrt(width), 0.0, generator)
        self.outer = _linear(width, width, 0.0, 0.0, generator)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.outer(F.silu(self.inner(F.silu(h))))  # type: ignore[no-any-return]


class ResidualMLP(nn.Module):
    """Pre-activation residual perceptron ``(n, d) -> (n,)`` with ``depth`` blocks, each zero at first.

    The first layer takes in ``features`` more inputs, if there are any.
    """

    def __init__(
        self,
        dim: int,
        width: int = 256,
        depth: int = 2,
        generator: torch.Generator | None = None,
        features: int = 0,
    ) -> None:
        super().__init__()
        self.first = _first(dim, width, generator)
        self.beside = _beside(features, width, generator)
        self.blocks = nn.Sequential(*[_ResidualBlock(width, generator) for _ in range(depth)])
        self.last = _linear(width, 1, 1 / math.sqrt(width), 0.0, generator)

    def pairs(self) -> list[tuple[nn.Linear, nn.Linear]]:
        """The inner and the outer layer of each block."""
        return [(block.inner, block.outer) for block in self.blocks if isinstance(block, _ResidualBlock)]

    def hidden_matrices(self) -> list[Tensor]:
        """Weights from hidden layer to hidden layer."""
        return [layer.weight for pair in self.pairs() for layer in pair]

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        h = self.first(u)
        if self.beside is not None:
            h = h + self.beside(features)
        return self.last(F.silu(self.blocks(h))).squeeze(1)  # type: ignore[no-any-return]


class Quadratic(nn.Module):
    r"""A quadratic form ``(n, d) -> (n,)``, :math:`u^\top W u + b^\top u + c`, zero but for small weights at first.

    The log ratio of two Gaussians is of this class (Rhodes, Xu and Gutmann, NeurIPS 2020, learn such ratios on
    theirs). Takes in ``features`` more inputs linearly, if there are any.
    """

    def __init__(self, dim: int, generator: torch.Generator | None = None, features: int = 0) -> None:
        super().__init__()
        self.form = _linear(dim, dim, 0.01 / dim, 0.01 / math.sqrt(dim), generator)
        self.beside = _beside(features, 1, generator)
        self.offset = nn.Parameter(torch.zeros(1))

    def symmetric(self) -> Tensor:
        r""":math:`W + W^\top` ``(d, d)``."""
        return self.form.weight + self.form.weight.T

    def form_parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """W ``(d, d)``, b ``(d,)`` and c ``(1,)``."""
        return self.form.weight, self.form.bias, self.offset

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        h = (self.form(u) * u).sum(1) + self.offset
        return h if self.beside is None else h + self.beside(features).squeeze(1)  # type: ignore[no-any-return]


class ConvNet(nn.Module):
    """A convolutional ratio for spatial latents: flat ``(n, C*H*W) -> (n,)``.

    Two 3x3 convolutions at full resolution, then ``depth`` strided ones while the map is wider than 2, the
    mean and the flattened rest read by a hidden layer, which takes in ``features`` more inputs, if there are any.
    """

    def __init__(
        self,
        event_shape: Sequence[int],
        width: int = 64,
        depth: int = 2,
        generator: torch.Generator | None = None,
        features: int = 0,
    ) -> None:
        super().__init__()
        if len(event_shape) != 3:
            raise LatentPriorError(f"the convolutional ratio needs latents (C, H, W), got {tuple(event_shape)}")
        self.event_shape = tuple(event_shape)
        channels, height, breadth = self.event_shape
        sizes = [(channels, width, 1), (width, width, 1)]
        for _ in range(depth):
            if min(height, breadth) <= 2:
                break
            sizes.append((width, width, 2))
            height, breadth = (height + 1) // 2, (breadth + 1) // 2
        convs: list[nn.Module] = []
        for fan_in, fan_out, stride in sizes:
            conv: nn.Conv2d = blank(nn.Conv2d, fan_in, fan_out, 3, stride=stride, padding=1)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * fan_in)), generator=generator)
            assert conv.bias is not None
            nn.init.normal_(conv.bias, std=0.5, generator=generator)
            convs += [conv, nn.SiLU()]
        self.convs = nn.Sequential(*convs)
        flat = width * height * breadth
        self.hidden = _linear(flat, 4 * width, math.sqrt(2 / flat), 0.0, generator)
        self.beside = _beside(features, 4 * width, generator)
        self.last = _linear(4 * width, 1, 0.5 / math.sqrt(width), 0.0, generator)

    def forward(self, u: Tensor, features: Tensor | None = None) -> Tensor:
        h = self.hidden(self.convs(u.view(-1, *self.event_shape)).flatten(1))
        if self.beside is not None:
            h = h + self.beside(features)
        return self.last(F.silu(h)).squeeze(1)  # type: ignore[no-any-return]


class BoundedRatio(nn.Module):
    r"""A log ratio that cannot run away, :math:`f(u) = s \tanh(h(u) / s)` with h a network.

    No stage reweighs a point by more than :math:`e^{s}`, so that a density chasm is crossed in several stages
    instead of by one saturated classifier (Rhodes, Xu and Gutmann, NeurIPS 2020, describe the chasm).
    Shapes: ``(n, d) -> (n,)``, in nats. With ``features`` the network reads these beside the coordinates; whoever
    has evaluated them already (several stages share a mixture) passes them on.
    """

    def __init__(
        self,
        network: nn.Module,
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
    decoder: Decoder | None = None,
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
    network: nn.Module
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
