"""The demo: a small autoencoder on bundled scans of digits, and the prior that its latents should have had."""

from __future__ import annotations

import io
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data.images import Images
from ..data.latents import Latents
from ..density.figures import strict_json
from ..density.prior import LatentPrior
from ..errors import MissingExtraError
from ..evaluation.feature_networks import feature_network
from ..evaluation.metrics import frechet_distance, two_sample_auc
from ..fitting.fit import fit
from ..fitting.settings import StageSettings
from ..models.model import LatentVariableModel
from ..models.networks import build_decoder, build_encoder, network_spec
from ..report import write_report
from ..runtime.progress import Progress, work_bar
from ..runtime.seeding import derived_generator
from ..storage.output_files import picture_grid
from ..training.config import AutoencoderConfig
from ..training.two_phase import train_autoencoder
from .options import counted

__all__ = ["run_demo"]

CPU = torch.device("cpu")
LATENT_DIM = 12
SIGMA = 0.1
"""Standard deviation of a pixel in [-1, 1]: small, so that pictures are sharp and latents lie far from N(0, I)."""
AUTOENCODER_WIDTH = 128
AUTOENCODER = AutoencoderConfig(steps=1200, batch_size=128, learning_rate=3e-3, learn_sigma=False, average=0.99)
STAGE = StageSettings(width=64, steps=800)
"""A quarter of the default's steps and width: 1,147 rows need little more, and the demo is to be short."""
FIT_SECONDS = 45.0
"""Time budget of the prior, which takes 7 s of one quiet core (Xeon with AVX-512): slow machines do fewer steps."""
CHECK_DRAWS = 100_000
PICTURE_COLUMNS = 8
PICTURE_SCALE = 5
"""How many pixels of ``samples.png`` one pixel of a digit takes, in each direction."""
PANELS = {
    "N(0, I)": "samples of N(0, I)",
    "ladder": "samples of the ladder",
    "reconstructions": "reconstructions",
    "test data": "data",
}
"""The four panels of ``samples.png`` and their titles."""
EXTRAS = {"PIL": "report", "torchmetrics": "metrics", "threadpoolctl": "metrics"}
"""Modules that the demo needs, and the extras that bring them."""


