"""What the commands share: their arguments and options, and checks before the work begins."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import torch
import typer

from .checkpoint import read_config
from .errors import CheckpointError, LatentPriorError

__all__ = [
    "AsJson",
    "Device",
    "ImagesSource",
    "Key",
    "Seed",
    "WorkFailed",
    "check_device",
    "check_ours",
    "remove_checkpoint",
]

ImagesSource = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES", help="Folder of pictures, .npy, .npz, .safetensors, .parquet, MNIST's or CIFAR-10's files."
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--key", metavar="K", help="Array in an archive; by default the only one, or train, or z."),
]
Seed = Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Seed of every random draw.")]
Device = Annotated[str | None, typer.Option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1, mps.")]
AsJson = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout, nothing else there.")
]


class WorkFailed(Exception):
    """The call was right, but its work could not be done: exit code 1."""


def check_device(device: str | None) -> None:
    """Raise now if nothing can be computed there."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise LatentPriorError(f"cannot compute on --device {device}: {reason}") from None


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
