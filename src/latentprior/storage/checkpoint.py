"""Atomic, pickle-free saving: one JSON file and one safetensors file a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import re
import stat
import sys
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .._version import __version__
from ..errors import CheckpointError

__all__ = [
    "FORMAT_VERSION",
    "UNFIT",
    "UNREADABLE",
    "check_lengths",
    "load_state",
    "locked",
    "read_config",
    "save_state",
    "tensors_under",
    "write_whole",
]

FORMAT = "latentprior"
FORMAT_VERSION = 1
MOST_NESTED = 64
CONFIG_LIMIT = 64 << 20
LOCK = ".lock"
LONGEST = 64
"""Most bytes in the name of a file that is saved in a folder, while it is written: ``.KIND-<digest>...partial``."""

UNFIT = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, ArithmeticError, MemoryError)
"""What rebuilding an object may raise where a document, whole as it is, describes none."""
UNREADABLE = (*UNFIT, OSError, EOFError, SyntaxError, zipfile.BadZipFile, tokenize.TokenError)
"""What numpy and the standard library raise for a damaged file of arrays."""


def save_state(folder: str | Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``KIND-<digest>.safetensors`` so that a kill at any moment leaves old or new.

    The JSON names the tensor file and is renamed into place last: it is the commit. Each file is written beside
    its place, flushed to disk and renamed. Raises :class:`CheckpointError` where the folder cannot be written.
    """
    folder = Path(folder)
    # Copies: tensors of one storage, as tied weights are, would be refused.
    blob = save({name: value.detach().cpu().clone().contiguous() for name, value in tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    weights = f"{kind}-{digest[:16]}.safetensors"
    head = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "written_by": f"latentprior {__version__}",
        "kind": kind,
        "weights": weights,
        "sha256": digest,
    }
    try:
        document = {**head, **config}
        if not _is_shallow(document):
            raise ValueError(f"nested more than {MOST_NESTED} deep")
        text = json.dumps({**document, "checksum": _checksum(document)}, indent=1, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: cannot save (the configuration is not JSON: {error})") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _turn(folder):
            write_whole(folder / weights, blob)
            write_whole(folder / "config.json", text.encode())
            for stale in folder.iterdir():
                ours = re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.safetensors", stale.name) and stale.name != weights
                half = r"\.(config\.json|[a-z]+-[0-9a-f]{16}\.safetensors)\.\d+\.partial"
                if ours or re.fullmatch(half, stale.name):
                    stale.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save ({error.strerror or error})") from None


def _is_shallow(value: Any) -> bool:
    """Whether containers stand in one another no deeper than those who walk through them can go."""
    level = [value]
    for _ in range(MOST_NESTED):
        parts = [
            part.values() if isinstance(part, dict) else part for part in level if isinstance(part, (dict, list, tuple))
        ]
        level = [entry for part in parts for entry in part]
        if not level:
            return True
    return False


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in document.items() if k != "checksum"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait until no other process saves there: each removes the tensors that its own configuration does not name."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def locked(folder: str | Path | None) -> Iterator[None]:
    """Keep a folder to one run; the system lets go of it when the process ends, however it ends.

    Without a folder, and on file systems without locks, nothing is kept. Raises :class:`CheckpointError` where another
    run holds it or it cannot be written.
    """
    if folder is None or sys.platform == "win32":
        yield
        return
    folder = Path(folder)
    made = not os.path.exists(folder)
    try:
        check_lengths(folder / ("x" * LONGEST))
        folder.mkdir(parents=True, exist_ok=True)
        handle = _hold(folder / LOCK)
    except BlockingIOError as error:
        raise CheckpointError(
            f"{folder}: another run{error.strerror or ''} is writing there; wait for its end, or choose another folder"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save ({error.strerror or error})") from None
    try:
        yield
    finally:
        # While it is still held: a file of this name that is removed later may be the next run's.
        with contextlib.suppress(OSError):
            (folder / LOCK).unlink()
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _hold(path: Path) -> int:
    """Open and lock a file; raise :class:`BlockingIOError`, naming the holder, where another process has it."""
    while True:
        # A link there is not ours: what it leads to would be overwritten.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            if not _lock(handle):
                holder = re.fullmatch(rb"process \d+ on [\w.-]+", os.pread(handle, 300, 0))
                raise BlockingIOError(0, f" ({holder[0].decode()})" if holder else "")
            # Its holder may have removed it between the two calls: then it keeps nobody out.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                os.truncate(handle, 0)
                os.pwrite(handle, f"process {os.getpid()} on {platform.node()}".encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int) -> bool:
    """Whether the lock is ours now; true where the file system knows none."""
    import fcntl

    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def check_lengths(path: Path) -> None:
    """Raise :class:`OSError` if a path, or a name in it, is longer than the system allows; none of it need exist."""
    known = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
    for place in (path, *(known / name for name in path.relative_to(known).parts)):
        try:
            os.lstat(place)
        except OSError as error:
            # The names between may be absent or no folders: whoever makes them will say so.
            if error.errno == errno.ENAMETOOLONG:
                raise


def write_whole(path: Path, blob: bytes) -> None:
    """Write a file beside its place, sync and rename it: whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # What a killed process of the same number left is no longer wanted, nor what a link of this name leads to.
        partial.unlink(missing_ok=True)
        with open(partial, "xb") as file:
            file.write(blob)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_config(folder: str | Path, kind: str) -> dict[str, Any]:
    """Read and check ``config.json``; raise :class:`CheckpointError` unless it is of this kind and version."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: holds no saved {kind} (config.json is absent)")
    try:
        with open(path, "rb") as file:
            text = file.read(CONFIG_LIMIT + 1)
        if len(text) > CONFIG_LIMIT:
            raise CheckpointError(f"{path}: too large to be a configuration")
        config = json.loads(text.decode())
        if not _is_shallow(config):
            raise CheckpointError(f"{path}: nested too deeply to be a configuration")
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{path}: damaged or unreadable ({type(error).__name__})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not written by latentprior")
    if config.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {_short(config.get('kind'))}, not a {kind!r}")
    if config.get("format_version") != FORMAT_VERSION:
        writer = config.get("written_by")
        raise CheckpointError(
            f"{path}: format version {_short(config.get('format_version'))}, this release reads {FORMAT_VERSION}; "
            f"use the latentprior release that wrote it{f' ({_short(writer)})' if writer else ''}"
        )
    try:
        intact = config.get("checksum") == _checksum(config)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: damaged (its checksum differs)")
    return config


def load_state(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`save_state` wrote, after checking kind, version and the tensors' digest.

    Raises :class:`CheckpointError` for anything absent, damaged or foreign; nothing is ever executed.
    """
    missed: set[str] = set()
    while True:
        config = read_config(folder, kind)
        name, digest = config.get("weights"), config.get("sha256")
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{folder}: config.json names no proper tensor file")
        path = Path(folder) / name
        try:
            if stat.S_ISREG(path.stat().st_mode):
                blob = path.read_bytes()
                break
            raise CheckpointError(f"{path}: is no file")
        except (OSError, ValueError, MemoryError) as error:
            # A run that saves meanwhile has put another pair in place of the one that was named.
            if isinstance(error, FileNotFoundError) and name not in missed:
                missed.add(name)
                continue
            line = " ".join(str(error).split()) or type(error).__name__
            raise CheckpointError(f"{folder}: its tensor file cannot be read ({line})") from None
    if hashlib.sha256(blob).hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged (its checksum differs from the one in config.json)")
    try:
        return config, load(blob)
    except (SafetensorError, *UNFIT) as error:
        raise CheckpointError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from None


def tensors_under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Those tensors whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _short(value: object) -> str:
    """A value of a foreign document, fit for one line."""
    text = repr(value) if value is None or isinstance(value, (str, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_ours(folder: Path, kind: str) -> None:
    """Raise :class:`CheckpointError` if a folder that will be written holds a ``config.json`` not of this kind."""
    if not (folder / "config.json").exists():
        return
    try:
        read_config(folder, kind)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; nothing was overwritten: choose another --out or remove it") from None


def remove_checkpoint(folder: Path, *kinds: str) -> None:
    """Remove what runs of these kinds saved there, and the folder if nothing else is in it."""
    tensors = [path for kind in kinds for path in folder.glob(f"{kind}-*.safetensors")]
    for path in (folder / "config.json", *tensors, *folder.glob(".*.partial")):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()
