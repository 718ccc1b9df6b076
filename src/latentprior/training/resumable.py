"""What runs on networks and images need to be saved and resumed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..data.images import Images
from ..errors import CheckpointError

__all__ = [
    "epoch_rows",
    "foreign",
    "images_identity",
    "network_state",
    "phase_folder",
    "restore_network",
]


def network_state(
    part: str, module: torch.nn.Module, average: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Weights, their moving averages, buffers and Adam's moments, under names that begin with ``part``."""
    tensors = {f"{part}.buffer.{name}": value for name, value in module.named_buffers()}
    for name, parameter in module.named_parameters():
        tensors[f"{part}.now.{name}"] = parameter.detach()
        tensors[f"{part}.average.{name}"] = average[name]
        for key, value in optimizer.state[parameter].items():
            tensors[f"{part}.{key}.{name}"] = value
    return tensors


@torch.no_grad()
def restore_network(
    part: str,
    module: torch.nn.Module,
    average: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what :func:`network_state` gave; raises :class:`KeyError` or :class:`RuntimeError` for anything else."""
    for name, buffer in module.named_buffers():
        buffer.copy_(tensors[f"{part}.buffer.{name}"])
    for name, parameter in module.named_parameters():
        parameter.copy_(tensors[f"{part}.now.{name}"])
        average[name].copy_(tensors[f"{part}.average.{name}"])
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{part}.{key}.{name}" in tensors]
        optimizer.state.pop(parameter, None)
        if keys:
            # Adam counts its steps on the CPU.
            optimizer.state[parameter] = {
                key: tensors[f"{part}.{key}.{name}"].clone().to("cpu" if key == "step" else parameter.device)
                for key in keys
            }


def images_identity(settings: object, images: Images) -> str:
    """A digest of settings and of a sample of the images."""
    digest = hashlib.sha256(repr((settings, len(images), images.shape)).encode())
    some = torch.linspace(0, len(images) - 1, min(64, len(images))).long()
    digest.update(images.batch(some).numpy().tobytes())
    return digest.hexdigest()


def epoch_rows(n: int, first: int, size: int, order: Callable[[int], torch.Generator]) -> Tensor:
    """Rows ``first`` to ``first + size`` of endless epochs over n: each holds every row once, in its own order."""
    wanted = torch.arange(first, first + size)
    epochs = torch.unique(wanted // n).tolist()
    return torch.cat([torch.randperm(n, generator=order(k))[wanted[wanted // n == k] % n] for k in epochs])


def phase_folder(folder: str | Path | None, phase: str) -> Path | None:
    """Where a phase of a longer run saves its state, if the run saves any."""
    return None if folder is None else Path(folder) / phase


def foreign(folder: Path) -> CheckpointError:
    """The error for a folder that holds another run."""
    return CheckpointError(
        f"{folder}: holds a run on other images or settings; choose another folder, or do not resume"
    )
