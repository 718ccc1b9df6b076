"""What a report is about: a saved prior or model, and the rows of data that it is held against."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.images import Images, read_images
from ..data.latents import Latents, as_latents
from ..density.bases import DistributionBase
from ..density.prior import LatentPrior
from ..errors import CheckpointError, InvalidImagesError, InvalidLatentsError, LatentPriorError
from ..models.model import ROWS, LatentVariableModel
from ..recipes.model_folders import image_size, load_model
from ..runtime.seeding import derived_generator

__all__ = ["Rows", "Subject", "check_images_fit", "check_latents_fit", "find", "load_folder", "may_have_parts"]

MOST_LATENTS = 20_000
MOST_IMAGES, MOST_PIXELS = 10_000, 1 << 24
"""Most images that are encoded, and most numbers in all of them together, 64 MiB of float32."""
MOST_FOREIGN_ROWS = 1_000
"""Most rows under a base of unknown cost, such as that of a two-stage VAE."""
MOST_CHAINS = 256
"""Most images whose latents are found by Markov chains, if there is no encoder."""


class Rows(NamedTuple):
    """Data in the latent space of a prior.

    ``z`` are draws of the target ``(n, *event_shape)``, ``codes`` the same without posterior noise, ``images``
    ``(n, C, H, W)`` if known, and ``numbers`` ``(n,)`` their places in the source ``name``.
    """

    z: Tensor
    codes: Tensor
    images: Tensor | None
    numbers: Tensor
    name: str

    def take(self, index: Tensor) -> Rows:
        """Return some of the rows."""
        images = None if self.images is None else self.images[index]
        return Rows(self.z[index], self.codes[index], images, self.numbers[index], self.name)


@dataclass(frozen=True)
class Subject:
    """A prior, its model if there is one, and the data at hand."""

    name: str
    prior: LatentPrior
    model: LatentVariableModel | None
    recipe: str | None
    rows: Rows | None
    """All training rows, among which the oddest are looked for."""
    train: Rows | None
    """Those of them that do not stand for held-out rows."""
    held_out: Rows | None
    separate: bool
    """Whether ``held_out`` was named as such; else it is a random half of the one set that was given."""

    @property
    def rows_name(self) -> str:
        """What to call the rows that samples are compared with."""
        return "held-out rows" if self.separate else "given rows"

    @property
    def sampler(self) -> dict[str, Any]:
        """How the model's method samples, as arguments of :meth:`LatentPrior.sample`."""
        return {"sampler": "smc"} if self.model is None else self.model.sampler


def check_latents_fit(prior: LatentPrior, latents: Latents, name: str | Path) -> None:
    """Raise :class:`InvalidLatentsError` if latents of this name have another shape than those of the prior."""
    if latents.event_shape != prior.event_shape:
        raise InvalidLatentsError(
            f"{name}: rows have shape {tuple(latents.event_shape)}, the prior was learned on "
            f"{tuple(prior.event_shape)}; give latents of the same decoder"
        )


def check_images_fit(model: LatentVariableModel, images: Images, name: str | Path) -> None:
    """Raise :class:`InvalidImagesError` if images of this name have another shape than those of the model."""
    if images.shape != tuple(model.image_shape):
        raise InvalidImagesError(
            f"{name}: images have shape {images.shape}, the model makes {tuple(model.image_shape)}; give images like "
            "those that it was trained on"
        )


def may_have_parts(path: Path) -> bool:
    """Whether images at this path may have parts; a single picture has none, whatever its name is."""
    return path.is_dir() or path.suffix in (".npz", ".safetensors")


def find(
    source: Any, latents: Any, images: Any, held_out: Any, *, seed: int, device: torch.device | str | None
) -> Subject:
    """Load a prior or model and its data: those given, or those that the demo left beside its prior.

    Parameters and errors are those of :func:`latentprior.write_report`.
    """
    name, model, recipe, size = type(source).__name__, None, None, None
    if isinstance(source, LatentVariableModel):
        model = source.moved(device)
        prior = model.prior
    elif isinstance(source, LatentPrior):
        prior = source.to(device)
    else:
        folder = Path(source)
        name = str(folder)
        prior, model = load_folder(folder, device)
        if model is not None:
            size, text = image_size(folder), folder / "config.yaml"
            recipe = text.read_text(encoding="utf-8", errors="replace") if text.is_file() else None
        elif latents is None:
            latents, images, held_out = _beside(folder, prior, images, held_out)
    rows, test = _Reader(prior, model, size, seed).both(latents, images, held_out)
    train, separate = rows, test is not None
    if rows is not None and test is None and len(rows.z) >= 4:
        order = torch.randperm(len(rows.z), generator=derived_generator(torch.device("cpu"), seed, "report", "halves"))
        half = len(order) // 2
        train, test = rows.take(order[half:].sort().values), rows.take(order[:half].sort().values)
    return Subject(name, prior, model, recipe, rows, train, test, separate)


