"""Single pictures: decode them, order their axes, cut and resize them, stack them into one array."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InvalidImagesError, needs_extra, reason

__all__ = ["Choice", "Pair", "Row", "Upright", "channels_first", "columns_of", "first_of", "gather", "square", "store"]

Array = NDArray[Any]
Pair = tuple["Tensor | Array", Any]
"""Pixels as one array, and a label each or None."""

MEMORY_BYTES = 1 << 30
"""Decoded images that take more bytes than this go to a memory-mapped temporary file."""
STREAM_ROWS = 256
"""Images that there is room for at first, where nobody knows how many will come."""
SIXTEEN_TO_EIGHT_BITS = 257
"""65535 / 255: what a 16-bit grey is divided by."""
IMAGE_KEYS = ("image", "img")
LABEL_KEYS = ("label", "labels")
"""Names by which tables and data sets call the image and its label, the first one that is there."""


class Row(NamedTuple):
    """One image of a source, what an error calls it, and its label or None.

    The image is a Pillow image, the bytes of a picture file, a path, ``{"bytes":, "path":}``, a tensor or an array.
    """

    name: str
    image: Any
    label: Any


class Choice(NamedTuple):
    """What to read of a source of images; see :func:`latentprior.data.images.read_images`."""

    key: str | None = None
    size: int | None = None
    split: str = "train"
    limit: int | None = None

    def at_most(self, count: int) -> int:
        """How many of ``count`` images are wanted."""
        return min(self.limit or count, count)


def first_of(names: Iterable[str], present: Collection[Any]) -> str | None:
    """Return the first of the names that is present, or None."""
    return next((name for name in names if name in present), None)


def columns_of(table: str, names: list[str], key: str | None) -> tuple[str, str | None]:
    """Return the columns of a table that hold the images, by default by their name, and their labels, if any."""
    image = key or first_of(IMAGE_KEYS, names)
    if image is None or image not in names:
        raise InvalidImagesError(f"{table} has no column {image or 'image'!r} (it has: {', '.join(names)}); give key=")
    return image, first_of(LABEL_KEYS, names)


def channels_first(shape: tuple[int, ...], floating: bool) -> tuple[int, int, int] | None:
    """Return which axes of one image are channels (-1: to be inserted), height and width; None if it is no image.

    Where both ``(C, H, W)`` and ``(H, W, C)`` fit, channels come first. Floats never have them last.
    """
    if len(shape) == 2 and not floating:
        return -1, 0, 1
    if len(shape) == 3 and shape[0] in (1, 3):
        return 0, 1, 2
    return (2, 0, 1) if len(shape) == 3 and shape[2] in (1, 3) and not floating else None


def square(x: Tensor, size: int) -> Tensor:
    """Cut the centre square out of ``(n, C, H, W)`` and resize it to ``size`` (bilinear, antialiased)."""
    side = min(x.shape[-2:])
    top, left = (x.shape[-2] - side) // 2, (x.shape[-1] - side) // 2
    x = x[..., top : top + side, left : left + side]
    if side == size:
        return x
    resized = interpolate(x.float(), (size, size), mode="bilinear", antialias=True)
    if x.dtype == torch.uint8:
        return resized.round().clamp(0, 255).to(torch.uint8)
    return resized.clamp(-1, 1).to(x.dtype)


def store(shape: tuple[int, ...], dtype: Any) -> Array:
    """Return an array to fill: in memory, or mapped to a temporary file that is removed together with the array."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= MEMORY_BYTES:
        return np.empty(shape, dtype)
    folder = tempfile.mkdtemp(prefix="latentprior-")
    mapped = np.lib.format.open_memmap(Path(folder) / "images.npy", mode="w+", dtype=dtype, shape=shape)
    weakref.finalize(mapped, shutil.rmtree, folder, ignore_errors=True)
    return mapped


def picture(source: Any, name: str) -> Array:
    """Decode a Pillow image, a file or its bytes to uint8 ``(H, W)`` or ``(H, W, 3)``, and turn it upright.

    Bilevel and grey pictures stay grey, palettes become RGB, 16-bit grey is scaled to 8 bits, and transparent pixels
    show white. A file that is absent, damaged or no picture raises :class:`InvalidImagesError`.
    """
    with _decoding(name):
        from PIL import Image, ImageOps

        if isinstance(source, Path):
            source = source.read_bytes()
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        return _eight_bits(ImageOps.exif_transpose(image), _is_deep(image), name)


