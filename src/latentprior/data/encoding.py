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

__all__ = ["encode", "in_eval_mode"]

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
    """Write ``mean.npy``, and ``scale.npy`` if there are scales; see :meth:`latentprior.Latents.encoded`."""
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(dataset, np.ndarray):
        dataset = torch.from_numpy(dataset)
    rows = len(dataset)
    if rows == 0:
        raise InvalidLatentsError("the data set to encode is empty: give at least one input")
    files: list[Array] = []
    written = 0
    with in_eval_mode(encoder), torch.no_grad():
        for batch in _batches(dataset, batch_size, num_workers):
            parts = _posterior_of(encoder(batch.to(device)))
            shape = (rows, *parts[0].shape[1:])
            if not files:
                paths = [folder / "mean.npy", folder / "scale.npy"][: len(parts)]
                files = [np.lib.format.open_memmap(p, mode="w+", dtype=np.float32, shape=shape) for p in paths]
            if shape != files[0].shape:
                raise InvalidLatentsError(
                    f"the encoder returned rows of shape {shape[1:]} after {files[0].shape[1:]}: "
                    "return rows of one shape"
                )
            start, written = written, written + len(parts[0])
            if written > rows:
                raise InvalidLatentsError(
                    "the encoder returned more rows than the data set has: return one row an input"
                )
            for file, part in zip(files, parts, strict=False):
                file[start:written] = part.float().cpu().numpy()
    if written != rows:
        raise InvalidLatentsError(f"the encoder returned {written} rows for {rows} inputs: return one row an input")
    return files[0], files[1] if len(files) > 1 else None


@contextlib.contextmanager
def in_eval_mode(encoder: Any) -> Iterator[None]:
    """Put a module in eval mode; afterwards give each of its modules the mode that it had."""
    modes = {m: m.training for m in encoder.modules()} if isinstance(encoder, torch.nn.Module) else {}
    if modes:
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


def _posterior_of(output: Any) -> list[Tensor]:
    """Return the means, and the scales if there are any."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, torch.distributions.Distribution):
        output = output.mean, output.stddev
    if not (isinstance(output, (tuple, list)) and len(output) == 2 and all(isinstance(v, Tensor) for v in output)):
        raise InvalidLatentsError(
            f"the encoder returned {type(output).__name__}: return a tensor, (mean, scale), or a torch Distribution"
        )
    mean, scale = output
    if mean.shape != scale.shape:
        raise InvalidLatentsError(
            f"the encoder returned means of shape {tuple(mean.shape)} and scales of {tuple(scale.shape)}: "
            "return one scale for every mean"
        )
    return [mean, scale]
