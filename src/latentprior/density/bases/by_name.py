"""Bases by name: fitted to rows, and rebuilt from what was saved."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, LatentPriorError
from ..whitening import Whitening
from .base import Base, NormalBase
from .copula import CopulaBase
from .distribution import DistributionBase
from .flow import FlowBase
from .full_mixture import GaussianMixtureBase
from .low_rank_mixture import LowRankMixtureBase
from .mixture_base import MixtureBase

__all__ = ["MIXTURE_NAME", "base_from_state", "finished", "fit_base", "mixture_kind"]

LOW_RANK_COORDINATES = 192
"""Coordinates from which on a mixture's covariances are of low rank, unless the name asks for others."""
MIXTURE_NAME = r"(gmm|gmm-lowrank)(?::0*([1-9]\d*))?"
"""The names of mixtures, as a regular expression."""
BASES: tuple[type[Base], ...] = (
    NormalBase,
    GaussianMixtureBase,
    LowRankMixtureBase,
    CopulaBase,
    FlowBase,
    DistributionBase,
)


def fit_base(
    kind: str | torch.distributions.Distribution | Base,
    train: Tensor,
    validation: Tensor,
    whitening: Whitening,
    generator: torch.Generator | None = None,
    redraw: Callable[[], Tensor] | None = None,
    deadline: float | None = None,
) -> Base:
    """Make the base ``kind`` from standardised rows ``(n, d)``; ``validation`` rows choose sizes.

    ``"gmm"`` has full covariances below 192 coordinates and low-rank ones from there on, where full ones would allow
    few components; ``"gmm:20"`` and ``"gmm-lowrank:20"`` fix kind and number. ``generator``, ``redraw`` and
    ``deadline`` are those of :class:`MixtureSearch`. Raises :class:`LatentPriorError` for an unknown name,
    :class:`MissingExtraError` where an extra is absent.
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
    else:
        mixture, k = mixture_kind(kind, *train.shape)
        base = mixture.fit(train, validation, n_components=k, generator=generator, redraw=redraw, deadline=deadline)
    return finished(base, train)


def finished(base: Base, like: Tensor) -> Base:
    """The base on the device and in the floating type of rows, its parameters fixed."""
    return base.to(device=like.device, dtype=like.dtype).requires_grad_(False)


def mixture_kind(name: str, n: int, d: int) -> tuple[type[MixtureBase], int | None]:
    """The kind of mixture that a name asks for on ``(n, d)`` rows, and its number of components, if it has one.

    Raises :class:`LatentPriorError` for a name that is no base's.
    """
    match = re.fullmatch(MIXTURE_NAME, name)
    if match is None:
        raise LatentPriorError(
            f"unknown base {name!r}: choose normal, gmm, gmm:K, copula, flow, gmm-lowrank or give a torch Distribution"
        )
    k = int(match[2]) if match[2] else None
    # Full covariances of many coordinates allow few components, where there are rows for several.
    wide = d >= LOW_RANK_COORDINATES and n > 2 * d
    low_rank = match[1] == "gmm-lowrank" or (k is None and wide)
    return (LowRankMixtureBase if low_rank else GaussianMixtureBase), k


def base_from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base:
    """Rebuild a saved base from its :meth:`Base.config` and state; raises :class:`CheckpointError`."""
    name = config.get("name")
    for kind in BASES:
        if kind.name == name:
            return kind.from_state(config, tensors)
    raise CheckpointError(f"unknown base {name!r}: saved by another release")
