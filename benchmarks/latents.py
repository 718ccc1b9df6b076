"""E2: held-out log density, sample quality and time on latents of real generators, all methods in one run.

    python benchmarks/latents.py --sets mnist16 cifar64 --seeds 0 1 2 --seconds 180

Every method sees the same rows, threads and machine in turn. Log densities are in the coordinates that
the ladder's whitening standardises (the same for all), test rows, nats. Rivals that learn by gradients have
``--seconds`` each with early stopping on validation rows; the ladder has half of that as its budget. The ladder's
density is integrated by importance sampling from two other densities. Runs of single seeds and ``--methods`` join the
figures of earlier ones.
"""

from __future__ import annotations

import argparse
import time
import warnings
from typing import Any

import torch
from torch import Tensor

import latentprior as lp
from _data import SETS, LatentSet, load_set
from _features import DECODERS, decoded_features, floor_features
from _latent_pictures import add_picture
from _latent_rivals import RIVALS, Rows
from _results import join_results
from latentprior.density.normalizer_check import check
from latentprior.density.prior import LatentPrior
from latentprior.density.whitening import Whitening
from latentprior.evaluation.metrics import frechet_distance, two_sample_auc
from latentprior.runtime.progress import Progress
from latentprior.runtime.seeding import derived_generator

SAMPLES = 10_000
LADDER = "ladder"
CPU = torch.device("cpu")


