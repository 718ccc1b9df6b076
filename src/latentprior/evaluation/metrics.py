"""Distances between two sets of rows or images, and average precision, by scikit-learn and torchmetrics."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data.encoding import in_eval_mode
from ..errors import InvalidImagesError, InvalidLatentsError, needs_extra
from .feature_networks import check_normalised, feature_network

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
    "mean_squared_error",
    "two_sample_auc",
]

TensorOrArray = Tensor | NDArray[Any]
AUC_ROWS = 5_000
"""Most rows of each sample that are classified: where the laws are equal, the standard error is then 0.006."""
BLOCK_IMAGES = 1024
"""Images that are compared at a time."""


class Estimate(NamedTuple):
    """A number measured on a sample, and its standard error."""

    value: float
    stderr: float


class TwoSampleTest(NamedTuple):
    """The held-out AUC of a classifier, 0.5 where it cannot tell two samples apart, and its standard error."""

    auc: float
    stderr: float


class AveragePrecision(NamedTuple):
    """Area under the precision-recall curve, and the share of the rare class, which random scores reach."""

    auprc: float
    prevalence: float


def frechet_distance(real_features: TensorOrArray, fake_features: TensorOrArray) -> float:
    r"""Frechet distance of the Gaussians that have the moments of two sets of features (extra ``metrics``).

    .. math:: \|m_1 - m_2\|^2 + \operatorname{tr}\bigl(C_1 + C_2 - 2 (C_1 C_2)^{1/2}\bigr)

    The distance is in squared units of the features. It is biased upwards by order :math:`d/n`, so only distances at
    equal n can be compared, and distances on different features never can (Heusel et al., NeurIPS 2017, eq. 6).

    Parameters
    ----------
    real_features, fake_features : Tensor or array
        ``(n, d)`` and ``(m, d)``, at least 2 rows each.

    Raises
    ------
    MissingExtraError
        Without torchmetrics.
    InvalidLatentsError
        For fewer than two rows, other shapes or numbers that are not finite.
    """
    with needs_extra("the Frechet distance", "metrics"):
        from torchmetrics.image.fid import FrechetInceptionDistance
    real, fake = _pair(real_features, fake_features, "features")
    metric = FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1])).set_dtype(torch.float64)
    # torchmetrics sums raw second moments: features with large means would lose their digits if they were not centred.
    centre = real.mean(0)
    metric.update(real - centre, real=True)
    metric.update(fake - centre, real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(
    real_features: TensorOrArray,
    fake_features: TensorOrArray,
    *,
    subsets: int = 100,
    subset_size: int = 1_000,
    seed: int = 0,
) -> Estimate:
    r"""Squared kernel distance of two sets of features, the mean over random subsets (extra ``metrics``).

    .. math:: \mathrm{MMD}^2_u(\text{real}, \text{fake}), \quad k(x, y) = (x^\top y / d + 1)^3

    It is unbiased: for equal laws it lies around 0, also below it, at any n and any size of subset (Binkowski,
    Sutherland, Arbel and Gretton, ICLR 2018, sec. 4). Distances on different features can never be compared.

    Subsets share rows, so the spread s of their values alone does not give the error. With m of n rows in each of b
    subsets the standard error is :math:`s \sqrt{m / (n - m) + 1 / b}`. Where the laws are nearly equal it is too
    wide, but never too narrow.

    Parameters
    ----------
    real_features, fake_features : Tensor or array
        ``(n, d)`` and ``(m, d)``, at least 4 rows each.
    subsets : int
        Number b of random subsets, at least 2.
    subset_size : int
        Rows of each subset, at least 2; half the rows where that is less.
    seed : int
        Seed of the subsets.

    Returns
    -------
    Estimate
        The distance and its standard error, without units.

    Raises
    ------
    MissingExtraError
        Without torchmetrics.
    InvalidLatentsError
        For fewer rows or subsets, other shapes, numbers that are not finite, and real features that are all equal.
    """
    with needs_extra("the kernel distance", "metrics"):
        from torchmetrics.image.kid import poly_mmd
    real, fake = _pair(real_features, fake_features, "features")
    n = min(len(real), len(fake))
    rows = min(subset_size, n // 2)
    if subsets < 2 or rows < 2:
        raise InvalidLatentsError(
            f"need at least 4 rows of each, 2 subsets and 2 rows in each, got {n}, {subsets} and {subset_size}"
        )
    if bool((real == real[0]).all()):
        raise InvalidLatentsError("all real features are equal: the network or the data is constant, choose another")
    # The subsets are drawn here, since torchmetrics' metric object draws them from the global random state.
    g = torch.Generator().manual_seed(seed)

    def subset(v: Tensor) -> Tensor:
        return v[torch.randperm(len(v), generator=g)[:rows]]

    values = torch.stack([poly_mmd(subset(real), subset(fake)) for _ in range(subsets)])
    return Estimate(float(values.mean()), float(values.std()) * math.sqrt(rows / (n - rows) + 1 / subsets))


def image_frechet_distance(
    real: TensorOrArray, fake: TensorOrArray, network: nn.Module, *, batch_size: int = 256
) -> float:
    """:func:`frechet_distance` of two sets of images on the features of a network, which decides what the number means.

    Parameters
    ----------
    real, fake : Tensor or array
        Images ``(n, ...)`` and ``(m, ...)``, as the network takes them.
    network : Module
        Maps a batch of images to features.
    batch_size : int
        Images a batch.
    """
    return frechet_distance(*(features(network, images, batch_size=batch_size) for images in (real, fake)))


def features(network: nn.Module, images: TensorOrArray, *, batch_size: int = 256) -> Tensor:
    """Features of images ``(n, d)`` on the CPU, by a network in eval mode and without gradients.

    Parameters
    ----------
    network : Module
        Maps a batch of images to features.
    images : Tensor or array
        ``(n, ...)``, as the network takes them.
    batch_size : int
        Images a batch.
    """
    images = torch.as_tensor(images)
    like = next(iter(network.parameters()), images)
    with in_eval_mode(network), torch.no_grad():
        parts = [network(batch.to(like.device)).flatten(1).cpu() for batch in torch.split(images, batch_size)]
    return torch.cat(parts)


def mean_squared_error(x: Tensor, y: Tensor) -> Estimate:
    r"""Mean over pairs of images of the squared difference per pixel and channel, :math:`\|x_i - y_i\|^2 / CHW`.

    Parameters
    ----------
    x, y : Tensor
        Images ``(n, C, H, W)`` in [-1, 1] and their partners in the same order, n at least 2.

    Returns
    -------
    Estimate
        The mean and its standard error. On [-1, 1] the error is four times that on [0, 1].

    Raises
    ------
    InvalidImagesError
        For anything but such images.
    """
    if check_normalised(x).shape != check_normalised(y).shape or len(x) < 2:
        raise InvalidImagesError(
            f"need at least 2 pairs of images of one shape, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    pairs = zip(x.split(BLOCK_IMAGES), y.split(BLOCK_IMAGES), strict=True)
    errors = torch.cat([(a.double() - b.double()).square().flatten(1).mean(1).cpu() for a, b in pairs])
    return Estimate(float(errors.mean()), float(errors.std()) / math.sqrt(len(errors)))


def feature_report(
    real_train: TensorOrArray,
    real_test: TensorOrArray,
    generated: TensorOrArray,
    reconstructions: TensorOrArray,
    *,
    subsets: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Distances of generated images from test images, beside those of reconstructions and of training images.

    No model with this decoder can be expected to come below ``reconstructions``, and no model at all below ``real``.
    All four sets have the same number of rows, so the bias of the Frechet distance is the same in all.

    Parameters
    ----------
    real_train, real_test, generated, reconstructions : Tensor or array
        Features ``(n, d)`` of training images, of test images (the set that all distances are taken from), of
        generated images and of reconstructed test images.
    subsets, seed : int
        Random subsets of the :func:`kernel_distance`, and their seed.

    Returns
    -------
    dict
        ``images`` (n), ``features`` (d), and of each of ``generated``, ``reconstructions`` and ``real`` its
        ``frechet``, ``kernel`` and ``kernel_stderr``. It can be written as JSON.

    Raises
    ------
    InvalidLatentsError
        For sets of unequal size, and for what the two distances refuse.
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
    real_train: TensorOrArray,
    real_test: TensorOrArray,
    generated: TensorOrArray,
    reconstructions: TensorOrArray,
    network: str | nn.Module | Callable[[Tensor], Tensor],
    *,
    network_name: str | None = None,
    batch_size: int = 256,
    subsets: int = 100,
    seed: int = 0,
) -> dict[str, Any]:
    """Distances of generated images from test images, and the error of reconstructions.

    Sets of unequal size are subsampled to the smallest.

    Parameters
    ----------
    real_train, real_test, generated : Tensor or array
        Training images, test images (the set that all distances are taken from) and generated images,
        ``(n_i, C, H, W)`` in [-1, 1].
    reconstructions : Tensor or array
        Reconstructions of ``real_test``, in its order.
    network : str, Module or callable
        See :func:`~latentprior.evaluation.feature_networks.feature_network`.
    network_name : str, optional
        What the result calls the network; by default its attribute ``name``, or else its class.
    batch_size : int
        Images a batch of the network.
    subsets : int
        Random subsets of the :func:`kernel_distance`.
    seed : int
        Seed of the subsamples and subsets.

    Returns
    -------
    dict
        What :func:`feature_report` gives, with ``feature_network``, and with ``mean_squared_error`` and its standard
        error under ``reconstructions``.

    Raises
    ------
    InvalidImagesError
        For reconstructions of another shape than ``real_test``, and for what the distances and the network refuse.
    """
    train, test, samples, decoded = (torch.as_tensor(v) for v in (real_train, real_test, generated, reconstructions))
    if decoded.shape != test.shape:
        raise InvalidImagesError(
            f"reconstructions {tuple(decoded.shape)} must be those of real_test {tuple(test.shape)}, in its order"
        )
    module = feature_network(network)
    n = min(len(v) for v in (train, test, samples))
    # Files are often sorted by class, so the images are drawn at random instead of taking the first.
    g = torch.Generator().manual_seed(seed)
    test_rows, train_rows, sample_rows = (torch.randperm(len(v), generator=g)[:n] for v in (test, train, samples))
    error = mean_squared_error(test[test_rows], decoded[test_rows])
    sets = (train[train_rows], test[test_rows], samples[sample_rows], decoded[test_rows])
    report = feature_report(
        *(features(module, images, batch_size=batch_size) for images in sets), subsets=subsets, seed=seed
    )
    report["reconstructions"] |= {"mean_squared_error": error.value, "mean_squared_error_stderr": error.stderr}
    name = network_name or getattr(module, "name", None) or type(module).__name__
    return {"feature_network": str(name), **report}


def two_sample_auc(a: TensorOrArray, b: TensorOrArray, *, seed: int = 0, folds: int = 5) -> TwoSampleTest:
    r"""Held-out AUC of gradient-boosted trees that tell rows of ``a`` from rows of ``b`` (extra ``metrics``).

    .. math:: \mathrm{AUC} = P\bigl(s(A) > s(B)\bigr) + \tfrac12 P\bigl(s(A) = s(B)\bigr)

    It is the mean over the folds of a cross-validation (Lopez-Paz and Oquab, ICLR 2017), and its standard error is
    that of DeLong, DeLong and Clarke-Pearson (1988) for fixed classifiers. Equal laws give 0.5, but an AUC near 0.5
    does not prove them equal: densities that are nats apart can reach it.

    Parameters
    ----------
    a, b : Tensor or array
        Samples ``(n, d)`` and ``(m, d)``. They are subsampled to equal size, 5,000 rows at most.
    seed : int
        Seed of the subsamples, the folds and the trees.
    folds : int
        Folds of the cross-validation, from 2 to the number of rows.

    Returns
    -------
    TwoSampleTest
        The AUC and its standard error.

    Raises
    ------
    MissingExtraError
        Without scikit-learn.
    InvalidLatentsError
        For fewer than two rows, other shapes, numbers that are not finite, or more folds than rows.
    """
    with needs_extra("the two-sample test", "metrics"):
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
    rng = np.random.default_rng(seed)
    first, second = (rows.numpy() for rows in _pair(a, b, "samples"))
    n = min(len(first), len(second), AUC_ROWS)
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
    wins = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    variance = sum(wins.mean(axis).var(ddof=1) / wins.shape[1 - axis] for axis in (0, 1) if wins.shape[1 - axis] > 1)
    return TwoSampleTest(float(wins.mean()), math.sqrt(variance))


def average_precision(labels: TensorOrArray, scores: TensorOrArray) -> AveragePrecision:
    r"""Area under the precision-recall curve, :math:`\sum_k (R_k - R_{k-1}) P_k` (extra ``metrics``).

    Parameters
    ----------
    labels : Tensor or array
        1 or True for the positive (rare) class, ``(n,)``.
    scores : Tensor or array
        Higher where the positive class is likelier, ``(n,)``.

    Raises
    ------
    MissingExtraError
        Without scikit-learn.
    """
    with needs_extra("the average precision", "metrics"):
        from sklearn.metrics import average_precision_score
    truth = torch.as_tensor(labels).bool().numpy()
    return AveragePrecision(float(average_precision_score(truth, torch.as_tensor(scores).numpy())), float(truth.mean()))


class _GivenFeatures(nn.Module):
    """A network in torchmetrics' sense that returns the features which it is given."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def _pair(a: TensorOrArray, b: TensorOrArray, name: str) -> tuple[Tensor, Tensor]:
    """Return both as float64 rows ``(n, d)`` on the CPU, or raise an error that names what is wrong with them."""
    first, second = (torch.as_tensor(v).detach().cpu().double() for v in (a, b))
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1]:
        raise InvalidLatentsError(
            f"{name} have shapes {tuple(first.shape)} and {tuple(second.shape)}: give (n, d) and (m, d)"
        )
    if min(len(first), len(second)) < 2:
        raise InvalidLatentsError(f"need at least 2 rows of each of the {name}, got {len(first)} and {len(second)}")
    if not (torch.isfinite(first).all() and torch.isfinite(second).all()):
        raise InvalidLatentsError(f"{name} hold NaN or infinite values: remove or mend such rows")
    return first, second
