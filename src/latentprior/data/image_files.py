"""Images and labels out of files and folders: arrays, pictures, IDX, CIFAR-10 batches and Parquet; no pickles."""

from __future__ import annotations

import gzip
import itertools
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidImagesError, needs_extra
from .array_files import ARCHIVES, Archive, map_array, open_archive, reading
from .pictures import Choice, Pair, Row, columns_of, first_of, gather

__all__ = ["open_images"]

Array = NDArray[Any]

PICTURE_ENDINGS = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
PICKLED_CIFAR = frozenset({"batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))})
"""Names of the files of CIFAR-10's Python version."""
SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
CIFAR_RECORD_BYTES = 1 + 3 * 32 * 32
"""One label and the colours of 32 x 32 pixels."""
IDX_BYTES = 0x08
"""The third byte of an IDX file whose numbers are unsigned bytes."""
PARQUET_BATCH_ROWS = 256
"""Rows that are decoded at a time."""
LISTED_NAMES = 8
"""Most names of a folder's contents that an error lists."""


def open_images(path: Path, choice: Choice) -> Pair:
    """Find out what a file or folder holds and read it; see :func:`latentprior.data.images.read_images`."""
    with reading(path, InvalidImagesError):
        if path.is_dir():
            return _folder(path, choice)
        if not path.is_file():
            raise InvalidImagesError(f"{path}: no such file or folder")
        if path.suffix in ARCHIVES:
            with open_archive(path) as archive:
                return _from_archive(path, archive, choice)
        _check_split(path, choice.split)
        if path.suffix == ".npy":
            return map_array(path), None
        if path.suffix == ".bin":
            return _cifar_batch(path)
        if path.suffix == ".parquet":
            return _parquet([path], choice)
        return _idx_pair(path)


def _check_split(path: Path, split: str) -> None:
    # "train" is the default and says nothing about a file that was named; any other split must be the file's own.
    if split != "train" and split not in re.split(r"[^a-z]+", path.name.lower().replace("t10k", "test")):
        raise InvalidImagesError(f"{path}: is one set of images, not known as {split!r}; give the file of that split")


def _from_archive(path: Path, archive: Archive, choice: Choice) -> Pair:
    names, key, split = archive.names, choice.key, choice.split
    if key is not None and key not in names:
        raise InvalidImagesError(f"{path}: no array named {key!r} (it has: {archive.listing})")
    candidates = [f"x_{split}", f"{split}_images"]
    if split == "train":
        candidates += ["images", "x"]
        candidates += [name for name in names if len(names) == 1 and name not in ("x_test", "test_images")]
    key = key or first_of(candidates, names)
    if key is None:
        raise InvalidImagesError(
            f"{path}: no images of split {split!r} (it has: {archive.listing}); choose an array with key="
        )
    partner = "y" + key[1:] if key == "x" or key.startswith("x_") else key.replace("images", "labels")
    return archive.get(key), archive.get(partner) if partner in names and partner != key else None


def _idx(path: Path) -> Array:
    """Read an IDX array of bytes: two zero bytes, type, rank, big-endian sizes, data (mapped if not compressed)."""
    is_packed = path.suffix == ".gz"
    with gzip.open(path, "rb") if is_packed else open(path, "rb") as file:
        magic = file.read(4)
        _check_idx(path, magic)
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(magic[3]))
        size, start = math.prod(shape), 4 + 4 * magic[3]
        # One byte more than the header says shows that a file goes on; no more is unpacked, however much there is.
        data = file.read(size + 1) if is_packed else b""
    present = len(data) if is_packed else path.stat().st_size - start
    if present != size:
        raise InvalidImagesError(f"{path}: truncated or damaged ({present:,} bytes for {size:,} that its header says)")
    if is_packed or size == 0:
        return np.frombuffer(data, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=shape)


def _check_idx(path: Path, magic: bytes) -> None:
    if magic[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
        raise InvalidImagesError(f"{path}: is a Python pickle, never opened; give the binary version, .npz or .npy")
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise InvalidImagesError(
            f"{path}: unknown kind of file; give a folder of pictures, .npy, .npz, .safetensors, .parquet, "
            "IDX or CIFAR-10 .bin"
        )
    if magic[2] != IDX_BYTES:
        raise InvalidImagesError(f"{path}: holds IDX numbers of type {magic[2]:#04x}; only bytes (0x08) are images")


def _idx_pair(path: Path) -> Pair:
    """Read a file of images, and the file of their labels if it stands beside it."""
    images = _idx(path)
    if images.ndim < 3:
        raise InvalidImagesError(f"{path}: holds {images.ndim}-dimensional data (labels?); give the file of the images")
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace(f"idx{images.ndim}", "idx1")
    for name in (stem, f"{stem}.gz"):
        if stem != path.name.removesuffix(".gz") and path.with_name(name).is_file():
            labels = _idx(path.with_name(name))
            if labels.shape != images.shape[:1]:
                raise InvalidImagesError(
                    f"{path.with_name(name)}: {labels.shape} labels for {len(images)} images; give one an image"
                )
            return images, labels
    return images, None


def _cifar_batch(path: Path) -> Pair:
    """Map records of one label byte and 3 x 32 x 32 colour bytes."""
    size = path.stat().st_size
    n, rest = divmod(size, CIFAR_RECORD_BYTES)
    if rest or not n:
        raise InvalidImagesError(
            f"{path}: truncated or no CIFAR-10 batch ({size:,} bytes are no multiple of {CIFAR_RECORD_BYTES})"
        )
    records = np.memmap(path, np.uint8, mode="r", shape=(n, CIFAR_RECORD_BYTES))
    labels = np.array(records[:, 0])
    if labels.max() > 9:
        raise InvalidImagesError(f"{path}: label {labels.max()} in a CIFAR-10 batch; damaged, or another data set")
    return records[:, 1:].reshape(n, 3, 32, 32), labels


def _folder(folder: Path, choice: Choice) -> Pair:
    """Read the chosen split of a folder: which reader that takes, the names in it say."""
    names = sorted(path.name for path in folder.iterdir() if not _is_hidden(path.name))
    if pickles := PICKLED_CIFAR & set(names):
        raise InvalidImagesError(
            f"{folder}: holds the Python version of CIFAR-10 ({min(pickles)}), pickles that are never "
            "opened; give the binary version (data_batch_1.bin ...)"
        )
    subfolders = [name for name in names if (folder / name).is_dir()]
    batches = [folder / name for name in names if re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name)]
    arrays = [folder / name for name in names if re.search(r"images[-.]idx[34]-ubyte(\.gz)?$", name)]
    tables = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    if batches:
        pair = _cifar_split(batches, choice.split)
    elif arrays:
        pair = _idx_split(folder, arrays, choice.split)
    elif tables:
        pair = _parquet_split(tables, choice)
    elif subfolders and set(subfolders) <= SPLITS:
        pair = _pictures(folder / choice.split, choice) if choice.split in subfolders else None
    else:
        pair = _pictures(folder, choice) if choice.split == "train" else None
    if pair is None:
        listed = ", ".join(names[:LISTED_NAMES]) or "nothing"
        raise InvalidImagesError(f"{folder}: no images of split {choice.split!r} (it has: {listed})")
    return pair


def _is_hidden(name: str) -> bool:
    return name[0] == "." or name == "__MACOSX"


def _cifar_split(batches: list[Path], split: str) -> Pair | None:
    kind = {"train": "data_batch", "test": "test_batch"}.get(split)
    pairs = [_cifar_batch(path) for path in batches if kind and path.name.startswith(kind)]
    if not pairs:
        return None
    return np.concatenate([pixels for pixels, _ in pairs]), np.concatenate([labels for _, labels in pairs])


def _idx_split(folder: Path, arrays: list[Path], split: str) -> Pair | None:
    words = ("test", "t10k") if split == "test" else (split,)
    # A file and its compressed copy count as one.
    sets = {path.name.removesuffix(".gz"): path for path in arrays if any(word in path.name for word in words)}
    if len(sets) > 1:
        raise InvalidImagesError(f"{folder}: several sets ({', '.join(sets)}); give one of these files")
    return _idx_pair(next(iter(sets.values()))) if sets else None


def _parquet_split(tables: list[Path], choice: Choice) -> Pair | None:
    """Read the tables whose names hold the split's; tables that name no split are training data."""
    splits = {path: set(re.split(r"[^a-z]+", path.name)) & SPLITS for path in tables}
    chosen = [path for path in tables if choice.split in (splits[path] or {"train"})]
    return _parquet(chosen, choice) if chosen else None


def _pictures(folder: Path, choice: Choice) -> Pair:
    """Read all pictures below a folder; its subfolders, in sorted order, are the labels."""
    files = sorted(path for path in folder.rglob("*") if _is_picture(path, folder))
    if not files:
        raise InvalidImagesError(f"{folder}: holds no pictures ({', '.join(sorted(PICTURE_ENDINGS))})")
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    if classes and any(path.parent == folder for path in files):
        raise InvalidImagesError(f"{folder}: pictures both beside and in subfolders ({classes[0]}); give one of these")
    n = choice.at_most(len(files))
    if classes:
        # Sorted files are sorted by class: the first n could be one class.
        files = [files[i * len(files) // n] for i in range(n)]
    label = {name: k for k, name in enumerate(classes)}
    rows = (Row(str(path), path, label.get(path.relative_to(folder).parts[0])) for path in files[:n])
    return gather(rows, n, choice.size)


def _is_picture(path: Path, folder: Path) -> bool:
    is_visible = not any(_is_hidden(part) for part in path.relative_to(folder).parts)
    return path.suffix.lower() in PICTURE_ENDINGS and is_visible and path.is_file()


def _parquet(paths: list[Path], choice: Choice) -> Pair:
    with needs_extra("reading Parquet files", "datasets"):
        import pyarrow.parquet as pq
    files = [pq.ParquetFile(path) for path in paths]
    image, label = columns_of(str(paths[0]), files[0].schema_arrow.names, choice.key)

    def rows(path: Path, file: Any) -> Iterator[Row]:
        number = itertools.count()
        columns = [image] if label is None else [image, label]
        for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield Row(f"{path}, row {next(number)}", row[image], row[label] if label else None)

    n = choice.at_most(sum(file.metadata.num_rows for file in files))
    return gather(itertools.islice(itertools.chain.from_iterable(map(rows, paths, files)), n), n, choice.size)
