"""Files of arrays (``.npy``, ``.npz``, ``.safetensors``) that are read without ever opening a pickle."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open

from ..errors import InvalidImagesError, InvalidLatentsError, reason
from ..storage.checkpoint import UNREADABLE

__all__ = ["ARCHIVES", "Archive", "map_array", "open_archive", "reading"]

ARCHIVES = frozenset({".npz", ".safetensors"})
"""Endings of files that hold several named arrays."""
DECODERS = frozenset({"safetensors", "safetensors_rust", "zipfile", "zlib", "pyarrow"})
"""Libraries whose own errors mean that the file is damaged."""


class Archive(NamedTuple):
    """The names of a file's arrays, and what reads the array of a name."""

    names: list[str]
    get: Callable[[str], Any]

    @property
    def listing(self) -> str:
        """The names in one line, for an error."""
        return ", ".join(self.names) or "none"


def map_array(path: Path) -> NDArray[Any]:
    """Map a ``.npy`` file into memory, read-only; its rows are read when they are asked for."""
    return np.load(path, mmap_mode="r", allow_pickle=False)  # type: ignore[no-any-return]


@contextlib.contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """Open a ``.npz`` or ``.safetensors`` file; its arrays can be read until the context ends."""
    if path.suffix == ".safetensors":
        with safe_open(path, framework="pt") as tensors:
            yield Archive(list(tensors.keys()), tensors.get_tensor)
        return
    # numpy goes by the content and would also open a single array or a pickle, which have no names.
    if not zipfile.is_zipfile(path):
        raise zipfile.BadZipFile("no zip archive; write it with numpy.savez")
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
        yield Archive(arrays.files, arrays.__getitem__)


@contextlib.contextmanager
def reading(path: Path, error: type[InvalidImagesError | InvalidLatentsError]) -> Iterator[None]:
    """Turn what numpy, safetensors and others raise for a damaged file into ``error``, which names the file."""
    try:
        yield
    except error:
        raise
    except Exception as cause:
        if not isinstance(cause, UNREADABLE) and type(cause).__module__.partition(".")[0] not in DECODERS:
            raise
        damage = f"damaged or unreadable ({reason(cause)})"
        if any(word in str(cause).lower() for word in ("pickle", "object array", "python objects")):
            damage = "holds Python objects or is damaged; save plain numbers with numpy.save"
        raise error(f"{path}: {damage}") from None
