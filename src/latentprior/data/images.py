"""Images of one size, normalised on the fly, out of arrays, files, folders and data sets."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidImagesError, LatentPriorError
from .image_datasets import open_dataset
from .image_files import open_images
from .pictures import Choice, channels_first, square, store

__all__ = ["Images", "read_images"]

Array = NDArray[Any]
BLOCK_IMAGES = 1 << 10
"""Images that are checked and resized at a time: of 3 x 64 x 64 floats they take 48 MiB."""
ROUNDING = 1e-3
"""How far floats may lie outside [-1, 1]: x * 2 - 1 in half precision rounds by as much."""


class Images:
    r"""Images of one size, normalised on the fly: :math:`x = \mathrm{pixel} / 127.5 - 1 \in [-1, 1]`.

    It is a map-style data set too: ``len(images)``, and ``images[i]``, a float32 tensor ``(C, H, W)``.

    Parameters
    ----------
    source : array or Tensor
        uint8 pixels ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` (channels first where both fit), or floats
        ``(n, C, H, W)`` in [-1, 1]; C is 1 or 3. Floats without any negative value are taken for [0, 1] and refused.
        The array is referenced and never copied, so a memory-mapped ``.npy`` may be larger than memory.
    labels : array or Tensor, optional
        One integer an image, kept as an int64 tensor ``(n,)`` in the attribute ``labels``.
    name : str
        What error messages call the images.

    Raises
    ------
    InvalidImagesError
        For a type, shape or range that is none of the above, for no images, and for labels that do not fit.

    Examples
    --------
    >>> images = Images(torch.tensor([[[0, 255]], [[51, 204]]], dtype=torch.uint8))
    >>> images.batch(torch.tensor([1, 0])).squeeze()
    tensor([[-0.6000,  0.6000],
            [-1.0000,  1.0000]])
    """

    def __init__(self, source: Tensor | Array, *, labels: Any = None, name: str = "images") -> None:
        self.name = name
        self._source, self._order = _as_images(source, name)
        self._rows: Tensor | None = None
        self.labels = None if labels is None else _as_labels(labels, len(self._source), name)

    def __len__(self) -> int:
        return len(self._source) if self._rows is None else len(self._rows)

    def __getitem__(self, i: int) -> Tensor:
        if not -len(self) <= i < len(self):
            raise IndexError(f"{self.name}: no image {i} among {len(self)}")
        return self.batch(torch.tensor([i]))[0]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image."""
        sizes = tuple(int(k) for k in self._source.shape[1:])
        c, h, w = self._order
        return 1 if c < 0 else sizes[c], sizes[h], sizes[w]

    def batch(self, index: Tensor | Array | list[int], *, device: torch.device | str | None = None) -> Tensor:
        """Return chosen images as float32 ``(b, C, H, W)`` in [-1, 1].

        Parameters
        ----------
        index : Tensor, array or list of int
            Numbers of the images, or a mask ``(n,)``.
        device : torch.device or str, optional
            Where the images are wanted; by default where their source is.
        """
        # Bytes travel to the device, a quarter of what floats would be.
        x = self._pixels(_numbers(index, len(self))).to(device)
        return x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()

    def batches(self, size: int, *, device: torch.device | str | None = None) -> Iterator[Tensor]:
        """Yield every image once, in order, as float32 ``(size, C, H, W)`` in [-1, 1].

        Parameters
        ----------
        size : int
            Images a batch; the last batch may be smaller.
        device : torch.device or str, optional
            Where the images are wanted; by default where their source is.
        """
        _check_positive(size, "size of a batch")
        for index in torch.arange(len(self)).split(size):
            yield self.batch(index, device=device)

    def subset(self, index: Tensor | Array | slice | list[int]) -> Images:
        """Return chosen images with their labels; they share the pixels.

        Parameters
        ----------
        index : Tensor, array, list of int or slice
            Numbers of the images, a mask ``(n,)``, or a slice: at least one image.
        """
        rows = torch.arange(len(self)) if self._rows is None else self._rows
        chosen = index if isinstance(index, slice) else _numbers(index, len(self))
        part = copy.copy(self)
        part._rows = rows[chosen]
        if part._rows.ndim != 1 or len(part._rows) == 0:
            raise InvalidImagesError(f"{self.name}: no image chosen; give at least one number in one dimension")
        part.labels = None if self.labels is None else self.labels[chosen]
        return part

    def resized(self, size: int) -> Images:
        """Cut the centre square out of every image and resize it, once (bilinear, antialiased).

        Parameters
        ----------
        size : int
            Side of the result in pixels; images of that size are returned as they are.
        """
        _check_positive(size, "size of an image")
        if self.shape[1:] == (size, size):
            return self
        first = square(self._pixels(torch.tensor([0])).cpu(), size).numpy()
        squares = store((len(self), *first.shape[1:]), first.dtype)
        for index in torch.arange(len(self)).split(BLOCK_IMAGES):
            squares[index[0] : index[-1] + 1] = square(self._pixels(index).cpu(), size).numpy()
        resized = copy.copy(self)
        resized._source, resized._order, resized._rows = squares, (0, 1, 2), None
        return resized

    def _pixels(self, index: Tensor) -> Tensor:
        """Copy images out as ``(b, C, H, W)``, in the type of the source."""
        if self._rows is not None:
            index = self._rows[index]
        if isinstance(self._source, Tensor):
            x = self._source[index.to(self._source.device)]
        else:
            rows = np.ascontiguousarray(self._source[index.numpy()])
            x = torch.from_numpy(rows.astype(rows.dtype.newbyteorder("="), copy=False))
        c, h, w = self._order
        return x[:, None] if c < 0 else x.permute(0, c + 1, h + 1, w + 1)


def _numbers(index: Any, n: int) -> Tensor:
    """Return numbers of images, out of numbers or a mask ``(n,)``."""
    numbers: Tensor = torch.as_tensor(index).cpu()
    if numbers.dtype == torch.bool and numbers.shape == (n,):
        return numbers.nonzero()[:, 0]
    if numbers.ndim != 1 or numbers.dtype == torch.bool or (numbers.is_floating_point() and len(numbers)):
        raise IndexError(
            f"index of type {numbers.dtype} and shape {tuple(numbers.shape)} for {n} images: give numbers or a mask"
        )
    return numbers.long()


def _as_images(source: Any, name: str) -> tuple[Tensor | Array, tuple[int, int, int]]:
    """Return the pixels and which axes of an image are channels, height and width."""
    if isinstance(source, Tensor):
        source = source.detach()
        floating, is_bytes = source.is_floating_point(), source.dtype == torch.uint8
    else:
        try:
            source = np.asanyarray(source)
        except (ValueError, TypeError) as error:
            raise InvalidImagesError(f"{name} are not one rectangular array: {error}") from None
        floating = source.dtype.kind == "f" and source.dtype.itemsize <= 8
        is_bytes = source.dtype == np.uint8
    if not (is_bytes or floating):
        raise InvalidImagesError(
            f"{name} have type {source.dtype}: give uint8 pixels from 0 to 255, or floats in [-1, 1]"
        )
    shape = tuple(source.shape)
    order = channels_first(shape[1:], floating) if shape else None
    if order is None:
        layouts = "floats (n, C, H, W)" if floating else "uint8 (n, H, W), (n, H, W, C) or (n, C, H, W)"
        raise InvalidImagesError(f"{name} have shape {shape}: give {layouts} with C = 1 or 3")
    if 0 in shape:
        raise InvalidImagesError(f"{name} are empty: shape {shape}; give at least one image")
    if floating:
        _check_range(source, name)
    return source, order


def _check_range(source: Tensor | Array, name: str) -> None:
    low, high = float("inf"), -float("inf")
    for start in range(0, len(source), BLOCK_IMAGES):
        block = source[start : start + BLOCK_IMAGES]
        least, most = float(block.min()), float(block.max())
        if not np.isfinite([least, most]).all():
            raise InvalidImagesError(
                f"{name}: NaN or infinite pixels in images {start} to {start + len(block) - 1}; remove or mend them"
            )
        low, high = min(low, least), max(high, most)
    if low < -1 - ROUNDING or high > 1 + ROUNDING:
        raise InvalidImagesError(
            f"{name}: floats from {low:.4g} to {high:.4g}; give them in [-1, 1], or uint8 pixels from 0 to 255"
        )
    if low >= 0 and high > 0:
        raise InvalidImagesError(f"{name}: floats from {low:.4g} to {high:.4g} look like [0, 1]; give x * 2 - 1")


def _as_labels(labels: Any, n: int, name: str) -> Tensor:
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if values.dtype.kind not in "iu" or values.shape not in ((n,), (n, 1)):
        raise InvalidImagesError(
            f"labels of {name} have type {values.dtype} and shape {values.shape}: give one integer for each of {n}"
        )
    return torch.from_numpy(values.astype(np.int64).reshape(n))


def _check_positive(value: Any, name: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LatentPriorError(f"{name} is {value!r}: give a whole number of at least 1")


def read_images(
    source: Any, *, key: str | None = None, size: int | None = None, split: str = "train", limit: int | None = None
) -> Images:
    """Read images, and their labels where the source has them. Nothing is downloaded, and no pickle is opened.

    Pictures and data sets are decoded once and kept as bytes; where these take more than 1 GiB, in a temporary file.

    Parameters
    ----------
    source : Images, Tensor, array, str, Path or Dataset
        Images as an array (see :class:`Images`), or

        - a folder of pictures; subfolders are classes, labelled in sorted order; ``train`` and ``test`` are splits;
        - ``.npy`` (memory-mapped), ``.npz`` and ``.safetensors`` (``x_train`` and ``y_train``, ``train_images`` and
          ``train_labels``, ``images`` and ``labels``, or the only array);
        - MNIST's IDX files, plain (memory-mapped) or ``.gz``, with the labels beside them, or their folder;
        - the binary version of CIFAR-10: ``data_batch_1.bin`` (memory-mapped) or the folder of the batches;
        - ``.parquet``, or a folder of it, with a column ``image`` or ``img`` of encoded pictures;
        - a :class:`torch.utils.data.Dataset` of images, tuples (image, label) or dicts, or a Hugging Face
          ``datasets.Dataset`` or ``DatasetDict``.
    key : str, optional
        The array, column or entry to read in place of the names above.
    size : int, optional
        Side in pixels of the centre square that images are cut and resized to. By default images are kept as they
        are, and must have one size.
    split : str
        Which part to read of a source that has parts. A file that is named counts as the training data unless its
        name says otherwise.
    limit : int, optional
        Read at most so many images: the first ones, or, of a folder of classes, some that are spread evenly over all
        files.

    Raises
    ------
    InvalidImagesError
        For a source that is absent, damaged, of unknown kind, or of images of unequal sizes.
    MissingExtraError
        Where Pillow or pyarrow is needed and not installed.
    """
    for value, name in ((size, "size"), (limit, "limit")):
        if value is not None:
            _check_positive(value, name)
    choice, is_path = Choice(key, size, split, limit), isinstance(source, (str, Path))
    name = str(source) if is_path else "images"
    pixels, labels = open_images(Path(source), choice) if is_path else open_dataset(source, choice)
    images = pixels if isinstance(pixels, Images) else Images(pixels, labels=labels, name=name)
    if limit is not None and limit < len(images):
        images = images.subset(slice(limit))
    return images if size is None else images.resized(size)
