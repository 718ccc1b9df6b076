"""What every base is; the standard normal; two bases in equal shares."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...errors import CheckpointError, LatentPriorError

__all__ = ["FIT_ROWS", "LOG_2PI", "Base", "BlendBase", "NormalBase", "device_of", "normal_noise"]

LOG_2PI = math.log(2 * math.pi)
FIT_ROWS = 100_000
"""Most rows that a mixture or marginals are fitted to."""


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

    @property
    def dim(self) -> int:
        """Number d of coordinates."""
        raise LatentPriorError(f"{type(self).__name__} does not know its dimension")

    def config(self) -> dict[str, Any]:
        """What :meth:`from_state` needs beside the tensors, as JSON."""
        return {"name": self.name}

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base:
        """Rebuild from :meth:`config` and the state of the module.

        Raises :class:`ValueError`, :class:`KeyError` or :class:`CheckpointError` where the two do not fit together.
        """
        raise CheckpointError(f"a base {cls.name!r} cannot be read from a file")


def device_of(generator: torch.Generator | None) -> torch.device:
    """Where a generator's numbers are drawn."""
    return torch.device("cpu") if generator is None else generator.device


def normal_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of ``like``'s type, on its device."""
    noise = torch.randn(shape, generator=generator, device=device_of(generator), dtype=like.dtype)
    return noise.to(like.device)


class NormalBase(Base):
    r"""The standard normal :math:`\log p_0(u) = -\frac12 \|u\|^2 - \frac d2 \log 2\pi`: the fitted Gaussian."""

    name = "normal"
    zero: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("zero", torch.zeros(dim, dtype=torch.float64))

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> NormalBase:
        return cls(len(tensors["zero"])).to(tensors["zero"].dtype)

    @property
    def dim(self) -> int:
        return len(self.zero)

    def log_prob(self, u: Tensor) -> Tensor:
        return -0.5 * (u.square().sum(1) + u.shape[1] * LOG_2PI)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.log_prob(u), -u

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        return normal_noise((n, len(self.zero)), self.zero, generator)


class BlendBase(Base):
    r"""Half of one base and half of another, :math:`\log\frac12(p_a(u) + p_b(u))`: covers what either covers."""

    name = "blend"

    def __init__(self, first: Base, second: Base) -> None:
        super().__init__()
        self.first, self.second = first, second

    @property
    def dim(self) -> int:
        return self.first.dim

    def log_prob(self, u: Tensor) -> Tensor:
        return torch.logaddexp(self.first.log_prob(u), self.second.log_prob(u)) - math.log(2)

    def log_prob_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        (a, grad_a), (b, grad_b) = self.first.log_prob_and_grad(u), self.second.log_prob_and_grad(u)
        share = torch.sigmoid(a - b)[:, None]
        return torch.logaddexp(a, b) - math.log(2), share * grad_a + (1 - share) * grad_b

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        coin = torch.rand(n, generator=generator, device=device_of(generator)) < 0.5
        rows = torch.cat(
            [self.first.sample(int(coin.sum()), generator), self.second.sample(int((~coin).sum()), generator)]
        )
        return rows[torch.cat([coin.nonzero(), (~coin).nonzero()]).flatten().argsort().to(rows.device)]
