"""Pixels and labels out of files: pictures, IDX, CIFAR-10 batches, NumPy, safetensors and Parquet; no pickles."""

from __future__ import annotations

import gzip
import itertools
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidImagesError, MissingExtraError
from ..storage.checkpoint import UNREADABLE
from .pictures import Pair, Row, gather, one_line

__all__ = ["open_images"]

Array = NDArray[Any]

PICTURES = frozenset(
    [".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm", ".tif", ".tiff", ".webp"]
)
PICKLES = frozenset({"batches.meta", "test_batch", *(f"data_batch_{k}" for k in range(1, 6))})
SPLITS = frozenset({"train", "test", "val", "valid", "validation"})
DECODERS = frozenset({"safetensors", "safetensors_rust", "zipfile", "zlib", "pyarrow"})
"""Libraries whose own errors mean a damaged file."""
CIFAR_RECORD = 1 + 3 * 32 * 32


def open_images(path: Path, key: str | None, size: int | None, split: str, limit: int | None) -> Pair:
    """Find out what a file or folder holds and read it; see :func:`latentprior.data.images.read_images`."""
    try:
        if path.is_dir():
            return _folder(path, key, size, split, limit)
        if not path.is_file():
            raise InvalidImagesError(f"{path}: no such file or folder")
        if path.suffix == ".npz":
            # numpy would take an array or a pickle of that name for what it is: only a zip archive has named arrays.
            if not zipfile.is_zipfile(path):
                raise InvalidImagesError(f"{path}: damaged or no .npz archive; write it with numpy.savez")
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return _from_archive(path, archive.files, archive.__getitem__, key, split)
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as tensors:
                return _from_archive(path, list(tensors.keys()), tensors.get_tensor, key, split)
        _check_split(path, split)
        if path.suffix == ".npy":
            return np.load(path, mmap_mode="r", allow_pickle=False), None
        if path.suffix == ".bin":
            return _cifar(path)
        if path.suffix == ".parquet":
            return _parquet([path], key, size, limit)
        return _idx_pair(path)
    except InvalidImagesError:
        raise
    except UNREADABLE as error:
        raise InvalidImagesError(f"{path}: {_plain(error)}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in DECODERS:
            raise
        raise InvalidImagesError(f"{path}: damaged ({one_line(error)})") from None


def _plain(error: BaseException) -> str:
    if any(word in str(error).lower() for word in ("pickle", "object array", "python objects")):
        return "holds Python objects or is damaged; save plain uint8 arrays with numpy.save"
    return f"damaged or unreadable ({one_line(error)})"


def _check_split(path: Path, split: str) -> None:
    # "train" is the default and says nothing about a file that was named; any other split must be its own.
    if split != "train" and split not in re.split(r"[^a-z]+", path.name.lower().replace("t10k", "test")):
        raise InvalidImagesError(f"{path}: is one set of images, not known as {split!r}; give the file of that split")


def _from_archive(path: Path, names: list[str], get: Callable[[str], Any], key: str | None, split: str) -> Pair:
    listed = ", ".join(names) or "none"
    if key is not None and key not in names:
        raise InvalidImagesError(f"{path}: no array named {key!r} (it has: {listed})")
    parts = [f"x_{split}", f"{split}_images"]
    if split == "train":
        parts += ["images", "x"] + [name for name in names if len(names) == 1 and name not in ("x_test", "test_images")]
    key = key if key is not None else next((name for name in parts if name in names), None)
    if key is None:
        raise InvalidImagesError(f"{path}: no images of split {split!r} (it has: {listed}); choose an array with key=")
    partner = "y" + key[1:] if key == "x" or key.startswith("x_") else key.replace("images", "labels")
    return get(key), get(partner) if partner in names and partner != key else None


def _idx(path: Path) -> Array:
    """Read an IDX array of bytes: two zero bytes, type, rank, big-endian sizes, data (memory-mapped if plain)."""
    packed = path.suffix == ".gz"
    with gzip.open(path, "rb") if packed else open(path, "rb") as file:
        magic = file.read(4)
        if magic[:1] == b"\x80" or path.suffix in (".pkl", ".pickle", ".pt", ".pth"):
            raise InvalidImagesError(f"{path}: is a Python pickle, never opened; give the binary version, .npz or .npy")
        if len(magic) < 4 or magic[:2] != b"\0\0":
            raise InvalidImagesError(
                f"{path}: unknown kind of file; give a folder of pictures, .npy, .npz, .safetensors, .parquet, "
                "IDX or CIFAR-10 .bin"
            )
        if magic[2] != 8:
            raise InvalidImagesError(f"{path}: holds IDX numbers of type {magic[2]:#04x}; only bytes (0x08) are images")
        shape = tuple(int.from_bytes(file.read(4), "big") for _ in range(magic[3]))
        size, start = math.prod(shape), 4 + 4 * magic[3]
        # One byte more than promised tells a file that goes on; no more is unpacked, however much there is.
        data = file.read(size + 1) if packed else b""
    found = len(data) if packed else path.stat().st_size - start
    if found != size:
        raise InvalidImagesError(f"{path}: truncated or damaged ({found:,} bytes for {size:,} that its header says)")
    if packed or size == 0:
        return np.frombuffer(data, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, mode="r", offset=start, shape=shape)


def _idx_pair(path: Path) -> Pair:
    images = _idx(path)
    if images.ndim < 3:
        raise InvalidImagesError(f"{path}: holds {images.ndim}-dimensional data (labels?); give the file of the images")
    stem = path.name.removesuffix(".gz").replace("images", "labels").replace(f"idx{images.ndim}", "idx1")
    for name in (stem, f"{stem}.gz"):
        if stem != path.name.removesuffix(".gz") and path.with_name(name).is_file():
            labels = _idx(path.with_name(name))
            if labels.shape != images.shape[:1]:
                raise InvalidImagesError(f"{path.with_name(name)}: {labels.shape} labels for {len(images)} images")
            return images, labels
    return images, None


def _cifar(path: Path) -> Pair:
    """Read records of one label byte and 3 x 32 x 32 colour bytes, memory-mapped."""
    n, rest = divmod(path.stat().st_size, CIFAR_RECORD)
    if rest or not n:
        raise InvalidImagesError(
            f"{path}: truncated or no CIFAR-10 batch ({path.stat().st_size:,} bytes are no multiple of {CIFAR_RECORD})"
        )
    records = np.memmap(path, np.uint8, mode="r", shape=(n, CIFAR_RECORD))
    labels = np.array(records[:, 0])
    if labels.max() > 9:
        raise InvalidImagesError(f"{path}: label {labels.max()} in a CIFAR-10 batch; damaged, or another data set")
    return records[:, 1:].reshape(n, 3, 32, 32), labels


def _folder(folder: Path, key: str | None, size: int | None, split: str, limit: int | None) -> Pair:
    names = sorted(path.name for path in folder.iterdir() if path.name[0] != "." and path.name != "__MACOSX")
    if PICKLES & set(names):
        raise InvalidImagesError(
            f"{folder}: holds the Python version of CIFAR-10 ({min(PICKLES & set(names))}), pickles that are never "
            "opened; give the binary version (data_batch_1.bin ...)"
        )
    subfolders = [name for name in names if (folder / name).is_dir()]
    batches = [name for name in names if re.fullmatch(r"(data_batch_\d+|test_batch)\.bin", name)]
    arrays = [name for name in names if re.search(r"images[-.]idx[34]-ubyte(\.gz)?$", name)]
    tables = sorted([*folder.glob("*.parquet"), *folder.glob("data/*.parquet")])
    if batches:
        kind = {"train": "data_batch", "test": "test_batch"}.get(split)
        parts = [_cifar(folder / name) for name in batches if kind and name.startswith(kind)]
        if parts:
            return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
    elif arrays:
        words = ("test", "t10k") if split == "test" else (split,)
        chosen = {name.removesuffix(".gz"): name for name in arrays if any(word in name for word in words)}
        if len(chosen) > 1:
            raise InvalidImagesError(f"{folder}: several sets ({', '.join(chosen)}); give one of these files")
        if chosen:
            return _idx_pair(folder / next(iter(chosen.values())))
    elif tables:
        named = {path: set(re.split(r"[^a-z]+", path.name)) & SPLITS for path in tables}
        chosen_tables = [path for path in tables if split in named[path] or (split == "train" and not named[path])]
        if chosen_tables:
            return _parquet(chosen_tables, key, size, limit)
    elif subfolders and set(subfolders) <= SPLITS:
        if split in subfolders:
            return _pictures(folder / split, size, limit)
    elif split == "train":
        return _pictures(folder, size, limit)
    raise InvalidImagesError(f"{folder}: no images of split {split!r} (it has: {', '.join(names[:8]) or 'nothing'})")


def _pictures(folder: Path, size: int | None, limit: int | None) -> Pair:
    def below(path: Path) -> bool:
        parts = path.relative_to(folder).parts
        return path.suffix.lower() in PICTURES and not any(p[0] == "." or p == "__MACOSX" for p in parts)

    files = sorted(path for path in folder.rglob("*") if below(path) and path.is_file())
    classes = sorted({path.relative_to(folder).parts[0] for path in files if path.parent != folder})
    if not files:
        raise InvalidImagesError(f"{folder}: holds no pictures ({', '.join(sorted(PICTURES))})")
    if classes and any(path.parent == folder for path in files):
        raise InvalidImagesError(f"{folder}: pictures both beside and in subfolders ({classes[0]}); give one of these")
    n = min(limit or len(files), len(files))
    if classes:
        # Sorted files are sorted by class: the first so many would be one class.
        files = [files[i * len(files) // n] for i in range(n)]
    label = {name: k for k, name in enumerate(classes)}
    rows = ((str(p), p, label.get(p.relative_to(folder).parts[0])) for p in files[:n])
    return gather(rows, n, size)


def _parquet(paths: list[Path], key: str | None, size: int | None, limit: int | None) -> Pair:
    try:
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("reading Parquet files", "datasets") from None
    files = [pq.ParquetFile(path) for path in paths]
    names = files[0].schema_arrow.names
    image = key if key is not None else next((name for name in ("image", "img") if name in names), None)
    if image is None or image not in names:
        raise InvalidImagesError(f"{paths[0]}: no column {key or 'image'!r} (it has: {', '.join(names)}); give key=")
    label = next((name for name in ("label", "labels") if name in names), None)

    def rows(path: Path, file: Any) -> Iterator[Row]:
        number = itertools.count()
        columns = [image] if label is None else [image, label]
        for batch in file.iter_batches(batch_size=256, columns=columns):
            for row in batch.to_pylist():
                yield f"{path}, row {next(number)}", row[image], row[label] if label else None

    count = sum(file.metadata.num_rows for file in files)
    count = min(limit or count, count)
    return gather(itertools.islice(itertools.chain.from_iterable(map(rows, paths, files)), count), count, size)
