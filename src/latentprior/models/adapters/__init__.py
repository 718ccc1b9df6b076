"""Autoencoders from elsewhere as one thing: an encoder and a generator that speak images in [-1, 1]."""

from .autoencoder import Autoencoder
from .callables import from_callables
from .foreign import from_any, from_diffusers, from_pythae
from .halves import AdaptedEncoder, AdaptedGenerator

__all__ = [
    "AdaptedEncoder",
    "AdaptedGenerator",
    "Autoencoder",
    "from_any",
    "from_callables",
    "from_diffusers",
    "from_pythae",
]
