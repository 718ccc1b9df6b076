"""E3a: generation and reconstruction, every method on the same generator, images and threads.

    python benchmarks/images.py --sets mnist --seeds 0 1 2 --scale cpu

Frechet distances are between test images and as many decoded samples, on LeNet-5 features (mnist) or
EfficientNet-Lite0 at 64 px (cifar10); beside them stand the floors, other real images and reconstructions. Errors of
reconstruction are per pixel on test images in [-1, 1]: by each method's own inference (the encoder's mean; short-run
Langevin where there is no encoder; for ladders the most probable latent), and for all alike at the most probable
latent under the method's own prior (2,000 images).

The autoencoder of the VAE and of all that stand on it is trained once a seed; its seconds count for each. At scale
``cpu`` the generator is a perceptron (mnist) or the narrow SVHN network (cifar10); at scale ``paper``
those of the papers. Runs of single seeds join the figures of earlier ones.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from _data import image_cache
from _features import network_named, real_features
from _results import FOLDER, join_results
from latentprior import baselines
from latentprior.data.images import Images
from latentprior.evaluation.metrics import features, frechet_distance, kernel_distance, mean_squared_error
from latentprior.models.model import LatentVariableModel
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.runtime.seeding import derived_generator
from latentprior.training.alternating import UNDER_A_PRIOR, train_under_prior
from latentprior.training.config import AutoencoderConfig, TrainingConfig
from latentprior.training.joint import train
from latentprior.training.two_phase import aggregate_posterior, refit_prior, train_autoencoder

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Scale:
    """Networks, images and steps of one set at one scale."""

    spec: tuple[str, int, int]
    train: int
    test: int
    autoencoder: int
    """Steps of every autoencoder."""
    short_run: int
    """Steps of the methods that infer by short-run dynamics of 20 steps."""
    from_normal: int
    """Steps of a stage of the joint ladder from N(0, I), whose chains start at the encoder."""
    joint: int
    """Steps of the stage that joint learning adds to the two-phase ladder, and of the generator alone after it."""
    fit_seconds: float


SCALES = {
    ("mnist", "cpu"): Scale(("mlp", 16, 512), 60_000, 10_000, 10_000, 1800, 800, 1500, 180),
    ("mnist", "paper"): Scale(("mnist", 16, 64), 60_000, 10_000, 30_000, 100_000, 6000, 6000, 300),
    ("cifar10", "cpu"): Scale(("svhn", 64, 16), 50_000, 5_000, 6000, 600, 400, 1000, 180),
    ("cifar10", "paper"): Scale(("cifar10", 128, 128), 50_000, 10_000, 60_000, 100_000, 12_000, 12_000, 600),
}
FEATURES = {"mnist": "lenet", "cifar10": "efficientnet_lite0"}
RATE = 1e-3
HURRIED = 10_000
"""Steps below which short-run methods learn at RATE."""
MAP_IMAGES = 2_000
FROM_NORMAL = "ladder, joint from N(0, I)"
ON_LONGER = "ladder on a VAE of 3 x the steps"
LADDERS = ("ladder, two-phase", "ladder, joint", ON_LONGER)


def paper_config(scale: Scale) -> TrainingConfig:
    """Learn from untrained networks and N(0, I) as in the paper, except for the encoder's start and for particles."""
    return TrainingConfig(
        stages=3, steps=scale.from_normal, settle_steps=scale.from_normal, posterior_start="encoder", posterior_steps=5,
        prior_sampler="particles", learning_rate=RATE, ratio_learning_rate=RATE, decay=0.95, evaluate_every=100,
    )  # fmt: skip


def joint_config(scale: Scale) -> TrainingConfig:
    epochs = 2 * scale.joint * UNDER_A_PRIOR.batch_size / scale.train
    return replace(
        UNDER_A_PRIOR, steps=scale.joint, settle_steps=scale.joint, evaluate_every=200, decay=0.05 ** (1 / epochs)
    )