def run_demo(out: Path, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    r"""Train a VAE on scikit-learn's digits, learn the prior of its latents, compare, and write it all to ``out``.

    The figures are measured on 400 test images that trained nothing (the autoencoder's width and noise were chosen
    once, with all parts in view): the log density of their latents (one draw of each posterior, in nats, every density
    normalised), the AUC of boosted trees between samples and those latents, and the Frechet distance of decoded samples
    on the 64 pixels. The VAE's likelihood is :math:`\mathcal N(x; g(z), 0.1^2)` for pixels in [-1, 1].

    The function prints a table and the commands to try next, and returns all numbers, ready for JSON. It raises
    :class:`MissingExtraError` if Pillow, torchmetrics or threadpoolctl is not installed.
    """
    for module, extra in EXTRAS.items():
        if find_spec(module) is None:
            raise MissingExtraError("the demo", extra)
    from threadpoolctl import threadpool_limits

    # A second thread makes layers this small slower: ten times slower where other programs use the cores as well.
    with threadpool_limits(1):
        return _run(Path(out), seed, progress and sys.stderr.isatty())


def _run(out: Path, seed: int, bars: bool) -> dict[str, Any]:
    start = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    train, validation, test = parts = _digits()
    print(
        f"{sum(map(len, parts)):,} scans of digits, 8 x 8 (scikit-learn): "
        f"{len(train):,} to train, {len(validation)} to validate, {len(test)} to test",
        flush=True,
    )
    model = _autoencoder(train, seed, bars)
    autoencoder_seconds = time.monotonic() - start

    mean, scale = _posterior(model, train)
    z_train, z_validation, z_test = (
        Latents.posterior(*_posterior(model, part)).draw(
            torch.arange(len(part)), derived_generator(CPU, seed, "demo", "latents", i)
        )
        for i, part in enumerate(parts)
    )
    model.prior = fit(
        Latents.posterior(mean, scale),
        base="gmm",
        # A second stage would leave importance sampling, take most of the time, and blur log Z.
        max_stages=1,
        seed=seed,
        validation=z_validation,
        settings=STAGE,
        time_budget=FIT_SECONDS,
        callbacks=[Progress()] if bars else [],
    )
    fit_seconds = time.monotonic() - start - autoencoder_seconds

    with work_bar("measuring", 3, shown=bars) as bar:
        bar.begin("samples")
        rivals = _rivals(model.prior, mean, scale)
        rows, pictures = _compared(model, rivals, (train, z_train), (test, z_test), seed)
        bar.begin("normaliser")
        check = model.prior.check_normalizer(draws=CHECK_DRAWS)
        bar.begin("report")
        model.prior.save_pretrained(out / "prior")
        model.save_pretrained(out / "model")
        np.save(out / "latents.npy", z_train.numpy())
        np.save(out / "test_latents.npy", z_test.numpy())
        np.savez_compressed(out / "images.npz", **_arrays("train", train), **_arrays("test", test))
        _draw(out / "samples.png", pictures, rows)
        write_report(model, out / "report.html", images=out / "images.npz", seed=seed)
    above = rivals["ladder"].log_prob(z_test).double() - rivals["GMM"].log_prob(z_test).double()
    error = float((pictures["reconstructions"] - pictures["test data"]).square().mean())
    results = {
        "data": {"name": "scikit-learn digits", "train": len(train), "validation": len(validation), "test": len(test)},
        "vae": {"latent_dim": LATENT_DIM, "sigma": SIGMA, "test_mean_squared_error": error},
        "rows": rows,
        "ladder_above_gmm": _mean(above, "log_prob", "stderr"),
        "normalizer_check": {**check._asdict(), "log_normalizer_stderr": model.prior.log_prob_stderr},
        "stages": len(model.prior.stages),
        "stopped": model.prior.info["stopped"],
        "seconds": {"vae": autoencoder_seconds, "fit": fit_seconds, "total": time.monotonic() - start},
        "seed": seed,
    }
    (out / "results.json").write_text(strict_json(results) + "\n")
    _print_table(results)
    _print_next(out)
    return results


def _digits() -> tuple[Images, Images, Images]:
    """Training, validation and test images; the split is stratified and always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels, labels = (digits.images * (255 / 16)).round().astype(np.uint8), digits.target
    train, rest = train_test_split(np.arange(len(labels)), train_size=1147, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=250, stratify=labels[rest], random_state=0)
    first, second, third = (Images(pixels[part], labels=labels[part]) for part in (train, validation, test))
    return first, second, third


def _arrays(part: str, images: Images) -> dict[str, Any]:
    """The images ``(n, 8, 8)`` as bytes, and their labels, by the names that ``read_images`` knows."""
    assert images.labels is not None
    pixels = ((_all(images) + 1) * 127.5).round().byte().squeeze(1)
    return {f"x_{part}": pixels.numpy(), f"y_{part}": images.labels.numpy()}


def _all(images: Images) -> Tensor:
    return images.batch(torch.arange(len(images)))


def _autoencoder(train: Images, seed: int, bars: bool) -> LatentVariableModel:
    """A trained VAE with its nominal prior, N(0, I)."""
    spec = network_spec("mlp", LATENT_DIM, AUTOENCODER_WIDTH, train.shape)
    model = LatentVariableModel(
        build_decoder(spec, derived_generator(CPU, seed, "generator")),
        sigma=SIGMA,
        encoder=build_encoder(spec, derived_generator(CPU, seed, "encoder")),
    )
    with Progress() as progress:
        return train_autoencoder(model, train, AUTOENCODER, seed=seed, callbacks=[progress] if bars else [])


class _Rival(NamedTuple):
    """One of the densities that the table compares."""

    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int, torch.Generator], Tensor]


def _posterior(model: LatentVariableModel, images: Images) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of the posteriors of all images."""
    mean, scale = model.encode(_all(images))
    assert scale is not None
    return mean, scale


def _rivals(prior: LatentPrior, mean: Tensor, scale: Tensor) -> dict[str, _Rival]:
    """The priors of the table, each normalised in the same coordinates."""
    covariance = torch.cov(mean.T, correction=0) + scale.square().mean(0).diag()
    base = prior.with_ladder(prior.ladder.first(0))
    return {
        "N(0, I)": _gaussian(torch.zeros(LATENT_DIM), torch.eye(LATENT_DIM)),
        "fitted Gaussian": _gaussian(mean.mean(0), covariance),
        "GMM": _Rival(base.log_prob, lambda n, g: base.sample((n,), generator=g)),
        "ladder": _Rival(prior.log_prob, lambda n, g: prior.sample((n,), generator=g)),
    }


def _gaussian(mean: Tensor, covariance: Tensor) -> _Rival:
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    factor = normal.scale_tril
    return _Rival(normal.log_prob, lambda n, g: mean + torch.randn(n, len(mean), generator=g) @ factor.T)


def _compared(
    model: LatentVariableModel,
    rivals: Mapping[str, _Rival],
    train: tuple[Images, Tensor],
    test: tuple[Images, Tensor],
    seed: int,
) -> tuple[dict[str, dict[str, float | None]], dict[str, Tensor]]:
    """The rows of the table, and the pictures of each; ``train`` and ``test`` are images with draws of posteriors."""
    pixels = feature_network("pixels", size=train[0].shape[-1])
    z_train, z_test, x_test = train[1], test[1], _all(test[0])

    def row(log_prob: Tensor | None, z: Tensor | None, x: Tensor) -> dict[str, float | None]:
        auc, stderr = (None, None) if z is None else two_sample_auc(z, z_test, seed=seed)
        distance = frechet_distance(pixels(x_test), pixels(x))
        means = _mean(log_prob, "log_prob", "log_prob_stderr")
        return {**means, "auc": auc, "auc_stderr": stderr, "frechet_distance": distance}

    rows, pictures = {}, {}
    with torch.no_grad():
        for name, rival in rivals.items():
            z = rival.sample(len(z_train), derived_generator(CPU, seed, "demo", "samples", name))
            pictures[name] = model.decode(z)
            rows[name] = row(rival.log_prob(z_test).double(), z, pictures[name])
        pictures["reconstructions"] = model.decode(z_test)
        rows["reconstructions"] = row(None, None, pictures["reconstructions"])
        rows["training data"] = row(None, z_train, _all(train[0]))
    pictures["test data"] = x_test
    return rows, pictures


def _mean(values: Tensor | None, name: str, stderr_name: str) -> dict[str, float | None]:
    """Mean and standard error under these names, or None for both where there are no values."""
    if values is None:
        return {name: None, stderr_name: None}
    return {name: float(values.mean()), stderr_name: float(values.std() / math.sqrt(len(values)))}


def _draw(path: Path, pictures: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Write one picture: a panel of 64 digits for each of :data:`PANELS`, with its title above it."""
    from PIL import Image, ImageDraw, ImageFont

    gap, title_height, font = 24, 44, ImageFont.load_default(18)
    panels = {}
    for name in PANELS:
        digits = pictures[name][: PICTURE_COLUMNS**2]
        # Dark ink on white paper.
        grid = Image.open(io.BytesIO(picture_grid(-digits, columns=PICTURE_COLUMNS)))
        panels[name] = grid.resize((PICTURE_SCALE * grid.width, PICTURE_SCALE * grid.height), Image.Resampling.NEAREST)
    width, height = panels["ladder"].size
    canvas = Image.new("L", (len(panels) * (width + gap) + gap, title_height + height + 2 * gap), 255)
    pen = ImageDraw.Draw(canvas)
    for i, (name, panel) in enumerate(panels.items()):
        left = gap + i * (width + gap)
        distance = f"Frechet distance {rows[name]['frechet_distance']:.2f}" if name in rows else "held-out test images"
        pen.multiline_text(
            (left + width / 2, gap / 2), f"{PANELS[name]}\n{distance}", fill=0, font=font, anchor="ma", align="center"
        )
        canvas.paste(panel, (left, title_height + gap))
    canvas.save(path)


def _print_table(results: Mapping[str, Any]) -> None:
    def cell(row: Mapping[str, Any], name: str, digits: int) -> str:
        if row[name] is None:
            return "-"
        return f"{row[name]:.{digits}f} ± {row[f'{name}_stderr']:.{digits}f}"

    print(f"\n{'':18}{'log density, nats':>20}{'two-sample AUC':>18}{'Fréchet distance':>19}")
    for name, row in results["rows"].items():
        if name == "reconstructions":
            print("floors")
        distance = f"{row['frechet_distance']:.2f}"
        print(f"{name:18}{cell(row, 'log_prob', 2):>20}{cell(row, 'auc', 3):>18}{distance:>19}")
    above, check = results["ladder_above_gmm"], results["normalizer_check"]
    print(
        f"\nladder above GMM: {above['log_prob']:+.2f} ± {above['stderr']:.2f} nats, paired over test latents\n"
        f"ladder's integral by an independent mixture: {check['value']:.4f} ± {check['stderr']:.4f} "
        f"(must be 1; log Z is known to ± {check['log_normalizer_stderr']:.4f})\n"
        f"{counted(results['stages'], 'stage')}; {results['seconds']['total']:.0f} s, "
        f"of which {results['seconds']['fit']:.0f} s for the prior"
    )


def _print_next(out: Path) -> None:
    command = "latentprior" if shutil.which("latentprior") else f"{shlex.quote(sys.executable)} -m latentprior"
    names = ("prior", "model", "test_latents.npy", "samples.npy", "images.npz")
    place = {name: shlex.quote(str(out / name)) for name in names}
    print(
        f"\nlook at {out / 'samples.png'} and {out / 'report.html'}; then try\n"
        f"  {command} sample {place['prior']} -n 1000 --out {place['samples.npy']}\n"
        f"  {command} score {place['prior']} {place['test_latents.npy']} --json\n"
        f"  {command} generate {place['model']} -n 64 --out generated.png\n"
        f"  {command} fit your_latents.npy --out my-prior\n"
        f"  {command} train {place['images.npz']} --out my-model    (or images of your own)"
    )
