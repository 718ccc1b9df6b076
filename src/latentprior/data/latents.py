"""Rows of the target density q: points, or posterior means and scales, out of arrays, files or an encoder."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidImagesError, InvalidLatentsError
from .array_files import ARCHIVES, Archive, map_array, open_archive, reading
from .encoding import encode

__all__ = ["Latents", "as_dense", "as_latents", "check_tensor", "read_latents"]

Array = NDArray[Any]
BLOCK_ROWS = 1 << 16
"""Rows that are checked and converted at a time: of 512 float64 coordinates they take 256 MiB."""
PREFERRED = ("train", "z")
"""Names of the array that is taken from an archive of several, the first one that is there."""
REAL_TYPES = frozenset(
    {torch.float64, torch.float32, torch.float16, torch.bfloat16}
    | {torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
)
"""Types of tensors that hold real numbers and that torch can convert; it cannot convert quantised ones or float8."""


class Latents:
    r"""Rows of the target density :math:`q(z)`: points, or Gaussian posteriors that are drawn afresh.

    With scales, row i stands for :math:`\mathcal N(m_i, \mathrm{diag}(s_i^2))`, and q is the aggregate posterior
    :math:`q(z) = \frac1n \sum_i \mathcal N(z; m_i, s_i^2)`. Every :meth:`draw` is then a new sample, which
    regularises a stage as endless data would. Without scales a draw returns the points themselves.

    Parameters
    ----------
    mean : array or Tensor
        The points, or the means of the posteriors, ``(n, *event_shape)``: finite real numbers, at least one row. The
        array is referenced and never copied, so a memory-mapped ``.npy`` may be larger than memory. Integers and half
        floats are converted batch by batch.
    scale : array or Tensor, optional
        Standard deviations of the posteriors in every coordinate, of the same shape as ``mean``, not negative.
    name : str
        What error messages call the rows.

    Raises
    ------
    InvalidLatentsError
        For a type or shape that is none of the above, for NaN or infinite values, and for no rows.

    Examples
    --------
    >>> mean, scale = torch.zeros(100, 2), torch.ones(100, 2)
    >>> latents = Latents.posterior(mean, scale)
    >>> len(latents), latents.event_shape, latents.is_posterior
    (100, torch.Size([2]), True)
    >>> g = torch.Generator().manual_seed(0)
    >>> bool((latents.draw(torch.arange(100), g) == latents.draw(torch.arange(100), g)).any())
    False
    >>> Latents.encoded(torch.nn.Flatten(), torch.ones(50, 3, 2)).event_shape
    torch.Size([6])
    """

    def __init__(self, mean: Tensor | Array, scale: Tensor | Array | None = None, *, name: str = "latents") -> None:
        self._mean = _as_rows(mean, name)
        self.event_shape = torch.Size(self._mean.shape[1:])
        self._scale = None if scale is None else _as_rows(scale, f"scales of {name}")
        if self._scale is not None and self._scale.shape != self._mean.shape:
            raise InvalidLatentsError(
                f"scales of {name} have shape {tuple(self._scale.shape)}, means {tuple(self._mean.shape)}: "
                "give every mean its scale"
            )
        for start in range(0, len(self), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            is_bad = ~torch.isfinite(_select(self._mean, rows).flatten(1)).all(1)
            if is_bad.any():
                row = start + int(is_bad.nonzero()[0])
                raise InvalidLatentsError(f"{name}: NaN or infinite value in row {row}; remove or mend such rows")
            scale = None if self._scale is None else _select(self._scale, rows)
            if scale is not None and (not torch.isfinite(scale).all() or (scale < 0).any()):
                raise InvalidLatentsError(f"scales of {name} must be finite and not negative: remove or mend such rows")

    @classmethod
    def posterior(cls, mean: Tensor | Array, scale: Tensor | Array) -> Latents:
        """Make latents of Gaussian posteriors, whose every draw is a new sample.

        Parameters
        ----------
        mean, scale : array or Tensor
            Means and standard deviations of the posteriors, ``(n, *event_shape)`` each; no scale is negative.
        """
        return cls(mean, scale)

    @classmethod
    def encoded(
        cls,
        encoder: Callable[[Tensor], Any],
        dataset: Any,
        *,
        batch_size: int = 256,
        device: torch.device | str | None = None,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
    ) -> Latents:
        """Run an encoder over a data set once and keep its posteriors, one row an input, in memory-mapped files.

        Parameters
        ----------
        encoder : callable
            Maps a batch of inputs to a tensor, to ``(mean, scale)``, or to a
            :class:`torch.distributions.Distribution` with ``mean`` and ``stddev``. It runs without gradients and, if
            it is a module, in eval mode.
        dataset : Dataset, Tensor or array
            The inputs: a :class:`torch.utils.data.Dataset` of tensors, or of tuples and dicts whose first entry is
            the input, or one tensor or array of all inputs.
        batch_size : int
            Inputs a batch.
        device : torch.device or str, optional
            Where batches are sent before they are encoded; by default they stay where they are.
        cache_dir : str or Path, optional
            The folder in which ``mean.npy`` and ``scale.npy`` are written and kept. By default they are written to a
            temporary folder, which is removed together with the returned object.
        num_workers : int
            Processes that load the data set, as :class:`torch.utils.data.DataLoader` has them.

        Raises
        ------
        InvalidLatentsError
            For an empty data set, and for an encoder that returns anything else than one row an input.
        """
        folder = Path(tempfile.mkdtemp(prefix="latentprior-") if cache_dir is None else cache_dir)
        try:
            mean, scale = encode(
                encoder, dataset, batch_size=batch_size, device=device, folder=folder, num_workers=num_workers
            )
            latents = cls(mean, scale, name="encoded latents")
        except BaseException:
            if cache_dir is None:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if cache_dir is None:
            weakref.finalize(latents, shutil.rmtree, folder, ignore_errors=True)
        return latents

    def __len__(self) -> int:
        return int(self._mean.shape[0])

    @property
    def is_posterior(self) -> bool:
        """Whether draws are fresh samples of a posterior for every row."""
        return self._scale is not None

    @property
    def dim(self) -> int:
        """Number of coordinates d of a flattened row."""
        return math.prod(self.event_shape)

    def draw(
        self,
        index: Tensor,
        generator: torch.Generator | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Draw one sample of each chosen row: a fresh sample of its posterior, or the point itself.

        Parameters
        ----------
        index : Tensor
            Numbers of the rows, ``(m,)``; a row may be chosen several times.
        generator : torch.Generator, optional
            Source of the noise of posteriors; by default the global one. Points take no noise.
        device : torch.device or str, optional
            Where the draws are made; by default where the rows are.
        dtype : torch.dtype
            Type of the draws.

        Returns
        -------
        Tensor
            The draws, flattened to ``(m, d)``.
        """
        z = _select(self._mean, index).flatten(1).to(device=device, dtype=dtype)
        if self._scale is None:
            return z
        scale = _select(self._scale, index).flatten(1).to(device=device, dtype=dtype)
        place = torch.device("cpu") if generator is None else generator.device
        noise = torch.randn(z.shape, generator=generator, dtype=dtype, device=place)
        return z + scale * noise.to(z.device)

    def blocks(self, generator: torch.Generator | None = None, rows: int = BLOCK_ROWS) -> Iterator[Tensor]:
        """Yield a draw of every row once, in order, block by block.

        Parameters
        ----------
        generator : torch.Generator, optional
            Source of the noise of posteriors; by default the global one.
        rows : int
            Rows a block; the last block may be smaller.

        Yields
        ------
        Tensor
            Flat float64 rows ``(rows, d)``.
        """
        for start in range(0, len(self), rows):
            index = torch.arange(start, min(start + rows, len(self)))
            yield self.draw(index, generator, dtype=torch.float64)


