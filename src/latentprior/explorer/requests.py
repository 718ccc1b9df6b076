"""What a request may say: one JSON object of known fields, every number within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["Fields", "Refused", "most_bytes", "parse"]

FARTHEST = 1e6
"""Most that a coordinate of a latent may be, in absolute value."""


class Refused(Exception):
    """A request that is answered with ``status`` and ``{"error": message}``."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = dict(headers or {})


def most_bytes(dim: int) -> int:
    """Length of the longest JSON that is read: two latents, with room."""
    return 4096 + 64 * dim


def parse(body: bytes) -> Fields:
    """Read one JSON object; NaN, infinities and anything else that is not JSON are refused."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON: send one object, numbers finite") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body must be one JSON object")
    return Fields(found)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


class Fields:
    """The fields of one object, taken one by one; :meth:`done` refuses what nobody asked for."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._left = dict(found)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in ``[low, high]``."""
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Refused(400, f"{name} must be a whole number from {low} to {high}")
        return value

    def real(self, name: str, low: float, high: float) -> float:
        """A number in ``[low, high]``."""
        value = self._take(name)
        if not _is_number(value) or not low <= value <= high:
            raise Refused(400, f"{name} must be a number from {low:g} to {high:g}")
        return float(value)

    def one_of(self, name: str, known: Mapping[str, Any]) -> str:
        """One of the known words."""
        value = self._take(name)
        if not isinstance(value, str) or value not in known:
            raise Refused(400, f"{name} must be one of: {', '.join(known)}")
        return value

    def latent(self, name: str, dim: int) -> Tensor:
        """The coordinates of one latent, flat, float64 ``(dim,)``."""
        value = self._take(name)
        if not isinstance(value, list) or len(value) != dim:
            raise Refused(400, f"{name} must be a list of {dim} numbers")
        if not all(_is_number(x) and abs(x) <= FARTHEST for x in value):
            raise Refused(400, f"{name} must hold finite numbers of at most {FARTHEST:g}")
        return torch.tensor([float(x) for x in value], dtype=torch.float64)

    def done(self) -> None:
        """Refuse fields that are left: a misspelt one would go unnoticed."""
        if self._left:
            raise Refused(400, f"unknown field {next(iter(self._left))[:40]!r}")

    def _take(self, name: str, default: Any = None) -> Any:
        value = self._left.pop(name, default)
        if value is None:
            raise Refused(400, f"{name} is missing")
        return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
