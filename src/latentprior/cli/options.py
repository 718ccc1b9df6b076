"""What the commands share: their arguments and options, and checks before the work begins."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor

from ..errors import LatentPriorError

__all__ = [
    "AsJson",
    "Device",
    "ImagesSource",
    "Key",
    "LatentsFile",
    "Limit",
    "ModelFolder",
    "PriorFolder",
    "Resume",
    "SavedFolder",
    "Seed",
    "WorkFailed",
    "check_device",
    "counted",
    "mean_and_stderr",
    "plus_minus",
]

PriorFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that [bold]latentprior fit[/] wrote.")]
ModelFolder = Annotated[Path, typer.Argument(metavar="DIR", help="Folder that [bold]latentprior train[/] wrote.")]
SavedFolder = Annotated[
    Path,
    typer.Argument(
        metavar="DIR", help="Folder that [bold]fit[/], [bold]train[/] or [bold]demo[/] wrote, or a saved model."
    ),
]
LatentsFile = Annotated[Path, typer.Argument(metavar="LATENTS", help="Latents, one a row: .npy, .npz or .safetensors.")]
ImagesSource = Annotated[
    Path,
    typer.Argument(
        metavar="IMAGES", help="Folder of pictures, .npy, .npz, .safetensors, .parquet, MNIST's or CIFAR-10's files."
    ),
]
Key = Annotated[
    str | None, typer.Option("--key", metavar="K", help="Array in an archive; by default the only one, or train, or z.")
]
Limit = Annotated[int | None, typer.Option("--limit", metavar="N", min=1, help="Take the first N images only.")]
Resume = Annotated[bool, typer.Option("--resume", metavar="", help="Go on from DIR/checkpoint, if a run left one.")]
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


def counted(count: int, thing: str) -> str:
    """Write a count with its noun: ``1 stage``, ``2,000 stages``."""
    return f"{count:,} {thing}" if count == 1 else f"{count:,} {thing}s"


def mean_and_stderr(values: Tensor) -> tuple[float, float | None]:
    """Mean, and its standard error if there is more than one value."""
    n = len(values)
    return float(values.mean()), float(values.std()) / math.sqrt(n) if n > 1 else None


def plus_minus(stderr: float | None, form: str) -> str:
    """Write a standard error, or nothing where there is none."""
    return "" if stderr is None or not math.isfinite(stderr) else f" ± {stderr:{form}}"
