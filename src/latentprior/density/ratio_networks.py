"""Networks of log ratios: perceptrons, a quadratic form, and convolutions for spatial latents."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import LatentPriorError
from ..storage.sized_networks import blank

__all__ = ["MLP", "ConvNet", "Quadratic", "RatioNetwork", "ResidualMLP"]

FIRST_LAYER_SCALE = 1.0
"""Standard deviation of the first layer's outputs: smaller ones leave the loss on a plateau for hundreds of steps."""


class RatioNetwork(nn.Module):
    """A network from rows ``(n, d)``, and features beside them where it reads any, to unbounded log ratios ``(n,)``."""

    def hidden_matrices(self) -> list[Tensor]:
        """Weights from hidden layer to hidden layer, which are optimised by orthogonalised momentum."""
        return []

    def form_parameters(self) -> tuple[Tensor, ...]:
        """Parameters of a quadratic form, which are optimised by natural gradients."""
        return ()


def _linear(fan_in: int, fan_out: int, std: float, bias_std: float, g: torch.Generator | None) -> nn.Linear:
    layer: nn.Linear = blank(nn.Linear, fan_in, fan_out)
    nn.init.normal_(layer.weight, std=std, generator=g)
    nn.init.normal_(layer.bias, std=bias_std, generator=g)
    return layer


def _first(fan_in: int, fan_out: int, g: torch.Generator | None) -> nn.Linear:
    """A first layer whose units bend all over the data, not only where they are linear."""
    return _linear(fan_in, fan_out, FIRST_LAYER_SCALE / math.sqrt(fan_in), FIRST_LAYER_SCALE, g)


def _beside(features: int, width: int, g: torch.Generator | None) -> nn.Linear | None:
    """Where a hidden layer takes in features; nothing if there are none."""
    return _linear(features, width, 0.5 / math.sqrt(features), 0.0, g) if features else None


class MLP(RatioNetwork):
    """A plain perceptron ``(n, d) -> (n,)``: ``depth`` hidden layers of ``width`` SiLU units.

    The first takes in ``features`` more inputs, if there are any.
    """

    def __init__(
        self, dim: int, width: int = 256, depth: int = 2, generator: torch.Generator | None = None, features: int = 0
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


class ResidualMLP(RatioNetwork):
    """Pre-activation residual perceptron ``(n, d) -> (n,)`` with ``depth`` blocks, each zero at first.

    The first layer takes in ``features`` more inputs, if there are any.
    """

    def __init__(
        self, dim: int, width: int = 256, depth: int = 2, generator: torch.Generator | None = None, features: int = 0
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


class Quadratic(RatioNetwork):
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


class ConvNet(RatioNetwork):
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
