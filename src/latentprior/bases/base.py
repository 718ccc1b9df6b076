"""What every base is, and the noise that its draws are made of."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import LatentPriorError

__all__ = ["FIT_ROWS", "LOG_2PI", "Base", "device_of", "normal_noise"]

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

    def config(self) -> dict[str, Any]:
        """What :func:`base_from_state` needs beside the tensors; JSON."""
        return {"name": self.name}


def device_of(generator: torch.Generator | None) -> torch.device:
    """Where a generator's numbers are drawn."""
    return torch.device("cpu") if generator is None else generator.device


def normal_noise(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal numbers of ``like``'s type, on its device."""
    noise = torch.randn(shape, generator=generator, device=device_of(generator), dtype=like.dtype)
    return noise.to(like.device)
