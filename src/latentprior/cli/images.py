"""``latentprior generate | reconstruct | detect | evaluate``: what a trained model is for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ..data.image_files import open_images
from ..data.images import Images, read_images
from ..density.figures import strict_json
from ..density.samplers import SAMPLE_BLOCK, SAMPLERS
from ..errors import InvalidImagesError, LatentPriorError
from ..evaluation import metrics
from ..evaluation.feature_networks import feature_network, list_feature_networks
from ..models.model import ROWS, LatentVariableModel
from ..recipes.model_folders import image_size, load_model, sampler_options
from ..runtime.progress import part_bar, row_bar
from ..storage.output_files import array_file, check_file, check_images_out, images_out
from .options import AsJson, Device, ImagesSource, Key, Seed

__all__ = ["COMMANDS", "detect", "evaluate", "generate", "reconstruct"]

METHODS = ("map", "encoder", "langevin", "mala", "tilt")
KINDS = ("joint", "reconstruction", "prior", "marginal")

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that [bold]latentprior train[/] wrote.")]
OUT = typer.Option("--out", metavar="OUT", help="F.npy (floats in [-1, 1]), F.png (a grid) or a new FOLDER of PNGs.")
Sampler = Annotated[
    str | None,
    typer.Option("--sampler", metavar="S", help=f"How to draw: {', '.join(SAMPLERS)}; by default the model's own way."),
]
Split = Annotated[
    str, typer.Option("--split", metavar="P", help="Part of a source that has parts: train, test and so on.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Take the first N images only.")]
Inference = Annotated[str, typer.Option("--method", metavar="M", help=f"How latents are found: {', '.join(METHODS)}.")]


def generate(
    folder: Folder,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of images.")],
    out: Annotated[Path, OUT],
    sampler: Sampler = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Draw images from a model.

    [bold]Examples:[/]

    latentprior generate run -n 64 --out samples.png

    latentprior generate run -n 10000 --out samples --seed 1
    """
    check_images_out(out, n)
    model = load_model(folder, device)
    options = _sampler(model, sampler)
    draws = torch.Generator().manual_seed(seed % 2**63)
    with row_bar(n, "generating") as bar, torch.no_grad(), _written(out, n, model) as write:
        for start in range(0, n, SAMPLE_BLOCK):
            z = model.prior.sample((min(SAMPLE_BLOCK, n - start),), generator=draws, **options)
            for block in z.split(ROWS):
                write(model.decode(block))
                bar.update(len(block))
    shape = _shape(model)
    if as_json:
        print(strict_json({"n": n, "shape": [n, *shape], "sampler": options["sampler"], "seed": seed}))
    else:
        print(f"{out}: {n:,} images of {' x '.join(map(str, shape))}, by {options['sampler']}")


