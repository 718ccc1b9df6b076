"""Atomic, pickle-free saving: one JSON file and one safetensors file a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import stat
import tokenize
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
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
"""Deepest nesting of a configuration; its own document is the first level."""
CONFIG_LIMIT = 64 << 20
"""Most bytes of a configuration."""
RUN_LOCK, SAVE_LOCK = ".lock", ".save.lock"
"""Files in a folder whose locks a run holds all the time, and whoever saves while it saves."""
WITHOUT_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP}
"""Errors of file systems that have no locks."""
LONGEST_NAME = 64
"""Most bytes in the name of a file that is saved in a folder, while it is written: ``.KIND-<digest>...partial``."""

UNFIT = (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError, ArithmeticError, MemoryError)
"""What rebuilding an object may raise if an intact document does not describe one."""
UNREADABLE = (*UNFIT, OSError, EOFError, SyntaxError, zipfile.BadZipFile, tokenize.TokenError)
"""What numpy and the standard library raise for a damaged file of arrays."""


def save_state(folder: str | Path, kind: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``KIND-<digest>.safetensors`` so that a kill at any moment leaves old or new.

    The JSON names the tensor file and is renamed into place last: that is the commit. Each file is written beside
    its place, flushed to disk and renamed.

    Parameters
    ----------
    folder : str or Path
        It is made if need be.
    kind : str
        What is saved, for example ``"prior"``; only a reader that asks for this kind accepts the folder.
    config : mapping
        What can be written as JSON, nested 64 deep at most, without numbers that are not finite.
    tensors : mapping
        Tensors by name.

    Raises
    ------
    CheckpointError
        If the folder cannot be written, or the configuration is not JSON.
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
        # Savers take turns: each removes the tensors that its own configuration does not name.
        with _lock(folder / SAVE_LOCK, wait=True):
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
    """Whether containers are nested no deeper than :data:`MOST_NESTED`, which recursive code can walk."""
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
def locked(folder: str | Path | None) -> Iterator[None]:
    """Keep a folder to one run; the system releases it when the process ends, however it ends.

    Nothing is locked on file systems that have no locks.

    Parameters
    ----------
    folder : str or Path, optional
        The folder; it is made if need be, and removed again if the run leaves it empty. None locks nothing.

    Raises
    ------
    CheckpointError
        If another run holds the folder, or if it cannot be written.
    """
    if folder is None:
        yield
        return
    folder = Path(folder)
    with contextlib.ExitStack() as stack:
        if not os.path.exists(folder):
            stack.callback(_remove_empty, folder)
        try:
            check_lengths(folder / ("x" * LONGEST_NAME))
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(folder / RUN_LOCK, wait=False))
        except Timeout:
            raise CheckpointError(
                f"{folder}: another run is writing there; wait for its end, or choose another folder"
            ) from None
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot save ({error.strerror or error})") from None
        yield


@contextlib.contextmanager
def _lock(path: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a file and remove the file; raise :class:`filelock.Timeout` instead of waiting for it."""
    # Without the fallback to a soft lock: that is a file which a killed process would leave to lock all others out.
    lock = FileLock(path, fallback_to_soft=False)
    try:
        lock.acquire(blocking=wait, poll_interval=0.01)
    except OSError as error:
        if error.errno not in WITHOUT_LOCKS:
            raise
    try:
        yield
    finally:
        # While the lock is still held: a file of this name that is removed later may belong to the next run.
        with contextlib.suppress(OSError):
            path.unlink()
        lock.release()


def check_lengths(path: Path) -> None:
    """Raise :class:`OSError` if a path, or a name in it, is longer than the system allows; it need not exist."""
    known = next((parent for parent in path.parents if os.path.lexists(parent)), Path())
    for place in (path, *(known / name for name in path.relative_to(known).parts)):
        try:
            os.lstat(place)
        except OSError as error:
            # The folders between may not exist or may be files: an error follows when they are made.
            if error.errno == errno.ENAMETOOLONG:
                raise


def write_whole(path: Path, blob: bytes) -> None:
    """Write a file beside its place, sync and rename it: whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        # A killed process of the same number may have left this file, and a link of this name must not be followed.
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
    """Read ``config.json``; raise :class:`CheckpointError` unless it is whole and of this kind and version."""
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

    Nothing is ever executed.

    Parameters
    ----------
    folder : str or Path
        The folder that was saved.
    kind : str
        What it must hold.

    Returns
    -------
    tuple
        The configuration, and the tensors by name.

    Raises
    ------
    CheckpointError
        If anything is absent, damaged or foreign.
    """
    absent: set[str] = set()
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
            # A run that saves at the same time may have replaced the pair of files: its configuration names the new.
            if isinstance(error, FileNotFoundError) and name not in absent:
                absent.add(name)
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
    """Show a value of a foreign document in one short line."""
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
    for path in (folder / "config.json", folder / SAVE_LOCK, *tensors, *folder.glob(".*.partial")):
        path.unlink(missing_ok=True)
    _remove_empty(folder)


def _remove_empty(folder: Path) -> None:
    """Remove a folder unless something is in it."""
    with contextlib.suppress(OSError):
        folder.rmdir()
