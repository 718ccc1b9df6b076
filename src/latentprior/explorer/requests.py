"""What a request may say: one JSON object of known fields, every number within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

__all__ = ["Fields", "Refused", "max_json_bytes", "parse"]

MAX_COORDINATE = 1e6
"""The largest absolute value of a coordinate of a latent: its square is finite in float32."""


class Refused(Exception):
    """A request is answered with an error: an HTTP status, one line that says what is wrong, and further headers."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})


def max_json_bytes(dim: int) -> int:
    """Return the bytes of the longest JSON that is read: two latents of 32 bytes a coordinate, and the rest."""
    return 4096 + 64 * dim


def parse(body: bytes) -> Fields:
    """Read one JSON object; anything else is refused, and so are NaN and infinities, which are not JSON."""
    try:
        content = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON: send one object, numbers finite") from None
    if not isinstance(content, dict):
        raise Refused(400, "the body must be one JSON object")
    return Fields(content)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(name)


class Fields:
    """The fields of one JSON object, to be taken one by one.

    Each method takes the ``name`` of a field and what its value may be, from ``low`` to ``high`` where it is a number;
    a field without a ``default`` is required. It raises :class:`Refused` with status 400 for any other value.
    """

    def __init__(self, content: Mapping[str, Any]) -> None:
        self._rest = dict(content)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Take a whole number."""
        value = self._take(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise Refused(400, f"{name} must be a whole number from {low} to {high}")
        return value

    def real(self, name: str, low: float, high: float) -> float:
        """Take a number."""
        value = self._take(name)
        if not _is_number(value) or not low <= value <= high:
            raise Refused(400, f"{name} must be a number from {low:g} to {high:g}")
        return float(value)

    def one_of(self, name: str, options: Mapping[str, Any]) -> str:
        """Take a word, one of the keys of ``options``."""
        value = self._take(name)
        if not isinstance(value, str) or value not in options:
            raise Refused(400, f"{name} must be one of: {', '.join(options)}")
        return value

    def latent(self, name: str, dim: int) -> Tensor:
        """Take the ``dim`` coordinates of one latent, float64 ``(dim,)``."""
        value = self._take(name)
        if not isinstance(value, list) or len(value) != dim:
            raise Refused(400, f"{name} must be a list of {dim} numbers")
        if not all(_is_number(x) and abs(x) <= MAX_COORDINATE for x in value):
            raise Refused(400, f"{name} must hold finite numbers of at most {MAX_COORDINATE:g}")
        return torch.tensor([float(x) for x in value], dtype=torch.float64)

    def done(self) -> None:
        """Refuse the fields that nobody took: a misspelt name would otherwise go unnoticed."""
        if self._rest:
            raise Refused(400, f"unknown field {next(iter(self._rest))[:40]!r}")

    def _take(self, name: str, default: Any = None) -> Any:
        value = self._rest.pop(name, default)
        if value is None:
            raise Refused(400, f"{name} is missing")
        return value


def _is_number(value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
