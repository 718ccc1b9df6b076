"""E4: outliers in tables, RatioDetector beside the fourteen unsupervised detectors that ADBench publishes.

    python benchmarks/adbench.py --seeds 1 2 3

Protocol of ADBench (Han et al., NeurIPS 2022): sets below 1,000 rows are drawn up to 1,000 with repetition, above
10,000 down to 10,000 without; 70% of the rows train, outliers among them and labels unseen, the rest test, split by
class; columns scaled to [0, 1] by the training rows. Figures are the area under the ROC curve and the average precision
on test rows, in percent, means over seeds. The published ones (``paper_AUCROC.csv``, ``paper_AUCPR.csv``) are the
paper's; some of those detectors run here too, on the very same rows, which shows how much other splits matter.

This reads the half of the paper's sets on which variants of the detector's score were compared by labels (RESULTS.md
says which). Its ranks are no claim about other sets: on the other half the detector is average. Runs of single sets
and methods join the figures of earlier runs; figures that are on file are not measured again without ``--again``.
"""

from __future__ import annotations

import argparse
import csv
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pyod.models.ecod import ECOD
from pyod.models.iforest import IForest
from pyod.models.knn import KNN
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

import latentprior as lp
from _data import data_folder
from _results import read_results, write_results

RECORD = "adbench"
FEWEST, MOST = 1_000, 10_000
METHODS: dict[str, Callable[[int], Any]] = {
    "RatioDetector": lambda seed: lp.RatioDetector(random_state=seed),
    "RatioDetector, no stage": lambda seed: lp.RatioDetector(max_stages=0, random_state=seed),
    "ECOD, run here": lambda seed: ECOD(),
    "IForest, run here": lambda seed: IForest(random_state=seed),
    "KNN, run here": lambda seed: KNN(),
}
Split = tuple[np.ndarray, np.ndarray, np.ndarray]


def folder() -> Path:
    """Return the folder of the sets and of the published figures."""
    return data_folder() / "adbench"


def names() -> dict[str, Path]:
    """Sets by name: ``47_yeast.npz`` is yeast."""
    return {path.stem.split("_", 1)[1]: path for path in sorted(folder().glob("*.npz"))}


def published(measure: str) -> dict[str, dict[str, float | None]]:
    """``AUCROC`` or ``AUCPR`` in percent, by set and detector; None where the paper has none."""
    with (folder() / f"paper_{measure}.csv").open(encoding="utf-8") as file:
        rows = {row.pop("dataset"): row for row in csv.DictReader(file)}
    return {name: {k: None if v == "N/A" else float(v) for k, v in row.items()} for name, row in rows.items()}


def split(path: Path, seed: int) -> Split:
    """Training rows, test rows and the test rows' labels."""
    archive = np.load(path)
    x, y = archive["X"].astype(np.float64), archive["y"].astype(int)
    draw = np.random.default_rng(seed)
    size = min(max(len(x), FEWEST), MOST)
    if size != len(x):
        index = draw.choice(len(x), size, replace=size > len(x))
        while y[index].sum() < 2:  # smtp has three outliers in 10,000 rows: both parts need one
            index = draw.choice(len(x), size, replace=size > len(x))
        x, y = x[index], y[index]
    train, test, _, odd = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    scaler = MinMaxScaler().fit(train)
    return scaler.transform(train), scaler.transform(test), odd


def measure(method: str, rows: Split, seed: int) -> dict[str, float]:
    """Learn, score the test rows, compare with their labels."""
    train, test, odd = rows
    start = time.monotonic()
    detector = METHODS[method](seed).fit(train)
    score = detector.decision_function(test)
    return {
        "AUCROC": 100 * float(roc_auc_score(odd, score)),
        "AUCPR": 100 * float(average_precision_score(odd, score)),
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", help="only these, such as glass yeast")
    ask.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    ask.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    ask.add_argument("--again", action="store_true", help="also what is on file")
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    paths = names()
    for name in call.sets or paths:
        for seed in call.seeds:
            rows: Split | None = None
            for method in call.methods:
                sets = (read_results(RECORD) or {}).get("sets", {})
                runs = sets.setdefault(name, {}).setdefault(method, {})
                if str(seed) in runs and not call.again:
                    continue
                rows = rows or split(paths[name], seed)
                runs[str(seed)] = measure(method, rows, seed)
                print(name, seed, method, runs[str(seed)], flush=True)
                figures = {
                    "sets": dict(sorted(sets.items())),
                    "published": {m: published(m) for m in ("AUCROC", "AUCPR")},
                }
                write_results(RECORD, figures, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
