"""What the detector's ceiling on the stages' part is worth, with labels and without.

    python benchmarks/detector_choice.py --seeds 1 2 3

The default is a reason, not a choice: outliers are fewer than half of the rows, as ``contamination`` of every PyOD
detector says, so the median over the training rows lies among the values of normal rows, whatever the outliers are. No
other quantile has that (a breakdown point of a half). Three tables ask what other ceilings would have done:

- planted: which ceiling finds anomalies planted among rows whose own labels are never read?
- the sets of ``adbench.py`` and of ``other_tables.py``, with their labels, under their protocols.

A detector learns once; every candidate is a ceiling on the same stage. Sets of more than 300 columns are left out.
Planted are a twentieth of the training rows, of one of the four kinds by which ADBench makes anomalies (Han et al.,
NeurIPS 2022), from a mixture of at most five Gaussians fitted to the rows, 2,000 at most:

- local: the mixture with covariances five times larger;
- global: uniform over the rows' range, a tenth wider;
- dependency: every column drawn by itself from the rows, so that margins stay and the joint density is lost;
- clustered: the mixture with means five times further from the rows' mean.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.mixture import GaussianMixture

import latentprior as lp
from _results import read_results, write_results
from adbench import names, split
from other_tables import parts, tasks

RECORD = "detector_choice"
MOST, WIDEST, SHARE, FACTOR, COMPONENTS = 2_000, 300, 0.05, 5.0, 5
KINDS = ("local", "global", "dependency", "clustered")
CEILINGS = {"no stage": None, "10%": 0.1, "25%": 0.25, "50%": 0.5, "75%": 0.75, "90%": 0.9, "no ceiling": 1.0}
"""Quantile of the stages' part over the training rows; the detector has 50%."""


def planted(x: np.ndarray, kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows with a twentieth replaced, and which."""
    draw = np.random.default_rng([seed, KINDS.index(kind)])
    n = max(2, round(SHARE * len(x)))
    d = x.shape[1]
    if kind == "global":
        low, high = x.min(0), x.max(0)
        margin = 0.05 * (high - low)
        odd = draw.uniform(low - margin, high + margin, (n, d))
    elif kind == "dependency":
        odd = np.stack([draw.choice(column, n) for column in x.T], 1)
    else:
        diagonal = d > 50
        mixture = GaussianMixture(
            min(COMPONENTS, len(x) // 50), covariance_type="diag" if diagonal else "full", random_state=seed
        ).fit(x)
        which = draw.choice(len(mixture.weights_), n, p=mixture.weights_)
        scale = FACTOR if kind == "local" else 1.0
        middle = x.mean(0)
        means = middle + (FACTOR if kind == "clustered" else 1.0) * (mixture.means_ - middle)
        normal = draw.standard_normal((n, d))
        spread = (
            np.sqrt(mixture.covariances_[which]) * normal
            if diagonal
            else np.einsum("nij,nj->ni", np.linalg.cholesky(mixture.covariances_)[which], normal)
        )
        odd = means[which] + np.sqrt(scale) * spread
    rows = x.copy()
    index = draw.choice(len(x), n, replace=False)
    rows[index] = odd
    marked = np.zeros(len(x), dtype=int)
    marked[index] = 1
    return rows, marked


def candidates(detector: lp.RatioDetector, train: np.ndarray, x: np.ndarray) -> dict[str, np.ndarray]:
    """Scores of ``x`` under every ceiling, a quantile over ``train``, on the stage that the detector learned."""
    ratios = _terms(detector, train)[1]
    base, part = _terms(detector, x)
    return {
        name: base if share is None else base - np.minimum(part, np.quantile(ratios, share))
        for name, share in CEILINGS.items()
    }


def _terms(detector: lp.RatioDetector, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Score by the base alone, and what the stages take from it."""
    u = detector._squash(x)
    base, ratios = (part.numpy() for part in detector._terms(u))
    return 0.5 * np.square(u[:, ~detector._columns.varies]).sum(1) - base, ratios


def measure(train: np.ndarray, x: np.ndarray, odd: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """Areas of every candidate in percent, learned on ``train``, on rows ``x`` of which some are odd."""
    detector = lp.RatioDetector(random_state=seed).fit(train)
    return {
        name: {
            "AUCROC": 100 * float(roc_auc_score(odd, score)),
            "AUCPR": 100 * float(average_precision_score(odd, score)),
        }
        for name, score in candidates(detector, train, x).items()
    }


def cases(seeds: list[int]) -> Iterator[tuple[str, str, int, Callable[[], tuple[np.ndarray, np.ndarray, np.ndarray]]]]:
    """Table, case, seed, and how to make its training rows, its rows to judge and their labels."""
    for seed in seeds:
        for name, path in names().items():
            train, test, odd = split(path, seed)
            if train.shape[1] > WIDEST:
                continue
            yield "adbench", name, seed, lambda rows=(train, test, odd): rows
            for kind in KINDS:

                def make(x: np.ndarray = train[:MOST], kind: str = kind, seed: int = seed) -> tuple[np.ndarray, ...]:
                    rows, marked = planted(x, kind, seed)
                    return rows, rows, marked

                yield "planted", f"{name}, {kind}", seed, make
        for _, task, x, y in tasks(seed):
            yield "other", task, seed, lambda x=x, y=y, seed=seed: parts(x, y, seed)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    tables = (read_results(RECORD) or {}).get("tables", {})
    for table, case, seed, make in cases(call.seeds):
        runs = tables.setdefault(table, {}).setdefault(case, {})
        if str(seed) not in runs:
            runs[str(seed)] = measure(*make(), seed)
            print(table, case, seed, flush=True)
            write_results(RECORD, {"tables": tables}, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
