"""What a report measures: draws by stage, two-sample tests, distances to training rows, oddest rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..density.ladder import LEAST_EFFECTIVE_SHARE
from ..density.prior import LatentPrior
from ..density.sampling.resampling import effective_sample_size
from ..evaluation.metrics import TwoSampleTest, two_sample_auc
from ..models.model import LatentVariableModel
from ..runtime.seeding import derived_generator
from .sources import Rows

__all__ = ["LogDensity", "Nearest", "StageDraws", "held_out_by_stage", "nearest", "oddest", "stage_draws", "two_sample"]

BASE_DRAWS = 32_768
"""Draws of the base from which those of all stages are chosen."""
LEAST_EFFECTIVE_DRAWS = 8
"""Effective candidates that a slot must have at least, so that one of them counts as a draw of its stage."""
MOST_STAGES = 12
LEAST_TEST_ROWS, MOST_TEST_ROWS = 20, 2_000
"""Rows of samples, and of data, in a two-sample test: fewer say nothing, and more only take time."""
MOST_DISTANCES = 1 << 22
"""Distances that are computed at once, 16 MiB of float32."""


class StageDraws(NamedTuple):
    """Draws ``(n, *event_shape)`` of the ladder's first ``stage`` stages; ``shared`` if chosen from base draws."""

    stage: int
    z: Tensor
    shared: bool


class LogDensity(NamedTuple):
    """Mean log density of rows in nats, in the user's coordinates, and its standard error.

    ``rise_stderr`` is the standard error of the rise above the base, paired over rows, normalisers included.
    """

    value: float
    stderr: float
    rise_stderr: float


class Nearest(NamedTuple):
    """Root mean square distance of each row to its nearest reference row ``(n,)``, and the index of that row."""

    distance: Tensor
    row: Tensor


def shown_stages(count: int, most: int = MOST_STAGES) -> list[int]:
    """Choose stages 0 to ``count``, or ``most`` of them, evenly spaced with both ends."""
    if count < most:
        return list(range(count + 1))
    return [round(i * count / (most - 1)) for i in range(most)]


