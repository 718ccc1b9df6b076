"""The adapter that suits what is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...errors import LatentPriorError
from .autoencoder import Autoencoder
from .callables import from_callables, from_methods
from .diffusers import from_diffusers, setting_of
from .halves import Range
from .pythae import from_pythae

__all__ = ["from_any"]


def from_any(
    obj: Any,
    *,
    image_shape: Sequence[int] | None = None,
    event_shape: Sequence[int] | None = None,
    image_range: Range | None = None,
) -> Autoencoder:
    """Adapt what is given, by what it has: an :class:`Autoencoder`, a diffusers or pythae model, or two callables.

    Accepted are ``(encode, decode)`` pairs and objects with ``encode`` and ``decode`` methods (both need
    ``event_shape``), diffusers autoencoders (``image_shape`` where theirs is not yours) and pythae models. Raises
    :class:`LatentPriorError` for anything else.
    """
    if isinstance(obj, Autoencoder):
        return obj
    bounds = image_range or (-1.0, 1.0)
    if isinstance(obj, tuple | list) and len(obj) == 2 and all(map(callable, obj)):
        return from_callables(*obj, event_shape=_needed(event_shape), image_range=bounds)
    if callable(getattr(obj, "encode", None)) and callable(getattr(obj, "decode", None)):
        if setting_of(obj, "latent_channels") is not None or setting_of(obj, "scaling_factor") is not None:
            return from_diffusers(obj, image_shape=image_shape)
        return from_methods(obj, bounds, event_shape=_needed(event_shape))
    if all(hasattr(obj, name) for name in ("encoder", "decoder", "latent_dim")):
        return from_pythae(obj, image_range=image_range or (0.0, 1.0))
    raise LatentPriorError(
        f"{type(obj).__name__} is no autoencoder known here: give a diffusers or pythae model, an object with "
        "encode and decode, or a pair (encode, decode) with event_shape"
    )


def _needed(event_shape: Sequence[int] | None) -> Sequence[int]:
    if event_shape is None:
        raise LatentPriorError("this autoencoder does not say what its latents look like: give event_shape")
    return event_shape
