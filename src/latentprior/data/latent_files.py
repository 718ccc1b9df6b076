"""Latents in files: which arrays of a file are the rows, and which the scales of their posteriors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import InvalidLatentsError
from .array_files import ARCHIVES, Archive, map_array, open_archive, reading

__all__ = ["StoredLatents", "open_latents"]

PREFERRED = ("train", "z")
"""Names of the array that is taken from an archive of several, the first one that is there."""


class StoredLatents(NamedTuple):
    """The rows of a file, the scales of their posteriors or None, and what an error calls them."""

    mean: Any
    scale: Any
    name: str


def open_latents(path: Path, key: str | None) -> StoredLatents:
    """Read a file by its ending; see :func:`latentprior.data.latents.read_latents`."""
    if path.is_dir():
        raise InvalidLatentsError(f"{path}: is a folder; give a .npy, .npz or .safetensors file")
    if not path.is_file():
        raise InvalidLatentsError(f"{path}: no such file")
    with reading(path, InvalidLatentsError):
        if path.suffix == ".npy":
            return StoredLatents(map_array(path), None, str(path))
        if path.suffix in ARCHIVES:
            with open_archive(path) as archive:
                return _from_archive(path, archive, key)
    raise InvalidLatentsError(f"{path}: unknown kind of file; give .npy, .npz or .safetensors")


def _from_archive(path: Path, archive: Archive, key: str | None) -> StoredLatents:
    names = archive.names
    if key is None and {"mean", "scale"} <= set(names):
        return StoredLatents(archive.get("mean"), archive.get("scale"), str(path))
    if key is None:
        key = names[0] if len(names) == 1 else next((name for name in PREFERRED if name in names), None)
    if key is None:
        raise InvalidLatentsError(f"{path}: several arrays ({archive.listing}); choose one with --key / key=")
    if key not in names:
        raise InvalidLatentsError(f"{path}: no array named {key!r} (it has: {archive.listing})")
    return StoredLatents(archive.get(key), None, f"{path}[{key}]")
