"""Run an encoder over a data set once and keep the posteriors that it returns in memory-mapped files."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidLatentsError

__all__ = ["encode"]

Array = NDArray[Any]


def encode(
    encoder: Callable[[Tensor], Any],
    dataset: Any,
    *,
    batch_size: int,
    device: torch.device | str | None,
    folder: Path,
    num_workers: int,
) -> tuple[Array, Array | None]:
    """Write the means, and the scales if there are any, to ``folder``; return both arrays, mapped.

    See :meth:`latentprior.Latents.encoded` for the parameters.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(dataset, np.ndarray):
        dataset = torch.from_numpy(dataset)
    if len(dataset) == 0:
        raise InvalidLatentsError("the data set to encode is empty: give at least one input")
    files = _PosteriorFiles(folder, len(dataset))
    with _in_eval_mode(encoder), torch.no_grad():
        for batch in _batches(dataset, batch_size, num_workers):
            files.append(*_posterior_of(encoder(batch.to(device))))
    return files.finish()


class _PosteriorFiles:
    """``mean.npy`` and ``scale.npy``, filled batch by batch; their shape is that of the first batch."""

    def __init__(self, folder: Path, rows: int) -> None:
        self.folder, self.rows, self.written = folder, rows, 0
        self.mean: Array | None = None
        self.scale: Array | None = None

    def append(self, mean: Tensor, scale: Tensor | None) -> None:
        if scale is not None and scale.shape != mean.shape:
            raise InvalidLatentsError(
                f"the encoder returned means of shape {tuple(mean.shape)} and scales of {tuple(scale.shape)}: "
                "return one scale for every mean"
            )
        if self.mean is None:
            self.mean = self._new("mean.npy", mean)
            self.scale = None if scale is None else self._new("scale.npy", scale)
        if mean.shape[1:] != self.mean.shape[1:]:
            raise InvalidLatentsError(
                f"the encoder returned rows of shape {tuple(mean.shape[1:])} after {self.mean.shape[1:]}: "
                "return rows of one shape"
            )
        stop = self.written + len(mean)
        if stop > self.rows:
            raise InvalidLatentsError("the encoder returned more rows than the data set has: return one row an input")
        self.mean[self.written : stop] = mean.float().cpu().numpy()
        if scale is not None and self.scale is not None:
            self.scale[self.written : stop] = scale.float().cpu().numpy()
        self.written = stop

    def finish(self) -> tuple[Array, Array | None]:
        if self.written != self.rows or self.mean is None:
            raise InvalidLatentsError(
                f"the encoder returned {self.written} rows for {self.rows} inputs: return one row an input"
            )
        return self.mean, self.scale

    def _new(self, name: str, batch: Tensor) -> Array:
        shape = (self.rows, *batch.shape[1:])
        return np.lib.format.open_memmap(self.folder / name, mode="w+", dtype=np.float32, shape=shape)


@contextlib.contextmanager
def _in_eval_mode(encoder: Any) -> Iterator[None]:
    """Put a module in eval mode; afterwards give each of its modules the mode that it had."""
    modes = {m: m.training for m in encoder.modules()} if isinstance(encoder, torch.nn.Module) else {}
    if isinstance(encoder, torch.nn.Module):
        encoder.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _batches(dataset: Any, batch_size: int, num_workers: int) -> Iterable[Tensor]:
    if isinstance(dataset, Tensor):
        yield from dataset.split(batch_size)
        return
    # A generator of its own keeps the loader from drawing its seed from the global one.
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator()
    )
    for batch in loader:
        while not isinstance(batch, Tensor):
            batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
        yield batch


def _posterior_of(output: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, torch.distributions.Distribution):
        return output.mean, output.stddev
    if isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(v, Tensor) for v in output):
        return output[0], output[1]
    raise InvalidLatentsError(
        f"the encoder returned {type(output).__name__}: return a tensor, (mean, scale), or a torch Distribution"
    )
