"""The demo: a small autoencoder on bundled scans of digits, and the prior that its latents should have had."""

from __future__ import annotations

import json
import math
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import save_file
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor, nn
from tqdm import tqdm

from ..data.latents import Latents
from ..density.prior import LatentPrior
from ..errors import MissingExtraError
from ..evaluation.metrics import image_frechet_distance, two_sample_auc
from ..fitting.fit import fit
from ..fitting.settings import StageSettings
from ..runtime.progress import FitProgress
from ..runtime.seeding import derived_generator

__all__ = ["run_demo"]

CPU = torch.device("cpu")
DIM = 12
SIGMA = 0.05
GRID = 8
COLUMNS = ("log_prob", "log_prob_stderr", "auc", "auc_stderr", "frechet_distance")


@dataclass(frozen=True)
class _Scale:
    """How much work a run does."""

    vae_epochs: int = 150
    classifier_epochs: int = 40
    max_stages: int = 1
    """One: the second leaves importance sampling, costs most of the time, and blurs log Z."""
    stage: StageSettings = field(default_factory=StageSettings)
    check_draws: int = 200_000


def run_demo(out: Path, seed: int = 0, progress: bool = True) -> dict[str, Any]:
    r"""Train a VAE on scikit-learn's digits, learn the prior of its latents, compare, and write it all to ``out``.

    Measured on 400 test images that trained nothing (the autoencoder's width and noise were chosen once, with all
    parts in view): the log density of their latents (one draw of each
    posterior, nats, every density normalised), the AUC of boosted trees between samples and those latents, and
    the Frechet distance of decoded samples on the features of a small classifier. The VAE's likelihood is
    :math:`\mathcal N(x; g(z), 0.05^2)`: sharp pictures, whose latents lie far from :math:`\mathcal N(0, I)`.

    Prints a table to stdout and the commands to try next; draws bars on stderr if it is a terminal and
    ``progress`` is true. Returns all numbers as a JSON-able dict, also written to ``out/results.json``.

    Raises :class:`~latentprior.errors.MissingExtraError` without matplotlib or torchmetrics.
    """
    # Layers this small lose time to a second thread, most of all where other work shares the cores.
    with threadpool_limits(1):
        return _run(Path(out), seed, progress, _Scale())


