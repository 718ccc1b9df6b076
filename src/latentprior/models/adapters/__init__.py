"""Autoencoders from elsewhere as one thing: an encoder and a decoder that speak images in [-1, 1]."""

from .autoencoder import Autoencoder
from .foreign import from_any, from_callables, from_diffusers, from_pythae
from .halves import AdaptedDecoder, AdaptedEncoder

__all__ = [
    "AdaptedDecoder",
    "AdaptedEncoder",
    "Autoencoder",
    "from_any",
    "from_callables",
    "from_diffusers",
    "from_pythae",
]
