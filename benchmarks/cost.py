"""E3d: seconds to LEBM's final Frechet distance, for LEBM itself and for the ladders, on the same networks and threads.

    python benchmarks/cost.py --set mnist --seeds 0 1 2 --scale cpu

LEBM learns generator and energy by short-run Langevin dynamics for its steps; the ladders learn on the same generator
architecture. Every curve is the Frechet distance of as many samples as test images against the seconds of training so
far; measuring is not counted. The joint ladder samples by sequential Monte Carlo, LEBM by its short-run dynamics.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from typing import Any

import torch

import latentprior as lp
from _results import join_results
from images import RATE, SCALES, Bench, paper_config
from latentprior import baselines
from latentprior.data.images import Images
from latentprior.evaluation.metrics import features, frechet_distance
from latentprior.fitting.settings import StageSettings
from latentprior.models.model import LatentVariableModel
from latentprior.runtime.seeding import derived_generator
from latentprior.training.config import AutoencoderConfig
from latentprior.training.two_phase import aggregate_posterior, refit_prior, train_autoencoder

HASTE = ((0.03, 6_000, 100), (0.04, 8_000, 100), (0.075, 20_000, 300), (0.2, 60_000, 600))
"""Share of the autoencoder's steps, images whose latents the ladder learns, steps of its one stage."""


class Curve:
    """Frechet distances at seconds of training; the clock stands still while one is measured."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.points = bench, []
        self.spent, self.resumed = 0.0, time.monotonic()

    def measure(self, model: LatentVariableModel, **how: Any) -> None:
        self.spent += time.monotonic() - self.resumed
        draws = derived_generator(torch.device("cpu"), self.bench.seed, "cost", len(self.points))
        x = model.generate(self.bench.scale.test, generator=draws, **how)
        self.points.append([self.spent, frechet_distance(self.bench.real, features(self.bench.network, x))])
        self.resumed = time.monotonic()


def lebm(bench: Bench, points: int) -> Curve:
    """LEBM's curve, each point by a run of its own prefix: its prior only exists at the end of a run."""
    steps = bench.scale.short_run
    curve = Curve(bench)
    for part in range(1, points + 1):
        model = bench.fresh()
        config = baselines.LEBMConfig(
            steps=steps * part // points, learning_rate=RATE, energy_learning_rate=2e-4, decay=0.95
        )
        start = time.monotonic()
        baselines.train_lebm(model, bench.images, config, seed=bench.seed)
        # A run of a part of the steps takes a part of the time, so earlier runs are not counted again.
        curve.spent, curve.resumed = time.monotonic() - start, time.monotonic()
        curve.measure(model, **model.sampler)
    return curve


def two_phase(bench: Bench) -> Curve:
    """Whole runs of two-phase learning, each with more steps of both phases."""
    curve = Curve(bench)
    for share, rows, steps in HASTE:
        start = time.monotonic()
        config = AutoencoderConfig(steps=round(share * bench.scale.autoencoder))
        model = train_autoencoder(bench.fresh(), bench.images, config, seed=bench.seed)
        latents = aggregate_posterior(model, Images(bench.pixels[:rows]))
        settings = StageSettings(width=128, steps=steps)
        refit_prior(model, latents, seed=bench.seed, base="gmm:20", max_stages=1, settings=settings)
        curve.spent, curve.resumed = time.monotonic() - start, time.monotonic()
        curve.measure(model)
    return curve


def joint(bench: Bench) -> Curve:
    """One run of joint learning from N(0, I), measured whenever a stage has joined the ladder and at its end."""
    curve = Curve(bench)

    def measure(event: lp.Event) -> None:
        if event.kind in ("learned", "end") and event.model is not None:
            curve.measure(copy.deepcopy(event.model))

    curve.resumed = time.monotonic()
    lp.train(bench.fresh(), bench.images, paper_config(bench.scale), seed=bench.seed, callbacks=[measure])
    return curve


def seconds_to(points: list[list[float]], level: float) -> float | None:
    """When a curve first comes down to a level."""
    return next((seconds for seconds, distance in points if distance <= level), None)


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--set", default="mnist", choices=["mnist", "cifar10"])
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--scale", default="cpu", choices=["cpu", "paper"])
    ask.add_argument("--points", type=int, default=2, help="points of LEBM's curve")
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    record = f"cost_{call.set}_{call.scale}"
    for seed in call.seeds:
        bench = Bench(call.set, SCALES[call.set, call.scale], seed)
        curves = {
            "LEBM": lebm(bench, call.points).points,
            "ladder, two-phase": two_phase(bench).points,
            "ladder, joint from N(0, I)": joint(bench).points,
        }
        level = curves["LEBM"][-1][1]
        figures = {
            "curves": curves,
            "level": level,
            "seconds": {name: seconds_to(points, level) for name, points in curves.items()},
        }
        print(seed, figures["seconds"], curves, flush=True)
        join_results(record, seed, figures, threads=call.threads, settings=vars(call))


if __name__ == "__main__":
    main()
