"""Bases by name: fitted to rows, and rebuilt from what was saved."""

from __future__ import annotations

import copy
import itertools
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

__all__ = ["base_from_state", "fit_base"]

WIDE = 192
"""Coordinates from which a mixture's covariances are of low rank, unless asked for otherwise."""


def fit_base(
    kind: str | torch.distributions.Distribution | Base,
    train: Tensor,
    validation: Tensor,
    whitening: Whitening,
    generator: torch.Generator | None = None,
    redraw: Callable[[], Tensor] | None = None,
    deadline: float | None = None,
    stage_gains: Callable[[MixtureBase], bool] | None = None,
) -> Base:
    """Make the base ``kind`` from standardised rows; ``"gmm:20"`` fixes the number of components.

    ``"gmm"`` has full covariances below 192 coordinates and low-rank ones from there on, where full ones would allow
    few components; ``"gmm-lowrank"`` and ``"gmm-lowrank:20"`` ask for them, ``"gmm:20"`` for full ones.
    ``redraw`` gives new draws of the rows, where the latents are posteriors. Where stages follow, ``stage_gains`` says
    whether one would gain much on a mixture, so that an average is not worth its time. A mixture that would not be done
    by the ``deadline`` (:func:`time.monotonic`) does without more components or members.

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
    elif found := re.fullmatch(r"(gmm|gmm-lowrank)(?::0*([1-9]\d*))?", kind):
        k = int(found[2]) if found[2] else None
        low_rank = found[1] == "gmm-lowrank" or (k is None and _is_wide(*train.shape))
        mixture = LowRankMixtureBase if low_rank else GaussianMixtureBase
        base = mixture.fit(
            train, validation, n_components=k, generator=generator, redraw=redraw, deadline=deadline,
            stage_gains=stage_gains,
        )  # fmt: skip
    else:
        raise LatentPriorError(
            f"unknown base {kind!r}: choose normal, gmm, gmm:K, copula, flow, gmm-lowrank or give a torch Distribution"
        )
    return base.to(device=train.device, dtype=train.dtype).requires_grad_(False)


def _members(config: Mapping[str, Any], components: int) -> int:
    """Of how many mixtures the saved one is the average; before there was a word for it, it was read whole."""
    members = int(config.get("members", 1))
    if not 1 <= members <= components or components % members:
        raise ValueError(f"{components} components of {members} mixtures")
    return members


def _is_wide(n: int, d: int) -> bool:
    """Whether many rows have so many coordinates that full covariances allow few components."""
    return d >= WIDE and n > 2 * d


def base_from_state(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Base:
    """Rebuild a saved base from its :meth:`Base.config` and state; raises :class:`CheckpointError`."""
    name = config.get("name")
    if name == "normal":
        return NormalBase(len(tensors["zero"])).to(tensors["zero"].dtype)
    if name == "gmm":
        k, d = tensors["means"].shape
        if tensors["cholesky"].shape != (k, d, d) or tensors["log_weights"].shape != (k,):
            raise ValueError("the mixture's shapes differ")
        parts = (tensors[part] for part in ("means", "cholesky"))
        mixture = GaussianMixtureBase(tensors["log_weights"].exp(), *parts, members=_members(config, k))
        # The derived buffers too, lest they differ in their last bits.
        mixture.load_state_dict(dict(tensors))
        return mixture
    if name == "gmm-lowrank":
        k, d, r = tensors["vectors"].shape
        shapes = {"means": (k, d), "log_weights": (k,), "values": (k, r), "noise": (k,)}
        if any(tensors[part].shape != shape for part, shape in shapes.items()):
            raise ValueError("the mixture's shapes differ")
        parts = (tensors[part] for part in ("means", "vectors", "values", "noise"))
        low_rank = LowRankMixtureBase(tensors["log_weights"].exp(), *parts, members=_members(config, k))
        low_rank.load_state_dict(dict(tensors))
        return low_rank
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
