r"""A prior or a model of images as an ONNX graph (extra ``onnx``): log density, one-shot sampler, decoder."""

from __future__ import annotations

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..density.bases import CopulaBase, GaussianMixtureBase, LowRankMixtureBase, MixtureBase, NormalBase
from ..density.ladder import COVER_WIDTHS
from ..density.prior import LatentPrior
from ..density.ratios import BoundedRatio
from ..errors import ExportError, needs_extra, reason
from ..models.model import LatentVariableModel
from ..storage.checkpoint import write_whole

__all__ = ["export_onnx"]

Graph = Literal["log_prob", "sampler", "decoder", "generate"]
OPSET_VERSION = 18
"""The version of ONNX's operators that torch's exporter writes without converting them."""
LEAST_FREE_ROWS = 3
"""Rows of the inputs that are traced: the exporter makes a constant of a dimension of 0 or 1."""
REASON_CHARACTERS = 200
"""Most of what torch says that an error repeats: it may print whole graphs."""


def export_onnx(
    prior_or_model: LatentPrior | LatentVariableModel,
    path: str | Path,
    what: Graph = "log_prob",
    *,
    candidates: int = 64,
) -> Path:
    r"""Write a prior or a part of a model to one ``.onnx`` file in float32, whose number of rows n is free.

    Rows are independent of one another, and nothing in a graph is random: equal inputs give equal outputs.

    Parameters
    ----------
    prior_or_model : LatentPrior or LatentVariableModel
        What to export.
    path : str or Path
        The file to write, which is returned.
    what : {"log_prob", "sampler", "decoder", "generate"}
        The graph to write:

        - ``log_prob`` maps ``z`` ``(n, *event_shape)`` to ``log_prob`` ``(n,)``, normalised, in nats. It takes all
          bases but ``flow`` and Distributions of your own.
        - ``sampler`` maps ``normal`` ``(n, candidates, d)``, standard normal numbers, and ``uniform``
          ``(n, candidates + 1)``, numbers in [0, 1), to ``z`` ``(n, *event_shape)``. It takes the bases ``normal`` and
          ``gmm``.
        - ``decoder`` maps ``z`` to ``images`` ``(n, C, H, W)`` in [-1, 1]; for a model only.
        - ``generate`` maps the inputs of the sampler to ``images``; for a model only.
    candidates : int
        Draws M of the base from which the sampler picks one for every row, in proportion to
        :math:`w = \prod_k r_k`; the last uniform number says which.

    Raises
    ------
    ExportError
        For what has no such graph: a flow, a Distribution, a tilt, or a decoder that torch cannot trace.
    MissingExtraError
        Without the extra.

    Notes
    -----
    The sampler is sampling-importance-resampling (Rubin, 1987), as NCP-VAE samples (Aneja, Schwing, Kautz and Vahdat,
    NeurIPS 2021). In the limit of many candidates its density is :math:`p_K`; with M of them it is off by a factor of
    about :math:`1 + O(\mathrm{var}(w) / M)`.
    """
    if what not in get_args(Graph):
        raise ExportError(f"unknown graph {what!r}: choose log_prob, sampler, decoder or generate")
    if candidates < 1:
        raise ExportError(f"candidates must be 1 or more, got {candidates}")
    model = prior_or_model if isinstance(prior_or_model, LatentVariableModel) else None
    prior = prior_or_model if isinstance(prior_or_model, LatentPrior) else prior_or_model.prior
    prior = prior.to("cpu", torch.float32)
    latents = {"z": torch.zeros(LEAST_FREE_ROWS, *prior.event_shape)}
    numbers = {
        "normal": torch.zeros(LEAST_FREE_ROWS, candidates, len(prior.whitening.loc)),
        "uniform": torch.full((LEAST_FREE_ROWS, candidates + 1), 0.5),
    }
    if what == "log_prob":
        return _write(_Density(prior), latents, what, path)
    if what == "sampler":
        return _write(_Sampler(prior), numbers, "z", path)
    if model is None:
        raise ExportError(f"a prior alone makes no images: export {what!r} of the LatentVariableModel")
    decoder = copy.deepcopy(model.decoder).to("cpu", torch.float32).eval()
    if what == "decoder":
        return _write(decoder, latents, "images", path)
    return _write(_Generate(_Sampler(prior), decoder), numbers, "images", path)


