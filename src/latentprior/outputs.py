"""Where results go: checked before the work begins, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .errors import LatentPriorError

__all__ = ["array_file", "check_file", "check_folder"]


def check_folder(folder: Path) -> None:
    """Raise now, not after hours of work, if files cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}.partial"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LatentPriorError(f"{folder}: cannot write there ({error.strerror}); choose another --out") from None


def check_file(path: Path) -> None:
    """Raise now if no ``.npy`` file of this name can be written."""
    if path.suffix != ".npy":
        raise LatentPriorError(f"--out {path}: give a name that ends in .npy")
    if path.is_dir():
        raise LatentPriorError(f"--out {path}: is a folder; give a file name that ends in .npy")
    check_folder(path.parent)


@contextlib.contextmanager
def array_file(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[BinaryIO]:
    """A file that takes the rows of a ``.npy``: renamed into place when whole, removed when not."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    try:
        with open(partial, "wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