def pace() -> float:
    """Matrix products of a hidden layer just now, in GFLOP/s: the machine is not equally fast at all times."""
    rows, weight, rates = torch.ones(2048, 256), torch.ones(256, 256), []
    for _ in range(60):
        start = time.perf_counter()
        rows @ weight
        rates.append(2e-9 * 2048 * 256 * 256 / (time.perf_counter() - start))
    return sorted(rates)[len(rates) // 2]


class Bench:
    """One set and seed: its rows in standardised coordinates, and how a method is scored."""

    def __init__(self, latents: LatentSet, seed: int, seconds: float, record: str) -> None:
        self.latents, self.seed, self.seconds, self.record = latents, seed, seconds, record
        generator = derived_generator(CPU, seed, "training rows")
        self.train = lp.Latents(latents.train, latents.train_scale)
        self.validation = lp.Latents(latents.validation, latents.validation_scale)
        # The ladder's fit standardises in the same way, from the same stream.
        self.whitening = Whitening.fit(self.train.blocks(derived_generator(CPU, seed, "whitening"))).float()
        flat = torch.as_tensor(latents.test, dtype=torch.float32).flatten(1)
        self.test = self.whitening.whiten(flat)
        rows = torch.arange(len(self.validation))
        self.held_out = self.whitening.whiten(self.validation.draw(rows, derived_generator(CPU, seed, "validation")))
        drawn = self.train.draw(torch.arange(len(self.train))[:: len(self.train) // SAMPLES][:SAMPLES], generator)
        drawn = drawn.float().flatten(1)
        real = None
        # A prior has to learn the training rows' own posteriors.
        self.floors = {"auc": two_sample_auc(self.whitening.whiten(drawn)[: len(self.test)], self.test, seed=seed).auc}
        if latents.name in DECODERS:
            real, floors = floor_features(latents.name, latents.test)
            floors["training rows"] = decoded_features(latents.name, drawn)
            self.floors |= {name: frechet_distance(real, f) for name, f in floors.items()}
        self.real = real

    def measure(self, name: str) -> dict[str, Any]:
        """Fit a method and score it."""
        torch.manual_seed(self.seed)
        before = pace()
        figures = self._ladder() if name == LADDER else self._rival(name)
        return {**figures, "gflops": (before + pace()) / 2}

    def _rival(self, name: str) -> dict[str, Any]:
        rival, start = RIVALS[name](), time.monotonic()
        notes = rival.fit(Rows(self.train, self.whitening, self.seed), self.held_out, self.seconds)
        fitting, start = time.monotonic() - start, time.monotonic()
        drawn = rival.sample(SAMPLES)
        return self._score(name, rival.log_prob, drawn, fitting, time.monotonic() - start, **notes)

    def _score(
        self, name: str, log_prob: Any, samples: Tensor, fitting: float, sampling: float, **more: Any
    ) -> dict[str, Any]:
        values = log_prob(self.test).double()
        samples = samples.float()
        finite = samples[samples.isfinite().all(1)]
        figures = {
            "log_prob": values.mean().item(),
            "log_prob_stderr": (values.std() / len(values) ** 0.5).item(),
            "auc": two_sample_auc(finite[: len(self.test)], self.test, seed=self.seed).auc,
            "seconds": fitting,
            "budget": self.seconds,
            "seconds_per_10k_samples": sampling * 10_000 / len(samples),
            **more,
        }
        if len(finite) < len(samples):
            figures["not_finite"] = len(samples) - len(finite)
        if self.real is not None:
            z = self.whitening.unwhiten(finite)
            figures["frechet"] = frechet_distance(self.real, decoded_features(self.latents.name, z))
            if self.seed == 0:
                add_picture(self.latents, self.record, name, z, [*RIVALS, LADDER])
        told = ", ".join(f"{k} {v}" for k, v in figures.items())
        print(f"{self.latents.name} seed {self.seed} {name}: {told}", flush=True)
        return figures

    def _ladder(self) -> dict[str, Any]:
        start = time.monotonic()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ladder = lp.fit(
                self.train,
                validation=self.validation,
                seed=self.seed,
                time_budget=self.seconds / 2,
                callbacks=[Progress()],
            )
        fitting = time.monotonic() - start
        assert torch.equal(ladder.whitening.matrix, self.whitening.matrix)
        generator = derived_generator(CPU, self.seed, "ladder")
        start = time.monotonic()
        drawn = self.whitening.whiten(ladder.sample((SAMPLES,), generator=generator).flatten(1))
        sampling = time.monotonic() - start
        more = self._normalizer(ladder, generator)
        more["warnings"] = [str(w.message) for w in caught]
        return self._score(LADDER, ladder.log_prob_whitened, drawn, fitting, sampling, **more)

    def _normalizer(self, ladder: LatentPrior, generator: torch.Generator) -> dict[str, Any]:
        """The ladder's integral from two other densities, and what its stages gained."""
        integral = ladder.check_normalizer(generator=generator)
        base_draws = ladder.base.sample(200_000, generator)
        from_base = check(ladder.log_prob_whitened, ladder.base.log_prob, base_draws, "base")
        return {
            "log_prob_base": ladder.base.log_prob(self.test).mean().item(),
            "log_prob_stderr_normalizer": ladder.log_prob_stderr,
            "integral": list(integral),
            "annealed_from_both_ends": integral.method == "annealing",
            "integral_from_base": list(from_base),
            "bracket": ladder.bracket and [list(ladder.bracket.forward), list(ladder.bracket.reverse)],
            "stopped": ladder.info["stopped"],
            "stages": [
                {"gain": s.gain, "gain_stderr": s.gain_stderr, "log_normalizer": s.log_normalizer,
                 "log_normalizer_stderr": s.log_normalizer_stderr, "seconds": s.diagnostics["seconds"],
                 "steps": s.diagnostics["steps"], "ess": s.diagnostics["ess"], "saturated": s.diagnostics["saturated"],
                 "particles": s.diagnostics["particles"]}
                for s in ladder.stages
            ],
        }  # fmt: skip


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", default=["mnist16", "vae20", "cifar64"], choices=list(SETS))
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--seconds", type=float, default=180, help="of each rival; the ladder has half")
    ask.add_argument("--methods", nargs="+", choices=[*RIVALS, LADDER], default=[*RIVALS, LADDER])
    ask.add_argument("--record", default="latents", help="results go to results/RECORD_SET.json")
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")  # scikit-learn's, of EM stopped early
    for name in call.sets:
        latents = load_set(name)
        for seed in call.seeds:
            record = f"{call.record}_{name}"
            bench = Bench(latents, seed, call.seconds, record)
            for method in call.methods:
                figures = {method: bench.measure(method), "floors": bench.floors}
                join_results(record, seed, figures, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
