"""Where the target density q comes from: arrays, posterior means and scales, or an encoder over a data set."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidImagesError, InvalidLatentsError
from ..storage.checkpoint import UNREADABLE

__all__ = ["Latents", "LatentsLike", "as_latents", "check_tensor", "read_latents"]

Array = NDArray[Any]
LatentsLike = "Latents | Tensor | Array | str | Path"
BLOCK = 1 << 16
TYPES = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.uint16, torch.uint32}
TYPES |= {torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64}
"""Types of tensors that are real numbers; those of eight bits or quantised know no arithmetic."""


class Latents:
    r"""Rows of the target density :math:`q(z)`: points, or Gaussian posteriors to draw afresh from.

    With scales, row i stands for :math:`\mathcal N(m_i, \mathrm{diag}(s_i^2))` and q is the aggregate posterior
    :math:`q(z) = \frac1n \sum_i \mathcal N(z; m_i, s_i^2)`; every :meth:`draw` is then a new sample, which
    regularises a stage like endless data. Without scales a draw returns the point itself.

    Arrays are referenced, never copied, so a memory-mapped ``.npy`` larger than memory works; integers and half
    floats are converted batch by batch.

    Arguments
    ---------
    mean : ``(n, *event_shape)`` array or tensor, finite real numbers.
    scale : standard deviations, same shape as ``mean``, non-negative; or None.

    Raises :class:`InvalidLatentsError` for wrong types, shapes, non-finite values or fewer than one row.

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
        for start in range(0, len(self), BLOCK):
            block = _rows(self._mean, slice(start, start + BLOCK))
            if not torch.isfinite(block).all():
                row = start + int((~torch.isfinite(block.flatten(1))).any(1).nonzero()[0])
                raise InvalidLatentsError(f"{name}: NaN or infinite value in row {row}; remove or mend such rows")
            if self._scale is not None:
                widths = _rows(self._scale, slice(start, start + BLOCK))
                if not torch.isfinite(widths).all() or (widths < 0).any():
                    raise InvalidLatentsError(f"scales of {name} must be finite and not negative")

    @classmethod
    def posterior(cls, mean: Tensor | Array, scale: Tensor | Array) -> Latents:
        """Gaussian posteriors by their means and standard deviations, both ``(n, *event_shape)``."""
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
        """Run an encoder over a data set once, streaming its posteriors to memory-mapped files.

        Arguments
        ---------
        encoder : maps a batch to a tensor, to ``(mean, scale)``, or to a :class:`torch.distributions.Distribution`
            with ``mean`` and ``stddev``. Called in ``eval`` mode if it is a module, without gradients.
        dataset : a :class:`torch.utils.data.Dataset` (of tensors, or of tuples and dicts whose first entry is
            the input), or a tensor or array of inputs.
        cache_dir : where ``mean.npy`` and ``scale.npy`` are written and kept; a temporary folder otherwise,
            removed with the returned object.
        """
        folder = Path(tempfile.mkdtemp(prefix="latentprior-") if cache_dir is None else cache_dir)
        try:
            mean, scale = _encode(encoder, dataset, batch_size, device, folder, num_workers)
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
        """Whether draws are fresh samples of per-row posteriors."""
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
        """Return the rows ``index`` as a flat ``(m, d)`` tensor: a fresh posterior sample each, or the points."""
        z = _rows(self._mean, index).flatten(1).to(device=device, dtype=dtype)
        if self._scale is None:
            return z
        scale = _rows(self._scale, index).flatten(1).to(device=device, dtype=dtype)
        noise = torch.randn(z.shape, generator=generator, dtype=dtype, device=_device_of(generator))
        return z + scale * noise.to(z.device)

    def blocks(self, generator: torch.Generator | None = None, rows: int = BLOCK) -> Iterator[Tensor]:
        """Yield all rows once, in order, as flat float64 blocks (fresh draws where scales are known)."""
        for start in range(0, len(self), rows):
            index = torch.arange(start, min(start + rows, len(self)))
            yield self.draw(index, generator, dtype=torch.float64)


