"""Random numbers that depend on a seed and on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derived_generator", "device_of"]


def derived_generator(device: torch.device, *keys: int | str) -> torch.Generator:
    """Return a generator seeded by a hash of ``keys``: any part of a run can be repeated without replaying the rest.

    Parameters
    ----------
    device : torch.device
        Where the generator draws.
    *keys : int or str
        The seed of the run, and words and numbers that name the use of the draws.

    Returns
    -------
    torch.Generator
        The same generator for the same keys.
    """
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)


def device_of(generator: torch.Generator | None) -> torch.device:
    """Return the device on which a generator draws.

    Parameters
    ----------
    generator : torch.Generator or None
        None stands for torch's own generator of the CPU.

    Returns
    -------
    torch.device
        The device for tensors that are drawn with ``generator``.
    """
    return torch.device("cpu") if generator is None else generator.device
