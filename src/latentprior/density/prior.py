"""The learned prior: a torch Distribution that samples, scores, tilts and saves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..data.latents import check_tensor
from ..errors import LatentPriorError
from ..storage.checkpoint import load_state
from ..storage.hub import find_folder
from ..storage.sharing import Shareable
from .bases import Base, DistributionBase
from .ladder import Ladder, Stage, carried
from .normalizer_check import NormalizerCheck, check, check_from, reference_mixture
from .normalizers import Bracket, Normalizer
from .samplers import SAMPLE_BLOCK, check_options, draw
from .sampling.resampling import effective_sample_size
from .saved_prior import prior_parts, prior_state
from .whitening import Whitening

__all__ = ["LatentPrior", "Stage"]

FAR_STANDARD_DEVIATIONS = 1e6
"""Distance from the centre beyond which a density that is not a number counts as zero."""
TILT_ISLANDS, TILT_MOVES = 16, 6


class LatentPrior(Distribution, Shareable):
    r"""A normalised density on latents, :math:`\log p_K(z) = \log p_0(z) + \sum_{k<K} (f_k(z) - c_k)`.

    :func:`latentprior.fit` and :meth:`from_pretrained` make it. It is a :class:`torch.distributions.Distribution` with
    an empty ``batch_shape``: ``log_prob`` takes ``(n, *event_shape)`` in the user's coordinates and returns ``(n,)``
    nats, normalised, differentiable with respect to its input.

    Parameters
    ----------
    ladder : Ladder
        The base and the stages, in standardised coordinates.
    whitening : Whitening
        The map from the user's flat coordinates to the standardised ones.
    event_shape : sequence of int
        Shape of one latent.
    normalizer : Normalizer, optional
        log Z of the whole ladder with its error; by default the sum of the stages' constants.
    info : mapping, optional
        Facts for people, as JSON; nothing is decided by them.

    Notes
    -----
    Source: Xiao and Han (NeurIPS 2022), whose prior is the product of the base and the ratios of all stages.
    Standardisation, bounds and normalisers are this package's.

    Examples
    --------
    >>> import latentprior as lp
    >>> z = torch.randn(300, 2, generator=torch.Generator().manual_seed(0)).exp()
    >>> prior = lp.fit(z, base="gmm:2", max_stages=0)
    >>> prior
    LatentPrior(event_shape=(2,), base='gmm', stages=0, log_prob_stderr=0)
    >>> prior.log_prob(z).shape, prior.log_prob(z[0]).shape
    (torch.Size([300]), torch.Size([]))
    >>> tilted = prior.tilt(lambda z: -z.square().sum(1), particles=1024)
    >>> tilted.sample((5,), generator=torch.Generator().manual_seed(1)).shape
    torch.Size([5, 2])
    >>> prior.check_normalizer(draws=20_000).passed
    True
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}
    has_rsample = False
    kind = "prior"

    def __init__(
        self,
        ladder: Ladder,
        whitening: Whitening,
        event_shape: Sequence[int],
        normalizer: Normalizer | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)
        self.ladder = ladder
        self.whitening = whitening
        value, stderr = ladder.log_normalizer
        self.normalizer = normalizer or Normalizer(value, stderr, 1.0, "stages", None)
        self.info = dict(info or {})

    @property
    def base(self) -> Base:
        """The normalised density that the ladder stands on, in standardised coordinates."""
        return self.ladder.base

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The factors of the ladder, in the order in which they were learned."""
        return self.ladder.stages

    @property
    def support(self) -> constraints.Constraint:
        """All of real space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @property
    def dtype(self) -> torch.dtype:
        """Floating type that densities are computed in."""
        return self.whitening.loc.dtype

    @property
    def device(self) -> torch.device:
        """Device that densities are computed on."""
        return self.whitening.loc.device

    @property
    def log_prob_stderr(self) -> float:
        """Standard error that the normaliser's estimate adds to every ``log_prob``, in nats."""
        return self.normalizer.stderr

    @property
    def bracket(self) -> Bracket | None:
        """Log Z of the whole ladder from the base's end and from the data's end; None without stages."""
        return self.normalizer.bracket

    def __repr__(self) -> str:
        return (
            f"LatentPrior(event_shape={tuple(self.event_shape)}, base={self.base.name!r}, stages={len(self.stages)}, "
            f"log_prob_stderr={self.log_prob_stderr:.3g})"
        )

    def with_ladder(
        self, ladder: Ladder, normalizer: Normalizer | None = None, info: Mapping[str, Any] | None = None
    ) -> LatentPrior:
        """Return a prior on the same coordinates with another ladder.

        Parameters
        ----------
        ladder : Ladder
            The new ladder.
        normalizer : Normalizer, optional
            Its log Z, by default the sum of its constants.
        info : mapping, optional
            Facts for people, by default those of this prior.
        """
        return LatentPrior(ladder, self.whitening, self.event_shape, normalizer, self.info if info is None else info)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LatentPrior:
        """Return a copy on another device or in another floating type (the prior itself if nothing moves).

        Parameters
        ----------
        device : device, optional
            Where densities are computed; by default where they are now.
        dtype : torch.dtype, optional
            Floating type that they are computed in; by default the present one.
        """
        if (device is None or torch.device(device) == self.device) and dtype in (None, self.dtype):
            return self
        # Copied in one go, so that stages go on sharing one mixture with the ladder.
        base, whitening, cover, networks = copy.deepcopy(
            (self.base, self.whitening, self.ladder.cover, self.ladder.ratios)
        )
        for part in (base, whitening, *([] if cover is None else [cover]), *networks):
            part.to(device=device, dtype=dtype)
        stages = [replace(stage, network=network) for stage, network in zip(self.stages, networks, strict=True)]
        return LatentPrior(Ladder(base, stages, cover), whitening, self.event_shape, self.normalizer, self.info)

    def log_prob(self, value: Tensor | NDArray[Any]) -> Tensor:
        r"""Normalised log density, ``(n, *event_shape) -> (n,)`` nats; also one unbatched event, to a scalar.

        Every value carries the same unknown shift of size :attr:`log_prob_stderr`.

        Parameters
        ----------
        value : Tensor or array
            Rows ``(n, *event_shape)`` in the user's coordinates, or one event. An array is read block by block, a
            memory-mapped one too, so that memory grows by the ``n`` results alone.

        Returns
        -------
        Tensor
            ``(n,)`` nats, or a scalar. NaN in gives NaN out; rows too far out for the floating type give ``-inf``.

        Raises
        ------
        InvalidLatentsError
            For rows of another shape or type.
        """
        if isinstance(value, np.ndarray) and value.ndim == 1 + len(self.event_shape) and len(value) > SAMPLE_BLOCK:
            return torch.cat([self.log_prob(value[i : i + SAMPLE_BLOCK]) for i in range(0, len(value), SAMPLE_BLOCK)])
        single = np.shape(value) == tuple(self.event_shape) if hasattr(value, "shape") else False
        z = check_tensor(value[None] if single else value, self.event_shape, self.device, self.dtype)
        u = self.whitening.whiten(z)
        result = self.log_prob_whitened(u) + self.whitening.log_abs_det
        # Squares of such rows overflow, and their differences are no numbers.
        lost = result.isnan() & ~(u.detach().abs() < FAR_STANDARD_DEVIATIONS).all(1) & ~z.isnan().any(1)
        result = torch.where(lost, -math.inf, result) if lost.any() else result
        return result[0] if single else result

    def log_prob_whitened(self, u: Tensor) -> Tensor:
        """Normalised log density in the standardised coordinates themselves, ``(n, d) -> (n,)`` nats.

        Parameters
        ----------
        u : Tensor
            Standardised rows ``(n, d)``.
        """
        # A mixture holds a number for each row and component: so many rows at a time.
        base = torch.cat([self.base.log_prob(block) for block in u.split(SAMPLE_BLOCK)])
        return base + self.ladder.log_potential(u) - self.normalizer.value

    @torch.no_grad()
    def sample(
        self,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        sampler: str = "smc",
        **options: Any,
    ) -> Tensor:
        """Draw ``(*sample_shape, *event_shape)`` in the user's coordinates.

        Parameters
        ----------
        sample_shape : sequence of int
            Shape of the batch of draws.
        generator : torch.Generator, optional
            Where random numbers come from; by default torch's global generator.
        sampler : {"smc", "sir", "mala", "hmc", "langevin"}
            ``smc`` is sequential Monte Carlo down the ladder, shuffled. Where 1% of base draws or more are effective,
            enough of them for n effective ones are resampled and moved by MALA in one level, else they go level by
            level. ``sir`` is sampling-importance-resampling of base draws (NCP-VAE, Aneja et al. 2021); it is fast, and
            repeats rows where the effective share is low. ``mala`` and ``hmc`` are Metropolis-corrected chains from
            ``sir`` draws. ``langevin`` is the paper's short-run dynamics from base draws, which is biased.
        **options
            Of ``smc``: ``ess``, the effective share at a level (0.5), and ``moves`` a level (6). Of ``sir``:
            ``candidates`` a draw (16). Of ``mala`` and ``hmc``: ``candidates``, ``steps``, ``step_size`` and, of
            ``hmc``, ``leapfrog_steps``. Of ``langevin``: ``steps`` (60) and ``step_size`` (0.4).

        Returns
        -------
        Tensor
            Draws ``(*sample_shape, *event_shape)``.

        Raises
        ------
        LatentPriorError
            For an unknown sampler or option, or steps so long that draws run away.
        """
        check_options(sampler, options)
        try:
            sample_shape = torch.Size(sample_shape)
        except TypeError:
            raise LatentPriorError(f"sample_shape must be whole numbers, as in (1000,), got {sample_shape!r}") from None
        if any(size < 0 for size in sample_shape):
            raise LatentPriorError(f"sample_shape must be 0 or more in every place, got {tuple(sample_shape)}")
        n = math.prod(sample_shape)
        z = self.whitening.loc.new_empty(n, len(self.whitening.loc))
        for rows in z.split(SAMPLE_BLOCK) if n else ():
            u = draw(self.ladder, len(rows), generator, sampler, options)
            if not u.isfinite().all():
                raise LatentPriorError(f"draws by {sampler} ran away: lower step_size, or choose another sampler")
            rows.copy_(self.whitening.unwhiten(u))
        return z.reshape(*sample_shape, *self.event_shape)

    @torch.no_grad()
    def tilt(
        self, g: Callable[[Tensor], Tensor], *, particles: int = 16_384, generator: torch.Generator | None = None
    ) -> LatentPrior:
        r"""The prior :math:`p_g(z) = p(z)\, e^{g(z)} / Z_g`: again a prior that samples and scores.

        Parameters
        ----------
        g : callable
            A log potential on the user's coordinates, ``(n, *event_shape) -> (n,)`` nats, differentiable: a log
            likelihood, a class score, a property, a preference. It need not be bounded, but must keep :math:`Z_g`
            finite. A potential of steps, such as the log of an indicator, needs no gradient: draws are as exact, since
            Metropolis corrects moves that know nothing of it.
        particles : int
            Draws of the prior that are reweighed or carried.
        generator : torch.Generator, optional
            Where random numbers come from; by default a new one of seed 0.

        Returns
        -------
        LatentPrior
            Its :math:`\log Z_g` comes from reweighed draws where half of them stay effective, else from sequential
            Monte Carlo in islands; the standard error joins :attr:`log_prob_stderr`. It cannot be saved.

        Raises
        ------
        LatentPriorError
            For a potential that is NaN or infinite at draws of the prior, or returns another shape.
        """
        generator = generator or torch.Generator().manual_seed(0)
        factor = _Potential(g, self.whitening, self.event_shape)
        rows = max(1, particles // TILT_ISLANDS)
        start = torch.cat([draw(self.ladder, rows, generator, "smc", {}) for _ in range(TILT_ISLANDS)])
        potential = factor(start)
        if potential.isnan().any() or potential.max() in (math.inf, -math.inf):
            raise LatentPriorError("the tilt is NaN, infinite, or -inf at every draw: it has no normaliser")
        # One reweighing needs no moves, and no gradient of g.
        moves = 0 if effective_sample_size(potential) >= 0.5 else TILT_MOVES
        _, passed = carried(self.ladder, factor, start, islands=TILT_ISLANDS, moves=moves, generator=generator)
        c = passed.constant
        total = Normalizer(
            self.normalizer.value + c.value, math.hypot(self.log_prob_stderr, c.stderr), passed.ess, "tilt", None
        )
        return self.with_ladder(self.ladder.times(factor, passed), total)

    @torch.no_grad()
    def check_normalizer(
        self, reference: str | Distribution = "gmm", *, draws: int = 200_000, generator: torch.Generator | None = None
    ) -> NormalizerCheck:
        r"""Integrate ``exp(log_prob)`` with another normalised density h: :math:`\mathbb E_h[p/h]` must be 1.

        The check is independent of every number that made :meth:`log_prob`.

        Parameters
        ----------
        reference : {"gmm", "base"} or Distribution
            ``"gmm"`` is a mixture fitted to draws of this prior (from 32 coordinates on the average of two). Two thirds
            of it are widened by 3%, a third by a fifth, and one part in ten is a wide normal, so that weights stay
            bounded. ``"base"`` are fresh draws of the base. A torch Distribution is one over the user's coordinates.
        draws : int
            Number of draws of the reference.
        generator : torch.Generator, optional
            Where random numbers come from; by default a new one of seed 1.

        Returns
        -------
        NormalizerCheck
            The integral with its standard error, which includes :attr:`log_prob_stderr`, and how it was found.

        Raises
        ------
        LatentPriorError
            For an unknown reference or no draws.

        Warns
        -----
        LowESSWarning
            Where few effective draws of a Distribution reach the prior, or their weights have a heavy tail.

        Notes
        -----
        In many coordinates weights may have so heavy a tail that their average is too low nearly always and its error
        bar too small. Where that may be (:func:`~latentprior.density.sampling.resampling.tail_shape` above 1/2, or
        fewer than 100 effective draws), sequential Monte Carlo carries draws of the mixture or of the base to the
        prior, with even weights, and draws of the prior back. Half of what lies between both ends is part of the
        standard error. Draws of a Distribution are averaged as they are.
        """
        if draws < 1:
            raise LatentPriorError(f"draws must be 1 or more, got {draws}")
        generator = generator or torch.Generator().manual_seed(1)

        def own(n: int) -> Tensor:
            """Draws of this prior ``(n, d)``, standardised."""
            return draw(self.ladder, n, generator, "smc", {})

        base: Base
        if isinstance(reference, Distribution):
            base, name = DistributionBase(reference, self.whitening), type(reference).__name__
        elif reference == "base":
            base, name = self.base, "base"
        elif reference == "gmm":
            base, name = reference_mixture(own, self.ladder, generator), "gmm"
        else:
            raise LatentPriorError(f"unknown reference {reference!r}: choose gmm, base or give a torch Distribution")
        u = torch.cat([base.sample(min(1 << 16, draws - i), generator) for i in range(0, draws, 1 << 16)])
        if isinstance(reference, Distribution):
            found = check(self.log_prob_whitened, base.log_prob, u, name)
        else:
            found = check_from(self.ladder, base, u, name, generator, log_normalizer=self.normalizer.value, own=own)
        return found._replace(stderr=math.hypot(found.stderr, found.value * self.log_prob_stderr))

    @torch.no_grad()
    def card_draws(self) -> dict[str, Tensor]:
        """Rows ``(1500, d)`` of the base and of the ladder on it, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        draws = {f"base: {self.base.name}": self.whitening.unwhiten(self.base.sample(1500, generator))}
        if self.stages:
            draws["ladder"] = self.sample((1500,), generator).flatten(1)
        return draws

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors from which :meth:`from_state` rebuilds this prior."""
        return prior_state(self.ladder, self.whitening, self.event_shape, self.normalizer, self.info)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        base: Distribution | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        device: torch.device | str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> LatentPrior:
        """Load from a folder, or from ``"user/name"`` on the Hugging Face hub (extra ``hub``); a folder wins.

        Safetensors and JSON are all that is downloaded.

        Parameters
        ----------
        source : path or str
            A folder, or a repository on the hub.
        base : Distribution, optional
            The torch Distribution of a prior that was fitted on one.
        decoder : callable, optional
            What the stages of :func:`~latentprior.refine` read.
        device : device, optional
            Where densities are computed; by default the CPU.
        revision, token, cache_dir, local_files_only
            As in ``huggingface_hub``: a branch, a tag or a commit; the access token; where downloads are kept; whether
            to do without the network.

        Raises
        ------
        CheckpointError
            For anything absent, damaged, foreign or from another format version.
        """
        folder = find_folder(
            source, cls.kind, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        config, tensors = load_state(folder, "prior")
        return cls.from_state(config, tensors, base=base, decoder=decoder, where=str(folder)).to(device)

    @classmethod
    def from_state(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        *,
        base: Distribution | None = None,
        decoder: Callable[[Tensor], Tensor] | None = None,
        where: str = "prior",
    ) -> LatentPrior:
        """Rebuild from :meth:`state`; raises :class:`CheckpointError` where the two do not fit together.

        Parameters
        ----------
        config, tensors : mapping
            What :meth:`state` gave.
        base, decoder
            As in :meth:`from_pretrained`.
        where : str
            What errors call the source.
        """
        return cls(*prior_parts(config, tensors, base=base, decoder=decoder, where=where))


class _Potential(nn.Module):
    def __init__(self, g: Callable[[Tensor], Tensor], whitening: Whitening, event_shape: torch.Size) -> None:
        super().__init__()
        self.g, self.event_shape = g, event_shape
        self.whitening = whitening

    def forward(self, u: Tensor) -> Tensor:
        value = self.g(self.whitening.unwhiten(u).reshape(len(u), *self.event_shape))
        if not isinstance(value, Tensor) or value.shape != (len(u),):
            found = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise LatentPriorError(f"the tilt returned {found} for {len(u)} rows: return one log potential a row")
        return value.to(u)
