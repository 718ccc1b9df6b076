"""Images in: uint8 pixels kept as they are and normalised batch by batch, out of any common source."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from ..errors import InvalidImagesError, LatentPriorError
from .image_files import open_images
from .pictures import Row, channels_first, gather, square, store

__all__ = ["Images", "read_images"]

Array = NDArray[Any]
BLOCK = 1 << 10


class Images:
    r"""Images of one size, normalised on the fly: :math:`x = \mathrm{pixel} / 127.5 - 1 \in [-1, 1]`.

    Arrays are referenced, never copied, so a memory-mapped ``.npy`` larger than memory works. It is a map-style
    data set too: ``len(images)`` and ``images[i]``, a float32 tensor (C, H, W).

    Arguments
    ---------
    source : uint8 ``(n, H, W)``, ``(n, H, W, C)`` or ``(n, C, H, W)`` (channels first where both fit), or floats
        ``(n, C, H, W)`` in [-1, 1]; C is 1 or 3. Floats without any negative value are taken for [0, 1] and refused.
    labels : one integer an image, or None.

    Raises :class:`InvalidImagesError` for wrong types, shapes, ranges, no images, or labels that do not fit.

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

    def batch(
        self,
        index: Tensor | Array | list[int],
        generator: torch.Generator | None = None,
        *,
        flip: bool = False,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Return the images ``index`` as float32 ``(b, C, H, W)`` in [-1, 1].

        With ``flip`` each is mirrored left to right with probability one half, drawn from ``generator``.
        """
        # Bytes travel to the device, a quarter of what floats would be.
        x = self._pixels(_numbers(index, len(self))).to(device)
        x = x.float() / 127.5 - 1 if x.dtype == torch.uint8 else x.float()
        if flip:
            if generator is None:
                raise LatentPriorError("flip=True draws at random: pass generator=torch.Generator()")
            mirrored = torch.rand(len(x), generator=generator, device=generator.device) < 0.5
            x = torch.where(mirrored.to(x.device)[:, None, None, None], x.flip(-1), x)
        return x

    def batches(
        self,
        size: int,
        generator: torch.Generator | None = None,
        *,
        shuffle: bool = False,
        flip: bool = False,
        device: torch.device | str | None = None,
    ) -> Iterator[Tensor]:
        """Yield every image once in batches of ``size`` (the last may be smaller), in order or shuffled."""
        _positive(size, "size of a batch")
        if shuffle and generator is None:
            raise LatentPriorError("shuffle=True draws at random: pass generator=torch.Generator()")
        place = torch.device("cpu") if generator is None else generator.device
        order = torch.arange(len(self))
        if shuffle:
            order = torch.randperm(len(self), generator=generator, device=place).cpu()
        for index in order.split(size):
            yield self.batch(index, generator, flip=flip, device=device)

    def subset(self, index: Tensor | Array | slice | list[int]) -> Images:
        """Return the images ``index`` (numbers, a mask or a slice) with their labels; pixels are shared."""
        rows = torch.arange(len(self)) if self._rows is None else self._rows
        picked = index if isinstance(index, slice) else _numbers(index, len(self))
        part = copy.copy(self)
        part._rows = rows[picked]
        if part._rows.ndim != 1 or len(part._rows) == 0:
            raise InvalidImagesError(f"{self.name}: no image chosen; give at least one number in one dimension")
        part.labels = None if self.labels is None else self.labels[picked]
        return part

    def resized(self, size: int) -> Images:
        """Return images ``(C, size, size)``: the centre square, resized once (bilinear, antialiased)."""
        _positive(size, "size of an image")
        if self.shape[1:] == (size, size):
            return self
        kept: Array | None = None
        for start in range(0, len(self), BLOCK):
            block = square(self._pixels(torch.arange(start, min(start + BLOCK, len(self)))).cpu(), size).numpy()
            kept = store((len(self), *block.shape[1:]), block.dtype) if kept is None else kept
            kept[start : start + BLOCK] = block
        assert kept is not None
        resized = copy.copy(self)
        resized._source, resized._order, resized._rows = kept, (0, 1, 2), None
        return resized

    def _pixels(self, index: Tensor) -> Tensor:
        """Copy out rows as ``(b, C, H, W)``, of the type they are kept in."""
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
    numbers: Tensor = torch.as_tensor(index).cpu()
    if numbers.dtype == torch.bool and numbers.shape == (n,):
        return numbers.nonzero()[:, 0]
    if numbers.ndim != 1 or numbers.dtype == torch.bool or (numbers.is_floating_point() and len(numbers)):
        raise IndexError(f"index of type {numbers.dtype} and shape {tuple(numbers.shape)} for {n} images")
    return numbers.long()


def _as_images(source: Any, name: str) -> tuple[Tensor | Array, tuple[int, int, int]]:
    if isinstance(source, Tensor):
        source = source.detach()
        floating, kind_ok = source.is_floating_point(), source.dtype == torch.uint8
    else:
        try:
            source = np.asanyarray(source)
        except (ValueError, TypeError) as error:
            raise InvalidImagesError(f"{name} are not one rectangular array: {error}") from None
        floating, kind_ok = source.dtype.kind == "f" and source.dtype.itemsize <= 8, source.dtype == np.uint8
    if not (kind_ok or floating):
        raise InvalidImagesError(
            f"{name} have type {source.dtype}: give uint8 pixels from 0 to 255, or floats in [-1, 1]"
        )
    shape = tuple(source.shape)
    order = channels_first(shape[1:], floating) if shape else None
    if order is None:
        wanted = "floats (n, C, H, W)" if floating else "uint8 (n, H, W), (n, H, W, C) or (n, C, H, W)"
        raise InvalidImagesError(f"{name} have shape {shape}: give {wanted} with C = 1 or 3")
    if 0 in shape:
        raise InvalidImagesError(f"{name} are empty: shape {shape}")
    if floating:
        _check_range(source, name)
    return source, order


def _check_range(source: Tensor | Array, name: str) -> None:
    low, high = float("inf"), -float("inf")
    for start in range(0, len(source), BLOCK):
        block = source[start : start + BLOCK]
        ends = float(block.min()), float(block.max())
        if not np.isfinite(ends).all():
            raise InvalidImagesError(f"{name}: NaN or infinite pixels in images {start} to {start + len(block) - 1}")
        low, high = min(low, ends[0]), max(high, ends[1])
    # A little room for the rounding of x * 2 - 1 in half precision.
    if low < -1.001 or high > 1.001:
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


def _positive(value: Any, what: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise LatentPriorError(f"{what} is {value!r}: give a whole number of at least 1")


def read_images(
    source: Any,
    *,
    key: str | None = None,
    size: int | None = None,
    split: str = "train",
    limit: int | None = None,
) -> Images:
    """Read images, and their labels where the source has them. Nothing is downloaded, no pickle is opened.

    Arguments
    ---------
    source : :class:`Images`, an array or tensor (see there), or

        - a folder of pictures; subfolders are classes, labelled in sorted order; ``train`` and ``test`` are splits;
        - ``.npy`` (memory-mapped), ``.npz`` and ``.safetensors`` (``x_train`` and ``y_train``, ``train_images`` and
          ``train_labels``, ``images`` and ``labels``, or the only array);
        - MNIST's IDX files, plain (memory-mapped) or ``.gz``, labels beside them, or their folder;
        - the binary version of CIFAR-10: ``data_batch_1.bin`` (memory-mapped) or the folder of the batches;
        - ``.parquet``, or a folder of it, with a column ``image`` or ``img`` of encoded pictures;
        - a :class:`torch.utils.data.Dataset` of images, tuples (image, label) or dicts, or a Hugging Face
          ``datasets.Dataset`` or ``DatasetDict``.
    key : array, column or entry to read in place of the names above.
    size : side of the centre square that images are cut and resized to; None keeps their one size.
    split : which part of a source that has parts; a file that was named is all of itself.
    limit : at most so many images, the first ones; of a folder of classes, spread evenly over all files.

    Pictures and data sets are decoded once and kept as bytes, past 1 GiB in a temporary file.

    Raises :class:`InvalidImagesError` in one line for what is absent, damaged, of unknown kind or unequal sizes,
    :class:`MissingExtraError` where Pillow or pyarrow is needed and absent.
    """
    for value, what in ((size, "size"), (limit, "limit")):
        if value is not None:
            _positive(value, what)
    labels: Any = None
    name = "images"
    if isinstance(source, (str, Path)):
        name = str(source)
        source, labels = open_images(Path(source), key, size, split, limit)
    else:
        if type(source).__module__.partition(".")[0] == "datasets" and isinstance(source, Mapping):
            if split not in source:
                raise InvalidImagesError(f"the data set has no split {split!r} (it has: {', '.join(source)})")
            source = source[split]
        elif split != "train":
            raise InvalidImagesError(f"the source has no parts to choose {split!r} from: give that part itself")
        if type(source).__module__.partition(".")[0] == "datasets":
            source, labels = _gather(_table_rows(source, key), source, size, limit)
        elif isinstance(source, TensorDataset):
            source, labels = source.tensors[0], source.tensors[1] if len(source.tensors) > 1 else None
            if labels is not None and (labels.ndim != 1 or labels.is_floating_point()):
                labels = None
        elif isinstance(source, Dataset):
            source, labels = _gather(_dataset_rows(source, key), source, size, limit)
    images = source if isinstance(source, Images) else Images(source, labels=labels, name=name)
    if limit is not None and limit < len(images):
        images = images.subset(slice(limit))
    return images if size is None else images.resized(size)


def _gather(rows: Iterator[Row], source: Any, size: int | None, limit: int | None) -> tuple[Array, Any]:
    count = len(source) if isinstance(source, Sized) else limit
    if count is not None:
        count = min(limit or count, count)
    pixels, labels = gather(itertools.islice(rows, count), count, size)
    return np.asarray(pixels), labels


def _dataset_rows(dataset: Any, key: str | None) -> Iterator[Row]:
    # A map-style data set need not end an iteration by itself.
    by_number = hasattr(dataset, "__len__") and not hasattr(dataset, "__iter__")
    items: Iterable[Any] = (dataset[i] for i in range(len(dataset))) if by_number else dataset
    for i, item in enumerate(items):
        name, label = f"image {i} of the data set", None
        if isinstance(item, Mapping) and not {"bytes", "path"} <= set(item):
            if key is not None and key not in item:
                raise InvalidImagesError(f"{name}: no entry {key!r} (it has: {', '.join(map(str, item))})")
            label = item.get("label", item.get("labels"))
            item = item[key or next((k for k in ("image", "img") if k in item), next(iter(item)))]
        elif isinstance(item, (tuple, list)):
            item, label = item[0], item[1] if len(item) > 1 else None
        yield name, item, label


def _table_rows(table: Any, key: str | None) -> Iterator[Row]:
    import datasets

    names = table.column_names
    column = key or next((name for name in ("image", "img") if name in names), None)
    if column not in names:
        raise InvalidImagesError(f"the data set has no column {column or 'image'!r} (it has: {', '.join(names)})")
    if isinstance(table.features[column], datasets.Image):
        # Decoding is ours: the library would fetch a picture from an address.
        table = table.cast_column(column, datasets.Image(decode=False))
    label = next((name for name in ("label", "labels") if name in names), None)
    for i, row in enumerate(table.with_format(None)):
        yield f"row {i} of the data set", row[column], row[label] if label else None
