"""Random numbers that depend on a seed and on what they are for, and on nothing that was drawn before."""

from __future__ import annotations

import hashlib

import torch

__all__ = ["derived_generator"]


def derived_generator(device: torch.device, *keys: int | str) -> torch.Generator:
    """A generator seeded by a hash of ``keys``: any part of a run can be repeated without replaying the rest."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big") >> 1)
