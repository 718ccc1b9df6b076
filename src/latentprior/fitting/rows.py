"""The rows that stages learn from and the rows that judge them, drawn in standardised coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..data.latents import Latents
from ..density.whitening import Whitening

__all__ = ["Target"]

MOST_PERMUTED_ROWS = 1 << 22
"""Rows above which an epoch draws with replacement: a permutation of more takes longer than the steps."""


@dataclass(frozen=True)
class Target:
    """The rows of q that a stage learns from and those that are held out, drawn in standardised coordinates.

    ``train`` are indices ``(n,)`` of rows of the latents; ``held_out`` are rows ``(m, d)``, one draw each,
    standardised.
    """

    latents: Latents
    train: Tensor
    held_out: Tensor
    whitening: Whitening

    def draw(self, rows: int, generator: torch.Generator) -> Tensor:
        """Draw ``rows`` training rows without repetition until all are used; fresh posterior draws if known."""
        n = len(self.train)
        orders = []
        for start in range(0, rows, n):
            if n > MOST_PERMUTED_ROWS:
                order = torch.randint(n, (min(n, rows - start),), generator=generator, device=generator.device)
            else:
                order = torch.randperm(n, generator=generator, device=generator.device)
            orders.append(order[: rows - start].to(self.train.device))
        index = self.train[torch.cat(orders)]
        loc = self.whitening.loc
        z = self.latents.draw(index, generator, device=loc.device, dtype=loc.dtype)
        return self.whitening.whiten(z)
