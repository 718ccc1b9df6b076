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
from latentprior.density.bases import GaussianMixtureBase
from latentprior.density.sampling.resampling import LogMean, log_mean_exp
from latentprior.evaluation import known_densities as targets

ROWS, ROUND, MOST, FITTED = 4000, 1 << 16, 1 << 22, 16_000
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
    start = prior.ladder.start
    strata = [_Exact(prior, target), start]
    weights: list[list[torch.Tensor]] = [[], []]
    while True:
        for kept, stratum in zip(weights, strata, strict=True):
            u = stratum.sample(ROUND, generator)
            ladder = (prior.base.log_prob(u) + prior.ladder.log_potential(u)).double()
            others = torch.stack([other.log_prob(u).double() for other in strata])
            kept.append(ladder - torch.logsumexp(others, 0) + math.log(len(strata)))
        # The strata are of equal size, so the estimate is the mean of their means, and their errors add in squares.
        means = [log_mean_exp(torch.cat(kept)) for kept in weights]
        sums = torch.logsumexp(torch.tensor([m.value for m in means], dtype=torch.float64), 0)
        value = float(sums) - math.log(len(strata))
        stderr = math.hypot(*(math.exp(m.value - value) / len(strata) * m.stderr for m in means))
        draws = len(strata) * ROUND * len(weights[0])
        if stderr <= wanted or draws >= MOST:
            return LogMean(value, stderr, min(m.ess for m in means))
        if len(strata) == 2 and stderr * math.sqrt(draws / MOST) > wanted:
            # The two strata are not enough where the ladder has mass and neither of them has much.
            u = prior.whitening.whiten(prior.sample((FITTED,), generator))
            fitted = GaussianMixtureBase.fit(u, u[:1], n_components=30, generator=generator)
            wider = GaussianMixtureBase(fitted.log_weights.exp(), fitted.means, 1.05 * fitted.cholesky)
            strata.append(wider.to(prior.dtype))
            weights = [[], [], []]


class _Exact:
    """The target in whitened coordinates, in the form of a base."""

    def __init__(self, prior: lp.LatentPrior, target: targets.Target) -> None:
        self.whitening, self.dtype, self.target = prior.whitening, prior.dtype, target

    def sample(self, n: int, generator: torch.Generator) -> torch.Tensor:
        return self.whitening.whiten(self.target.sample((n,), generator).to(self.dtype))

    def log_prob(self, u: torch.Tensor) -> torch.Tensor:
        return self.target.log_prob(self.whitening.unwhiten(u).double()) - self.whitening.log_abs_det


def measure(target: targets.Target, options: dict[str, Any], seed: int) -> dict[str, Any]:
    """One interval and the truth."""
    generator = torch.Generator().manual_seed(50_000 + seed)
    start_time = time.monotonic()
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
        "seconds": time.monotonic() - start_time,
    }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--seeds", type=int, default=40)
    ask.add_argument("--threads", type=int, default=1)
    ask.add_argument("--only", default="")
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    results: dict[str, Any] = (read_results("calibration") or {"targets": {}})["targets"]
    # The outer loop is over seeds, so that a run that is cut short has measured every target.
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
