"""Several processes on one run: each takes a share of the work, and all go on alike. accelerate does the work."""

from __future__ import annotations

import contextlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..errors import LatentPriorError, MissingExtraError, ProcessLostError

__all__ = [
    "ALONE",
    "AccelerateProcesses",
    "Processes",
    "SingleProcess",
    "agreed",
    "in_unison",
    "joined",
    "launched_processes",
]

T = TypeVar("T")
PATIENCE = timedelta(hours=2)
"""How long a process waits for another: the first one may fit a base, which takes all of them longer than usual."""


class Processes(Protocol):
    """What learning needs to know about the processes it runs in. Every method is called in all of them at once."""

    rank: int
    count: int
    device: torch.device

    @property
    def keys(self) -> tuple[int, ...]:
        """What tells this process's random draws from the others'; nothing if it is alone."""
        return (self.rank,) if self.count > 1 else ()

    def share(self, total: int) -> int:
        """How much of ``total`` each process takes: equal parts, rounded up."""
        return -(-total // self.count)

    def stripe(self, rows: Tensor) -> Tensor:
        """The part of rows that all have which is this process's; all, where there are fewer rows than processes."""
        return rows[self.rank :: self.count] if len(rows) >= self.count else rows

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over processes, in place."""

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """The value of every process, in the order of their ranks."""

    @abstractmethod
    def first(self, value: T) -> T:
        """The value of the first process: what it has decided, all do."""

    def wait(self) -> None:
        """Return when every process has come here."""


class SingleProcess(Processes):
    """One process, alone."""

    rank, count = 0, 1

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or "cpu")

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to average."""

    def gather(self, value: T) -> list[T]:
        """One value."""
        return [value]

    def first(self, value: T) -> T:
        """The value itself."""
        return value

    def wait(self) -> None:
        """Nobody to wait for."""


ALONE = SingleProcess()


class AccelerateProcesses(Processes):
    """The processes that ``accelerate launch`` or ``torchrun`` started (extra ``distributed``).

    Raises :class:`~latentprior.errors.ProcessLostError` when another process has left: the run can be resumed.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingExtraError("learning in several processes", "distributed") from None
        # Unless it is told of the CPU, accelerate takes processes without a GPU for single ones.
        gpu = torch.cuda.is_available() or torch.xpu.is_available()
        self._state = PartialState(cpu=not gpu or torch.device(device or "cuda").type == "cpu", timeout=PATIENCE)
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
        with _losses_told():
            mean = reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Small values of any kind; tensors on the CPU."""
        from accelerate.utils import gather_object

        with _losses_told():
            values: list[T] = gather_object([value])
        return values

    def first(self, value: T) -> T:
        """A value of any kind; tensors on the CPU. What the others pass is not looked at."""
        from accelerate.utils import broadcast_object_list

        with _losses_told():
            (told,) = broadcast_object_list([value if self.rank == 0 else None])
        return told  # type: ignore[no-any-return]

    def wait(self) -> None:
        """A barrier."""
        with _losses_told():
            self._state.wait_for_everyone()


@contextlib.contextmanager
def _losses_told() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = " ".join(str(error).split())[:120]
        raise ProcessLostError(
            f"another process of this run has ended ({line}); start all again with --resume"
        ) from None


def launched_processes(device: torch.device | str | None = None) -> Processes:
    """The processes of a launcher if one started this (``WORLD_SIZE`` above 1), else this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return AccelerateProcesses(device)
    return SingleProcess(device)


@contextlib.contextmanager
def in_unison(processes: Processes) -> Iterator[None]:
    """Within this context an error of this package in one process is raised in all of them, at its end."""
    error: LatentPriorError | None = None
    try:
        yield
    except ProcessLostError:
        raise
    except LatentPriorError as found:
        if processes.count == 1:
            raise
        error = found
    for raised in processes.gather(error):
        if raised is not None:
            raise raised from error


def agreed(processes: Processes, value: float, device: torch.device) -> float:
    """The mean of ``value`` over all processes, which then decide the same."""
    if processes.count == 1:
        return value
    mean = torch.tensor([value], dtype=torch.float64, device=device)
    processes.average([mean])
    return float(mean)


def joined(processes: Processes, rows: Tensor) -> Tensor:
    """Rows of every process, those of the first one first."""
    if processes.count == 1:
        return rows
    return torch.cat(processes.gather(rows.detach().cpu())).to(rows.device)
