"""Autoencoders that are two callables, or an object with two methods."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .autoencoder import Autoencoder, joined
from .halves import AdaptedDecoder, AdaptedEncoder, Range, call_itself

__all__ = ["from_callables", "from_methods"]


def from_callables(
    encode: Callable[[Tensor], Any],
    decode: Callable[[Tensor], Any],
    *,
    event_shape: Sequence[int],
    image_range: Range = (-1.0, 1.0),
) -> Autoencoder:
    """An autoencoder from two callables; give modules rather than their methods, so that ``.to(device)`` moves them.

    Both callables are tried once; modules are put in ``eval`` mode.

    Parameters
    ----------
    encode : callable
        Images ``(n, C, H, W)`` in ``image_range`` to a tensor, to ``(mean, standard deviation)`` (not a log
        variance), or to a :class:`torch.distributions.Distribution`.
    decode : callable
        Latents ``(n, *event_shape)`` to a tensor of images in ``image_range``.
    event_shape : sequence of int
        Shape of one latent.
    image_range : tuple of float
        Least and most value of a pixel, as the two callables have it.

    Raises
    ------
    LatentPriorError
        Where the two do not fit each other or ``event_shape``.

    Examples
    --------
    >>> import torch
    >>> flat, square = torch.nn.Flatten(), torch.nn.Unflatten(1, (1, 2, 2))
    >>> from_callables(flat, square, event_shape=(4,), image_range=(0, 1)).image_shape
    torch.Size([1, 2, 2])
    """
    encoder, decoder = (
        AdaptedEncoder(encode, call_itself, image_range),
        AdaptedDecoder(decode, call_itself, image_range),
    )
    return joined(encoder, decoder, event_shape=event_shape)


def from_methods(
    obj: Any, image_range: Range, *, event_shape: Sequence[int] | None = None, image_shape: Sequence[int] | None = None
) -> Autoencoder:
    """An autoencoder from the ``encode`` and ``decode`` methods of one object.

    Parameters
    ----------
    obj : object
        What has the two methods.
    image_range : tuple of float
        Least and most value of a pixel, as the two methods have it.
    event_shape : sequence of int, optional
        Shape of one latent.
    image_shape : sequence of int, optional
        Shape (C, H, W) of one image, where ``event_shape`` is not given.

    Raises
    ------
    LatentPriorError
        Where the two methods do not fit each other or the shape.
    """
    encoder = AdaptedEncoder(_without(obj, "decoder", "post_quant_conv", "quantize"), _call_encode, image_range)
    decoder = AdaptedDecoder(_without(obj, "encoder", "quant_conv"), _call_decode, image_range)
    return joined(encoder, decoder, event_shape=event_shape, image_shape=image_shape)


def _call_encode(part: Any, x: Tensor) -> Any:
    return part.encode(x)


def _call_decode(part: Any, z: Tensor) -> Any:
    return part.decode(z)


def _without(obj: Any, *names: str) -> Any:
    """Return a view of a module that lacks some children, so that encoder and decoder own no weight in common."""
    if not isinstance(obj, nn.Module):
        return obj
    view = copy.copy(obj)
    view._modules = {name: child for name, child in obj._modules.items() if name not in names}
    return view