def _run(out: Path, seed: int, progress: bool, scale: _Scale) -> dict[str, Any]:
    for module, extra in (("matplotlib", "report"), ("torchmetrics", "metrics")):
        if find_spec(module) is None:
            raise MissingExtraError("the demo", extra)
    began = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data = _digits()
    train, _, test = data
    n_train, n_validation, n_test = (len(part.images) for part in data)
    print(
        f"{n_train + n_validation + n_test:,} scans of digits, 8 x 8 (scikit-learn): "
        f"{n_train:,} to train, {n_validation} to validate, {n_test} to test",
        flush=True,
    )
    bars = progress and sys.stderr.isatty()
    vae = _train_vae(train.images, scale.vae_epochs, seed, bars)
    classifier = _train_classifier(train, scale.classifier_epochs, seed)
    vae_seconds = time.monotonic() - began

    posteriors = [vae.posterior(part.images) for part in data]
    z_train, z_validation, z_test = (
        Latents.posterior(*q).draw(torch.arange(len(q[0])), derived_generator(CPU, seed, "demo", "latents", i))
        for i, q in enumerate(posteriors)
    )
    prior = fit(
        Latents.posterior(*posteriors[0]),
        base="gmm",
        max_stages=scale.max_stages,
        seed=seed,
        validation=z_validation,
        settings=scale.stage,
        callbacks=[FitProgress()] if bars else [],
    )
    fit_seconds = time.monotonic() - began - vae_seconds

    with tqdm(total=2, desc="measuring", bar_format="{desc} [{elapsed}]", disable=not bars) as shown:
        rows, decoded, above = _compare(
            prior, vae, classifier[:-1], posteriors[0], (z_train, z_test), train, test, seed
        )
        shown.update()
        check = prior.check_normalizer(draws=scale.check_draws)
        shown.update()
    with torch.no_grad():
        accuracy = float((classifier(test.images).argmax(1) == test.labels).double().mean())

    _draw_pictures(out, decoded, rows)
    prior.save_pretrained(out / "prior")
    save_file(vae.state_dict(), out / "vae.safetensors")
    np.save(out / "latents.npy", z_train.numpy())
    np.save(out / "test_latents.npy", z_test.numpy())
    np.savez_compressed(
        out / "images.npz",
        x_train=_bytes(train.images),
        y_train=train.labels.numpy(),
        x_test=_bytes(test.images),
        y_test=test.labels.numpy(),
    )
    misfit = float((decoded["reconstructions"] - test.images).square().mean())
    results = {
        "data": {"name": "scikit-learn digits", "train": n_train, "validation": n_validation, "test": n_test},
        "vae": {"latent_dim": DIM, "sigma": SIGMA, "test_mean_squared_error": misfit},
        "classifier_test_accuracy": accuracy,
        "rows": rows,
        "ladder_above_gmm": {"log_prob": above[0], "stderr": above[1]},
        "normalizer_check": {**check._asdict(), "log_normalizer_stderr": prior.log_prob_stderr},
        "stages": len(prior.stages),
        "stopped": prior.info["stopped"],
        "seconds": {"vae_and_classifier": vae_seconds, "fit": fit_seconds, "total": time.monotonic() - began},
        "seed": seed,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    _print_table(results)
    _print_next(out)
    return results


def _compare(
    prior: LatentPrior,
    vae: _VAE,
    network: nn.Module,
    posterior: tuple[Tensor, Tensor],
    latents: tuple[Tensor, Tensor],
    train: _Part,
    test: _Part,
    seed: int,
) -> tuple[dict[str, dict[str, float | None]], dict[str, Tensor], tuple[float, float]]:
    """The table's rows, the decoded pictures, and the ladder's paired gain over its base on test latents."""
    z_train, z_test = latents
    figures: dict[str, tuple[float | None, ...]] = {}
    decoded: dict[str, Tensor] = {}
    log_probs: dict[str, Tensor] = {}
    for name, rival in _rivals(prior, posterior).items():
        z = rival.sample(len(z_train), derived_generator(CPU, seed, "demo", "samples", name))
        decoded[name], log_probs[name] = vae.decode(z), rival.log_prob(z_test).double()
        distance = image_frechet_distance(test.images, decoded[name], network)
        figures[name] = (*_mean(log_probs[name]), *two_sample_auc(z, z_test, seed=seed), distance)
    decoded["reconstructions"] = vae.decode(z_test)
    distance = image_frechet_distance(test.images, decoded["reconstructions"], network)
    figures["reconstructions"] = (None, None, None, None, distance)
    distance = image_frechet_distance(test.images, train.images, network)
    figures["training data"] = (None, None, *two_sample_auc(z_train, z_test, seed=seed), distance)
    decoded["test data"] = test.images
    rows = {name: dict(zip(COLUMNS, values, strict=True)) for name, values in figures.items()}
    return rows, decoded, _mean(log_probs["ladder"] - log_probs["GMM"])


class _Part(NamedTuple):
    images: Tensor
    labels: Tensor


def _digits() -> tuple[_Part, _Part, _Part]:
    """Training, validation and test images ``(n, 64)`` in [0, 1]; the split is stratified and always the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    train, rest = train_test_split(np.arange(len(labels)), train_size=1147, stratify=labels, random_state=0)
    validation, test = train_test_split(rest, train_size=250, stratify=labels[rest], random_state=0)
    x, y = torch.as_tensor(images / 16, dtype=torch.float32), torch.as_tensor(labels)
    return _Part(x[train], y[train]), _Part(x[validation], y[validation]), _Part(x[test], y[test])


def _bytes(images: Tensor) -> NDArray[np.uint8]:
    """Images ``(n, 64)`` in [0, 1] as pixels ``(n, 8, 8)``."""
    pixels: NDArray[np.uint8] = (images * 255).round().byte().view(-1, 8, 8).numpy()
    return pixels


class _VAE(nn.Module):
    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(64, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2 * DIM)
        )
        self.decoder = nn.Sequential(
            nn.Linear(DIM, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 64), nn.Sigmoid()
        )

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        r"""Negative evidence bound, a mean in nats up to a constant (Kingma and Welling 2014, eq. 10)."""
        mean, log_scale = self.encoder(x).chunk(2, 1)
        rebuilt = self.decoder(mean + log_scale.exp() * noise)
        misfit = 0.5 * ((rebuilt - x) / SIGMA).square().sum(1)
        divergence = 0.5 * (mean.square() + (2 * log_scale).exp() - 1).sum(1) - log_scale.sum(1)
        return torch.mean(misfit + divergence)

    @torch.no_grad()
    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_scale = self.encoder(x).chunk(2, 1)
        return mean, log_scale.exp()

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        rebuilt: Tensor = self.decoder(z)
        return rebuilt


def _built(make: Callable[[], nn.Module], seed: int) -> Any:
    """A network whose weights follow from ``seed``; torch's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def _train_vae(x: Tensor, epochs: int, seed: int, bars: bool) -> _VAE:
    vae: _VAE = _built(_VAE, seed)
    generator = derived_generator(CPU, seed, "demo", "vae")

    def loss(index: Tensor) -> Tensor:
        value: Tensor = vae(x[index], torch.randn(len(index), DIM, generator=generator))
        return value

    _minimise(vae, loss, len(x), epochs, 2e-3, generator, "autoencoder" if bars else None)
    return vae


def _train_classifier(train: _Part, epochs: int, seed: int) -> nn.Sequential:
    """A classifier of the digits; all but its last layer gives the 32 features of the Frechet distance."""
    network: nn.Sequential = _built(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 10)),
        seed,
    )
    generator = derived_generator(CPU, seed, "demo", "classifier")

    def loss(index: Tensor) -> Tensor:
        return F.cross_entropy(network(train.images[index]), train.labels[index])

    _minimise(network, loss, len(train.images), epochs, 3e-3, generator, None)
    return network


