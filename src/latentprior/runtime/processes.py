"""Several processes that learn together: each takes a share of the work. The library accelerate connects them."""

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
LONGEST_WAIT = timedelta(hours=2)
"""How long a process waits for another one. The first one may fit a base while the others wait."""


class Processes(Protocol):
    """The processes that learn together; every method must be called in all of them at the same point.

    Parameters
    ----------
    rank : int
        Number of this process, from 0.
    count : int
        Number of processes.
    device : torch.device
        Where this process computes.
    """

    rank: int
    count: int
    device: torch.device

    @property
    def keys(self) -> tuple[int, ...]:
        """Keys that give this process random numbers of its own; none where it is alone."""
        return (self.rank,) if self.count > 1 else ()

    def share(self, total: int) -> int:
        """Return how much of some work each process takes: equal parts, rounded up.

        Parameters
        ----------
        total : int
            All the work.

        Returns
        -------
        int
            The share of one process.
        """
        return -(-total // self.count)

    def stripe(self, rows: Tensor) -> Tensor:
        """Return the rows of this process, out of rows that every process has.

        Parameters
        ----------
        rows : Tensor
            Rows ``(n, ...)``, the same in every process.

        Returns
        -------
        Tensor
            Every ``count``-th row; all rows where there are fewer rows than processes.
        """
        return rows[self.rank :: self.count] if len(rows) >= self.count else rows

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in place.

        Parameters
        ----------
        tensors : sequence of Tensor
            The tensors; all processes pass the same shapes in the same order.
        """

    @abstractmethod
    def gather(self, value: T) -> list[T]:
        """Return the values of all processes.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.

        Returns
        -------
        list
            One value for each process, in the order of their ranks.
        """

    @abstractmethod
    def first(self, value: T) -> T:
        """Return the value of the first process, so that all act on one decision.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.

        Returns
        -------
        object
            The value of the process of rank 0.
        """

    def wait(self) -> None:
        """Return when every process has called this."""


class SingleProcess(Processes):
    """One process that learns alone.

    Parameters
    ----------
    device : torch.device or str, optional
        Where it computes; by default the CPU.
    """

    rank, count = 0, 1

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = torch.device(device or "cpu")

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are.

        Parameters
        ----------
        tensors : sequence of Tensor
            The tensors; all processes pass the same shapes in the same order.
        """

    def gather(self, value: T) -> list[T]:
        """Return a list of the one value.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.
        """
        return [value]

    def first(self, value: T) -> T:
        """Return the value.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.
        """
        return value

    def wait(self) -> None:
        """Return at once."""


ALONE = SingleProcess()


class AccelerateProcesses(Processes):
    """The processes that ``accelerate launch`` or ``torchrun`` has started (extra ``distributed``).

    Every method raises :class:`~latentprior.errors.ProcessLostError` when another process has ended: the run can then
    be resumed.

    Parameters
    ----------
    device : torch.device or str, optional
        ``"cpu"`` to leave GPUs unused; otherwise accelerate chooses one for each process.

    Raises
    ------
    MissingExtraError
        Without accelerate.
    LatentPriorError
        Where accelerate has joined fewer processes than the launcher has started.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        try:
            from accelerate import PartialState
        except ImportError:
            raise MissingExtraError("learning in several processes", "distributed") from None
        # Without cpu=True, accelerate takes every process without a GPU for one that is alone.
        gpu = torch.cuda.is_available() or torch.xpu.is_available()
        self._state = PartialState(cpu=not gpu or torch.device(device or "cuda").type == "cpu", timeout=LONGEST_WAIT)
        self.rank = int(self._state.process_index)
        self.count = int(self._state.num_processes)
        started = os.environ.get("WORLD_SIZE", "1") or "1"
        if self.count != int(started):
            raise LatentPriorError(f"accelerate joined {self.count} of {started} processes: launch them with torchrun")
        self.device = torch.device(self._state.device)

    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its mean over the processes, in place, by one message for all of them.

        Parameters
        ----------
        tensors : sequence of Tensor
            The tensors; all processes pass the same shapes in the same order.
        """
        from accelerate.utils import reduce

        # Half precision would lose small gradients in the sum.
        wide = [tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]
        flat = torch.cat([tensor.flatten() for tensor in wide])
        with _naming_lost_processes():
            mean = reduce(flat, reduction="mean")
        for tensor, part in zip(tensors, mean.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.

        Returns
        -------
        list
            One value for each process, in the order of their ranks.
        """
        from accelerate.utils import gather_object

        with _naming_lost_processes():
            values: list[T] = gather_object([value])
        return values

    def first(self, value: T) -> T:
        """Return the value of the first process; what the others pass is ignored.

        Parameters
        ----------
        value : object
            Any value that can be pickled; its tensors must be on the CPU.

        Returns
        -------
        object
            The value of the process of rank 0.
        """
        from accelerate.utils import broadcast_object_list

        with _naming_lost_processes():
            (first,) = broadcast_object_list([value if self.rank == 0 else None])
        return first  # type: ignore[no-any-return]

    def wait(self) -> None:
        """Return when every process has called this."""
        with _naming_lost_processes():
            self._state.wait_for_everyone()


@contextlib.contextmanager
def _naming_lost_processes() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        line = " ".join(str(error).split())[:120]
        raise ProcessLostError(
            f"another process of this run has ended ({line}); start all again with --resume"
        ) from None


def launched_processes(device: torch.device | str | None = None) -> Processes:
    """Return the processes of the launcher that has started this one (``WORLD_SIZE`` above 1), or this one alone.

    Parameters
    ----------
    device : torch.device or str, optional
        Where this process is to compute.

    Returns
    -------
    Processes
        The processes that learn together.
    """
    if int(os.environ.get("WORLD_SIZE", "1") or 1) > 1:
        return AccelerateProcesses(device)
    return SingleProcess(device)


@contextlib.contextmanager
def in_unison(processes: Processes) -> Iterator[None]:
    """Return a context at whose end an error of this package in one process is raised in all of them.

    Parameters
    ----------
    processes : Processes
        The processes.
    """
    error: LatentPriorError | None = None
    try:
        yield
    except ProcessLostError:
        raise
    except LatentPriorError as own:
        if processes.count == 1:
            raise
        error = own
    for raised in processes.gather(error):
        if raised is not None:
            raise raised from error


def agreed(processes: Processes, value: float, device: torch.device) -> float:
    """Return the mean of a number over all processes, so that all decide by the same number.

    Parameters
    ----------
    processes : Processes
        The processes.
    value : float
        The number of this process.
    device : torch.device
        Where the processes exchange numbers.

    Returns
    -------
    float
        The mean.
    """
    if processes.count == 1:
        return value
    mean = torch.tensor([value], dtype=torch.float64, device=device)
    processes.average([mean])
    return float(mean)


def joined(processes: Processes, rows: Tensor) -> Tensor:
    """Return the rows of every process.

    Parameters
    ----------
    processes : Processes
        The processes.
    rows : Tensor
        The rows of this process, ``(n, ...)``.

    Returns
    -------
    Tensor
        All rows, in the order of the ranks, on the device of ``rows``.
    """
    if processes.count == 1:
        return rows
    return torch.cat(processes.gather(rows.detach().cpu())).to(rows.device)
