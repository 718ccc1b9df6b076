"""Autoencoders of pythae."""

from __future__ import annotations

from typing import Any

from ...errors import LatentPriorError
from .autoencoder import Autoencoder, joined
from .halves import AdaptedEncoder, AdaptedGenerator, Range, call_itself

__all__ = ["from_pythae"]


def from_pythae(model: Any, *, image_range: Range = (0.0, 1.0)) -> Autoencoder:
    """A pythae model: ``encoder(x).embedding`` and ``.log_covariance``, ``decoder(z).reconstruction``.

    pythae's decoders end in a sigmoid and its images lie in [0, 1]; give another ``image_range`` for networks of
    your own. The model is put in ``eval`` mode. Raises :class:`LatentPriorError` for something else.
    """
    if not (callable(getattr(model, "encoder", None)) and callable(getattr(model, "decoder", None))):
        raise LatentPriorError(f"{type(model).__name__} has no encoder and decoder: give a pythae autoencoder")
    encoder = AdaptedEncoder(model.encoder, call_itself, image_range)
    generator = AdaptedGenerator(model.decoder, call_itself, image_range)
    return joined(encoder, generator, event_shape=(int(model.latent_dim),))
