"""What fit starts from: the task, rows to learn from and to hold out, and the base that is fitted to them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..data.latents import Latents, as_latents
from ..density.bases import Base, MixtureBase, fit_base
from ..density.bases.base import FIT_ROWS
from ..density.bases.by_name import finished, mixture_kind
from ..density.bases.mixture_base import MixtureSearch
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.whitening import Kind, Whitening
from ..errors import InvalidLatentsError, LatentPriorError, LearningDivergedError
from ..runtime.seeding import derived_generator
from .rows import Target
from .settings import StageSettings
from .stage import StageLearner

__all__ = ["FitTask", "Rows", "checked_device", "split_rows", "standardised_rows"]

MOST_HELD_OUT_ROWS = 10_000
MOST_BASE_ROWS = 200_000
TRIAL_STEPS, TRIAL_GAIN_NATS = 100, 0.13
"""A stage that gains so much in so few steps has more to learn than an average of mixtures would give."""
AVERAGE_SHARE = 0.5
"""Share of the search's time that an average of mixtures may take: stages make more of the rest than further
members."""

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
    m = max(1, min(MOST_HELD_OUT_ROWS, round(validation * n), n - 1))
    order = torch.randperm(n, generator=derived_generator(torch.device("cpu"), seed, "split"))
    return (latents, order[m:]), (latents, order[:m])


def standardised_rows(latents: Latents, index: Tensor, seed: int, whitening: Whitening) -> Tensor:
    """Draw rows once and standardise them."""
    loc = whitening.loc
    z = latents.draw(index, derived_generator(loc.device, seed, "held-out"), device=loc.device, dtype=loc.dtype)
    return whitening.whiten(z)


@dataclass(frozen=True)
class FitTask:
    """What one call of fit is asked for, apart from when to stop and where to save."""

    target: Rows
    held_out: Rows
    base: str | torch.distributions.Distribution | Base
    seed: int
    device: torch.device
    dtype: torch.dtype
    whitening: Kind | None
    settings: StageSettings

    @property
    def event_shape(self) -> tuple[int, ...]:
        """Shape of one latent."""
        return tuple(self.target[0].event_shape)

    @property
    def given_distribution(self) -> torch.distributions.Distribution | None:
        """The user's Distribution, which no file holds."""
        return self.base if isinstance(self.base, torch.distributions.Distribution) else None

    def aim(self, whitening: Whitening) -> Target:
        """The rows in standardised coordinates."""
        rows = standardised_rows(*self.held_out, self.seed, whitening)
        return Target(self.target[0], self.target[1], rows, whitening)

    def learner(self, aim: Target, ladder: Ladder, **options: Any) -> StageLearner:
        """The learner of the next stage."""
        return StageLearner(aim, ladder, self.settings, self.event_shape, self.seed, **options)

    def start(self, with_stages: bool, deadline: float | None = None) -> tuple[LatentPrior, StageLearner | None]:
        """Standardise the rows and fit the base.

        Returns a prior without stages, and the learner of the first stage, if its first steps were tried. Where stages
        follow a base that is no mixture, a mixture is fitted as the ladder's cover.
        """
        latents, train = self.target
        kind: Kind = self.whitening or default_whitening(self.base)
        blocks = latents.blocks(self._stream("whitening"))
        whitening = Whitening.fit(blocks, kind).to(device=self.device, dtype=self.dtype)
        _check_precision(whitening)
        generator = derived_generator(self.device, self.seed, "base")
        some = train[torch.randperm(len(train), generator=self._stream("base rows"))[:MOST_BASE_ROWS]]
        rows = whitening.whiten(latents.draw(some, generator, device=self.device, dtype=self.dtype))

        def redraw() -> Tensor:
            """New draws of as many rows as a mixture takes."""
            z = latents.draw(some[:FIT_ROWS], generator, device=self.device, dtype=self.dtype)
            return whitening.whiten(z)

        aim, fresh = self.aim(whitening), redraw if latents.is_posterior else None
        base, learner = self._base(aim, rows, generator, fresh, deadline, with_stages)
        cover = None
        if with_stages and not isinstance(base, MixtureBase):
            stream = derived_generator(self.device, self.seed, "cover")
            near = fit_base("gmm", rows, aim.held_out, whitening, stream, fresh, deadline)
            cover = near if isinstance(near, MixtureBase) else None
        prior = LatentPrior(Ladder(base, (), cover), whitening, latents.event_shape)
        log_prob_base = float(prior.log_prob_whitened(aim.held_out).mean())
        return prior.with_ladder(prior.ladder, info={"log_prob_base": log_prob_base}), learner

    def _base(
        self,
        aim: Target,
        rows: Tensor,
        generator: torch.Generator,
        redraw: Callable[[], Tensor] | None,
        deadline: float | None,
        with_stages: bool,
    ) -> tuple[Base, StageLearner | None]:
        """Fit the base; where an average of mixtures is dear, try first whether a stage gains more on a single one."""
        name = self.base if isinstance(self.base, str) else ""
        if not name.startswith("gmm"):
            return fit_base(self.base, rows, aim.held_out, aim.whitening, generator, redraw, deadline), None
        kind, components = mixture_kind(name, *rows.shape)
        search = MixtureSearch(
            kind, rows, aim.held_out, generator=generator, redraw=redraw, deadline=deadline, coarse=with_stages
        )
        if components is not None:
            return finished(search.fitted(components), rows), None
        single = search.find()
        if not with_stages or not search.average_is_optional:
            return finished(search.average(), rows), None
        learner = self._trial(aim, single, deadline)
        if learner.best_gain.value > TRIAL_GAIN_NATS:
            return finished(single, rows), learner
        return finished(search.average(AVERAGE_SHARE), rows), None

    def _trial(self, aim: Target, mixture: Base, deadline: float | None) -> StageLearner:
        """Take the first steps of a stage on a mixture."""
        learner = self.learner(aim, Ladder(finished(copy.deepcopy(mixture), aim.held_out)))
        # One that diverges is learned anew on the average, more slowly if need be.
        with torch.enable_grad(), contextlib.suppress(LearningDivergedError):
            learner.learn(learner.particles(), deadline=deadline, until=TRIAL_STEPS)
        return learner

    def _stream(self, key: str) -> torch.Generator:
        return derived_generator(torch.device("cpu"), self.seed, key)

    def identity(self) -> str:
        """A digest of everything that decides the outcome: settings, and a sample of the rows."""
        digest = hashlib.sha256()
        name = self.base if isinstance(self.base, str) else type(self.base).__name__
        if self.given_distribution is not None:
            plain = Whitening.fit(self.target[0].blocks(torch.Generator().manual_seed(0)), "none")
            rows = self.target[0].draw(self.target[1][:16], torch.Generator().manual_seed(0), dtype=torch.float64)
            digest.update(fit_base(self.base, rows, rows, plain).log_prob(rows).detach().numpy().tobytes())
        digest.update(repr((name, self.seed, str(self.dtype), self.whitening, asdict(self.settings))).encode())
        for latents, index in (self.target, self.held_out):
            digest.update(repr((tuple(latents.event_shape), len(index), latents.is_posterior)).encode())
            some = index[torch.linspace(0, len(index) - 1, min(64, len(index))).long()]
            rows = latents.draw(some, torch.Generator().manual_seed(0), dtype=torch.float64)
            digest.update(rows.numpy().tobytes())
        return digest.hexdigest()


def default_whitening(base: object) -> Kind:
    """The standardising map that suits a base: one that keeps the margins apart for a copula, else the full one."""
    return "diagonal" if base == "copula" else "full"


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
