"""E1: fits on targets whose log density is known exactly.

    python benchmarks/known_truth.py --seeds 3

For each target: KL(truth, model) on fresh exact draws, which cannot be below zero by more than its error; and the
error of log Z, from importance sampling with the exact target, E_q[p_K / q] = 1, in units of the standard error.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch

import latentprior as lp
from _results import write_results
from latentprior import targets
from latentprior.sampling.resampling import log_mean_exp

ROWS, TEST = 20_000, 50_000


def cases() -> dict[str, tuple[targets.Target, str]]:
    """Targets and the bases they are learned from."""
    mixture = targets.two_component_mixture
    return {
        "correlated Gaussian, d = 8": (targets.CorrelatedGaussian(8, 0.9), "gmm"),
        "mixture, near": (mixture(distance=3.0), "gmm"),
        "mixture, far": (mixture(distance=12.0), "gmm"),
        "mixture, 1:20": (mixture(distance=6.0, ratio=20.0), "gmm"),
        "mixture, 1:20, from N(0, I)": (mixture(distance=6.0, ratio=20.0), "normal"),
        "banana": (targets.Banana(), "gmm"),
        "rings": (targets.Rings(), "gmm"),
        "heavy tails, d = 4": (targets.StudentT(4), "gmm"),
        "C: ten modes, d = 16": (targets.ten_component_mixture(), "gmm"),
        "C: ten modes, d = 16, from N(0, I)": (targets.ten_component_mixture(), "normal"),
    }


def measure(target: targets.Target, base: str, seed: int) -> dict[str, Any]:
    """Learn from exact draws, compare with the exact density."""
    generator = torch.Generator().manual_seed(1000 + seed)
    z, test = target.sample((ROWS,), generator).float(), target.sample((TEST,), generator).float()
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = lp.fit(z, base=base, seed=seed, max_stages=8)
    seconds = time.monotonic() - begun
    exact, model = target.log_prob(test.double()).double(), prior.log_prob(test).double()
    difference = exact - model
    integral = log_mean_exp(-difference)
    stderr = math.hypot(integral.stderr, prior.log_prob_stderr)
    kl_stderr = math.hypot(float(difference.std()) / math.sqrt(TEST), prior.log_prob_stderr)
    return {
        "exact": exact.mean().item(),
        "model": model.mean().item(),
        "kl": difference.mean().item(),
        "kl_stderr": kl_stderr,
        "log_z_error": integral.value,
        "log_z_error_stderr": stderr,
        "within_3_se": abs(integral.value) <= 3 * stderr,
        "stages": len(prior.stages),
        "gains": [s.gain for s in prior.stages],
        "seconds": seconds,
        "warnings": [str(w.message) for w in caught],
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--only", default="")
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    results: dict[str, Any] = {}
    for name, (target, base) in cases().items():
        if call.only not in name:
            continue
        for seed in range(call.seeds):
            figures = measure(target, base, seed)
            results.setdefault(name, []).append(figures)
            print(f"{name}, seed {seed}: {figures}", flush=True)
            write_results("known_truth", {"targets": results}, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
