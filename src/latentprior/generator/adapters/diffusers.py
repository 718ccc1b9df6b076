"""Autoencoders of diffusers, with the factors of their latents that their configuration stores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import LatentPriorError
from .autoencoder import Autoencoder
from .callables import from_methods
from .halves import weight_of

__all__ = ["from_diffusers", "setting_of"]


def from_diffusers(vae: Any, *, image_shape: Sequence[int] | None = None) -> Autoencoder:
    r"""An ``AutoencoderKL``, ``AutoencoderTiny`` or another diffusers autoencoder of images.

    Such models store factors that their ``encode`` and ``decode`` do not apply; here they are applied:
    :math:`z' = (z - \text{shift\_factor}) \cdot \text{scaling\_factor}`, or with moments per channel in the
    configuration :math:`z' = (z - \text{latents\_mean}) \cdot \text{scaling\_factor} / \text{latents\_std}`. Where they
    are absent or do not suit your images, measure them: :meth:`Autoencoder.standardised`. Half-precision weights
    are called in their own type.

    Arguments
    ---------
    vae : the model; put in ``eval`` mode. Its weights are referenced, not copied.
    image_shape : (C, H, W) of the images you will use; the configuration's ``in_channels`` and ``sample_size`` by
        default. One image of it is encoded to learn the latents' shape.
    """
    if image_shape is None:
        size = setting_of(vae, "sample_size")
        if size is None:
            raise LatentPriorError(
                f"{type(vae).__name__} does not say what images it takes: give image_shape=(C, H, W)"
            )
        height, width = (size, size) if isinstance(size, int) else size
        image_shape = (setting_of(vae, "in_channels") or 3, height, width)
    plain = from_methods(vae, (-1.0, 1.0), image_shape=image_shape)
    return plain._rescaled(*_stored_moments(vae, plain.event_shape))


def setting_of(vae: Any, name: str) -> Any:
    """A value of a model's configuration, or None."""
    config = getattr(vae, "config", None)
    return config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)


def _stored_moments(vae: Any, event_shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the shift and factor that a diffusers configuration stores, ready to broadcast over latents."""
    means, deviations, scaling = (setting_of(vae, name) for name in ("latents_mean", "latents_std", "scaling_factor"))
    if means is None or deviations is None:
        means, deviations = setting_of(vae, "shift_factor") or 0.0, 1.0
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