def _device_of(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device


def _as_rows(values: Any, name: str) -> Tensor | Array:
    if isinstance(values, Tensor):
        values = values.detach()
        if values.is_nested or values.layout != torch.strided or values.is_meta:
            what = "on the device meta" if values.is_meta else "nested or sparse"
            raise InvalidLatentsError(f"{name} are {what}: give real numbers, a dense tensor or array")
        kind_ok = values.dtype in TYPES
    else:
        if np.ma.is_masked(values):
            raise InvalidLatentsError(f"{name} have masked values: remove or fill such rows")
        try:
            values = np.asanyarray(values)
        except (ValueError, TypeError) as error:
            raise InvalidLatentsError(f"{name} are not one rectangular array of numbers: {error}") from None
        kind_ok = values.dtype.kind in "fiu"
        if kind_ok and values.dtype.itemsize > 8:
            values = values.astype(np.float64)
        if kind_ok and values.dtype.byteorder not in "=|":
            values = values.astype(values.dtype.newbyteorder("="))
    if not kind_ok:
        raise InvalidLatentsError(f"{name} have type {values.dtype}: give real numbers (float or integer)")
    if values.ndim < 2:
        raise InvalidLatentsError(
            f"{name} have shape {tuple(values.shape)}: give (rows, coordinates...), for one coordinate (rows, 1)"
        )
    if values.shape[0] == 0 or math.prod(values.shape[1:]) == 0:
        raise InvalidLatentsError(f"{name} are empty: shape {tuple(values.shape)}")
    return values  # type: ignore[no-any-return]


def _rows(values: Tensor | Array, index: Tensor | slice) -> Tensor:
    if isinstance(values, Tensor):
        return values[index if isinstance(index, slice) else index.to(values.device)]
    picked = np.ascontiguousarray(values[index if isinstance(index, slice) else index.numpy()])
    if not picked.flags.writeable:
        picked = picked.copy()
    if picked.dtype.kind == "u" and picked.dtype.itemsize > 1:
        picked = picked.astype(np.float64)
    return torch.from_numpy(picked)


def _encode(
    encoder: Callable[[Tensor], Any],
    dataset: Any,
    batch_size: int,
    device: torch.device | str | None,
    folder: Path,
    num_workers: int,
) -> tuple[Array, Array | None]:
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(dataset, np.ndarray):
        dataset = torch.from_numpy(dataset)
    n, start = len(dataset), 0
    if n == 0:
        raise InvalidLatentsError("the data set to encode is empty")
    mean_file: Array | None = None
    scale_file: Array | None = None
    modes = {m: m.training for m in encoder.modules()} if isinstance(encoder, torch.nn.Module) else {}
    if isinstance(encoder, torch.nn.Module):
        encoder.eval()
    try:
        for batch in _batches(dataset, batch_size, num_workers):
            with torch.no_grad():
                mean, scale = _posterior_of(encoder(batch.to(device)))
            if scale is not None and scale.shape != mean.shape:
                raise InvalidLatentsError(
                    f"the encoder returned means of shape {tuple(mean.shape)} and scales of {tuple(scale.shape)}"
                )
            if mean_file is not None and mean.shape[1:] != mean_file.shape[1:]:
                raise InvalidLatentsError(
                    f"the encoder returned rows of shape {tuple(mean.shape[1:])} after {mean_file.shape[1:]}"
                )
            stop = start + len(mean)
            if mean_file is None:
                shape = (n, *mean.shape[1:])
                mean_file = _memmap(folder / "mean.npy", shape)
                scale_file = None if scale is None else _memmap(folder / "scale.npy", shape)
            if stop > n:
                raise InvalidLatentsError("the encoder returned more rows than the data set has")
            mean_file[start:stop] = mean.float().cpu().numpy()
            if scale is not None and scale_file is not None:
                scale_file[start:stop] = scale.float().cpu().numpy()
            start = stop
    finally:
        for module, training in modes.items():
            module.training = training
    if start != n or mean_file is None:
        raise InvalidLatentsError(f"the encoder returned {start} rows for {n} inputs")
    return mean_file, scale_file


def _memmap(path: Path, shape: tuple[int, ...]) -> Array:
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=shape)


def _batches(dataset: Any, batch_size: int, num_workers: int) -> Iterable[Tensor]:
    if isinstance(dataset, Tensor):
        yield from dataset.split(batch_size)
        return
    for batch in torch.utils.data.DataLoader(
        dataset, batch_size=batch_size, num_workers=num_workers, generator=torch.Generator()
    ):
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