class _Density(nn.Module):
    """The log density of a prior, without blocks and without anything that depends on the number of rows."""

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
        self.base = copy.deepcopy(prior.base)
        self.mixture = copy.deepcopy(prior.ladder.mixture)
        self.ratios = nn.ModuleList(copy.deepcopy(networks))
        self.shift = prior.normalizer.value - float(prior.whitening.log_abs_det)

    def forward(self, z: Tensor) -> Tensor:
        u = self.whitening.whiten(z.flatten(1))
        terms = self.terms(u)
        return self.log_base(u, terms) + self.log_potential(u, terms) - self.shift

    def terms(self, u: Tensor) -> Tensor | None:
        """Log terms of the mixture that the base or the stages read, if there is one."""
        # The mixture's own log_prob evaluates blocks of a fixed length, which would fix the number of rows.
        return None if self.mixture is None else self.mixture.project(u)[1]

    def log_base(self, u: Tensor, terms: Tensor | None) -> Tensor:
        if isinstance(self.base, MixtureBase):
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
    """For every row, one of M draws of the proposal, which a uniform number picks in proportion to the weights."""

    def __init__(self, prior: LatentPrior) -> None:
        super().__init__()
        self.density = _Density(prior)
        self.event_shape = tuple(prior.event_shape)
        self.proposal = _proposal(prior)
        self.weighted = bool(prior.stages)
        # Where the base is the proposal, its density cancels.
        self.covered = prior.ladder.cover is not None
        self.register_buffer("cumulative", self.proposal.log_weights.exp().cumsum(0)[:-1].clone())

    def forward(self, normal: Tensor, uniform: Tensor) -> Tensor:
        d = normal.shape[2]
        component = (uniform[:, :-1, None] >= self.get_buffer("cumulative")).sum(2)
        scale = self.proposal.cholesky[component]
        u = self.proposal.means[component] + (scale * normal[:, :, None, :]).sum(3)
        if not self.weighted:
            return self._event(u[:, 0])
        flat = u.reshape(-1, d)
        terms = self.density.terms(flat)
        log_weight = self.density.log_potential(flat, terms)
        if self.covered:
            proposed = torch.logsumexp(self.proposal.project(flat)[1], 1)
            log_weight = log_weight + self.density.log_base(flat, terms) - proposed
        share = torch.softmax(log_weight.reshape(-1, normal.shape[1]), 1).cumsum(1)
        # The sum of rounded shares may end below 1, so the last candidate takes the rest.
        candidate = (uniform[:, -1:] >= share[:, :-1]).sum(1)
        return self._event(torch.gather(u, 1, candidate[:, None, None].expand(-1, 1, d))[:, 0])

    def _event(self, u: Tensor) -> Tensor:
        return self.density.whitening.unwhiten(u).reshape(-1, *self.event_shape)


class _Generate(nn.Module):
    def __init__(self, sampler: _Sampler, decoder: nn.Module) -> None:
        super().__init__()
        self.sampler, self.decoder = sampler, decoder

    def forward(self, normal: Tensor, uniform: Tensor) -> Tensor:
        return self.decoder(self.sampler(normal, uniform))  # type: ignore[no-any-return]


def _proposal(prior: LatentPrior) -> GaussianMixtureBase:
    """Return what the ladder's importance sampling draws from, as one mixture."""
    base = prior.base
    if isinstance(base, NormalBase):
        d = len(base.zero)
        base = GaussianMixtureBase(torch.ones(1), torch.zeros(1, d), torch.eye(d)[None])
    if not isinstance(base, MixtureBase):
        raise ExportError(f"the base {base.name!r} has no ONNX sampler: fit with base='gmm' or 'normal' to export one")
    base = _full(base)
    if prior.ladder.cover is None or not prior.stages:
        return base
    # This is the blend of Ladder.start: half base, half cover at three widths. The weights are normalised together.
    cover = _full(prior.ladder.cover.widened(COVER_WIDTHS))
    return GaussianMixtureBase(
        torch.cat([base.log_weights.exp(), cover.log_weights.exp()]),
        torch.cat([base.means, cover.means]),
        torch.cat([base.cholesky, cover.cholesky]),
    )


def _full(mixture: MixtureBase) -> GaussianMixtureBase:
    """Copy a mixture with full covariances."""
    if isinstance(mixture, LowRankMixtureBase):
        return mixture.full()
    assert isinstance(mixture, GaussianMixtureBase)
    return copy.deepcopy(mixture)


def _write(module: nn.Module, inputs: dict[str, Tensor], output: str, path: str | Path) -> Path:
    """Trace a module with the first dimension of every input free, and write the file in one piece."""
    with needs_extra("writing ONNX files", "onnx"):
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
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
                opset_version=OPSET_VERSION,
                dynamo=True,
                verbose=False,
            )
        assert program is not None
        blob = program.model_proto.SerializeToString()
    except Exception as error:
        # A user's network may raise anything while it is traced, and files beyond 2 GB cannot be serialised.
        line = reason(error)[:REASON_CHARACTERS]
        raise ExportError(f"torch cannot turn this into ONNX ({type(error).__name__}: {line})") from error
    write_whole(Path(path), blob)
    return Path(path)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporter says about itself and about packages that it could use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
