"""Single pictures: decode them, order their axes, cut and resize them, stack them into one array."""

from __future__ import annotations

import contextlib
import io
import math
import shutil
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import InvalidImagesError, MissingExtraError

__all__ = ["Pair", "Row", "Upright", "channels_first", "gather", "one_line", "picture", "square"]

Array = NDArray[Any]
Pair = tuple["Tensor | Array", Any]
"""Pixels as one array, and a label each or None."""
Row = tuple[str, Any, Any]
"""What to call an image in an error, the image, its label or None."""

IN_MEMORY = 1 << 30
"""Decoded images of more bytes than this go to a memory-mapped temporary file."""


def channels_first(shape: tuple[int, ...], floating: bool) -> tuple[int, int, int] | None:
    """Return which axes of one image are (C, H, W), -1 for a channel axis to insert, or None if it is no image.

    Where both ``(C, H, W)`` and ``(H, W, C)`` fit, channels come first; floats are never channels-last.
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
    """Return an array to fill: in memory, or mapped to a temporary file that goes when the array does."""
    if math.prod(shape) * np.dtype(dtype).itemsize <= IN_MEMORY:
        return np.empty(shape, dtype)
    folder = tempfile.mkdtemp(prefix="latentprior-")
    mapped = np.lib.format.open_memmap(Path(folder) / "images.npy", mode="w+", dtype=dtype, shape=shape)
    weakref.finalize(mapped, shutil.rmtree, folder, ignore_errors=True)
    return mapped


def picture(source: Any, name: str) -> Array:
    """Decode a Pillow image, a path or the bytes of a file to uint8 ``(H, W)`` or ``(H, W, 3)``, upright.

    Bilevel and grey pictures stay grey, palettes become RGB, 16-bit grey is scaled to 8 bits, transparent pixels
    show white. Raises :class:`InvalidImagesError` that names a damaged file.
    """
    with _decoding(name):
        from PIL import Image, ImageOps

        if isinstance(source, Path):
            source = source.read_bytes()
        image = source if isinstance(source, Image.Image) else Image.open(io.BytesIO(source))
        return _eight_bits(ImageOps.exif_transpose(image), _is_deep(image), name)


class Upright:
    """A Pillow image, turned in place, whose pixels are read box by box: all at once would take far more memory.

    Raises what :func:`picture` raises, and gives the same pixels.
    """

    def __init__(self, image: Any, name: str) -> None:
        self._image, self._name, self._deep = image, name, _is_deep(image)
        with _decoding(name):
            from PIL import ImageOps

            ImageOps.exif_transpose(image, in_place=True)
        self.width, self.height = image.size

    def pixels(self, box: tuple[int, int, int, int]) -> Array:
        """Those from ``(left, top)`` to before ``(right, bottom)``, uint8 ``(H, W)`` or ``(H, W, 3)``."""
        with _decoding(self._name):
            return _eight_bits(self._image.crop(box), self._deep, self._name)


@contextlib.contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever is raised into :class:`InvalidImagesError`."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("reading pictures", "images") from None
    try:
        yield
    except InvalidImagesError:
        raise
    except FileNotFoundError:
        raise InvalidImagesError(f"{name}: no such file") from None
    except Exception as error:
        # Pillow's decoders raise almost anything on damaged input.
        raise InvalidImagesError(f"{name}: damaged or not a picture ({one_line(error)})") from None


def _is_deep(image: Any) -> bool:
    return bool(image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"))


def _eight_bits(image: Any, deep: bool, name: str) -> Array:
    from PIL import Image

    if deep:
        return np.rint(np.asarray(image) / 257).astype(np.uint8)
    if image.mode in ("I", "F"):
        raise InvalidImagesError(f"{name}: has 32-bit pixels; save it with 8 or 16 bits a channel")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return np.asarray(image.convert("L" if grey else "RGB"))


def gather(rows: Iterable[Row], count: int | None, size: int | None = None) -> Pair:
    """Stack images one by one to ``(n, C, H, W)``; grey ones among colour become colour.

    Arguments
    ---------
    rows : Pillow images, bytes of picture files, paths, ``{"bytes":, "path":}``, tensors or arrays.
    count : how many at most; None if unknown.
    size : side that each is cut and resized to; None keeps images, which must then have one size.
    """
    kept: Array | None = None
    labels: list[int] = []
    n = 0
    for name, image, label in rows:
        x = _one(image, name)
        if size is not None:
            x = square(x[None], size)[0]
        pixels = x.numpy()
        if kept is None:
            kept = store((count or 256, *pixels.shape), pixels.dtype)
        if pixels.shape[1:] != kept.shape[2:] or pixels.dtype != kept.dtype:
            raise InvalidImagesError(
                f"{name}: is {_size(pixels)}, the first image {_size(kept[0])}; make them alike, or give a size"
            )
        channels = max(kept.shape[1], len(pixels))
        if n == len(kept) or channels > kept.shape[1]:
            wider = store((max(len(kept), 2 * n), channels, *kept.shape[2:]), kept.dtype)
            wider[:n] = kept[:n]
            kept = wider
        kept[n] = pixels
        number = _integer(label)
        if number is not None:
            labels.append(number)
        n += 1
    if kept is None:
        raise InvalidImagesError("no images: the source is empty")
    return kept[:n], labels if len(labels) == n else None


def _one(image: Any, name: str) -> Tensor:
    if isinstance(image, Mapping) and "bytes" in image:
        # A path in a table is only ever opened as a file: nothing is fetched from an address.
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
    return f"{pixels.shape[1]} x {pixels.shape[2]} {pixels.dtype}"


def one_line(error: BaseException) -> str:
    """Return what an error says without line breaks, or else its name."""
    return " ".join(str(error).split()) or type(error).__name__
