"""Autoencoders of diffusers and pythae, and the adapter that suits what is given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import LatentPriorError
from .autoencoder import Autoencoder, joined
from .callables import from_callables, from_methods
from .halves import AdaptedDecoder, AdaptedEncoder, Range, call_itself, weight_of

__all__ = ["from_any", "from_diffusers", "from_pythae"]


def from_diffusers(vae: Any, *, image_shape: Sequence[int] | None = None) -> Autoencoder:
    r"""An ``AutoencoderKL``, ``AutoencoderTiny`` or another diffusers autoencoder of images.

    Such models store factors that their ``encode`` and ``decode`` do not apply; here they are applied:
    :math:`z' = (z - \text{shift\_factor}) \cdot \text{scaling\_factor}`, or with moments per channel in the
    configuration :math:`z' = (z - \text{latents\_mean}) \cdot \text{scaling\_factor} / \text{latents\_std}`. Where they
    are absent or do not suit your images, measure them: :meth:`Autoencoder.standardised`. Half-precision weights
    are called in their own type.

    Parameters
    ----------
    vae : torch.nn.Module
        The model; it is put in ``eval`` mode. Its weights are referenced, not copied.
    image_shape : sequence of int, optional
        Shape (C, H, W) of the images that you will use; the configuration's ``in_channels`` and ``sample_size`` by
        default. One image of it is encoded to learn the latents' shape.

    Raises
    ------
    LatentPriorError
        Where the images' shape is not known, or the stored factors do not fit the latents.
    """
    if image_shape is None:
        size = _setting(vae, "sample_size")
        if size is None:
            raise LatentPriorError(
                f"{type(vae).__name__} does not say what images it takes: give image_shape=(C, H, W)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        image_shape = (_setting(vae, "in_channels") or 3, height, width)
    plain = from_methods(vae, (-1.0, 1.0), image_shape=image_shape)
    return plain._rescaled(*_stored_moments(vae, plain.event_shape))


def from_pythae(model: Any, *, image_range: Range = (0.0, 1.0)) -> Autoencoder:
    """A pythae model: ``encoder(x).embedding`` and ``.log_covariance``, ``decoder(z).reconstruction``.

    Parameters
    ----------
    model : torch.nn.Module
        The model; it is put in ``eval`` mode.
    image_range : tuple of float
        Least and most value of a pixel. The decoders of pythae end in a sigmoid and its images lie in [0, 1]; networks
        of your own may have another range.

    Raises
    ------
    LatentPriorError
        For something that is no pythae autoencoder.
    """
    if not (callable(getattr(model, "encoder", None)) and callable(getattr(model, "decoder", None))):
        raise LatentPriorError(f"{type(model).__name__} has no encoder and decoder: give a pythae autoencoder")
    encoder = AdaptedEncoder(model.encoder, call_itself, image_range)
    decoder = AdaptedDecoder(model.decoder, call_itself, image_range)
    return joined(encoder, decoder, event_shape=(int(model.latent_dim),))


def from_any(
    obj: Any,
    *,
    image_shape: Sequence[int] | None = None,
    event_shape: Sequence[int] | None = None,
    image_range: Range | None = None,
) -> Autoencoder:
    """Adapt what is given, by what it has: an :class:`Autoencoder`, a diffusers or pythae model, or two callables.

    Parameters
    ----------
    obj : object
        An :class:`Autoencoder`, which is returned as it is; a diffusers autoencoder; a pythae model; a pair
        ``(encode, decode)`` of callables; or an object with ``encode`` and ``decode`` methods.
    image_shape : sequence of int, optional
        Shape (C, H, W) of the images that you will use, where a diffusers model was made for others.
    event_shape : sequence of int, optional
        Shape of one latent, which a pair and an object with two methods need.
    image_range : tuple of float, optional
        Least and most value of a pixel: [0, 1] for pythae and [-1, 1] for everything else by default.

    Raises
    ------
    LatentPriorError
        For anything else, or where a shape is missing.
    """
    if isinstance(obj, Autoencoder):
        return obj
    bounds = image_range or (-1.0, 1.0)
    if isinstance(obj, tuple | list) and len(obj) == 2 and all(map(callable, obj)):
        return from_callables(*obj, event_shape=_needed(event_shape), image_range=bounds)
    if callable(getattr(obj, "encode", None)) and callable(getattr(obj, "decode", None)):
        if _setting(obj, "latent_channels") is not None or _setting(obj, "scaling_factor") is not None:
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


def _setting(vae: Any, name: str) -> Any:
    """A value of a model's configuration, or None."""
    config = getattr(vae, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _stored_moments(vae: Any, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the shift and factor that a diffusers configuration stores, ready to broadcast over latents."""
    means, deviations, scaling = (_setting(vae, name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    if means is None or deviations is None:
        means, deviations = _setting(vae, "shift_factor") or 0.0, 1.0
    shift = torch.as_tensor(means, dtype=torch.float32).flatten()
    factor = (1.0 if scaling is None else scaling) / torch.as_tensor(deviations, dtype=torch.float32).flatten()
    fits = {len(shift), len(factor)} <= {1, event_shape[0]}
    if not fits or not torch.isfinite(shift).all() or not torch.isfinite(factor).all() or (factor == 0).any():
        raise LatentPriorError(
            f"{type(vae).__name__}'s configuration stores latent factors that do not fit {event_shape[0]} channels: "
            "mend scaling_factor, shift_factor, latents_mean and latents_std"
        )
    trailing = (1,) * (len(event_shape) - 1)
    like = weight_of(vae)
    device = None if like is None else like.device
    return shift.view(-1, *trailing).to(device), factor.view(-1, *trailing).to(device)
