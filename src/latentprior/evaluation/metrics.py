"""Distances between two sets of rows or images, and average precision; scikit-learn and torchmetrics do the work."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import InvalidImagesError, InvalidLatentsError, MissingExtraError
from .feature_networks import check_images, feature_network

__all__ = [
    "AveragePrecision",
    "Estimate",
    "TwoSampleTest",
    "average_precision",
    "feature_report",
    "features",
    "frechet_distance",
    "image_frechet_distance",
    "image_report",
    "kernel_distance",
    "maximum_mean_discrepancy",
    "mean_squared_error",
    "two_sample_auc",
]

Rows = Tensor | NDArray[Any]
LARGEST_SAMPLE = 5_000
MEDIAN_ROWS = 1_000


class Estimate(NamedTuple):
    """A number measured on a sample, and its standard error."""

    value: float
    stderr: float


class TwoSampleTest(NamedTuple):
    """Held-out area under the ROC curve of a classifier between two samples, and its standard error."""

    auc: float
    stderr: float


class AveragePrecision(NamedTuple):
    """Area under the precision-recall curve beside the value that random scores reach, the prevalence."""

    auprc: float
    prevalence: float


def frechet_distance(real_features: Rows, fake_features: Rows) -> float:
    r"""Frechet distance of the Gaussians with the moments of two sets of features (extra ``metrics``).

    .. math:: \|m_1 - m_2\|^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1 C_2)^{1/2}\bigr)

    Shapes: ``(n, d)`` and ``(m, d)``, summed in float64 by torchmetrics; in squared units of the features. It is
    biased upwards by order :math:`d/n`, so that only distances at equal n compare; distances on different
    features never do.

    Raises :class:`~latentprior.errors.MissingExtraError` without torchmetrics, and
    :class:`~latentprior.errors.InvalidLatentsError` for fewer than two rows, other shapes or non-finite numbers.

    Source: Heusel et al. (NeurIPS 2017), eq. 6.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
    except ImportError:
        raise MissingExtraError("the Frechet distance", "metrics") from None
    real, fake = _pair(real_features, fake_features, "features")
    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1])).set_dtype(torch.float64)
    # torchmetrics sums raw second moments: centred first, features with large means keep their digits.
    centre = real.mean(0)
    metric.update(real - centre, real=True)
    metric.update(fake - centre, real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(
    real_features: Rows, fake_features: Rows, *, subsets: int = 100, subset_size: int = 1_000, seed: int = 0
) -> Estimate:
    r"""Kernel (Inception) distance of two sets of features, the mean over random subsets (extra ``metrics``).

    .. math:: \mathrm{MMD}^2_u(\text{real}, \text{fake}), \quad k(x, y) = (x^\top y / d + 1)^3

    Unbiased: around 0, also below it, for equal laws, at any n and any size of subset. Subsets have ``subset_size``
    rows or half the rows, whichever is less. Their values overlap, so that their spread s alone says nothing of the
    error: with m of n rows in each of b subsets the standard error is
    :math:`s \sqrt{m / (n - m) + 1 / b}`, which is too wide, never too narrow, where the laws are nearly equal.
    Shapes: ``(n, d)`` and ``(m, d)``; no units; numbers on different features never compare.

    Raises :class:`~latentprior.errors.MissingExtraError` without torchmetrics, and
    :class:`~latentprior.errors.InvalidLatentsError` for fewer than four rows, other shapes, non-finite numbers, real
    features that are all equal, or fewer than two subsets or two rows in each.

    Source: Binkowski, Sutherland, Arbel and Gretton (ICLR 2018), sec. 4.
    """
    try:
        from torchmetrics.image.kid import poly_mmd
    except ImportError:
        raise MissingExtraError("the kernel distance", "metrics") from None
    real, fake = _pair(real_features, fake_features, "features")
    n = min(len(real), len(fake))
    rows = min(subset_size, n // 2)
    if subsets < 2 or rows < 2:
        raise InvalidLatentsError(
            f"need at least 4 rows of each, 2 subsets and 2 rows in each, got {n}, {subsets} and {subset_size}"
        )
    if bool((real == real[0]).all()):
        raise InvalidLatentsError("all real features are equal: the network or the data is constant, choose another")
    # torchmetrics' metric object draws its subsets from the global random state, its estimator does not.
    g = torch.Generator().manual_seed(seed)

    def subset(v: Tensor) -> Tensor:
        return v[torch.randperm(len(v), generator=g)[:rows]]

    values = torch.stack([poly_mmd(subset(real), subset(fake)) for _ in range(subsets)])
    return Estimate(float(values.mean()), float(values.std()) * math.sqrt(rows / (n - rows) + 1 / subsets))


def image_frechet_distance(real: Rows, fake: Rows, network: nn.Module, *, batch_size: int = 256) -> float:
    """:func:`frechet_distance` on ``network(images)``; images ``(n, ...)`` as the network takes them.

    The network is the caller's choice and decides what the number means: say which one it was.
    """
    return frechet_distance(
        features(network, real, batch_size=batch_size), features(network, fake, batch_size=batch_size)
    )


def features(network: nn.Module, images: Rows, *, batch_size: int = 256) -> Tensor:
    """``network(images)`` in eval mode, batch by batch and without gradients: flat ``(n, d)`` on the CPU."""
    images = torch.as_tensor(images)
    like = next(iter(network.parameters()), images)
    training = network.training
    network.eval()
    try:
        with torch.no_grad():
            parts = [network(batch.to(like.device)).flatten(1).cpu() for batch in torch.split(images, batch_size)]
    finally:
        network.train(training)
    return torch.cat(parts)


def mean_squared_error(x: Tensor, y: Tensor) -> Estimate:
    r"""Mean over images of the squared difference per pixel and channel, :math:`\|x_i - y_i\|^2 / CHW`.

    Shapes: both ``(n, C, H, W)`` in [-1, 1], paired, n at least 2: four times the error on [0, 1]. Raises
    :class:`~latentprior.errors.InvalidImagesError` for anything else.
    """
    if check_images(x).shape != check_images(y).shape or len(x) < 2:
        raise InvalidImagesError(
            f"need at least 2 pairs of images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    pairs = zip(x.split(1024), y.split(1024), strict=True)
    errors = torch.cat([(a.double() - b.double()).square().flatten(1).mean(1).cpu() for a, b in pairs])
    return Estimate(float(errors.mean()), float(errors.std()) / math.sqrt(len(errors)))


def feature_report(
    real_train: Rows, real_test: Rows, generated: Rows, reconstructions: Rows, *, subsets: int = 100, seed: int = 0
) -> dict[str, Any]:
    """Frechet and kernel distances to ``real_test`` of samples, and beside them of reconstructions and training data.

    All four are features ``(n, d)`` with n in common: the Frechet distance's bias is then the same in all three. No
    generator with this decoder can be expected below ``reconstructions``, nor any below ``real``. The result holds
    ``images`` (n), ``features`` (d), and ``frechet``, ``kernel``, ``kernel_stderr`` of ``generated``,
    ``reconstructions`` and ``real``; it is JSON as it stands.

    Raises :class:`~latentprior.errors.InvalidLatentsError` unless n is the same, and as the two distances do.
    """
    sets = {"generated": generated, "reconstructions": reconstructions, "real": real_train}
    if len(lengths := {len(rows) for rows in (*sets.values(), real_test)}) > 1:
        raise InvalidLatentsError(
            f"Frechet distances compare at equal n only, got {sorted(lengths)}: take as many rows"
        )
    report: dict[str, Any] = {"images": len(real_test), "features": int(real_test.shape[1])}
    for name, rows in sets.items():
        kernel = kernel_distance(real_test, rows, subsets=subsets, seed=seed)
        report[name] = {
            "frechet": frechet_distance(real_test, rows),
            "kernel": kernel.value,
            "kernel_stderr": kernel.stderr,
        }
    return report


def image_report(
    real_train: Rows,
    real_test: Rows,
    generated: Rows,
    reconstructions: Rows,
    network: str | nn.Module | Callable[[Tensor], Tensor],
    *,
    network_name: str | None = None,
    batch_size: int = 256,
    subsets: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """:func:`feature_report` on images, with the network's name and the reconstructions' mean squared error.

    Arguments
    ---------
    real_train, real_test, generated : ``(n_i, C, H, W)`` in [-1, 1]; the smallest n counts, others are subsampled.
    reconstructions : of ``real_test``, in its order.
    network : a name for :func:`~latentprior.evaluation.feature_networks.feature_network`, or a module or function of
        your own.
    network_name : what the result calls it, by default the module's ``name`` or class.

    Raises :class:`~latentprior.errors.InvalidImagesError` for reconstructions of another shape than ``real_test``,
    and as the distances and the network do.
    """
    train, test, samples, decoded = (torch.as_tensor(v) for v in (real_train, real_test, generated, reconstructions))
    if decoded.shape != test.shape:
        raise InvalidImagesError(
            f"reconstructions {tuple(decoded.shape)} must be those of real_test {tuple(test.shape)}, in its order"
        )
    module = feature_network(network)
    n = min(len(v) for v in (train, test, samples))
    # Files are often sorted by class: the rows that count are drawn, not the first.
    g = torch.Generator().manual_seed(seed)
    index, of_train, of_samples = (torch.randperm(len(v), generator=g)[:n] for v in (test, train, samples))
    pair = test[index], decoded[index]
    error = mean_squared_error(*pair)
    sets = (train[of_train], pair[0], samples[of_samples], pair[1])
    report = feature_report(
        *(features(module, images, batch_size=batch_size) for images in sets), subsets=subsets, seed=seed
    )
    report["reconstructions"] |= {"mean_squared_error": error.value, "mean_squared_error_stderr": error.stderr}
    name = network_name or getattr(module, "name", None) or type(module).__name__
    return {"feature_network": str(name), **report}


def two_sample_auc(a: Rows, b: Rows, *, seed: int = 0, folds: int = 5) -> TwoSampleTest:
    r"""Held-out AUC of gradient-boosted trees that tell rows of ``a`` from rows of ``b``: 0.5 if they cannot.

    .. math:: \mathrm{AUC} = P\bigl(s(A) > s(B)\bigr) + \tfrac12 P\bigl(s(A) = s(B)\bigr)

    Shapes: ``(n, d)`` and ``(m, d)``; both are subsampled to equal size, 5,000 at most. The AUC is the mean over
    ``folds`` of a cross-validation, the standard error DeLong's for fixed classifiers. An AUC near 0.5 is
    necessary, far from sufficient: densities that are nats apart can pass.

    Source: Lopez-Paz and Oquab (ICLR 2017); DeLong, DeLong and Clarke-Pearson (1988).
    """
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rng = np.random.default_rng(seed)
    first, second = (rows.numpy() for rows in _pair(a, b, "samples"))
    n = min(len(first), len(second), LARGEST_SAMPLE)
    if not 2 <= folds <= n:
        raise InvalidLatentsError(f"folds must lie between 2 and the {n} rows of each sample, got {folds}")
    x = np.concatenate([rows[rng.permutation(len(rows))[:n]] for rows in (first, second)])
    y = np.repeat([1, 0], n)
    splits = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x, y))
    trees = HistGradientBoostingClassifier(early_stopping=False, random_state=seed)
    scores = cross_val_predict(trees, x, y, cv=splits, method="decision_function")
    parts = [_auc(scores[test][y[test] == 1], scores[test][y[test] == 0]) for _, test in splits]
    return TwoSampleTest(sum(part.auc for part in parts) / folds, math.hypot(*(part.stderr for part in parts)) / folds)


def _auc(positive: NDArray[Any], negative: NDArray[Any]) -> TwoSampleTest:
    """AUC of two sets of scores and DeLong's standard error, from the placements of each row."""
    won = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = sum(won.mean(axis).var(ddof=1) / won.shape[1 - axis] for axis in (0, 1) if won.shape[1 - axis] > 1)
    return TwoSampleTest(float(won.mean()), math.sqrt(variance))


def maximum_mean_discrepancy(a: Rows, b: Rows) -> float:
    r"""Squared maximum mean discrepancy, unbiased, with a Gaussian kernel of median width.

    .. math:: \frac{1}{n(n-1)} \sum_{i \ne j} k(a_i, a_j) + \frac{1}{m(m-1)} \sum_{i \ne j} k(b_i, b_j)
        - \frac{2}{nm} \sum_{i,j} k(a_i, b_j), \quad k(x, y) = \exp\frac{-\|x - y\|^2}{2 h^2}

    h is the median distance of pooled rows (1,000 of each at most). Shapes: ``(n, d)`` and ``(m, d)``; no
    units; around 0, also below it, for equal laws. Time grows with :math:`(n + m)^2`, memory does not.

    Source: Gretton, Borgwardt, Rasch, Schoelkopf and Smola (JMLR 2012), eq. 3.
    """
    x, y = _pair(a, b, "samples")
    # cdist expands the square: centred first, rows far from the origin keep their distances.
    x, y = x - x.mean(0), y - x.mean(0)
    pooled = torch.cat([rows[:: -(-len(rows) // MEDIAN_ROWS)] for rows in (x, y)])
    width = float(torch.pdist(pooled).median())
    if width == 0:
        raise InvalidLatentsError("more than half of all rows are equal: the median width of the kernel is zero")

    def total(left: Tensor, right: Tensor) -> float:
        return sum(
            float(torch.cdist(block, right).square().div(-2 * width**2).exp().sum())
            for block in torch.split(left, 1024)
        )

    n, m = len(x), len(y)
    # The diagonal, k(x, x) = 1, is left out.
    same = (total(x, x) - n) / (n * (n - 1)) + (total(y, y) - m) / (m * (m - 1))
    return same - 2 * total(x, y) / (n * m)


def average_precision(labels: Rows, scores: Rows) -> AveragePrecision:
    r"""Area under the precision-recall curve, :math:`\sum_k (R_k - R_{k-1}) P_k`, with the prevalence.

    Arguments
    ---------
    labels : ``(n,)``, 1 or True for the positive (rare) class.
    scores : ``(n,)``, higher where the positive class is likelier.
    """
    from sklearn.metrics import average_precision_score

    truth = torch.as_tensor(labels).bool().numpy()
    return AveragePrecision(float(average_precision_score(truth, torch.as_tensor(scores).numpy())), float(truth.mean()))


class _GivenFeatures(nn.Module):
    """What torchmetrics calls a feature extractor, for features that are known already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _pair(a: Rows, b: Rows, what: str) -> tuple[Tensor, Tensor]:
    """Both as float64 rows ``(n, d)`` on the CPU, checked."""
    first, second = (torch.as_tensor(v).detach().cpu().double() for v in (a, b))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InvalidLatentsError(
            f"{what} have shapes {tuple(first.shape)} and {tuple(second.shape)}: give (n, d) and (m, d)"
        )
    if min(len(first), len(second)) < 2:
        raise InvalidLatentsError(f"need at least 2 rows of each of the {what}, got {len(first)} and {len(second)}")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InvalidLatentsError(f"{what} hold NaN or infinite values: remove or mend such rows")
    return first, second
