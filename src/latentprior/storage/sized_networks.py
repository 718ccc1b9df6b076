"""Networks that a file describes: measured against the weights beside it before memory is given to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["blank", "built_for"]

Network = TypeVar("Network", bound=nn.Module)


def blank(kind: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    """A layer on the CPU whose weights the caller is about to draw; without memory while :func:`built_for` measures."""
    where = "meta" if torch.get_default_device().type == "meta" else "cpu"
    return nn.utils.skip_init(kind, *sizes, **options, device=where)


def built_for(
    weights: Mapping[str, Tensor], build: Callable[[], Network], *, ignored: str | tuple[str, ...] = ()
) -> Network:
    """Build a network whose state has the names and shapes of ``weights``, those that begin with ``ignored`` apart.

    It is first sketched without memory: a damaged or hostile specification of a kilobyte could otherwise ask for
    all that the machine has. Raises :class:`ValueError` where sketch and weights differ.
    """
    with torch.device("meta"):
        sketch = build().state_dict()
    wanted = {k: tuple(v.shape) for k, v in sketch.items() if not k.startswith(ignored)}
    found = {k: tuple(v.shape) for k, v in weights.items()}
    if wanted != found:
        wrong = sorted(k for k in {*wanted, *found} if wanted.get(k) != found.get(k))
        raise ValueError(f"weights that do not fit: {', '.join(wrong[:5])}")
    return build()
