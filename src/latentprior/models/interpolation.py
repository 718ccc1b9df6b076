"""Paths between latents that keep to where a prior has mass."""

from __future__ import annotations

import torch
from torch import Tensor

from ..density.prior import LatentPrior
from ..errors import LatentPriorError
from .checks import check_latents

__all__ = ["latent_path"]

STEP_SIZE = 0.05
"""How far a point of the path follows the gradient at once, in standardised coordinates."""
LEAST_GAP = 1e-12
"""Distance of two points below which they count as one."""


@torch.no_grad()
def latent_path(prior: LatentPrior, start: Tensor, end: Tensor, n: int = 8, *, relaxation: int = 50) -> Tensor:
    r"""``n`` latents ``(n, *event_shape)`` on a path that keeps to where the prior has mass, both ends included.

    Parameters
    ----------
    prior : LatentPrior
        Density of the latents.
    start, end : Tensor
        The two ends, each of the event's shape.
    n : int
        Latents on the path, 2 or more.
    relaxation : int
        How often interior points follow :math:`\nabla\log p(z)` in standardised coordinates and are spread to equal
        distances again; 0 gives the straight line.

    Raises
    ------
    LatentPriorError
        For fewer than two latents.
    InvalidLatentsError
        For ends of another shape, or with NaN.

    Notes
    -----
    The string method. Source: E, Ren and Vanden-Eijnden (2007).
    """
    if n < 2:
        raise LatentPriorError(f"a path has 2 points or more, got {n}")
    whitening = prior.whitening
    both = [check_latents(z[None], 1, prior.event_shape, whitening.loc).flatten(1) for z in (start, end)]
    ends = whitening.whiten(torch.cat(both))
    share = torch.linspace(0, 1, n, dtype=ends.dtype, device=ends.device)[:, None]
    path = ends[0] + share * (ends[1] - ends[0])
    density = prior.ladder.density(prior.ladder.length)
    for _ in range(relaxation):
        moved = path + STEP_SIZE * density(path)[1]
        moved[0], moved[-1] = ends[0], ends[1]
        path = _respaced(moved)
    return whitening.unwhiten(path).reshape(n, *prior.event_shape)


def _respaced(path: Tensor) -> Tensor:
    """The same broken line, its points at equal distances."""
    gaps = path.diff(dim=0).norm(dim=1)
    along = torch.cat([gaps.new_zeros(1), gaps.cumsum(0)])
    if along[-1] == 0:
        return path
    even = torch.linspace(0, 1, len(path), dtype=path.dtype, device=path.device) * along[-1]
    right = torch.searchsorted(along, even).clamp(1, len(path) - 1)
    share = ((even - along[right - 1]) / gaps[right - 1].clamp_min(LEAST_GAP))[:, None].clamp(0, 1)
    spaced: Tensor = path[right - 1] + share * (path[right] - path[right - 1])
    return spaced
