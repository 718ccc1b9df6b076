"""What a report is about: a saved prior or model, and the rows of data that it is held against."""

from __future__ import annotations

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
from ..recipes.model_folders import image_size, load_model, sampler_options
from ..runtime.seeding import derived_generator

__all__ = ["Rows", "Subject", "find", "load_folder"]

LATENT_ROWS = 20_000
IMAGE_ROWS, PIXELS = 10_000, 1 << 24
"""Most images that are encoded, and most of their numbers."""
FOREIGN_ROWS = 1_000
"""Most rows under a base of unknown cost, such as a two-stage VAE's."""
CHAINED_ROWS = 256
"""Most images whose latents Markov chains find, where there is no encoder."""


class Rows(NamedTuple):
    """Data in the latent space of a prior.

    ``z`` draws of the target ``(n, *event_shape)``, ``codes`` the same without posterior noise, ``images``
    ``(n, C, H, W)`` if known, ``numbers`` ``(n,)`` their places in the source, which is called ``name``.
    """

    z: Tensor
    codes: Tensor
    images: Tensor | None
    numbers: Tensor
    name: str

    def taken(self, index: Tensor) -> Rows:
        """Some of the rows."""
        images = None if self.images is None else self.images[index]
        return Rows(self.z[index], self.codes[index], images, self.numbers[index], self.name)


@dataclass(frozen=True)
class Subject:
    """A prior, its model if there is one, and the data at hand."""

    name: str
    prior: LatentPrior
    model: LatentVariableModel | None
    recipe: str | None
    train: Rows | None
    held_out: Rows | None
    separate: bool
    """Whether ``held_out`` was named as such; else it is a random half of the one set that was given."""

    @property
    def sampler(self) -> dict[str, Any]:
        """How the model's method samples, as arguments of :meth:`LatentPrior.sample`."""
        return {"sampler": "smc"} if self.model is None else sampler_options(self.model)


class _Given(NamedTuple):
    latents: Any
    images: Any
    held_out: Any


