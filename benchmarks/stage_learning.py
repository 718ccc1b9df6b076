"""E2: what a stage learns in as many steps, by the odds of its loss, its optimiser and its weight decay.

    python benchmarks/stage_learning.py --sets mnist16 vae20 cifar64 --seeds 0 --steps 1000

One stage on one mixture of 32 components (of low-rank covariances from 192 coordinates on, as ``fit`` has them), the
same base, batches and draws for all. Steps and not seconds are the same, so that the machine's pace does not matter;
the processor's seconds are told. Log Z is the mean over draws of the base that trained nothing. Runs of single sets and
seeds join the figures of earlier ones.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

import latentprior as lp
from _data import SETS, load_set
from _results import read_results, write_results
from latentprior.density.bases.by_name import LOW_RANK_COORDINATES
from latentprior.density.sampling.resampling import log_mean_exp
from latentprior.fitting.rows import Target
from latentprior.fitting.settings import StageSettings
from latentprior.fitting.stage import StageLearner
from latentprior.runtime.seeding import derived_generator

CPU = torch.device("cpu")
NAME = "stage_learning"
DRAWS = 400_000
VARIANTS = {
    "odds 1, AdamW": {"odds": 1.0, "optimizer": "adamw", "weight_decay": 0.1},
    "odds 16, AdamW": {"odds": 16.0, "optimizer": "adamw", "weight_decay": 0.1},
    "odds 1, Muon": {"odds": 1.0, "optimizer": "muon", "weight_decay": 0.1},
    "odds 16, Muon": {"odds": 16.0, "optimizer": "muon", "weight_decay": 0.1},
    "odds 16, Muon, decay 0.3": {"odds": 16.0, "optimizer": "muon", "weight_decay": 0.3},
    "odds 16, Muon, decay 0.5": {"odds": 16.0, "optimizer": "muon", "weight_decay": 0.5},
    "odds 16, Muon, decay adapted": {"odds": 16.0, "optimizer": "muon", "weight_decay": None},
}


class Bench:
    """One set and seed: rows, and a ladder of no stages."""

    def __init__(self, name: str, seed: int) -> None:
        rows = load_set(name)
        self.seed, self.latents = seed, lp.Latents(rows.train, rows.train_scale)
        held_out = lp.Latents(rows.validation, rows.validation_scale)
        base = "gmm:32" if rows.train[0].size < LOW_RANK_COORDINATES else "gmm-lowrank:32"
        self.prior = lp.fit(self.latents, base=base, max_stages=0, seed=seed, validation=held_out)
        index = torch.arange(len(held_out))
        drawn = held_out.draw(index, derived_generator(CPU, seed, "validation"))
        self.held_out = self.prior.whitening.whiten(drawn)
        self.test = self.prior.whitening.whiten(torch.as_tensor(rows.test, dtype=torch.float32).flatten(1))

    def learned(self, settings: StageSettings) -> dict[str, Any]:
        """A stage at these settings."""
        prior = self.prior
        target = Target(self.latents, torch.arange(len(self.latents)), self.held_out, prior.whitening)
        learner = StageLearner(target, prior.ladder, settings, tuple(prior.event_shape), self.seed)
        particles, start = learner.particles(), time.process_time()
        stage = learner.learn(particles)
        seconds = time.process_time() - start

        @torch.no_grad()
        def ratio(rows: Tensor) -> Tensor:
            return torch.cat([stage.ratio(block) for block in rows.split(8192)]).double()

        f = ratio(self.test)
        c = log_mean_exp(ratio(prior.base.sample(DRAWS, derived_generator(CPU, self.seed, "log Z"))))
        train = ratio(target.draw(10_000, derived_generator(CPU, self.seed, "train rows")))
        base = float(prior.base.log_prob(self.test).mean())
        return {
            "log_prob_base": base,
            "log_prob": base + float(f.mean()) - c.value,
            "log_prob_stderr": float(f.std()) / len(f) ** 0.5,
            "log_normalizer_stderr": c.stderr,
            "rise": float(f.mean()) - c.value,
            "rise_train": float(train.mean()) - c.value,
            "gain": stage.gain.value,
            "ess": c.ess,
            "saturated": stage.saturated,
            "steps": stage.steps,
            "processor_seconds": seconds,
        }


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", default=["mnist16", "vae20", "cifar64"], choices=list(SETS))
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--steps", type=int, default=1000)
    ask.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    for name in call.sets:
        for seed in call.seeds:
            bench = Bench(name, seed)
            for variant in call.variants:
                settings = dataclasses.replace(StageSettings(steps=call.steps), **VARIANTS[variant])
                found = bench.learned(settings)
                print(f"{name} seed {seed}, {variant}: {found}", flush=True)
                sets = (read_results(NAME) or {}).get("sets", {})
                sets.setdefault(name, {}).setdefault(variant, {})[str(seed)] = found
                write_results(NAME, {"sets": sets}, threads=call.threads, settings={"steps": call.steps})


if __name__ == "__main__":
    main()
