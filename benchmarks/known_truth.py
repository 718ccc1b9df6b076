"""E1: fits on targets whose log density is known exactly.

    python benchmarks/known_truth.py --seeds 3

For each target, on fresh exact draws: KL(truth, model), which cannot be below zero by more than its error; the root
mean square of the error of log p; the error of log Z, by importance sampling with the exact target, E_q[p_K / q] = 1,
in units of its standard error (where the support is bounded that is the model's mass inside, and must be the share of
samples that lie inside); weights of the modes among the prior's samples, where modes are known; and the area under the
ROC curve of boosted trees that tell samples from exact draws. Runs that the results file holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import latentprior as lp
from _results import read_results, write_results
from latentprior.density.sampling.resampling import log_mean_exp
from latentprior.evaluation import known_densities as targets
from latentprior.evaluation.metrics import two_sample_auc

ROWS, TEST, SAMPLES = 20_000, 50_000, 10_000


def cases() -> dict[str, tuple[targets.Target, str]]:
    """Targets and the bases they are learned from."""
    mixture = targets.two_component_mixture
    return {
        "correlated Gaussian, d = 2": (targets.CorrelatedGaussian(2, 0.9), "gmm"),
        "correlated Gaussian, d = 8": (targets.CorrelatedGaussian(8, 0.9), "gmm"),
        "mixture, near": (mixture(distance=3.0), "gmm"),
        "mixture, far": (mixture(distance=12.0), "gmm"),
        "mixture, 1:20": (mixture(distance=6.0, ratio=20.0), "gmm"),
        "mixture, 1:20, from N(0, I)": (mixture(distance=6.0, ratio=20.0), "normal"),
        "funnel": (targets.Funnel(), "gmm"),
        "banana": (targets.Banana(), "gmm"),
        "rings": (targets.Rings(), "gmm"),
        "heavy tails, d = 4": (targets.StudentT(4), "gmm"),
        "bounded support": (targets.BoundedCube(), "gmm"),
        "skewed, d = 4": (targets.SkewedProduct(4), "gmm"),
        "spikes": (targets.Spikes(), "gmm"),
        "C: ten modes, d = 16": (targets.ten_component_mixture(), "gmm"),
        "C: ten modes, d = 16, from N(0, I)": (targets.ten_component_mixture(), "normal"),
    }


def modes(target: targets.Target, z: Tensor) -> tuple[Tensor, Tensor] | None:
    """Share of rows nearest to each mode, and the modes' true weights; None where the target has no modes."""
    if isinstance(target, targets.GaussianMixture):
        which, weights = target.component(z), target.weights
    elif isinstance(target, targets.Rings):
        which, weights = (z.norm(dim=1, keepdim=True) - target.radii).abs().argmin(1), target.weights
    elif isinstance(target, targets.Spikes):
        marginal = target.marginal
        index, size = marginal.component(z[..., None]), len(marginal.weights)
        which = (index * size ** torch.arange(target.dim)).sum(1)
        weights = marginal.weights
        for _ in range(target.dim - 1):
            weights = torch.outer(marginal.weights, weights).flatten()
    else:
        return None
    return torch.bincount(which, minlength=len(weights)).double() / len(z), weights


def measure(target: targets.Target, base: str, seed: int) -> dict[str, Any]:
    """Learn from exact draws, compare with the exact density."""
    generator = torch.Generator().manual_seed(1000 + seed)
    z, test = target.sample((ROWS,), generator).float(), target.sample((TEST,), generator).float()
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = lp.fit(z, base=base, seed=seed, max_stages=8)
        seconds = time.monotonic() - start
        samples = prior.sample((SAMPLES,), generator=generator)
    exact, model = target.log_prob(test.double()).double(), prior.log_prob(test).double()
    difference = exact - model
    inside = log_mean_exp(-difference)
    bounded = isinstance(target, targets.BoundedCube)
    if bounded:
        # The model has mass outside, where no exact draw lies. The samples say how much.
        share = float(((samples >= 0) & (samples <= 1)).all(1).double().mean())
        error = inside.value - math.log(share)
        stderr = math.hypot(inside.stderr, math.sqrt((1 - share) / (share * SAMPLES)))
    else:
        error, stderr = inside.value, inside.stderr
    stderr = math.hypot(stderr, prior.log_prob_stderr)
    kl_stderr = math.hypot(float(difference.std()) / math.sqrt(TEST), prior.log_prob_stderr)
    auc = two_sample_auc(samples, target.sample((SAMPLES,), generator).float(), seed=seed)
    weights = modes(target, samples.double())
    return {
        "exact": exact.mean().item(),
        "model": model.mean().item(),
        "kl": difference.mean().item(),
        "kl_stderr": kl_stderr,
        "rmse": float(difference.square().mean().sqrt()),
        "log_z_error": error,
        "log_z_error_stderr": stderr,
        "within_3_se": abs(error) <= 3 * stderr,
        "mass_inside": math.exp(inside.value) if bounded else None,
        "mode_error": None if weights is None else float((weights[0] - weights[1]).abs().max()),
        "mode_error_of_exact": None if weights is None else mode_noise(weights[1]),
        "auc": [auc.auc, auc.stderr],
        "stages": len(prior.stages),
        "gains": [s.gain for s in prior.stages],
        "seconds": seconds,
        "warnings": [str(w.message) for w in caught],
    }


def mode_noise(weights: Tensor) -> float:
    """The largest error of a weight that 95 of 100 sets of exact draws stay below."""
    draws = torch.multinomial(weights, 1000 * SAMPLES, replacement=True, generator=torch.Generator().manual_seed(0))
    flat = draws.view(1000, SAMPLES) + len(weights) * torch.arange(1000)[:, None]
    shares = torch.bincount(flat.flatten(), minlength=1000 * len(weights)).view(1000, -1) / SAMPLES
    return float((shares - weights).abs().amax(1).quantile(0.95))


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, default=3)
    ask.add_argument("--threads", type=int, default=2)
    ask.add_argument("--only", default="")
    ask.add_argument("--afresh", action="store_true", help="forget what the results file holds")
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    results: dict[str, Any] = {} if call.afresh else (read_results("known_truth") or {}).get("targets", {})
    for seed in range(call.seeds):
        for name, (target, base) in cases().items():
            runs = results.setdefault(name, [])
            if call.only not in name or len(runs) > seed:
                continue
            runs.append(measure(target, base, seed))
            print(f"{name}, seed {seed}: {runs[-1]}", flush=True)
            done = {case: results[case] for case in cases() if results.get(case)}
            settings = {"seeds": call.seeds, "rows": ROWS, "test": TEST, "samples": SAMPLES, "max_stages": 8}
            write_results("known_truth", {"targets": done}, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
