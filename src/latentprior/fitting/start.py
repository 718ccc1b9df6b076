"""What fit starts from: rows to learn from and to hold out, standardised, and the base that is fitted to them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..data.latents import Latents, as_latents
from ..density.bases import Base, MixtureBase, fit_base
from ..density.bases.base import FIT_ROWS
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.whitening import Kind, Whitening
from ..errors import InvalidLatentsError, LatentPriorError, LearningDivergedError
from ..runtime.seeding import derived_generator
from .settings import StageSettings
from .stage import StageLearner, Target

__all__ = ["Rows", "checked_device", "fit_identity", "split_rows", "standardised_rows", "start_ladder"]

HELD_OUT_LIMIT = 10_000
BASE_ROWS = 200_000
TRIAL_STEPS, TRIAL_GAIN = 100, 0.13
"""A stage of so few steps and so large a gain, in nats, shows that it has more to learn than an average of mixtures."""

Rows = tuple[Latents, Tensor]
"""Latents, and the indices of those rows of them that are meant."""


def checked_device(device: torch.device | str | None, dtype: torch.dtype) -> torch.device:
    """The device to compute on; raises :class:`LatentPriorError` where nothing of this type can be."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise LatentPriorError(f"dtype must be a floating type such as torch.float32, got {dtype}")
    try:
        where = torch.device(device or "cpu")
        torch.zeros(1, device=where, dtype=dtype).cpu()
        return where
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        raise LatentPriorError(f"cannot compute on device {device}: {str(error).partition(chr(10))[0]}") from None


def split_rows(latents: Latents, validation: Any, seed: int) -> tuple[Rows, Rows]:
    """Rows to learn from and rows to hold out."""
    n = len(latents)
    if not isinstance(validation, (int, float)):
        held_out = as_latents(validation)
        if held_out.event_shape != latents.event_shape:
            raise InvalidLatentsError(
                f"held-out latents have shape {tuple(held_out.event_shape)} a row, latents {tuple(latents.event_shape)}"
            )
        return (latents, torch.arange(n)), (held_out, torch.arange(len(held_out)))
    if n < 2:
        raise InvalidLatentsError(f"need at least 2 rows to learn a prior, got {n}")
    if not 0 < validation < 1:
        raise InvalidLatentsError(f"validation must be a share between 0 and 1, got {validation}")
    m = max(1, min(HELD_OUT_LIMIT, round(validation * n), n - 1))
    order = torch.randperm(n, generator=derived_generator(torch.device("cpu"), seed, "split"))
    return (latents, order[m:]), (latents, order[:m])


def standardised_rows(latents: Latents, index: Tensor, seed: int, whitening: Whitening) -> Tensor:
    """Draw rows once and standardise them."""
    loc = whitening.loc
    z = latents.draw(index, derived_generator(loc.device, seed, "held-out"), device=loc.device, dtype=loc.dtype)
    return whitening.whiten(z)


def start_ladder(
    target: Rows,
    held_out: Rows,
    base: str | torch.distributions.Distribution | Base,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    kind: Kind | None,
    climb: bool,
    settings: StageSettings,
    deadline: float | None = None,
) -> tuple[LatentPrior, StageLearner | None]:
    """Standardise, and fit the base: a ladder of no stages; and the first stage, if its first steps were tried.

    A base that is no mixture gets one beside it, as cover for importance sampling on the way up, where there is a
    ``climb``.
    """
    latents, train = target
    kind = kind or ("diagonal" if base == "copula" else "full")
    streams = derived_generator(torch.device("cpu"), seed, "whitening")
    whitening = Whitening.fit(latents.blocks(streams), kind).to(device=device, dtype=dtype)
    _check_precision(whitening)
    rows = standardised_rows(*held_out, seed, whitening)
    generator = derived_generator(device, seed, "base")
    pick = torch.randperm(len(train), generator=derived_generator(torch.device("cpu"), seed, "base rows"))
    some = train[pick[:BASE_ROWS]]
    u = whitening.whiten(latents.draw(some, generator, device=device, dtype=dtype))

    def redraw() -> Tensor:
        """New draws of as many rows as a mixture takes."""
        return whitening.whiten(latents.draw(some[:FIT_ROWS], generator, device=device, dtype=dtype))

    begun: list[StageLearner] = []

    def stage_gains(mixture: MixtureBase) -> bool:
        """Whether the first steps of a stage on the mixture tell data from its draws."""
        ladder = Ladder(copy.deepcopy(mixture).to(device=device, dtype=dtype).requires_grad_(False))
        aim = Target(latents, train, rows, whitening)
        learner = StageLearner(aim, ladder, settings, tuple(latents.event_shape), seed)
        # One that diverges is learned anew on the average, more slowly if need be.
        with torch.enable_grad(), contextlib.suppress(LearningDivergedError):
            learner.learn(learner.particles(), deadline=deadline, until=TRIAL_STEPS)
        gains = learner.best_gain.value > TRIAL_GAIN
        begun.extend([learner] if gains else [])
        return gains

    fresh = redraw if latents.is_posterior else None
    fitted = fit_base(base, u, rows, whitening, generator, fresh, deadline, stage_gains if climb else None)
    cover = None
    if climb and not isinstance(fitted, MixtureBase):
        drawn = derived_generator(device, seed, "cover")
        near = fit_base("gmm", u, rows, whitening, drawn, fresh, deadline)
        cover = near if isinstance(near, MixtureBase) else None
    prior = LatentPrior(fitted, (), whitening, latents.event_shape, cover=cover)
    prior.info["log_prob_base"] = float(prior.log_prob_whitened(rows).mean())
    return prior, begun[0] if begun else None


def _check_precision(whitening: Whitening) -> None:
    """Raise where rounding in the prior's floating type is coarser than a hundredth of a standard deviation."""
    info = torch.finfo(whitening.loc.dtype)
    spread, centre = whitening.inverse.double().norm(dim=1), whitening.loc.double().abs()
    lost = ~((spread > 100 * info.tiny) & (spread < 0.001 * info.max) & (info.eps * centre < 0.01 * spread))
    if lost.any():
        raise InvalidLatentsError(
            f"latent coordinate(s) {lost.nonzero().flatten().tolist()[:5]} are too large, small or far from zero for "
            f"{whitening.loc.dtype}: shift and rescale them, or pass dtype=torch.float64"
        )


def fit_identity(
    target: Rows,
    held_out: Rows,
    base: str | torch.distributions.Distribution | Base,
    seed: int,
    dtype: torch.dtype,
    whitening: Kind | None,
    settings: StageSettings,
) -> str:
    """A digest of everything that decides the outcome: settings, and a sample of the rows."""
    digest = hashlib.sha256()
    name = base if isinstance(base, str) else type(base).__name__
    if isinstance(base, torch.distributions.Distribution):
        plain = Whitening.fit(target[0].blocks(torch.Generator().manual_seed(0)), "none")
        rows = target[0].draw(target[1][:16], torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(fit_base(base, rows, rows, plain).log_prob(rows).detach().numpy().tobytes())
    digest.update(repr((name, seed, str(dtype), whitening, asdict(settings))).encode())
    for latents, index in (target, held_out):
        digest.update(repr((tuple(latents.event_shape), len(index), latents.is_posterior)).encode())
        some = index[torch.linspace(0, len(index) - 1, min(64, len(index))).long()]
        rows = latents.draw(some, torch.Generator().manual_seed(0), dtype=torch.float64)
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()