class Bench:
    """One seed: fresh networks, the shared autoencoder, and the figures so far."""

    def __init__(self, dataset: str, scale: Scale, seed: int) -> None:
        archive = np.load(image_cache() / f"{dataset}.npz")
        self.pixels = archive["x_train"][: scale.train]
        self.images = Images(self.pixels)
        self.test = Images(archive["x_test"][: scale.test])
        self.scale, self.seed, self.dataset = scale, seed, dataset
        self.name = FEATURES[dataset]
        self.network = network_named(self.name)
        self.real = real_features(dataset, "test", self.name, scale.test)
        self.other = real_features(dataset, "train", self.name, scale.test)
        self.x = torch.cat(list(self.test.batches(1000)))
        self.vae: LatentVariableModel | None = None
        self.ladder: tuple[LatentVariableModel, float] | None = None
        self.vae_seconds = 0.0
        self.pictures: dict[str, Tensor] = {}

    def fresh(self) -> LatentVariableModel:
        family, dim, width = self.scale.spec
        spec = network_spec(family, dim, width, self.images.shape)
        weights = derived_generator(CPU, self.seed, "networks")
        return LatentVariableModel(build_decoder(spec, weights), None, 0.3, build_encoder(spec, weights))

    def shared(self) -> LatentVariableModel:
        """The VAE that several methods stand on."""
        if self.vae is None:
            self.vae, self.vae_seconds = self.autoencoder(self.scale.autoencoder)
        return self.vae

    def autoencoder(self, steps: int) -> tuple[LatentVariableModel, float]:
        """A VAE of so many steps and the seconds it took; kept in the image cache for later calls."""
        key = "_".join(map(str, (*self.scale.spec, self.scale.train, steps, self.seed)))
        kept = image_cache() / f"vae_{self.dataset}_{key}"
        if not (kept / "seconds.json").exists():
            start_time = time.monotonic()
            model = train_autoencoder(self.fresh(), self.images, AutoencoderConfig(steps=steps), seed=self.seed)
            seconds = time.monotonic() - start_time
            model.save_pretrained(kept)
            (kept / "seconds.json").write_text(json.dumps(seconds))
        return LatentVariableModel.from_pretrained(kept), json.loads((kept / "seconds.json").read_text())

    def rival(self, name: str, config: Any, *, on_vae: bool = False) -> tuple[LatentVariableModel, float]:
        options = {"autoencoder": self.shared()} if on_vae else {}
        start_time = time.monotonic()
        model = baselines.RIVALS[name](self.fresh(), self.images, config, seed=self.seed, **options)
        return model, time.monotonic() - start_time + (self.vae_seconds if on_vae else 0.0)

    def gmm_on_longer_vae(self) -> tuple[LatentVariableModel, float]:
        """The best simple rival with more steps of its generator than the joint ladder's has in all."""
        vae, seconds = self.autoencoder(3 * self.scale.autoencoder)
        start_time = time.monotonic()
        model = baselines.RIVALS["latent_gmm"](self.fresh(), self.images, None, seed=self.seed, autoencoder=vae)
        return model, seconds + time.monotonic() - start_time

    def ladder_on_longer_vae(self) -> tuple[LatentVariableModel, float]:
        """The ladder on the control's autoencoder: the same generator under another prior."""
        model, seconds = self.autoencoder(3 * self.scale.autoencoder)
        start_time = time.monotonic()
        latents = aggregate_posterior(model, self.images)
        refit_prior(model, latents, seed=self.seed, time_budget=self.scale.fit_seconds)
        return model, seconds + time.monotonic() - start_time

    def two_phase(self) -> tuple[LatentVariableModel, float]:
        """The ladder on the VAE's aggregate posterior; joint learning may begin from it."""
        if self.ladder is None:
            model = copy.deepcopy(self.shared())
            start_time = time.monotonic()
            latents = aggregate_posterior(model, self.images)
            refit_prior(model, latents, seed=self.seed, time_budget=self.scale.fit_seconds)
            self.ladder = model, time.monotonic() - start_time + self.vae_seconds
        return self.ladder

    def joint(self) -> tuple[LatentVariableModel, float]:
        """Generator and ladder together from the two-phase model, then a ladder on draws of the last posterior."""
        model, seconds = self.two_phase()
        model, start_time = copy.deepcopy(model), time.monotonic()
        config, budget = joint_config(self.scale), self.scale.fit_seconds
        train_under_prior(model, self.images, config, seed=self.seed, time_budget=budget)
        return model, seconds + time.monotonic() - start_time

    def joint_from_normal(self) -> tuple[LatentVariableModel, float]:
        start_time = time.monotonic()
        model = train(self.fresh(), self.images, paper_config(self.scale), seed=self.seed)
        return model, time.monotonic() - start_time

    def measure(self, name: str, made: tuple[LatentVariableModel, float]) -> dict[str, Any]:
        model, seconds = made
        draws = derived_generator(CPU, self.seed, "measure", name)
        sampler = model.sampler
        start_time = time.monotonic()
        x = model.generate(self.scale.test, generator=draws, **sampler)
        sampling = time.monotonic() - start_time
        self.pictures[name] = x[:64]
        made_features = features(self.network, x)
        some = self.x[:MAP_IMAGES]
        # The density of the 2-stage prior is an average over 64 draws. It is too slow to climb, and its paper does not.
        best = None if name == "2-stage VAE" else model.reconstruct(some, method="map", generator=draws)
        if name in LADDERS:
            own = model.reconstruct(self.x, method="map", generator=draws)
        elif model.encoder is not None and name != FROM_NORMAL:
            own = model.decode(model.encode(self.x)[0])
        else:
            steps = 5 if model.encoder is not None else 20
            own = model.reconstruct(self.x, method="langevin", steps=steps, step_size=0.1, generator=draws)
        kernel = kernel_distance(self.real, made_features, subsets=20)
        figures = {
            "frechet": frechet_distance(self.real, made_features),
            "frechet_reconstructions": frechet_distance(self.real, features(self.network, own)),
            "kernel": kernel.value,
            "kernel_stderr": kernel.stderr,
            "mse": mean_squared_error(self.x, own).value,
            "mse_map": None if best is None else mean_squared_error(some, best).value,
            "sigma": model.sigma,
            "seconds": seconds,
            "sampling_seconds": sampling,
            "stages": len(model.prior.stages),
            "log_prob_stderr": model.prior.log_prob_stderr,
        }
        print(f"{self.dataset} seed {self.seed} {name}: {figures}", flush=True)
        return figures

    def floors(self) -> dict[str, float]:
        return {"real": frechet_distance(self.real, self.other)}

    def methods(self) -> dict[str, Callable[[], tuple[LatentVariableModel, float]]]:
        s = self.scale
        # The rates are those of the papers, except where a few hundred steps need higher ones.
        rates: dict[str, Any] = {"learning_rate": RATE, "decay": 0.95} if s.short_run < HURRIED else {}
        energy: dict[str, Any] = {"energy_learning_rate": 2e-4} if rates else {}
        return {
            "VAE": lambda: self.rival("vae", None, on_vae=True),
            "2-stage VAE": lambda: self.rival(
                "two_stage_vae", baselines.TwoStageVAEConfig(second_steps=s.autoencoder), on_vae=True
            ),
            "NCP-VAE": lambda: self.rival("ncp_vae", None, on_vae=True),
            "GMM on latents": lambda: self.rival("latent_gmm", None, on_vae=True),
            "GMM on a VAE of 3 x the steps": self.gmm_on_longer_vae,
            ON_LONGER: self.ladder_on_longer_vae,
            "flow on latents": lambda: self.rival("latent_flow", None, on_vae=True),
            "RAE": lambda: self.rival("rae", baselines.RAEConfig(steps=s.autoencoder)),
            "SRI": lambda: self.rival("sri", baselines.SRIConfig(steps=s.short_run, **rates)),
            "LEBM": lambda: self.rival("lebm", baselines.LEBMConfig(steps=s.short_run, **energy, **rates)),
            FROM_NORMAL: self.joint_from_normal,
            "ladder, two-phase": self.two_phase,
            "ladder, joint": self.joint,
        }