def _as_rows(values: Any, name: str) -> Tensor | Array:
    """Return the values as a tensor or array of real numbers ``(n, ...)``, without a copy where that is possible."""
    rows = _tensor_of_reals(values, name) if isinstance(values, Tensor) else _array_of_reals(values, name)
    if rows.ndim < 2:
        raise InvalidLatentsError(
            f"{name} have shape {tuple(rows.shape)}: give (rows, coordinates...), for one coordinate (rows, 1)"
        )
    if rows.shape[0] == 0 or math.prod(rows.shape[1:]) == 0:
        raise InvalidLatentsError(f"{name} are empty: shape {tuple(rows.shape)}; give at least one row")
    return rows


def _tensor_of_reals(values: Tensor, name: str) -> Tensor:
    if values.is_nested or values.layout != torch.strided or values.is_meta:
        kind = "on the device meta" if values.is_meta else "nested or sparse"
        raise InvalidLatentsError(f"{name} are {kind}: give real numbers, a dense tensor or array")
    if values.dtype not in REAL_TYPES:
        raise InvalidLatentsError(f"{name} have type {values.dtype}: give real numbers (float or integer)")
    return values.detach()


def _array_of_reals(values: Any, name: str) -> Array:
    if np.ma.is_masked(values):
        raise InvalidLatentsError(f"{name} have masked values: remove or fill such rows")
    try:
        array: Array = np.asanyarray(values)
    except (ValueError, TypeError) as error:
        raise InvalidLatentsError(f"{name} are not one rectangular array of numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        raise InvalidLatentsError(f"{name} have type {array.dtype}: give real numbers (float or integer)")
    # torch has neither longer floats than float64 nor another order of bytes than the machine's.
    if array.dtype.itemsize > 8:
        array = array.astype(np.float64)
    if array.dtype.byteorder not in "=|":
        array = array.astype(array.dtype.newbyteorder("="))
    return array


def _select(values: Tensor | Array, index: Tensor | slice) -> Tensor:
    """Return the chosen rows as a tensor that does not share memory with a read-only array."""
    if isinstance(values, Tensor):
        return values[index if isinstance(index, slice) else index.to(values.device)]
    selected = np.ascontiguousarray(values[index if isinstance(index, slice) else index.numpy()])
    if not selected.flags.writeable:
        selected = selected.copy()
    # torch computes with unsigned integers of eight bits only.
    if selected.dtype.kind == "u" and selected.dtype.itemsize > 1:
        selected = selected.astype(np.float64)
    return torch.from_numpy(selected)


def as_latents(values: Any, *, key: str | None = None) -> Latents:
    """Turn a tensor, an array or the path of a file into :class:`Latents`; ``key`` is that of :func:`read_latents`."""
    if isinstance(values, Latents):
        return values
    if isinstance(values, (str, Path)):
        return read_latents(values, key=key)
    return Latents(values)


def as_dense(
    values: Any, name: str = "latents", error: type[InvalidLatentsError | InvalidImagesError] = InvalidLatentsError
) -> Tensor:
    """Return a dense tensor of real numbers, out of a tensor or what numpy reads as an array.

    Anything else raises ``error``, whose message calls the values ``name``.
    """
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            array = np.asarray(values)
        except (ValueError, TypeError) as cause:
            raise error(f"{name} are not one rectangular array of numbers: {cause}") from None
        if array.dtype.kind not in "fiub":
            raise error(f"{name} have type {array.dtype}: give real numbers (float or integer)")
        # The copy mends what torch cannot take: another order of bytes, and negative strides.
        is_long = array.dtype.itemsize > 8
        tensor = torch.from_numpy(np.array(array, dtype=np.float64 if is_long else array.dtype.newbyteorder("=")))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        raise error(f"{name} are complex, sparse, nested or without data: give a dense tensor")
    return tensor.dequantize() if tensor.is_quantized else tensor


def check_tensor(z: Any, event_shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return latents ``(n, *event_shape)`` as flat rows ``(n, d)``; the error for another shape names both."""
    tensor = as_dense(z)
    if tuple(tensor.shape[1:]) != tuple(event_shape) or tensor.ndim != len(event_shape) + 1:
        raise InvalidLatentsError(
            f"latents have shape {tuple(tensor.shape)}, the prior expects (n, {', '.join(map(str, event_shape))})"
        )
    return tensor.to(device=device, dtype=dtype).flatten(1)


def read_latents(path: str | Path, *, key: str | None = None) -> Latents:
    """Read latents from a ``.npy`` file, which is memory-mapped, or a ``.npz`` or ``.safetensors`` file.

    Without a ``key``, ``mean`` and ``scale`` are read together, as posteriors to draw from; else the only array; else
    ``train``; else ``z``. A file that is absent, damaged or of another kind raises InvalidLatentsError, and a pickle is
    never opened.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidLatentsError(f"{path}: is a folder; give a .npy, .npz or .safetensors file")
    if not path.is_file():
        raise InvalidLatentsError(f"{path}: no such file")
    with reading(path, InvalidLatentsError):
        if path.suffix == ".npy":
            return Latents(map_array(path), name=str(path))
        if path.suffix in ARCHIVES:
            with open_archive(path) as archive:
                return _from_archive(path, archive, key)
    raise InvalidLatentsError(f"{path}: unknown kind of file; give .npy, .npz or .safetensors")


def _from_archive(path: Path, archive: Archive, key: str | None) -> Latents:
    names = archive.names
    if key is None and {"mean", "scale"} <= set(names):
        return Latents(archive.get("mean"), archive.get("scale"), name=str(path))
    if key is None:
        key = names[0] if len(names) == 1 else next((name for name in PREFERRED if name in names), None)
    if key is None:
        raise InvalidLatentsError(f"{path}: several arrays ({archive.listing}); choose one with --key / key=")
    if key not in names:
        raise InvalidLatentsError(f"{path}: no array named {key!r} (it has: {archive.listing})")
    return Latents(archive.get(key), name=f"{path}[{key}]")