def _minimise(
    network: nn.Module,
    loss: Callable[[Tensor], Tensor],
    rows: int,
    epochs: int,
    rate: float,
    generator: torch.Generator,
    bar: str | None,
) -> None:
    """AdamW over shuffled batches of 128 rows under a cosine schedule."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.1)
    with tqdm(total=epochs, desc=bar, unit="epoch", disable=bar is None, dynamic_ncols=True) as shown:
        for epoch in range(epochs):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
            total = 0.0
            for index in torch.randperm(rows, generator=generator).split(128):
                value = loss(index)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total += value.item() * len(index)
            shown.set_postfix(loss=f"{total / rows:.2f}", refresh=False)
            shown.update()
    network.eval().requires_grad_(False)


class _Rival(NamedTuple):
    log_prob: Callable[[Tensor], Tensor]
    sample: Callable[[int, torch.Generator], Tensor]


def _rivals(prior: LatentPrior, posterior: tuple[Tensor, Tensor]) -> dict[str, _Rival]:
    """The priors of the table, each normalised on the same coordinates."""
    mean, scale = posterior
    covariance = torch.cov(mean.T, correction=0) + scale.square().mean(0).diag()
    base = prior.with_ladder(prior.ladder.first(0))
    return {
        "N(0, I)": _gaussian(torch.zeros(DIM), torch.eye(DIM)),
        "fitted Gaussian": _gaussian(mean.mean(0), covariance),
        "GMM": _Rival(base.log_prob, lambda n, g: base.sample((n,), generator=g)),
        "ladder": _Rival(prior.log_prob, lambda n, g: prior.sample((n,), generator=g)),
    }


def _gaussian(mean: Tensor, covariance: Tensor) -> _Rival:
    normal = torch.distributions.MultivariateNormal(mean, covariance)
    factor = normal.scale_tril
    return _Rival(normal.log_prob, lambda n, g: mean + torch.randn(n, len(mean), generator=g) @ factor.T)


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values)))


def _draw_pictures(out: Path, decoded: Mapping[str, Tensor], rows: Mapping[str, Mapping[str, Any]]) -> None:
    """One figure with four panels, and each panel as a picture of its own."""
    from matplotlib.figure import Figure
    from matplotlib.image import imsave

    panels = {
        "N(0, I)": ("normal", "samples of N(0, I)"),
        "ladder": ("ladder", "samples of the ladder"),
        "reconstructions": ("reconstructions", "reconstructions"),
        "test data": ("data", "data"),
    }
    figure = Figure(figsize=(14, 4.5), layout="constrained")
    axes = figure.subplots(1, len(panels))
    for axis, (name, (file, title)) in zip(axes, panels.items(), strict=True):
        tiles = decoded[name][: GRID * GRID].reshape(GRID, GRID, 8, 8)
        padded = F.pad(tiles, (1, 1, 1, 1)).permute(0, 2, 1, 3).reshape(GRID * 10, GRID * 10).numpy()
        imsave(out / f"{file}.png", np.kron(padded, np.ones((6, 6))), cmap="gray_r", vmin=0, vmax=1)
        axis.imshow(padded, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        axis.set_axis_off()
        distance = rows[name]["frechet_distance"] if name in rows else None
        note = "held-out test images" if distance is None else f"Fréchet distance {distance:.2f}"
        axis.set_title(f"{title}\n{note}", fontsize=12)
    figure.savefig(out / "samples.png", dpi=120)


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
        f"{results['stages']} stages; {results['seconds']['total']:.0f} s, "
        f"of which {results['seconds']['fit']:.0f} s for the prior"
    )


def _print_next(out: Path) -> None:
    command = "latentprior" if shutil.which("latentprior") else f"{shlex.quote(sys.executable)} -m latentprior"
    folder = {name: shlex.quote(str(out / name)) for name in ("prior", "test_latents.npy", "samples.npy", "images.npz")}
    print(
        f"\nlook at {out / 'samples.png'}; then try\n"
        f"  {command} sample {folder['prior']} -n 1000 --out {folder['samples.npy']}\n"
        f"  {command} score {folder['prior']} {folder['test_latents.npy']} --json\n"
        f"  {command} fit your_latents.npy --out my-prior\n"
        f"  {command} train {folder['images.npz']} --out my-model    (or images of your own)"
    )
