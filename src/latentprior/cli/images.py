"""``latentprior generate | reconstruct | detect | evaluate``: what a trained model is for."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor

from ..data.image_files import open_images
from ..data.images import Images, read_images
from ..data.pictures import Choice
from ..density.figures import strict_json
from ..density.samplers import SAMPLE_BLOCK, SAMPLERS
from ..errors import InvalidImagesError, LatentPriorError
from ..evaluation import metrics
from ..evaluation.feature_networks import feature_network, list_feature_networks
from ..models.model import ROWS, LatentVariableModel
from ..recipes.model_folders import image_size, load_model
from ..report.sources import check_images_fit
from ..runtime.progress import work_bar
from ..storage.output_files import array_file, check_file, check_images_out, images_out
from .options import AsJson, Device, ImagesSource, Key, Limit, ModelFolder, Seed, counted, mean_and_stderr, plus_minus

__all__ = ["COMMANDS", "detect", "evaluate", "generate", "reconstruct"]

INFERENCE_METHODS = ("map", "encoder", "langevin", "mala", "tilt")
SCORE_KINDS = ("joint", "reconstruction", "prior", "marginal")

IMAGES_OUT = typer.Option(
    "--out", metavar="OUT", help="F.npy (floats in [-1, 1]), F.png (a grid) or a new FOLDER of PNGs."
)
Sampler = Annotated[
    str | None,
    typer.Option("--sampler", metavar="S", help=f"How to draw: {', '.join(SAMPLERS)}; by default the model's own way."),
]
Split = Annotated[
    str, typer.Option("--split", metavar="P", help="Part of a source that has parts: train, test and so on.")
]
Inference = Annotated[
    str, typer.Option("--method", metavar="M", help=f"How latents are found: {', '.join(INFERENCE_METHODS)}.")
]


def generate(
    folder: ModelFolder,
    n: Annotated[int, typer.Option("-n", metavar="N", min=1, help="Number of images.")],
    out: Annotated[Path, IMAGES_OUT],
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
    generator = torch.Generator().manual_seed(seed % 2**63)
    with work_bar("generating", n) as bar, torch.no_grad(), images_out(out, n, model.image_shape) as write:
        for start in range(0, n, SAMPLE_BLOCK):
            z = model.prior.sample((min(SAMPLE_BLOCK, n - start),), generator=generator, **options)
            for block in z.split(ROWS):
                write(model.decode(block))
                bar.update(len(block))
    shape = model.image_shape
    if as_json:
        print(strict_json({"n": n, "shape": [n, *shape], "sampler": options["sampler"], "seed": seed}))
    else:
        print(f"{out}: {counted(n, 'image')} of {' x '.join(map(str, shape))}, by {options['sampler']}")


def reconstruct(
    folder: ModelFolder,
    images: ImagesSource,
    out: Annotated[Path | None, IMAGES_OUT] = None,
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
    _check_choice("--method", method, INFERENCE_METHODS)
    model = load_model(folder, device)
    pictures = _pictures(folder, model, images, key, split, limit)
    n, pairs = len(pictures), out is not None and out.suffix == ".png"
    if out is not None:
        check_images_out(out, 2 * n if pairs else n)
    generator, errors = torch.Generator().manual_seed(seed % 2**63), []
    columns = 2 * math.ceil(math.sqrt(n / 2)) if pairs else None
    writing = contextlib.nullcontext() if out is None else images_out(out, n, model.image_shape, columns=columns)
    with work_bar("reconstructing", n) as bar, writing as write:
        for x in pictures.batches(ROWS, device=model.device):
            reconstructed = model.reconstruct(x, method=method, generator=generator)
            errors.append((reconstructed.double() - x).square().flatten(1).mean(1).cpu())
            if write is not None:
                write(torch.stack([x, reconstructed], 1).flatten(0, 1) if pairs else reconstructed)
            bar.update(len(x))
    mean, stderr = mean_and_stderr(torch.cat(errors))
    if as_json:
        print(strict_json({"n": n, "mean_squared_error": mean, "stderr": stderr}))
        return
    print(f"{images}: {counted(n, 'image')}, squared error a pixel {mean:.5f}{plus_minus(stderr, '.5f')} by {method}")
    if out is not None:
        print(f"reconstructions in {out}")


def detect(
    folder: ModelFolder,
    images: ImagesSource,
    kind: Annotated[str, typer.Option("--kind", metavar="K", help=f"Score: {', '.join(SCORE_KINDS)}.")] = "joint",
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
    method: Inference = "mala",
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
    _check_choice("--kind", kind, SCORE_KINDS)
    _check_choice("--method", method, INFERENCE_METHODS)
    if out is not None:
        check_file(out)
    model = load_model(folder, device)
    pictures = _pictures(folder, model, images, key, split, limit)
    truth = _truth(pictures, images, labels_key, anomaly, split)
    n, generator, parts = len(pictures), torch.Generator().manual_seed(seed % 2**63), []
    options: dict[str, Any] = {} if kind == "marginal" else {"method": method}
    with work_bar("scoring", n) as bar:
        for x in pictures.batches(ROWS, device=model.device):
            parts.append(model.anomaly_score(x, kind=kind, generator=generator, **options).double().cpu())  # type: ignore[arg-type]
            bar.update(len(x))
    scores = torch.cat(parts)
    if out is not None:
        with array_file(out, (n,), "<f8") as file:
            file.write(scores.numpy().astype("<f8").tobytes())
    mean, stderr = mean_and_stderr(scores)
    figures: dict[str, Any] = {"n": n, "kind": kind, "mean": mean, "stderr": stderr}
    figures |= {"min": float(scores.min()), "median": float(scores.median()), "max": float(scores.max())}
    if truth is not None:
        figures |= metrics.average_precision(truth, scores)._asdict()
    if as_json:
        print(strict_json(figures))
        return
    print(f"{images}: {counted(n, 'image')}, {kind} score {mean:.3f}{plus_minus(stderr, '.3f')} nats")
    print(f"from {figures['min']:.3f} to {figures['max']:.3f}, median {figures['median']:.3f}; higher is odder")
    if truth is not None:
        print(f"average precision {figures['auprc']:.4f}; random scores reach {figures['prevalence']:.4f}")
    if out is not None:
        print(f"score of every image in {out}")


def evaluate(
    folder: ModelFolder,
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
    _check_choice("--features", features, list_feature_networks())
    _check_choice("--method", method, INFERENCE_METHODS)
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
    generator = torch.Generator().manual_seed(seed % 2**63)
    n = min(n, len(real), len(held_out))
    real, held_out = (part.subset(torch.randperm(len(part), generator=generator)[:n]) for part in (real, held_out))
    x = held_out.batch(torch.arange(n))
    reconstructed = []
    with work_bar("reconstructing", n) as bar:
        for block in x.split(ROWS):
            reconstructed.append(model.reconstruct(block, method=method, generator=generator).cpu())
            bar.update(len(block))
    with work_bar("generating"):
        generated = model.generate(n, generator=generator, **options).cpu()
    with work_bar("features and distances"):
        again = torch.cat(reconstructed).float()
        report = metrics.image_report(
            real.batch(torch.arange(n)), x, generated, again, network, network_name=None, seed=seed
        )
    report |= {"sampler": options["sampler"], "method": method, "seed": seed}
    if as_json:
        print(strict_json(report))
        return
    print(f"{report['images']:,} images each, features {report['feature_network']} ({report['features']})")
    print("\n                      Frechet      kernel")
    for name in ("generated", "reconstructions", "real"):
        row = report[name]
        print(f"  {name:<16} {row['frechet']:>12.4f}  {row['kernel']:>10.4g}{plus_minus(row['kernel_stderr'], '.2g')}")
    floor = report["reconstructions"]
    close = plus_minus(floor["mean_squared_error_stderr"], ".5f")
    print(f"\n  reconstructions' squared error a pixel {floor['mean_squared_error']:.5f}{close}")


COMMANDS = (generate, reconstruct, detect, evaluate)


def _pictures(
    folder: Path, model: LatentVariableModel, source: Path, key: str | None, split: str, limit: int | None
) -> Images:
    pictures = read_images(source, key=key, size=image_size(folder), split=split, limit=limit)
    check_images_fit(model, pictures, source)
    return pictures


def _sampler(model: LatentVariableModel, chosen: str | None) -> dict[str, Any]:
    if chosen is None:
        return model.sampler
    _check_choice("--sampler", chosen, SAMPLERS)
    return {"sampler": chosen}


def _truth(
    pictures: Images, source: Path, labels_key: str | None, anomaly: list[int] | None, split: str
) -> Tensor | None:
    """Return True for every image that is odd, or None where no labels say so."""
    labels = pictures.labels
    if labels_key is not None:
        values = np.asarray(open_images(source, Choice(labels_key, split=split))[0])
        if values.dtype.kind not in "iub" or values.ndim != 1 or len(values) < len(pictures):
            raise InvalidImagesError(
                f"{source}: {labels_key} has type {values.dtype} and shape {values.shape}; give one 0 or 1 for each of "
                f"{len(pictures)} images"
            )
        labels = torch.from_numpy(values[: len(pictures)].astype(np.int64))
    if anomaly:
        if labels is None:
            raise InvalidImagesError(
                f"{source}: has no labels from which --anomaly could take a class; leave it out, or use --labels-key"
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


def _check_choice(option: str, given: str, choices: tuple[str, ...]) -> None:
    if given not in choices:
        raise LatentPriorError(f"unknown {option} {given!r}: choose one of {', '.join(choices)}")
