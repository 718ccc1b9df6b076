"""RatioDetector on tables that no choice has seen: scikit-learn's own, one class made rare.

    python benchmarks/other_tables.py --seeds 1 2 3

A class in turn is the outliers: of its rows as many stay as make a tenth of the table; the others are normal. For
breast_cancer only the malignant class is. The rest is the protocol of ``adbench.py``: 70% of the rows train, outliers
among them, labels unread; columns scaled to [0, 1] by them. Rivals are PyOD's, with its defaults, on the same rows.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from pyod.models.cblof import CBLOF
from pyod.models.copod import COPOD
from pyod.models.ecod import ECOD
from pyod.models.hbos import HBOS
from pyod.models.iforest import IForest
from pyod.models.knn import KNN
from pyod.models.lof import LOF
from pyod.models.ocsvm import OCSVM
from pyod.models.pca import PCA
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.metrics import average_precision_score, roc_auc_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MinMaxScaler

import latentprior as lp
from _results import read_results, write_results

RECORD = "other_tables"
SHARE = 0.1
SOURCES = {"breast_cancer": load_breast_cancer, "digits": load_digits, "iris": load_iris, "wine": load_wine}
METHODS: dict[str, Callable[[int], Any]] = {
    "RatioDetector": lambda seed: lp.RatioDetector(random_state=seed),
    "RatioDetector, no stage": lambda seed: lp.RatioDetector(max_stages=0, random_state=seed),
    "CBLOF": lambda seed: CBLOF(random_state=seed),
    "COPOD": lambda seed: COPOD(),
    "ECOD": lambda seed: ECOD(),
    "HBOS": lambda seed: HBOS(),
    "IForest": lambda seed: IForest(random_state=seed),
    "KNN": lambda seed: KNN(),
    "LOF": lambda seed: LOF(),
    "OCSVM": lambda seed: OCSVM(),
    "PCA": lambda seed: PCA(random_state=seed),
}


def tasks(seed: int) -> Iterator[tuple[str, str, np.ndarray, np.ndarray]]:
    """Source, task, rows and which of them are odd."""
    for source, load in SOURCES.items():
        x, y = load(return_X_y=True)
        for rare in [0] if source == "breast_cancer" else np.unique(y):
            draw = np.random.default_rng([seed, int(rare)])
            normal, odd = np.flatnonzero(y != rare), np.flatnonzero(y == rare)
            n = min(len(odd), round(len(normal) * SHARE / (1 - SHARE)))
            index = np.concatenate([normal, draw.choice(odd, n, replace=False)])
            yield source, f"{source} {rare}", x[index].astype(np.float64), (y[index] == rare).astype(int)


def parts(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training rows, test rows and the test rows' labels."""
    train, test, _, odd = train_test_split(x, y, test_size=0.3, stratify=y, random_state=seed)
    scaler = MinMaxScaler().fit(train)
    return scaler.transform(train), scaler.transform(test), odd


def measure(method: str, x: np.ndarray, y: np.ndarray, seed: int) -> dict[str, float]:
    """Learn on 70% of the rows, score the rest."""
    train, test, odd = parts(x, y, seed)
    start = time.monotonic()
    # PyOD's PCA gives infinity on columns that are constant in the training rows.
    score = np.nan_to_num(METHODS[method](seed).fit(train).decision_function(test))
    return {
        "AUCROC": 100 * float(roc_auc_score(odd, score)),
        "AUCPR": 100 * float(average_precision_score(odd, score)),
        "seconds": time.monotonic() - start,
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    entries = (read_results(RECORD) or {}).get("tasks", {})
    for seed in call.seeds:
        for source, task, x, y in tasks(seed):
            entry = entries.setdefault(task, {"source": source, "rows": len(x), "columns": x.shape[1], "methods": {}})
            for method in METHODS:
                runs = entry["methods"].setdefault(method, {})
                if str(seed) not in runs:
                    runs[str(seed)] = measure(method, x, y, seed)
            print(seed, task, entry["methods"]["RatioDetector"][str(seed)], flush=True)
            write_results(RECORD, {"tasks": entries}, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