def find(
    source: Any, latents: Any, images: Any, held_out: Any, *, seed: int, device: torch.device | str | None
) -> tuple[Subject, Rows | None]:
    """Load a prior or model and the data given, or found beside a prior that the demo left.

    The rows beside the subject are all that were given to learn from. Arguments and errors are those of
    :func:`latentprior.write_report`.
    """
    folder, recipe = None, None
    if isinstance(source, LatentVariableModel):
        name, model, prior = type(source).__name__, source.moved(device), source.moved(device).prior
    elif isinstance(source, LatentPrior):
        name, model, prior = type(source).__name__, None, source.to(device)
    else:
        folder = Path(source)
        name = str(folder)
        prior, model = load_folder(folder, device)
        text = folder / "config.yaml"
        known = model is not None and text.is_file()
        recipe = text.read_text(encoding="utf-8", errors="replace") if known else None
    given = _Given(latents, images, held_out)
    if folder is not None and model is None and latents is None:
        given = _beside(folder, prior, given)
    size = None if folder is None or model is None else image_size(folder)
    train, test = _Reader(prior, model, size, seed).both(given)
    whole, separate = train, test is not None
    if train is not None and test is None and len(train.z) >= 4:
        order = torch.randperm(len(train.z), generator=derived_generator(torch.device("cpu"), seed, "report", "halves"))
        half = len(order) // 2
        train, test = train.taken(order[half:].sort().values), train.taken(order[:half].sort().values)
    return Subject(name, prior, model, recipe, train, test, separate), whole


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
    """What ``config.json`` says it describes, unchecked: whoever loads it checks it."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found.get("kind") if isinstance(found, dict) and isinstance(found.get("kind"), str) else None


def _beside(folder: Path, prior: LatentPrior, given: _Given) -> _Given:
    """The latents and images that ``latentprior demo`` leaves beside its prior."""
    root = folder if _kind(folder) is None else Path(os.path.abspath(folder)).parent
    parts = {name: root / name for name in ("results.json", "latents.npy", "test_latents.npy", "images.npz")}
    if not all(path.is_file() for path in parts.values()):
        return given
    found = as_latents(parts["latents.npy"])
    if found.event_shape != prior.event_shape:
        return given
    test = parts["test_latents.npy"] if given.held_out is None else given.held_out
    return _Given(parts["latents.npy"], parts["images.npz"] if given.images is None else given.images, test)


class _Reader:
    """Turns sources of latents or images into :class:`Rows`."""

    def __init__(self, prior: LatentPrior, model: LatentVariableModel | None, size: int | None, seed: int) -> None:
        self.prior, self.model, self.size, self.seed = prior, model, size, seed

    def both(self, given: _Given) -> tuple[Rows | None, Rows | None]:
        """Training and held-out rows; images beside latents are those that the latents encode, in their order."""
        if given.latents is None and given.images is None:
            if given.held_out is not None:
                raise LatentPriorError("held-out rows need rows beside them: give --latents or --images too")
            return None, None
        if given.latents is None:
            if self.model is None:
                raise InvalidImagesError(
                    "a prior without a decoder cannot read images alone: give the latents that encode them as well"
                )
            return self._encoded(given.images, "train"), self._test_images(given)
        pictures = None if given.images is None else self._pictures(given.images, "train")
        train = self._latents(given.latents, "train", pictures)
        return train, None if given.held_out is None else self._latents(given.held_out, "held-out", None)

    def _latents(self, source: Any, use: str, pictures: Images | None) -> Rows:
        latents: Latents = as_latents(source)
        name = str(source) if isinstance(source, (str, Path)) else f"{use} latents"
        shape = self.prior.event_shape
        if latents.event_shape != shape:
            raise InvalidLatentsError(
                f"{name}: rows have shape {tuple(latents.event_shape)}, the prior was learned on {tuple(shape)}; "
                "give latents of the same decoder"
            )
        if pictures is not None and len(pictures) != len(latents):
            raise InvalidImagesError(
                f"{len(pictures):,} images for {len(latents):,} latents: give those that the latents encode, in their "
                "order"
            )
        most = LATENT_ROWS if pictures is None else min(LATENT_ROWS, PIXELS // max(1, pictures[0].numel()))
        numbers = self._some(len(latents), most, use)
        z = latents.draw(numbers, self._draws(use), dtype=self.prior.dtype).reshape(-1, *shape)
        return Rows(z, z, None if pictures is None else pictures.batch(numbers), numbers, name)

    def _test_images(self, given: _Given) -> Rows | None:
        if given.held_out is not None:
            return self._encoded(given.held_out, "train", "held-out")
        if not isinstance(given.images, (str, Path)):
            return None
        path = Path(given.images)
        # A lone file of images has no parts, whatever its name.
        if not path.is_dir() and path.suffix not in (".npz", ".safetensors"):
            return None
        try:
            return self._encoded(path, "test", "held-out")
        except InvalidImagesError:
            return None

    def _encoded(self, source: Any, split: str, use: str = "train") -> Rows:
        assert self.model is not None
        model = self.model
        pictures = self._pictures(source, split)
        # A held-out file without parts is read whole, and "train" would misname it.
        part = "" if split == "train" and use != "train" else f" ({split})"
        name = f"{source}{part}" if isinstance(source, (str, Path)) else f"{use} images"
        most = IMAGE_ROWS if model.encoder is not None else CHAINED_ROWS
        numbers = self._some(len(pictures), min(most, PIXELS // max(1, pictures[0].numel())), use)
        x, draws = pictures.batch(numbers), self._draws(use)
        z, codes = [], []
        with torch.no_grad():
            for block in x.to(model.prior.dtype).split(ROWS):
                block = block.to(model.device)
                if model.encoder is None:
                    found = model.infer(block, method="mala", generator=draws)
                    code = found
                else:
                    code, scale = model.encode(block)
                    noise = torch.randn(code.shape, generator=draws, dtype=code.dtype)
                    found = code if scale is None else code + scale * noise.to(code)
                z.append(found.cpu())
                codes.append(code.cpu())
        return Rows(torch.cat(z), torch.cat(codes), x, numbers, name)

    def _pictures(self, source: Any, split: str) -> Images:
        paths = isinstance(source, (str, Path))
        pictures = read_images(source, size=self.size, split=split if paths else "train")
        shape = getattr(None if self.model is None else self.model.decoder, "image_shape", None)
        if shape is not None and pictures.shape != tuple(shape):
            raise InvalidImagesError(
                f"{source if paths else 'images'}: have shape {pictures.shape}, the model makes {tuple(shape)}; give "
                "images like those that it was trained on"
            )
        return pictures

    def _some(self, n: int, most: int, use: str) -> Tensor:
        if isinstance(self.prior.base, DistributionBase):
            most = min(most, FOREIGN_ROWS)
        return torch.randperm(n, generator=self._draws(f"{use} rows"))[: max(most, 4)].sort().values

    def _draws(self, use: str) -> torch.Generator:
        return derived_generator(torch.device("cpu"), self.seed, "report", use)
