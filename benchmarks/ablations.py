"""E3c: what each part of the method is worth: stages, base, width of the ratio networks, Langevin steps, negatives.

    python benchmarks/ablations.py --set mnist --seeds 0 --scale cpu

``stages`` and ``width`` learn ladders on the posteriors of one VAE: after every stage the held-out rise in nats, the
Frechet distance of as many samples as test images, and the seconds so far. The ladder from N(0, I) climbs until its
stopping rule or its seconds end it, the one from a mixture likewise. ``joint`` learns generator and ladder together
from N(0, I) in short runs that differ in one setting. Runs of single seeds and parts join the figures of earlier ones.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

import latentprior as lp
from _results import join_results
from images import MAP_IMAGES, RATE, SCALES, Bench, Scale
from latentprior.evaluation.metrics import features, frechet_distance, mean_squared_error
from latentprior.runtime.seeding import derived_generator
from latentprior.training.two_phase import aggregate_posterior

CPU = torch.device("cpu")
WIDTHS = (16, 64, 256)
JOINT: dict[str, dict[str, Any]] = {
    "encoder's start, 5 steps; particles": {},
    "encoder's start, 20 steps": {"posterior_steps": 20},
    "encoder's start in its scales, 2 steps": {"posterior_steps": 2, "posterior_step_size": 0.5, "precondition": True},
    "start at the prior, 5 steps": {"posterior_start": "prior"},
    "start at the prior, 20 steps (the paper)": {"posterior_start": "prior", "posterior_steps": 20},
    "persistent posterior chains, 5 steps": {"posterior_start": "persistent"},
    "negatives by short-run Langevin (the paper)": {"prior_sampler": "langevin"},
    "negatives by persistent chains": {"prior_sampler": "persistent"},
    "ratio networks 50 wide": {"ratio_width": 50},
    "one stage": {"stages": 1},
    "no stage": {"stages": 0},
}
"""Differences from :func:`joint_config`; fewer stages leave their steps to the generator."""


def joint_config(scale: Scale) -> lp.TrainingConfig:
    """Half the steps of the table's joint runs. All runs are alike except for the named setting."""
    steps = scale.from_normal // 2
    return lp.TrainingConfig(
        stages=3, steps=steps, settle_steps=steps, switch="schedule", posterior_start="encoder", posterior_steps=5,
        prior_sampler="particles", learning_rate=RATE, ratio_learning_rate=RATE, decay=0.95, evaluate_every=steps,
    )  # fmt: skip


class Ablation:
    """One seed: its VAE, and the distances of the ladders that are learned on it."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def frechet(self, model: lp.LatentVariableModel, *keys: str | int) -> float:
        draws = derived_generator(CPU, self.bench.seed, "ablations", *keys)
        x = model.generate(self.bench.scale.test, generator=draws)
        return frechet_distance(self.bench.real, features(self.bench.network, x))

    def ladder(self, name: str, base: str, **options: Any) -> dict[str, Any]:
        """Learn a ladder on the VAE's posteriors, and measure after every stage."""
        model = self.bench.shared()
        latents = aggregate_posterior(model, self.bench.images)
        start_time = time.monotonic()
        prior = lp.fit(latents, base=base, seed=self.bench.seed, **options)
        seconds = time.monotonic() - start_time
        before, points = model.prior, []
        for k in range(len(prior.stages) + 1):
            model.prior = prior.with_ladder(prior.ladder.first(k))
            stage = prior.stages[k - 1] if k else None
            points.append(
                {
                    "stage": k,
                    "rise": 0.0 if stage is None else stage.diagnostics["log_prob_rise"],
                    "gain": None if stage is None else [stage.gain, stage.gain_stderr],
                    "seconds": None if stage is None else stage.diagnostics["seconds"],
                    "frechet": self.frechet(model, name, k),
                }
            )
        model.prior = before
        figures = {"points": points, "seconds": seconds, "stopped": prior.info["stopped"]}
        figures |= {"log_prob_base": prior.info["log_prob_base"], "log_prob_stderr": prior.log_prob_stderr}
        print(name, figures, flush=True)
        return figures

    def stages(self) -> dict[str, Any]:
        budget = 2 * self.bench.scale.fit_seconds
        return {
            "from N(0, I)": self.ladder("normal", "normal", time_budget=budget),
            "from a mixture": self.ladder("gmm", "gmm", time_budget=budget),
        }

    def width(self) -> dict[str, Any]:
        """One stage on the same mixture for each width."""
        return {
            str(width): self.ladder(f"width {width}", "gmm:40", max_stages=1, settings=lp.StageSettings(width=width))
            for width in WIDTHS
        }

    def joint(self) -> dict[str, Any]:
        bench, figures = self.bench, {}
        for name, changes in JOINT.items():
            config = replace(joint_config(bench.scale), **changes)
            config = replace(config, settle_steps=(4 - config.stages) * config.steps)
            start_time = time.monotonic()
            model = lp.train(bench.fresh(), bench.images, config, seed=bench.seed)
            seconds = time.monotonic() - start_time
            x = bench.x[:MAP_IMAGES]
            figures[name] = {
                "frechet": self.frechet(model, name),
                "mse_map": mean_squared_error(x, model.reconstruct(x, method="map")).value,
                "gains": [[s.gain, s.gain_stderr] for s in model.prior.stages],
                "seconds": seconds,
            }
            print(name, figures[name], flush=True)
        return figures


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--set", default="mnist", choices=["mnist", "cifar10"])
    ask.add_argument("--seeds", nargs="+", type=int, default=[0])
    ask.add_argument("--parts", nargs="+", default=["stages", "width", "joint"], choices=["stages", "width", "joint"])
    ask.add_argument("--scale", default="cpu", choices=["cpu", "paper"])
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    record = f"ablations_{call.set}_{call.scale}"
    for seed in call.seeds:
        ablation = Ablation(Bench(call.set, SCALES[call.set, call.scale], seed))
        for part in call.parts:
            figures = getattr(ablation, part)()
            join_results(record, seed, {part: figures}, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
