"""Atomic, pickle-free saving: one JSON file and one safetensors file a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from .errors import CheckpointError

__all__ = ["FORMAT_VERSION", "load_state", "read_config", "save_state", "write_whole"]

FORMAT = "latentprior"
FORMAT_VERSION = 1
CONFIG_LIMIT = 64 << 20


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
        "kind": kind,
        "weights": weights,
        "sha256": digest,
    }
    try:
        document = {**head, **config}
        text = json.dumps({**document, "checksum": _checksum(document)}, indent=1, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: cannot save (the configuration is not JSON: {error})") from None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / weights, blob)
        write_whole(folder / "config.json", text.encode())
        for stale in folder.iterdir():
            ours = re.fullmatch(rf"{kind}-[0-9a-f]{{16}}\.safetensors", stale.name) and stale.name != weights
            if ours or re.fullmatch(r"\.(config\.json|[a-z]+-[0-9a-f]{16}\.safetensors)\.\d+\.partial", stale.name):
                stale.unlink(missing_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot save ({error.strerror or error})") from None


def _checksum(document: Mapping[str, Any]) -> str:
    text = json.dumps({k: v for k, v in document.items() if k != "checksum"}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_whole(path: Path, blob: bytes) -> None:
    """Write a file beside its place, sync and rename it: whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
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
        if path.stat().st_size > CONFIG_LIMIT:
            raise CheckpointError(f"{path}: too large to be a configuration")
        config = json.loads(path.read_text(encoding="utf-8"))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged or unreadable ({type(error).__name__})") from None
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not written by latentprior")
    if config.get("kind") != kind:
        raise CheckpointError(f"{path}: holds a {config.get('kind')!r}, not a {kind!r}")
    if config.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {config.get('format_version')!r}, this release reads {FORMAT_VERSION}; "
            "use the latentprior release that wrote it"
        )
    try:
        intact = config.get("checksum") == _checksum(config)
    except ValueError:
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: damaged (its checksum differs)")
    return config


def load_state(folder: str | Path, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read what :func:`save_state` wrote, after checking kind, version and the tensors' digest.

    Raises :class:`CheckpointError` for anything absent, damaged or foreign; nothing is ever executed.
    """
    config = read_config(folder, kind)
    name, digest = config.get("weights"), config.get("sha256")
    if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
        raise CheckpointError(f"{folder}: config.json names no proper tensor file")
    path = Path(folder) / name
    try:
        blob = path.read_bytes()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: its tensor file cannot be read ({error})") from None
    if hashlib.sha256(blob).hexdigest() != digest:
        raise CheckpointError(f"{path}: damaged (its checksum differs from the one in config.json)")
    try:
        return config, load(blob)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from None
