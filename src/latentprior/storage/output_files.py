"""Where results go: checked before the work begins, written whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ..errors import LatentPriorError
from .checkpoint import check_lengths, write_whole
from .pictures import picture, picture_grid, pillow, png

__all__ = ["array_file", "check_file", "check_folder", "check_images_out", "images_out", "picture_grid", "write_whole"]

MOST_IN_GRID = 4096
"""Most images in one picture, 64 by 64 of them."""
ROOM = 160
"""Bytes of a path that a run may need for names inside its folder: states of its phases, events of TensorBoard."""


def check_folder(folder: Path, name: str = "", inside: str = "") -> None:
    """Raise :class:`LatentPriorError` now, not after hours of work, if a folder cannot be written.

    Parameters
    ----------
    folder : Path
        It is made if need be.
    name : str, optional
        A file, or a folder, that will be written in it.
    inside : str, optional
        The longest name in ``name``, if that is a folder.
    """
    # The longest name that is given to a file on its way.
    probe = folder / f".{name}.{os.getpid()}.partial"
    try:
        check_lengths(probe / inside if name else folder / ("x" * ROOM))
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise LatentPriorError(
            f"{folder / name}: cannot write there ({error.strerror}); choose another --out"
        ) from None


def check_file(path: Path) -> None:
    """Raise :class:`LatentPriorError` now if no ``.npy`` file of this name can be written."""
    if path.suffix != ".npy":
        raise LatentPriorError(f"--out {path}: give a name that ends in .npy")
    # Unlike Path.is_dir, this is False for names too long for the file system, which check_folder refuses.
    if os.path.isdir(path):
        raise LatentPriorError(f"--out {path}: is a folder; give a file name that ends in .npy")
    check_folder(path.parent, path.name)


@contextlib.contextmanager
def array_file(path: Path, shape: tuple[int, ...], dtype: str) -> Iterator[BinaryIO]:
    """Open a file for the rows of a ``.npy``; it is renamed into place when it is whole, and removed otherwise.

    Parameters
    ----------
    path : Path
        The ``.npy`` file.
    shape : tuple of int
        Shape of the whole array.
    dtype : str
        Its type in numpy's notation, such as ``"<f4"``.

    Raises
    ------
    LatentPriorError
        If the file system has no room for all of it.
    """
    size, free = math.prod(shape) * np.dtype(dtype).itemsize, shutil.disk_usage(path.parent).free
    if size > free:
        raise LatentPriorError(
            f"--out {path}: needs {size / 2**30:,.1f} GiB, {free / 2**30:,.1f} are free; ask for less"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    try:
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def check_images_out(out: Path, n: int) -> None:
    """Raise :class:`LatentPriorError` now if :func:`images_out` could not write ``n`` images to ``out``."""
    if out.suffix == ".npy":
        return check_file(out)
    if out.suffix not in (".png", ""):
        raise LatentPriorError(f"--out {out}: give a name that ends in .npy or .png, or a folder")
    pillow()
    if out.suffix == ".png":
        if os.path.isdir(out):
            raise LatentPriorError(f"--out {out}: is a folder; give a file name that ends in .png")
        if n > MOST_IN_GRID:
            raise LatentPriorError(
                f"--out {out}: a grid shows {MOST_IN_GRID:,} images at most, not {n:,}; give a folder or a .npy"
            )
    elif os.path.isdir(out) and any(out.iterdir()):
        raise LatentPriorError(
            f"--out {out}: holds files already; give a new folder, so that no other image joins them"
        )
    elif os.path.isfile(out):
        raise LatentPriorError(f"--out {out}: is a file; give a name that ends in .npy or .png, or a new folder")
    whole = Path(os.path.abspath(out))
    check_folder(whole.parent, whole.name, f"{n:05}.png" if out.suffix == "" else "")


@contextlib.contextmanager
def images_out(
    out: Path, n: int, shape: Sequence[int], *, columns: int | None = None
) -> Iterator[Callable[[Tensor], None]]:
    """Give a function that takes images ``(b, C, H, W)`` in [-1, 1] block by block; all appear on disk, or none.

    Parameters
    ----------
    out : Path
        A ``.npy`` for float32 ``(n, C, H, W)`` in [-1, 1], which :func:`latentprior.read_images` reads; a ``.png`` for
        one grid; otherwise a folder for ``00000.png`` and so on.
    n : int
        Number of images in all blocks together.
    shape : sequence of int
        Shape ``(C, H, W)`` of an image.
    columns : int, optional
        Images in a row of a grid; by default as many as make it about square.
    """
    if out.suffix == ".npy":
        with array_file(out, (n, *shape), "<f4") as file:

            def append(x: Tensor) -> None:
                file.write(x.cpu().numpy().astype("<f4").tobytes())

            yield append
    elif out.suffix == ".png":
        blocks: list[Tensor] = []
        yield blocks.append
        write_whole(out, picture_grid(torch.cat(blocks), columns=columns))
    else:
        whole = Path(os.path.abspath(out))
        partial = whole.with_name(f".{whole.name}.{os.getpid()}.partial")
        partial.mkdir()
        width = max(5, len(str(n - 1)))
        number = itertools.count()

        def write(x: Tensor) -> None:
            for image in x:
                (partial / f"{next(number):0{width}}.png").write_bytes(png(picture(image)))

        try:
            yield write
            if whole.is_dir():
                whole.rmdir()
            os.replace(partial, whole)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
