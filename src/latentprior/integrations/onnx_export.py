r"""A prior, or a model of images, as an ONNX graph (extra ``onnx``): log density, one-shot sampler, decoder."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..density.bases import Base, CopulaBase, GaussianMixtureBase, LowRankMixtureBase, MixtureBase, NormalBase
from ..density.ladder import COVER_WIDTHS
from ..density.prior import LatentPrior
from ..density.ratios import BoundedRatio
from ..errors import ExportError, MissingExtraError
from ..models.model import LatentVariableModel
from ..storage.checkpoint import write_whole

__all__ = ["export_onnx"]

What = Literal["log_prob", "sampler", "decoder", "generate"]
OPSET = 18


def export_onnx(
    prior_or_model: LatentPrior | LatentVariableModel,
    path: str | Path,
    what: What = "log_prob",
    *,
    candidates: int = 64,
) -> Path:
    r"""Write one ``.onnx`` file, in float32, whose number of rows n is free; return its path.

    Graphs
    ------
    ``log_prob`` : ``z`` ``(n, *event_shape)`` to ``log_prob`` ``(n,)``, nats, normalised: all bases but ``flow`` and
        Distributions of your own.
    ``sampler`` : ``normal`` ``(n, candidates, d)`` standard normal numbers and ``uniform`` ``(n, candidates + 1)``
        numbers in [0, 1) to ``z`` ``(n, *event_shape)``. Of a row's candidate draws of the base one is picked in
        proportion to :math:`w = \prod_k r_k`, the last uniform number says which. For bases ``normal`` and ``gmm``.
    ``decoder`` : of a model, ``z`` to ``images`` ``(n, C, H, W)`` in [-1, 1].
    ``generate`` : of a model, the sampler's inputs to ``images``.

    The sampler's law is that of sampling-importance-resampling, :math:`p_K` in the limit of many candidates; with M
    of them its density is off by a factor of about :math:`1 + O(\mathrm{var}(w) / M)`. Rows are independent of one
    another and nothing in the graph is random: equal inputs give equal outputs.

    Raises :class:`~latentprior.errors.ExportError` for what has no such graph: a flow, a Distribution, a tilt, a
    decoder that torch cannot trace; :class:`~latentprior.errors.MissingExtraError` without the extra. Source of the
    sampler: Rubin (1987); Aneja, Schwing, Kautz and Vahdat (NeurIPS 2021), whose NCP-VAE samples so.
    """
    if what not in ("log_prob", "sampler", "decoder", "generate"):
        raise ExportError(f"unknown graph {what!r}: choose log_prob, sampler, decoder or generate")
    if candidates < 1:
        raise ExportError(f"candidates must be 1 or more, got {candidates}")
    model = prior_or_model if isinstance(prior_or_model, LatentVariableModel) else None
    prior = prior_or_model if isinstance(prior_or_model, LatentPrior) else prior_or_model.prior
    prior = prior.to("cpu", torch.float32)
    decoder = None
    if what in ("decoder", "generate"):
        if model is None:
            raise ExportError(f"a prior alone makes no images: export {what!r} of the LatentVariableModel")
        decoder = copy.deepcopy(model.decoder).to("cpu", torch.float32).eval()
    d = len(prior.whitening.loc)
    # Three rows: of a dimension of 0 or 1 the exporter would make a constant.
    latents = torch.zeros(3, *prior.event_shape)
    draws = (torch.zeros(3, candidates, d), torch.full((3, candidates + 1), 0.5))
    if what == "decoder":
        assert decoder is not None
        return _write(decoder, {"z": latents}, "images", path)
    density = _Density(prior)
    if what == "log_prob":
        return _write(density, {"z": latents}, "log_prob", path)
    sampler = _Sampler(prior, density)
    if decoder is None:
        return _write(sampler, dict(zip(("normal", "uniform"), draws, strict=True)), "z", path)
    return _write(_Generate(sampler, decoder), dict(zip(("normal", "uniform"), draws, strict=True)), "images", path)


class _Mixture(nn.Module):
    """A Gaussian mixture in whole batches: :class:`MixtureBase` works in blocks, which have no free length."""

    def __init__(self, mixture: MixtureBase) -> None:
        super().__init__()
        self.mixture = copy.deepcopy(mixture)

    def log_terms(self, u: Tensor) -> Tensor:
        return self.mixture.project(u)[1]


class _Density(nn.Module):
    """The log density of a prior, free of blocks and of what depends on the number of rows."""

    def __init__(self, prior: LatentPrior) -> None:
        super().__init__()
        if not isinstance(prior.base, (NormalBase, MixtureBase, CopulaBase)):
            raise ExportError(
                f"the base {prior.base.name!r} has no ONNX graph: fit with base='gmm', 'normal' or 'copula' to export"
            )
        networks = [stage.network for stage in prior.stages]
        if not all(isinstance(network, BoundedRatio) for network in networks):
            raise ExportError("a tilted prior holds a function of yours, which has no ONNX graph: export the prior")
        self.whitening = copy.deepcopy(prior.whitening)
        self.base: Base | _Mixture = (
            _Mixture(prior.base) if isinstance(prior.base, MixtureBase) else copy.deepcopy(prior.base)
        )
        mixture = prior.ladder.mixture
        self.mixture = None if mixture is None else _Mixture(mixture)
        self.ratios = nn.ModuleList(copy.deepcopy(networks))
        self.shift = prior.normalizer.value - float(prior.whitening.log_abs_det)

    def forward(self, z: Tensor) -> Tensor:
        u = self.whitening.whiten(z.flatten(1))
        terms = self.terms(u)
        return self.log_base(u, terms) + self.log_potential(u, terms) - self.shift

    def terms(self, u: Tensor) -> Tensor | None:
        """Log terms of the mixture that base or stages read, if there is one."""
        return None if self.mixture is None else self.mixture.log_terms(u)

    def log_base(self, u: Tensor, terms: Tensor | None) -> Tensor:
        if isinstance(self.base, _Mixture):
            assert terms is not None
            return torch.logsumexp(terms, 1)
        if isinstance(self.base, CopulaBase):
            return torch.logsumexp(self.base._terms(u)[1], 2).sum(1)
        assert isinstance(self.base, NormalBase)
        return self.base.log_prob(u)

    def log_potential(self, u: Tensor, terms: Tensor | None) -> Tensor:
        total = torch.zeros_like(u[:, 0])
        for ratio in self.ratios:
            assert isinstance(ratio, BoundedRatio)
            features = None
            if ratio.features is not None:
                assert terms is not None
                features = ratio.features.of_terms(terms, u.shape[1])
            total = total + ratio(u, features)
        return total


class _Sampler(nn.Module):
    """Of M draws of the proposal a row, the one that a uniform number picks in proportion to its weight."""

    def __init__(self, prior: LatentPrior, density: _Density) -> None:
        super().__init__()
        self.density = density
        self.event_shape = tuple(prior.event_shape)
        self.proposal = _proposal(prior)
        self.weighted = bool(prior.stages)
        # Where the base is the proposal its density cancels.
        self.covered = prior.ladder.cover is not None
        self.register_buffer("cumulative", self.proposal.log_weights.exp().cumsum(0)[:-1].clone())

    def forward(self, normal: Tensor, uniform: Tensor) -> Tensor:
        d = normal.shape[2]
        which = (uniform[:, :-1, None] >= self.get_buffer("cumulative")).sum(2)
        scale = self.proposal.cholesky[which]
        u = self.proposal.means[which] + (scale * normal[:, :, None, :]).sum(3)
        if not self.weighted:
            return self._event(u[:, 0])
        flat = u.reshape(-1, d)
        terms = self.density.terms(flat)
        log_weight = self.density.log_potential(flat, terms)
        if self.covered:
            proposed = torch.logsumexp(self.proposal.project(flat)[1], 1)
            log_weight = log_weight + self.density.log_base(flat, terms) - proposed
        share = torch.softmax(log_weight.reshape(-1, normal.shape[1]), 1).cumsum(1)
        # Sums of rounded shares may end below 1: the last candidate takes the rest.
        picked = (uniform[:, -1:] >= share[:, :-1]).sum(1)
        return self._event(torch.gather(u, 1, picked[:, None, None].expand(-1, 1, d))[:, 0])

    def _event(self, u: Tensor) -> Tensor:
        return self.density.whitening.unwhiten(u).reshape(-1, *self.event_shape)


class _Generate(nn.Module):
    def __init__(self, sampler: _Sampler, decoder: nn.Module) -> None:
        super().__init__()
        self.sampler, self.decoder = sampler, decoder

    def forward(self, normal: Tensor, uniform: Tensor) -> Tensor:
        return self.decoder(self.sampler(normal, uniform))  # type: ignore[no-any-return]


def _proposal(prior: LatentPrior) -> GaussianMixtureBase:
    """What the ladder's importance sampling draws from, as one mixture."""
    base = prior.base
    if isinstance(base, NormalBase):
        d = len(base.zero)
        base = GaussianMixtureBase(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None])
    if not isinstance(base, MixtureBase):
        raise ExportError(f"the base {base.name!r} has no ONNX sampler: fit with base='gmm' or 'normal' to export one")
    base = _full(base)
    if prior.ladder.cover is None or not prior.stages:
        return base
    # The blend of Ladder.start: half base, half cover at three widths.
    cover = _full(prior.ladder.cover.widened(COVER_WIDTHS))
    return GaussianMixtureBase(
        torch.cat([base.log_weights.exp(), cover.log_weights.exp()]),
        torch.cat([base.means, cover.means]),
        torch.cat([base.cholesky, cover.cholesky]),
    )


def _full(mixture: MixtureBase) -> GaussianMixtureBase:
    """A copy with full covariances."""
    if isinstance(mixture, LowRankMixtureBase):
        return mixture.full()
    assert isinstance(mixture, GaussianMixtureBase)
    return copy.deepcopy(mixture)


def _write(module: nn.Module, inputs: dict[str, Tensor], output: str, path: str | Path) -> Path:
    """Trace, with the first dimension of every input free, and write the file whole."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError:
        raise MissingExtraError("writing ONNX files", "onnx") from None
    rows = torch.export.Dim("n", min=1)
    module.requires_grad_(False).eval()
    try:
        with _quiet():
            program = torch.onnx.export(
                module,
                tuple(inputs.values()),
                input_names=list(inputs),
                output_names=[output],
                dynamic_shapes=tuple({0: rows} for _ in inputs),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        blob = program.model_proto.SerializeToString()
    except Exception as error:  # Whatever a network of the user's raises while it is traced; files beyond 2 GB.
        line = " ".join(str(error).split())[:200]
        raise ExportError(f"torch cannot turn this into ONNX ({type(error).__name__}: {line})") from error
    write_whole(Path(path), blob)
    return Path(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch's exporter says about itself, and about packages that it could use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
