"""E1: how often the interval of two standard errors around log Z holds the truth.

    python benchmarks/calibration.py --seeds 40

For each target and seed a small ladder is learned from fresh exact draws. The normaliser that ``fit`` states is then
compared with the true one of that very ladder, by importance sampling from half exact draws of the target and half
draws of what the ladder starts from, none of them seen before, until its standard error is a quarter of the stated one
or four million draws are spent. The interval is judged alone, without the error of the truth, which makes it look a
little worse than it is. A fit that keeps no stage has log Z = 0 by construction and is counted apart. Seeds that the
results file holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from typing import Any

import torch

import latentprior as lp
from _results import read_results, write_results
from latentprior import targets
from latentprior.sampling.resampling import LogMean, log_mean_exp

ROWS, ROUND, MOST = 4000, 1 << 16, 1 << 22
SETTINGS = lp.StageSettings(steps=200, width=32, depth=1, batch_size=256, average=0.98, bound=3.0)


def cases() -> dict[str, tuple[targets.Target, dict[str, Any]]]:
    """Targets and options of the fit: poor bases on purpose, so that stages have something to learn."""
    mixture = targets.two_component_mixture
    raw = {"whitening": "none"}
    return {
        "correlated Gaussian, d = 2": (targets.CorrelatedGaussian(2, 0.9), raw),
        "correlated Gaussian, d = 8": (targets.CorrelatedGaussian(8, 0.8), raw),
        "correlated Gaussian, d = 32": (targets.CorrelatedGaussian(32, 0.5), raw),
        "mixture, near": (mixture(distance=3.0), {}),
        "mixture, far": (mixture(distance=12.0), {}),
        "mixture, 1:20": (mixture(distance=6.0, ratio=20.0), {}),
        "funnel": (targets.Funnel(), {}),
        "banana": (targets.Banana(), {}),
        "rings": (targets.Rings(), {}),
        "heavy tails, d = 4": (targets.StudentT(4), {}),
        "bounded support": (targets.BoundedCube(), {}),
        "skewed, d = 4": (targets.SkewedProduct(4), {}),
        "spikes": (targets.Spikes(), {}),
        "C: ten modes, d = 16": (targets.ten_component_mixture(), {}),
    }


@torch.no_grad()
def true_log_normalizer(
    prior: lp.LatentPrior, target: targets.Target, generator: torch.Generator, wanted: float
) -> LogMean:
    r""":math:`\log\int e^{\log p_0 + \sum f_k}` in whitened coordinates, to a standard error or for ``MOST`` draws."""
    whitening, start = prior.whitening, prior.ladder.start
    weights: list[list[torch.Tensor]] = [[], []]
    while True:
        exact = whitening.whiten(target.sample((ROUND,), generator).to(prior.dtype))
        for kept, u in zip(weights, (exact, start.sample(ROUND, generator)), strict=True):
            ladder = (prior.base.log_prob(u) + prior.ladder.log_potential(u)).double()
            truth = target.log_prob(whitening.unwhiten(u).double()) - whitening.log_abs_det
            kept.append(ladder - torch.logaddexp(truth, start.log_prob(u).double()) + math.log(2))
        # Strata of equal size: the mean of their means, and half of what their errors make together.
        halves = [log_mean_exp(torch.cat(kept)) for kept in weights]
        value = float(torch.logsumexp(torch.tensor([h.value for h in halves], dtype=torch.float64), 0)) - math.log(2)
        stderr = math.hypot(*(math.exp(h.value - value) / 2 * h.stderr for h in halves))
        if stderr <= wanted or 2 * ROUND * len(weights[0]) >= MOST:
            return LogMean(value, stderr, min(h.ess for h in halves))


def measure(target: targets.Target, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """One interval and the truth."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    begun = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = target.sample((ROWS,), generator).float()
        prior = lp.fit(z, base="normal", seed=seed, max_stages=2, settings=SETTINGS, **options)
    stated = prior.normalizer
    truth = true_log_normalizer(prior, target, generator, stated.stderr / 4) if prior.stages else LogMean(0.0, 0.0, 1.0)
    return {
        "value": stated.value,
        "stderr": stated.stderr,
        "source": stated.source,
        "truth": truth.value,
        "truth_stderr": truth.stderr,
        "stages": len(prior.stages),
        "covered": abs(stated.value - truth.value) <= 2 * stated.stderr,
        "bracket_warning": any(issubclass(w.category, lp.NormalizerBracketWarning) for w in caught),
        "seconds": time.monotonic() - begun,
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, default=40)
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--only", default="")
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    results: dict[str, Any] = (read_results("calibration") or {"targets": {}})["targets"]
    # Seed by seed, so that a run that is cut short has measured every target.
    for seed in range(call.seeds):
        for name, (target, options) in cases().items():
            runs = results.setdefault(name, {})
            if call.only not in name or str(seed) in runs:
                continue
            runs[str(seed)] = measure(target, options, seed)
            print(f"{name}, seed {seed}: {runs[str(seed)]}", flush=True)
            settings = {"rows": ROWS, "most_draws_of_truth": MOST, "seeds": call.seeds}
            write_results("calibration", {"targets": results}, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
