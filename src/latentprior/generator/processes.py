"""Several processes on one run: each takes a share of the batch, gradients are averaged. accelerate does the work."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..errors import LatentPriorError, MissingExtraError

__all__ = ["AccelerateProcesses", "Processes", "SingleProcess", "agreed", "gathered", "launched_processes"]


class Processes(Protocol):
    """What training needs to know about the processes it runs in."""

    rank: int
    count: int
    device: torch.device

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over processes, in place."""

    def wait(self) -> None:
        """Return when every process has come here."""


class SingleProcess:
    """One process, alone."""

    rank, count = 0, 1

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or "cpu")

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to average."""

    def wait(self) -> None:
        """Nobody to wait for."""


class AccelerateProcesses:
    """The processes that ``accelerate launch`` or ``torchrun`` started (extra ``distributed``).

    Raises :class:`~latentprior.errors.LatentPriorError` when another process has left: the run can be resumed.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingExtraError("training in several processes", "distributed") from None
        # Unless it is told of the CPU, accelerate takes processes without a GPU for single ones.
        gpu = torch.cuda.is_available() or torch.xpu.is_available()
        self._state = PartialState(cpu=not gpu or torch.device(device or "cuda").type == "cpu")
        self.rank = int(self._state.process_index)
        self.count = int(self._state.num_processes)
        wanted = os.environ.get("WORLD_SIZE", "1") or "1"
        if self.count != int(wanted):
            raise LatentPriorError(f"accelerate joined {self.count} of {wanted} processes: launch them with torchrun")
        self.device = torch.device(self._state.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """One message for all tensors, in their order."""
        from accelerate.utils import reduce

        # Half precision would lose small gradients in the sum.
        wide = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
        flat = torch.cat([tensor.flatten() for tensor in wide])
        try:
            mean = reduce(flat, reduction="mean")
        except RuntimeError as error:
            raise _left(error) from None
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def wait(self) -> None:
        """A barrier."""
        try:
            self._state.wait_for_everyone()
        except RuntimeError as error:
            raise _left(error) from None


def _left(error: RuntimeError) -> LatentPriorError:
    line = " ".join(str(error).split())[:120]
    return LatentPriorError(f"another process of this run has ended ({line}); start all again with --resume")


def launched_processes(device: torch.device | str | None = None) -> Processes:
    """The processes of a launcher if one started this (``WORLD_SIZE`` above 1), else this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return AccelerateProcesses(device)
    return SingleProcess(device)


def agreed(processes: Processes, value: float, device: torch.device) -> float:
    """The mean of ``value`` over all processes, which then decide the same."""
    if processes.count == 1:
        return value
    mean = torch.tensor([value], dtype=torch.float64, device=device)
    processes.average([mean])
    return float(mean)


def gathered(processes: Processes, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and rows ``(b, d)`` of every process: the next epoch may deal them to another."""
    rank, count = processes.rank, processes.count
    if count == 1:
        return index, rows
    table = torch.zeros(count * len(rows), 1 + rows.shape[1], dtype=torch.float64, device=rows.device)
    table[rank::count, 0], table[rank::count, 1:] = index.to(table), rows.to(table)
    processes.average([table])
    table = count * table.cpu()
    return table[:, 0].round().long(), table[:, 1:]
