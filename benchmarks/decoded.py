"""E2: what stages add that see latents as their decoder shows them.

    python benchmarks/decoded.py --sets cifar128 --seeds 0 1 2 --seconds 600

The ladder of benchmarks/latents.py (same rows, seeds and seconds), then a stage on the decoder's pictures with
a budget of ``--seconds``, the normaliser included. Held-out log density in the same coordinates, log Z
from both ends, and the integral by annealing from a mixture that is fitted to the refined prior's samples. Fréchet
distances and AUC are those of latents.py; 5,000 samples. Rows of rivals stand in ``latents_SET.json``.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import latentprior as lp
from _data import SETS
from _features import NETWORKS, decoded_features
from _latent_pictures import add_picture
from _results import join_results
from latentprior.density.bases import GaussianMixtureBase, LowRankMixtureBase
from latentprior.density.bases.by_name import LOW_RANK_COORDINATES
from latentprior.density.normalizer_check import check_from
from latentprior.density.prior import LatentPrior
from latentprior.density.samplers import draw
from latentprior.evaluation.metrics import frechet_distance, two_sample_auc
from latentprior.runtime.progress import Progress
from latentprior.runtime.seeding import derived_generator
from latents import CPU, Bench, load_set

SAMPLES, FITTED, CARRIED = 5000, 10_000, 1024


def scored(bench: Bench, prior: LatentPrior, name: str) -> tuple[dict[str, Any], Tensor]:
    """Density of test rows, and how samples compare with them."""
    generator, start = derived_generator(CPU, bench.seed, "decoded", name), time.monotonic()
    z = prior.sample((SAMPLES,), generator=generator).flatten(1)
    sampling = time.monotonic() - start
    with torch.no_grad():
        values = prior.log_prob_whitened(bench.test).double()
    u = bench.whitening.whiten(z)
    figures = {
        "log_prob": float(values.mean()),
        "log_prob_stderr": float(values.std() / len(values) ** 0.5),
        "log_prob_stderr_normalizer": prior.log_prob_stderr,
        "bracket": prior.bracket and [list(prior.bracket.forward), list(prior.bracket.reverse)],
        "auc": two_sample_auc(u, bench.test, seed=bench.seed).auc,
        "frechet": frechet_distance(bench.real, decoded_features(bench.latents.name, z)),
        "seconds_per_10k_samples": sampling * 10_000 / SAMPLES,
    }
    if bench.seed == 0:
        add_picture(bench.latents, f"decoded_{bench.latents.name}", name, z, ["ladder", "refined"])
    return figures, u


def checked(prior: LatentPrior, u: Tensor, generator: torch.Generator) -> list[Any]:
    """Integrate from a mixture fitted to samples ``u``, both ways, a few rows at a time: pictures are expensive."""
    d = u.shape[1]
    size = max(1, min(16, len(u) // (2 * d)))
    kind = GaussianMixtureBase if d < LOW_RANK_COORDINATES else LowRankMixtureBase
    fitted = kind.fit(u, u[:1], n_components=size, generator=generator).to(u.dtype).widened((1.05,))
    integral = check_from(
        prior.ladder, fitted, fitted.sample(FITTED, generator), "gmm", generator,
        log_normalizer=prior.normalizer.value, own=lambda n: draw(prior.ladder, n, generator, "smc", {}),
        particles=CARRIED,
    )  # fmt: skip
    return list(integral)


def measured(name: str, seed: int, ladder_seconds: float, seconds: float) -> dict[str, Any]:
    """A set and seed."""
    bench = Bench(load_set(name), seed, 2 * ladder_seconds, "decoded")
    start = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ladder = lp.fit(
            bench.train, validation=bench.validation, seed=seed, time_budget=ladder_seconds, callbacks=[Progress()]
        )
        fitted = time.monotonic() - start
        refined = lp.refine(
            ladder, bench.train, NETWORKS[name](), validation=bench.validation, seed=seed, time_budget=seconds,
            callbacks=[Progress()],
        )  # fmt: skip
    both = time.monotonic() - start
    assert torch.equal(ladder.whitening.matrix, bench.whitening.matrix)
    figures: dict[str, Any] = {"floors": bench.floors}
    base = bench.whitening.unwhiten(ladder.base.sample(SAMPLES, derived_generator(CPU, seed, "decoded", "base")))
    figures["base"] = {
        "log_prob": float(ladder.base.log_prob(bench.test).mean()),
        "frechet": frechet_distance(bench.real, decoded_features(name, base)),
    }
    figures["ladder"] = {**scored(bench, ladder, "ladder")[0], "seconds": fitted}
    if refined is not ladder:
        refined_figures, u = scored(bench, refined, "refined")
        kept = ("steps", "ess", "saturated", "log_prob_rise", "log_prob_rise_stderr", "seconds", "history")
        added = [
            {"kind": stage.network.spec["kind"], "gain": stage.gain, **{k: stage.diagnostics[k] for k in kept}}
            for stage in refined.stages[len(ladder.stages) :]
        ]
        print(f"{name} seed {seed}: {figures}, refined {refined_figures}, {added}", flush=True)
        integral = checked(refined, u, derived_generator(CPU, seed, "decoded", "check"))
        figures["refined"] = {**refined_figures, "seconds": both, "integral": integral, "stages": added}
    figures["warnings"] = [str(w.message) for w in caught]
    return figures


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", default=["cifar128"], choices=[s for s in SETS if s in NETWORKS])
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--ladder-seconds", type=float, default=90, help="of the ladder on the coordinates")
    ask.add_argument("--seconds", type=float, default=600, help="of the stage on pictures")
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    settings = {"ladder_seconds": call.ladder_seconds, "seconds": call.seconds, "samples": SAMPLES}
    for name in call.sets:
        for seed in call.seeds:
            figures = measured(name, seed, call.ladder_seconds, call.seconds)
            print(f"{name} seed {seed}: {figures}", flush=True)
            join_results(f"decoded_{name}", seed, figures, threads=call.threads, settings=settings)


if __name__ == "__main__":
    main()