def reconstruct(
    folder: Folder,
    images: ImagesSource,
    out: Annotated[Path | None, OUT] = None,
    method: Inference = "map",
    key: Key = None,
    split: Split = "train",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Find the latents of images and decode them; print the squared error a pixel, in [-1, 1].

    A .png shows each image with its reconstruction to its right.

    [bold]Example:[/] latentprior reconstruct run photos/ --out reconstructed.png --method encoder
    """
    _choice("--method", method, METHODS)
    model = load_model(folder, device)
    pictures = _pictures(folder, model, images, key, split, limit)
    n, pairs = len(pictures), out is not None and out.suffix == ".png"
    if out is not None:
        check_images_out(out, 2 * n if pairs else n)
    draws, errors = torch.Generator().manual_seed(seed % 2**63), []
    writing = contextlib.nullcontext() if out is None else _written(out, n, model, pairs)
    with row_bar(n, "reconstructing") as bar, writing as write:
        for x in pictures.batches(ROWS, device=model.device):
            again = model.reconstruct(x, method=method, generator=draws)
            errors.append((again.double() - x).square().flatten(1).mean(1).cpu())
            if write is not None:
                write(torch.stack([x, again], 1).flatten(0, 1) if pairs else again)
            bar.update(len(x))
    mean, stderr = _mean(torch.cat(errors))
    if as_json:
        print(strict_json({"n": n, "mean_squared_error": mean, "stderr": stderr}))
        return
    print(f"{images}: {n:,} images, squared error a pixel {mean:.5f}{_plus_minus(stderr, '.5f')} by {method}")
    if out is not None:
        print(f"reconstructions in {out}")


def detect(
    folder: Folder,
    images: ImagesSource,
    kind: Annotated[str, typer.Option("--kind", metavar="K", help=f"Score: {', '.join(KINDS)}.")] = "joint",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="F.npy", help="Also write the score of every image.")
    ] = None,
    labels_key: Annotated[
        str | None,
        typer.Option("--labels-key", metavar="K", help="Array in the archive: 1 where an image is odd, else 0."),
    ] = None,
    anomaly: Annotated[
        list[int] | None, typer.Option("--anomaly", metavar="CLASS", help="Class of the images' labels that is odd.")
    ] = None,
    method: Annotated[
        str, typer.Option("--method", metavar="M", help=f"How latents are found: {', '.join(METHODS)}.")
    ] = "mala",
    key: Key = None,
    split: Split = "train",
    limit: Limit = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Score how odd images are, in nats: higher is odder. With labels, also the average precision.

    Labels are those that come with the images, if they are 0 and 1, or --labels-key, or the classes of --anomaly.

    [bold]Examples:[/]

    latentprior detect run photos/ --out scores.npy

    latentprior detect run mnist.npz --split test --anomaly 4 --json
    """
    _choice("--kind", kind, KINDS)
    _choice("--method", method, METHODS)
    if out is not None:
        check_file(out)
    model = load_model(folder, device)
    pictures = _pictures(folder, model, images, key, split, limit)
    truth = _truth(pictures, images, labels_key, anomaly, split)
    n, draws, parts = len(pictures), torch.Generator().manual_seed(seed % 2**63), []
    options: dict[str, Any] = {} if kind == "marginal" else {"method": method}
    with row_bar(n, "scoring") as bar:
        for x in pictures.batches(ROWS, device=model.device):
            parts.append(model.anomaly_score(x, kind=kind, generator=draws, **options).double().cpu())  # type: ignore[arg-type]
            bar.update(len(x))
    scores = torch.cat(parts)
    if out is not None:
        with array_file(out, (n,), "<f8") as file:
            file.write(scores.numpy().astype("<f8").tobytes())
    mean, stderr = _mean(scores)
    found: dict[str, Any] = {"n": n, "kind": kind, "mean": mean, "stderr": stderr}
    found |= {"min": float(scores.min()), "median": float(scores.median()), "max": float(scores.max())}
    if truth is not None:
        found |= metrics.average_precision(truth, scores)._asdict()
    if as_json:
        print(strict_json(found))
        return
    print(f"{images}: {n:,} images, {kind} score {mean:.3f}{_plus_minus(stderr, '.3f')} nats")
    print(f"from {found['min']:.3f} to {found['max']:.3f}, median {found['median']:.3f}; higher is odder")
    if truth is not None:
        print(f"average precision {found['auprc']:.4f}; random scores reach {found['prevalence']:.4f}")
    if out is not None:
        print(f"score of every image in {out}")


def evaluate(
    folder: Folder,
    images: ImagesSource,
    test: Annotated[
        Path | None,
        typer.Option("--test", metavar="IMAGES", help="Held-out images; by default the split test of IMAGES."),
    ] = None,
    features: Annotated[
        str, typer.Option("--features", metavar="F", help=f"Features: {', '.join(list_feature_networks())}.")
    ] = "efficientnet_lite0",
    weights: Annotated[
        Path | None, typer.Option("--weights", metavar="FILE", help="Weights of lenet or inception.")
    ] = None,
    n: Annotated[int, typer.Option("-n", metavar="N", min=4, help="Images in each set, at most.")] = 1000,
    sampler: Sampler = None,
    method: Inference = "map",
    key: Key = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure Frechet and kernel distances of samples to held-out images, beside the floors that bound them.

    The floors: reconstructions of the held-out images, and training images. Distances compare at equal n and features.

    [bold]Examples:[/]

    latentprior evaluate run mnist.npz --features lenet --weights lenet5.safetensors --json

    latentprior evaluate run photos/train --test photos/test -n 5000
    """
    _choice("--features", features, list_feature_networks())
    _choice("--method", method, METHODS)
    network = feature_network(features, weights=weights)
    model = load_model(folder, device)
    options = _sampler(model, sampler)
    real = _pictures(folder, model, images, key, "train", None)
    try:
        held_out = _pictures(
            folder, model, test or images, key if test is None else None, "train" if test else "test", None
        )
    except InvalidImagesError as error:
        raise InvalidImagesError(str(error) if test else f"{error}; or give held-out images with --test") from None
    draws = torch.Generator().manual_seed(seed % 2**63)
    n = min(n, len(real), len(held_out))
    real, held_out = (part.subset(torch.randperm(len(part), generator=draws)[:n]) for part in (real, held_out))
    x = held_out.batch(torch.arange(n))
    again = []
    with row_bar(n, "reconstructing") as bar:
        for block in x.split(ROWS):
            again.append(model.reconstruct(block, method=method, generator=draws).cpu())
            bar.update(len(block))
    with part_bar(task="generating"):
        generated = model.generate(n, generator=draws, **options).cpu()
    with part_bar(task="features and distances"):
        report = metrics.image_report(
            real.batch(torch.arange(n)), x, generated, torch.cat(again).float(), network, network_name=None, seed=seed
        )
    report |= {"sampler": options["sampler"], "method": method, "seed": seed}
    if as_json:
        print(strict_json(report))
        return
    print(f"{report['images']:,} images each, features {report['feature_network']} ({report['features']})")
    print("\n                      Frechet      kernel")
    for name in ("generated", "reconstructions", "real"):
        row = report[name]
        print(f"  {name:<16} {row['frechet']:>12.4f}  {row['kernel']:>10.4g}{_plus_minus(row['kernel_stderr'], '.2g')}")
    floor = report["reconstructions"]
    close = _plus_minus(floor["mean_squared_error_stderr"], ".5f")
    print(f"\n  reconstructions' squared error a pixel {floor['mean_squared_error']:.5f}{close}")


COMMANDS = (generate, reconstruct, detect, evaluate)


def _pictures(
    folder: Path, model: LatentVariableModel, source: Path, key: str | None, split: str, limit: int | None
) -> Images:
    pictures = read_images(source, key=key, size=image_size(folder), split=split, limit=limit)
    shape = _shape(model)
    if pictures.shape != shape:
        raise InvalidImagesError(
            f"{source}: images have shape {pictures.shape}, the model in {folder} makes {shape}; give images "
            "like those that it was trained on"
        )
    return pictures


def _shape(model: LatentVariableModel) -> tuple[int, ...]:
    shape: Any = getattr(model.decoder, "image_shape", ())
    return tuple(shape)


@contextlib.contextmanager
def _written(out: Path, n: int, model: LatentVariableModel, pairs: bool = False) -> Iterator[Any]:
    columns = 2 * math.ceil(math.sqrt(n / 2)) if pairs else None
    with images_out(out, n, _shape(model), columns=columns) as write:
        yield write


def _sampler(model: LatentVariableModel, chosen: str | None) -> dict[str, Any]:
    if chosen is None:
        return sampler_options(model)
    _choice("--sampler", chosen, SAMPLERS)
    return {"sampler": chosen}


def _truth(
    pictures: Images, source: Path, labels_key: str | None, anomaly: list[int] | None, split: str
) -> Tensor | None:
    """1 for images that are odd, where that is known."""
    labels = pictures.labels
    if labels_key is not None:
        values = np.asarray(open_images(source, labels_key, None, split, None)[0])
        if values.dtype.kind not in "iub" or values.ndim != 1 or len(values) < len(pictures):
            raise InvalidImagesError(
                f"{source}: {labels_key} has type {values.dtype} and shape {values.shape}; give one 0 or 1 for each of "
                f"{len(pictures)} images"
            )
        labels = torch.from_numpy(values[: len(pictures)].astype(np.int64))
    if anomaly:
        if labels is None:
            raise InvalidImagesError(
                f"{source}: has no labels that --anomaly could mean; leave it out, or use --labels-key"
            )
        truth = torch.isin(labels, torch.tensor(anomaly))
    elif labels_key is None and (labels is None or not set(labels.tolist()) <= {0, 1}):
        return None
    else:
        assert labels is not None
        if not set(labels.tolist()) <= {0, 1}:
            raise InvalidImagesError(f"{source}: {labels_key} must hold 0 and 1 only; name odd classes with --anomaly")
        truth = labels == 1
    if truth.all() or not truth.any():
        if anomaly or labels_key is not None:
            raise LatentPriorError("average precision needs odd images and others: the labels say that all are alike")
        return None
    return truth


def _mean(values: Tensor) -> tuple[float, float | None]:
    n = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None


def _plus_minus(stderr: float | None, form: str) -> str:
    return "" if stderr is None or not math.isfinite(stderr) else f" ± {stderr:{form}}"


def _choice(option: str, given: str, known: tuple[str, ...]) -> None:
    if given not in known:
        raise LatentPriorError(f"unknown {option} {given!r}: choose one of {', '.join(known)}")
