"""E1: mutual information of correlated Gaussians, learned as a ladder from the product of the marginals.

    python benchmarks/mutual_information.py --seeds 3

The set of Rhodes, Xu and Gutmann (NeurIPS 2020): d / 2 pairs of unit normals, each correlated by the rho that gives
20, 40 and 80 nats at d = 80, 160 and 320. The base N(0, I) is the product of the marginals, rows are not whitened, and
log p_K - log p_0 is the log ratio whose mean on fresh exact draws is the mutual information. Two estimates: the mean of
the sum of log ratios, as they were learned (the estimate of that paper), and the same less log Z of the whole ladder,
which is the gain in held-out log density of a normalised model and below the truth but for errors of log Z. Beside it
E_q[p_K / q] = 1 with the exact density checks log Z. Runs that the results file holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

import latentprior as lp
from _results import read_results, write_results
from latentprior.density.sampling.resampling import log_mean_exp
from latentprior.evaluation.known_densities import CorrelatedGaussian

DIMS = {80: 20, 160: 40, 320: 80}
"""Nats at each d."""
ROWS, TEST = 100_000, 20_000
QUADRATIC = lp.StageSettings(
    ratio="quadratic",
    bound=50.0,
    mixture_features=False,
    batch_size=4096,
    odds=1.0,
    optimizer="natural",
    learning_rate=0.002,
    weight_decay=0.0,
    average=0.99,
    steps=1000,
    patience=10,
)


def methods(dim: int) -> dict[str, dict[str, Any]]:
    """Options of the fit; one classifier and a ladder between waypoints differ in nothing else."""
    ladder = {"base": "normal", "whitening": "none"}
    count = {80: 10, 160: 14, 320: 14}[dim]

    def between(waypoints: int, **changed: Any) -> dict[str, Any]:
        settings = replace(QUADRATIC, waypoints=waypoints, **changed)
        return {**ladder, "max_stages": waypoints, "settings": settings}

    small: dict[str, Any] = {"optimizer": "adamw", "steps": 2000, "batch_size": 512}
    # Adam moves each of d^2 weights by about the rate, whatever its gradient, so the step of the form grows with d.
    adamw = {**small, "learning_rate": 0.8 / dim, "average": 0.99}
    residual = {**small, "ratio": "residual", "learning_rate": 3e-3, "weight_decay": 0.1, "average": 0.999}
    return {
        "waypoints, quadratic": between(count),
        "waypoints, quadratic, AdamW": between(count, **adamw),
        "single ratio, quadratic": between(1),
        "waypoints, residual": between(count, **residual),
        "whitened (the base alone is exact)": {"base": "normal", "max_stages": 0},
    }


def measure(dim: int, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """Learn from exact draws; compare the mean log ratio on others with the mutual information."""
    target = CorrelatedGaussian(dim, math.sqrt(-math.expm1(-4 * DIMS[dim] / dim)))
    generator = torch.Generator().manual_seed(1000 + seed)
    z, test = target.sample((ROWS,), generator).float(), target.sample((TEST,), generator).float()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = lp.fit(z, seed=seed, **options)
    seconds = time.monotonic() - start
    product = -0.5 * (test.double().square() + math.log(2 * math.pi)).sum(1)
    normalised = prior.log_prob(test).double() - product
    inside = log_mean_exp(prior.log_prob(test).double() - target.log_prob(test.double()))
    exact = target.mutual_information
    log_z = prior.normalizer
    return {
        "exact": exact,
        "sum_of_log_ratios": float(normalised.mean()) + log_z.value,
        "normalised": float(normalised.mean()),
        "test_stderr": float(normalised.std()) / math.sqrt(TEST),
        "log_z": log_z.value,
        "log_z_stderr": log_z.stderr,
        "log_z_ends": None if prior.bracket is None else [end.value for end in prior.bracket],
        "log_z_error": [inside.value, inside.stderr, inside.ess],
        "rmse": float((normalised - (target.log_prob(test.double()) - product)).square().mean().sqrt()),
        "stages": len(prior.stages),
        "gains": [s.gain for s in prior.stages],
        "steps": [s.diagnostics["steps"] for s in prior.stages],
        "seconds": seconds,
        "warnings": [str(w.message) for w in caught],
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--dims", type=int, nargs="*", default=list(DIMS), choices=list(DIMS))
    ask.add_argument("--only", default="", help="methods whose name ends so")
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    known = read_results("mutual_information") or {}
    results: dict[str, Any] = known.get("dims", {})
    for seed in range(call.seeds):
        for dim in call.dims:
            for name, options in methods(dim).items():
                runs = results.setdefault(str(dim), {}).setdefault(name, {})
                if not name.endswith(call.only) or str(seed) in runs:
                    continue
                runs[str(seed)] = measure(dim, options, seed)
                print(f"d = {dim}, {name}, seed {seed}: {runs[str(seed)]}", flush=True)
                done = {d: {m: r for m, r in methods.items() if r} for d, methods in results.items()}
                settings = {"rows": ROWS, "test": TEST}
                figures = {"dims": done, "tried": known.get("tried", [])}
                write_results("mutual_information", figures, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
