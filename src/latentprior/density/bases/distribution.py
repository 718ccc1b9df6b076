"""A torch Distribution of the user's, seen in standardised coordinates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, LatentPriorError
from ..whitening import Whitening
from .base import Base, device_of

__all__ = ["DistributionBase"]


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

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> DistributionBase:
        raise CheckpointError(
            "this prior stands on a torch Distribution of yours: pass it again, from_pretrained(dir, base=...)"
        )

    @property
    def dim(self) -> int:
        return len(self.whitening.loc)

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
        seed = int(torch.randint(2**62, (), generator=generator, device=device_of(generator)))
        z = self._draw(n, seed).to(self.whitening.loc)
        return self.whitening.whiten(z.reshape(n, len(self.whitening.loc)))