class Upright:
    """A Pillow image, turned upright in place, whose pixels are read box by box, in far less memory than all at once.

    The pixels and the errors are those of :func:`picture`.
    """

    def __init__(self, image: Any, name: str) -> None:
        self._image, self._name, self._deep = image, name, _is_deep(image)
        with _decoding(name):
            from PIL import ImageOps

            ImageOps.exif_transpose(image, in_place=True)
        self.width, self.height = image.size

    def pixels(self, box: tuple[int, int, int, int]) -> Array:
        """Read those from ``(left, top)`` to before ``(right, bottom)``, uint8 ``(H, W)`` or ``(H, W, 3)``."""
        with _decoding(self._name):
            return _eight_bits(self._image.crop(box), self._deep, self._name)


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever is raised into :class:`InvalidImagesError`."""
    with needs_extra("reading pictures", "images"):
        import PIL  # noqa: F401
    try:
        yield
    except InvalidImagesError:
        raise
    except FileNotFoundError:
        raise InvalidImagesError(f"{name}: no such file") from None
    except Exception as error:
        # Pillow's decoders raise almost any kind of error for a damaged file.
        raise InvalidImagesError(f"{name}: damaged or not a picture ({reason(error)})") from None


def _is_deep(image: Any) -> bool:
    """Whether the picture is grey with 16 bits a pixel."""
    return bool(image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"))


def _eight_bits(image: Any, deep: bool, name: str) -> Array:
    from PIL import Image

    if deep:
        return np.rint(np.asarray(image) / SIXTEEN_TO_EIGHT_BITS).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise InvalidImagesError(f"{name}: has 32-bit pixels; save it with 8 or 16 bits a channel")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if grey else "RGB"))


def gather(rows: Iterable[Row], count: int | None, size: int | None = None) -> Pair:
    """Stack images one by one to ``(n, C, H, W)``; grey ones among colour become colour.

    ``count`` says how many there are at most, if that is known. Without a ``size`` to cut and resize them to, all must
    have one size. There are labels only where every image has one.
    """
    stack: Array | None = None
    labels: list[int] = []
    n = 0
    for row in rows:
        x = _one(row.image, row.name)
        pixels = (x if size is None else square(x[None], size)[0]).numpy()
        if stack is None:
            stack = store((count or STREAM_ROWS, *pixels.shape), pixels.dtype)
        if pixels.shape[1:] != stack.shape[2:] or pixels.dtype != stack.dtype:
            raise InvalidImagesError(
                f"{row.name}: is {_size(pixels)}, the first image {_size(stack[0])}; make them alike, or give a size"
            )
        stack = _with_room(stack, n, len(pixels))
        stack[n] = pixels
        n += 1
        label = _integer(row.label)
        if label is not None:
            labels.append(label)
    if stack is None:
        raise InvalidImagesError("no images: the source is empty; give one that holds at least one image")
    return stack[:n], labels if len(labels) == n else None


def _with_room(stack: Array, n: int, channels: int) -> Array:
    """Return the stack itself, or a copy with twice the rows where it is full, or with more channels if need be."""
    channels = max(stack.shape[1], channels)
    if n < len(stack) and channels == stack.shape[1]:
        return stack
    larger = store((max(len(stack), 2 * n), channels, *stack.shape[2:]), stack.dtype)
    larger[:n] = stack[:n]
    return larger


def _one(image: Any, name: str) -> Tensor:
    if isinstance(image, Mapping) and "bytes" in image:
        # A path in a table is opened as a file and as nothing else: no address is fetched from.
        image = Path(image.get("path") or "absent") if image["bytes"] is None else image["bytes"]
    if isinstance(image, (bytes, Path)) or type(image).__module__.startswith("PIL."):
        image = picture(image, name)
    try:
        x = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    except (TypeError, ValueError):
        raise InvalidImagesError(f"{name}: is no image; give a Pillow image, a tensor or an array") from None
    floating = x.is_floating_point()
    order = channels_first(tuple(x.shape), floating) if floating or x.dtype == torch.uint8 else None
    if order is None:
        raise InvalidImagesError(
            f"{name}: has type {x.dtype} and shape {tuple(x.shape)}; "
            "give uint8 (H, W), (H, W, C) or (C, H, W), or floats (C, H, W) in [-1, 1], C 1 or 3"
        )
    return x[None] if order[0] < 0 else (x.float() if floating else x).permute(order)


def _integer(label: Any) -> int | None:
    if isinstance(label, Tensor):
        label = label.detach().cpu().numpy()
    value = np.asarray(label)
    return int(value.item()) if value.size == 1 and value.dtype.kind in "iu" else None


def _size(pixels: Array) -> str:
    """Height, width and type in words."""
    return f"{pixels.shape[1]} x {pixels.shape[2]} {pixels.dtype}"