def as_latents(values: Any, *, key: str | None = None) -> Latents:
    """Turn a tensor, array, path or :class:`Latents` into :class:`Latents`."""
    if isinstance(values, Latents):
        return values
    if isinstance(values, (str, Path)):
        return read_latents(values, key=key)
    return Latents(values)


def as_dense(
    values: Any, name: str = "latents", error: type[InvalidLatentsError | InvalidImagesError] = InvalidLatentsError
) -> Tensor:
    """A dense tensor of real numbers, from a tensor or what numpy reads as an array; raises ``error`` for others."""
    if isinstance(values, Tensor):
        tensor = values
    else:
        try:
            array = np.asarray(values)
        except (ValueError, TypeError) as cause:
            raise error(f"{name} are not one rectangular array of numbers: {cause}") from None
        if array.dtype.kind not in "fiub":
            raise error(f"{name} have type {array.dtype}: give real numbers (float or integer)")
        # A copy: torch knows no other order of bytes, and no negative strides.
        wide = array.dtype.itemsize > 8
        tensor = torch.from_numpy(np.array(array, dtype=np.float64 if wide else array.dtype.newbyteorder("=")))
    if tensor.is_nested or tensor.layout != torch.strided or tensor.is_meta or tensor.is_complex():
        raise error(f"{name} are complex, sparse, nested or without data: give a dense tensor")
    return tensor.dequantize() if tensor.is_quantized else tensor


def check_tensor(z: Any, event_shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return ``z`` as a flat ``(n, d)`` tensor, or raise :class:`InvalidLatentsError` naming the mismatch."""
    tensor = as_dense(z)
    if tuple(tensor.shape[1:]) != tuple(event_shape) or tensor.ndim != len(event_shape) + 1:
        raise InvalidLatentsError(
            f"latents have shape {tuple(tensor.shape)}, the prior expects (n, {', '.join(map(str, event_shape))})"
        )
    return tensor.to(device=device, dtype=dtype).flatten(1)


def read_latents(path: str | Path, *, key: str | None = None) -> Latents:
    """Read ``.npy`` (memory-mapped), ``.npz`` or ``.safetensors``; pickles are refused, never opened.

    In an archive, ``key`` names the array; by default it is the only one, else ``train``, else ``z``. An archive
    with both ``mean`` and ``scale`` (and no key) gives posteriors to draw from.

    Raises :class:`InvalidLatentsError` with one line that says what is wrong with the file.
    """
    path = Path(path)
    if path.is_dir():
        raise InvalidLatentsError(f"{path}: is a folder; give a .npy, .npz or .safetensors file")
    if not path.is_file():
        raise InvalidLatentsError(f"{path}: no such file")
    try:
        if path.suffix == ".npy":
            values = np.load(path, mmap_mode="r", allow_pickle=False)
            return Latents(values, name=str(path))
        if path.suffix == ".npz":
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
                return _from_archive(path, archive.files, archive.__getitem__, key)
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(path, framework="pt") as archive:
                return _from_archive(path, list(archive.keys()), archive.get_tensor, key)
    except InvalidLatentsError:
        raise
    except UNREADABLE as error:
        raise InvalidLatentsError(f"{path}: {_plain(error)}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("safetensors", "zlib", "safetensors_rust"):
            raise
        raise InvalidLatentsError(f"{path}: damaged archive ({error})") from None
    raise InvalidLatentsError(f"{path}: unknown kind of file; give .npy, .npz or .safetensors")


def _plain(error: BaseException) -> str:
    if "pickle" in str(error).lower() or "object array" in str(error).lower():
        return "holds Python objects or is damaged; save plain numbers with numpy.save"
    return f"damaged or not an array file ({' '.join(str(error).split()) or type(error).__name__})"


def _from_archive(path: Path, names: list[str], get: Callable[[str], Any], key: str | None) -> Latents:
    listed = ", ".join(names) or "none"
    if key is None and {"mean", "scale"} <= set(names):
        return Latents(get("mean"), get("scale"), name=str(path))
    if key is None:
        key = names[0] if len(names) == 1 else next((k for k in ("train", "z") if k in names), None)
    if key is None:
        raise InvalidLatentsError(f"{path}: several arrays ({listed}); choose one with --key / key=")
    if key not in names:
        raise InvalidLatentsError(f"{path}: no array named {key!r} (it has: {listed})")
    return Latents(get(key), name=f"{path}[{key}]")