def load_folder(folder: Path, device: torch.device | str | None) -> tuple[LatentPrior, LatentVariableModel | None]:
    """Load the prior in a folder that ``fit``, ``train`` or ``demo`` wrote, and its model if there is one."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give one that `latentprior fit`, `train` or `demo` wrote")
    # `demo` leaves its prior one folder down.
    for place in (folder, folder / "prior"):
        if _kind(place) == "prior":
            return LatentPrior.from_pretrained(place, device=device), None
    if _kind(folder) == "model" or (folder / "model").is_dir() or (folder / "config.yaml").is_file():
        model = load_model(folder, device)
        return model.prior, model
    if _kind(folder / "checkpoint") is not None:
        raise CheckpointError(f"{folder}: its learning has not ended; go on with the same command and --resume")
    raise CheckpointError(f"{folder}: holds no prior and no model; give a folder that `fit`, `train` or `demo` wrote")


def _kind(folder: Path) -> str | None:
    """Read what ``config.json`` says it describes, without the checks that loading makes."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return config.get("kind") if isinstance(config, dict) and isinstance(config.get("kind"), str) else None


def _beside(folder: Path, prior: LatentPrior, images: Any, held_out: Any) -> tuple[Any, Any, Any]:
    """Find the latents, images and held-out rows that ``latentprior demo`` leaves beside its prior."""
    root = folder if _kind(folder) is None else Path(os.path.abspath(folder)).parent
    parts = {name: root / name for name in ("results.json", "latents.npy", "test_latents.npy", "images.npz")}
    latents = parts["latents.npy"]
    if not all(path.is_file() for path in parts.values()) or as_latents(latents).event_shape != prior.event_shape:
        return None, images, held_out
    return (
        latents,
        parts["images.npz"] if images is None else images,
        (parts["test_latents.npy"] if held_out is None else held_out),
    )


class _Reader:
    """Turns sources of latents or images into :class:`Rows`."""

    def __init__(self, prior: LatentPrior, model: LatentVariableModel | None, size: int | None, seed: int) -> None:
        self.prior, self.model, self.size, self.seed = prior, model, size, seed

    def both(self, latents: Any, images: Any, held_out: Any) -> tuple[Rows | None, Rows | None]:
        """Training and held-out rows; images beside latents are those that the latents encode, in their order."""
        if latents is not None:
            pictures = None if images is None else self._pictures(images, "train")
            train = self._latents(latents, "train", pictures)
            return train, None if held_out is None else self._latents(held_out, "held-out", None)
        if images is None:
            if held_out is not None:
                raise LatentPriorError("held-out rows need rows beside them: give --latents or --images too")
            return None, None
        if self.model is None:
            raise InvalidImagesError(
                "a prior without a decoder cannot read images alone: give the latents that encode them as well"
            )
        return self._encoded(images, "train"), self._test_images(images, held_out)

    def _latents(self, source: Any, use: str, pictures: Images | None) -> Rows:
        latents: Latents = as_latents(source)
        name = str(source) if isinstance(source, (str, Path)) else f"{use} latents"
        check_latents_fit(self.prior, latents, name)
        if pictures is not None and len(pictures) != len(latents):
            raise InvalidImagesError(
                f"{len(pictures):,} images for {len(latents):,} latents: give those that the latents encode, in their "
                "order"
            )
        most = MOST_LATENTS if pictures is None else min(MOST_LATENTS, MOST_PIXELS // max(1, pictures[0].numel()))
        numbers = self._some(len(latents), most, use)
        z = latents.draw(numbers, self._generator(use), dtype=self.prior.dtype).reshape(-1, *self.prior.event_shape)
        return Rows(z, z, None if pictures is None else pictures.batch(numbers), numbers, name)

    def _test_images(self, images: Any, held_out: Any) -> Rows | None:
        if held_out is not None:
            return self._encoded(held_out, "train", "held-out")
        with contextlib.suppress(InvalidImagesError):
            if isinstance(images, (str, Path)) and may_have_parts(Path(images)):
                return self._encoded(Path(images), "test", "held-out")
        return None

    def _encoded(self, source: Any, split: str, use: str = "train") -> Rows:
        assert self.model is not None
        model = self.model
        pictures = self._pictures(source, split)
        # A held-out file without parts is read whole, so that "train" would be a wrong name for it.
        part = "" if split == "train" and use != "train" else f" ({split})"
        name = f"{source}{part}" if isinstance(source, (str, Path)) else f"{use} images"
        most = MOST_IMAGES if model.encoder is not None else MOST_CHAINS
        numbers = self._some(len(pictures), min(most, MOST_PIXELS // max(1, pictures[0].numel())), use)
        x, generator = pictures.batch(numbers), self._generator(use)
        z, codes = [], []
        with torch.no_grad():
            for block in x.to(model.prior.dtype).split(ROWS):
                block = block.to(model.device)
                if model.encoder is None:
                    row = code = model.infer(block, method="mala", generator=generator)
                else:
                    code, scale = model.encode(block)
                    noise = torch.randn(code.shape, generator=generator, dtype=code.dtype)
                    row = code if scale is None else code + scale * noise.to(code)
                z.append(row.cpu())
                codes.append(code.cpu())
        return Rows(torch.cat(z), torch.cat(codes), x, numbers, name)

    def _pictures(self, source: Any, split: str) -> Images:
        paths = isinstance(source, (str, Path))
        pictures = read_images(source, size=self.size, split=split if paths else "train")
        if self.model is not None:
            check_images_fit(self.model, pictures, source if paths else "these images")
        return pictures

    def _some(self, n: int, most: int, use: str) -> Tensor:
        if isinstance(self.prior.base, DistributionBase):
            most = min(most, MOST_FOREIGN_ROWS)
        return torch.randperm(n, generator=self._generator(f"{use} rows"))[: max(most, 4)].sort().values

    def _generator(self, use: str) -> torch.Generator:
        return derived_generator(torch.device("cpu"), self.seed, "report", use)