@torch.no_grad()
def stage_draws(prior: LatentPrior, n: int, seed: int) -> list[StageDraws]:
    r"""Draw ``n`` rows of every stage in slots that change from one stage to the next only where the ladder does.

    Every slot has its own candidates :math:`u_m` from the base and its own Gumbel noise :math:`g_m`. At stage k it
    shows

    .. math:: \arg\max_m\; \log w_k(u_m) + g_m, \quad \log w_k = \sum_{j<k} f_j

    which is one draw with probability :math:`\propto w_k`, made from the same random numbers at every stage. If fewer
    than 8 candidates of a slot are effective, the stage is sampled by itself.
    """
    ladder, generator = prior.ladder, derived_generator(prior.device, seed, "report", "stages")
    slots = max(1, BASE_DRAWS // n)
    u = ladder.start.sample(slots * n, generator)
    start_weights = torch.zeros(len(u), dtype=torch.float64, device=u.device)
    if ladder.cover is not None:
        start_weights = (ladder.base.log_prob(u) - ladder.start.log_prob(u)).double()
    ratios = ladder.log_ratios(u).double()
    noise = -torch.empty(n, slots, dtype=torch.float64, device=u.device).exponential_(generator=generator).log()
    stages = []
    for k in shown_stages(ladder.length):
        log_weights = start_weights + ratios[:, :k].sum(1)
        share = effective_sample_size(log_weights) if k or ladder.cover is not None else 1.0
        shared = share >= LEAST_EFFECTIVE_SHARE and share * slots >= LEAST_EFFECTIVE_DRAWS
        if shared:
            pick = (log_weights.reshape(n, slots) + noise).argmax(1)
            z = prior.whitening.unwhiten(u[torch.arange(n, device=u.device) * slots + pick])
        else:
            fresh = derived_generator(prior.device, seed, "report", "stage")
            z = prior.with_ladder(ladder.first(k)).sample((n,), generator=fresh)
        stages.append(StageDraws(k, z.reshape(n, *prior.event_shape), shared))
    return stages


@torch.no_grad()
def held_out_by_stage(prior: LatentPrior, z: Tensor) -> list[LogDensity]:
    r"""Average :math:`\log p_k(z) = \log p_0(z) + \sum_{j<k} (f_j(z) - c_j)` over rows, for k = 0 to K.

    The standard errors are those of rows and normalisers together.
    """
    u = prior.whitening.whiten(z.to(prior.whitening.loc).flatten(1))
    base = prior.base.log_prob(u).double() + float(prior.whitening.log_abs_det)
    ratios, rise = prior.ladder.log_ratios(u).double(), torch.zeros_like(base)
    means, variance = [], 0.0
    for k in range(prior.ladder.length + 1):
        if k:
            stage = prior.stages[k - 1]
            rise = rise + ratios[:, k - 1] - stage.log_normalizer
            variance += stage.log_normalizer_stderr**2
        stderr, rise_stderr = (math.sqrt(_stderr_squared(values) + variance) for values in (base + rise, rise))
        means.append(LogDensity(float((base + rise).mean()), stderr, rise_stderr))
    return means


def _stderr_squared(values: Tensor) -> float:
    return float(values.var()) / len(values) if len(values) > 1 else math.nan


def two_sample(samples: Tensor, data: Tensor, seed: int) -> TwoSampleTest | None:
    """Test samples against rows of data by boosted trees, 2,000 of each at most; None for fewer than 20."""
    n = min(len(samples), len(data), MOST_TEST_ROWS)
    if n < LEAST_TEST_ROWS:
        return None
    return two_sample_auc(samples.flatten(1)[:n], data.flatten(1)[:n], seed=seed)


def nearest(rows: Tensor, reference: Tensor) -> Nearest:
    r"""Find the nearest reference row of every row, by :math:`\|a - b\| / \sqrt d`; both ``(n, ...)`` and flattened."""
    a, b = rows.flatten(1).float(), reference.flatten(1).float()
    # cdist expands the square, which loses digits far from the origin unless rows are centred.
    centre = b.mean(0)
    a, b = a - centre, b - centre
    parts = [torch.cdist(block, b).min(1) for block in a.split(max(1, MOST_DISTANCES // len(b)))]
    distance = torch.cat([part.values for part in parts]) / math.sqrt(a.shape[1])
    return Nearest(distance, torch.cat([part.indices for part in parts]))


@torch.no_grad()
def oddest(prior: LatentPrior, model: LatentVariableModel | None, rows: Rows, n: int) -> tuple[Tensor, Tensor]:
    r"""Find the ``n`` rows of highest score: their indices and scores in nats.

    The score is :math:`-\log p(x, z)` at the encoder's mean if there are a model and images, else :math:`-\log p(z)`.
    """
    scores = []
    for index in torch.arange(len(rows.z)).split(1024):
        z = rows.codes[index].to(prior.device)
        if model is None or rows.images is None:
            scores.append(-prior.log_prob(z).double().cpu())
        else:
            scores.append(model.anomaly_score(rows.images[index].to(z), kind="joint", z=z).double().cpu())
    values = torch.cat(scores)
    order = torch.argsort(values.nan_to_num(math.inf), descending=True, stable=True)[:n]
    return order, values[order]


def principal_axes(z: Tensor, most: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean ``(d,)`` of rows, principal directions ``(d, k)``, and their shares of the variance ``(k,)``."""
    x = z.flatten(1).double().cpu()
    mean = x.mean(0)
    covariance = (x - mean).T @ (x - mean) / max(1, len(x) - 1)
    values, vectors = torch.linalg.eigh(covariance)
    k = min(most, x.shape[1])
    directions = vectors.flip(1)[:, :k]
    # The sign of an eigenvector is arbitrary: a positive largest entry makes pictures repeatable.
    signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()
    return mean, directions * signs, values.flip(0)[:k] / values.sum().clamp_min(1e-300)


def plane_limits(sets: Sequence[Tensor]) -> Tensor:
    """Compute the low and the high corner ``(2, 2)`` around the middle 99.4% of points ``(n, 2)`` of every set."""
    share = torch.tensor([0.003, 0.997], dtype=torch.float64)
    ends = torch.stack([torch.quantile(points.double(), share, dim=0) for points in sets])
    low, high = ends[:, 0].min(0).values, ends[:, 1].max(0).values
    room = 0.06 * (high - low).clamp_min(1e-9)
    return torch.stack([low - room, high + room])