def save_grids(record: str, pictures: dict[str, Tensor], real: Tensor, order: list[str]) -> None:
    """One row of samples a method, as a PNG beside the results; rows of earlier runs are kept in the image cache."""
    from PIL import Image, PngImagePlugin

    kept = image_cache() / f"{record}.npz"
    if kept.exists():
        pictures = {**{name: torch.from_numpy(x) for name, x in np.load(kept).items()}, **pictures}
    np.savez(kept, **{name: x.numpy() for name, x in pictures.items()})
    shown, rows = [name for name in order if name in pictures], []
    for x in [real, *(pictures[name] for name in shown)]:
        row = torch.cat(list(x[:16]), 2)
        rows.append(((row + 1) * 127.5).round().clamp(0, 255).byte())
    grid = torch.cat(rows, 1).permute(1, 2, 0).squeeze(2).numpy()
    names = PngImagePlugin.PngInfo()
    names.add_text("rows", json.dumps(["data", *shown]))
    Image.fromarray(grid).resize((grid.shape[1] * 2, grid.shape[0] * 2), Image.Resampling.NEAREST).save(
        FOLDER / f"{record}.png", optimize=True, pnginfo=names
    )


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--sets", nargs="+", default=["mnist", "cifar10"], choices=["mnist", "cifar10"])
    ask.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    ask.add_argument("--scale", default="cpu", choices=["cpu", "paper"])
    ask.add_argument("--methods", nargs="+", help="only these, such as 'RAE' 'ladder, two-phase'")
    ask.add_argument("--threads", type=int, default=1)
    call = ask.parse_args()
    torch.set_num_threads(call.threads)
    warnings.simplefilter("ignore")
    for dataset in call.sets:
        for seed in call.seeds:
            bench, record = Bench(dataset, SCALES[dataset, call.scale], seed), f"images_{dataset}_{call.scale}"
            figures: dict[str, Any] = {"floors": bench.floors()}
            for name, make in bench.methods().items():
                if not call.methods or name in call.methods:
                    figures[name] = bench.measure(name, make())
                    join_results(record, seed, figures, threads=call.threads, settings=vars(call))
            if seed == 0:
                save_grids(record, bench.pictures, bench.x[:16], list(bench.methods()))


if __name__ == "__main__":
    main()
