"""Networks that a file describes are compared with the weights beside it before they get memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

__all__ = ["blank", "built_for"]

Network = TypeVar("Network", bound=nn.Module)


def blank(kind: Callable[..., nn.Module], *sizes: Any, **options: Any) -> Any:
    """Make a layer on the CPU whose weights the caller draws; under :func:`built_for` it first takes no memory."""
    where = "meta" if torch.get_default_device().type == "meta" else "cpu"
    return nn.utils.skip_init(kind, *sizes, **options, device=where)


def built_for(
    weights: Mapping[str, Tensor], build: Callable[[], Network], *, ignored: str | tuple[str, ...] = ()
) -> Network:
    """Build a network whose state has the names and shapes of ``weights``.

    It is first built without memory: a damaged or hostile specification of a kilobyte could otherwise ask for all
    that the machine has.

    Parameters
    ----------
    weights : mapping
        Tensors by name.
    build : callable
        Makes the network.
    ignored : str or tuple of str, optional
        Beginnings of names in the network that ``weights`` need not have.

    Raises
    ------
    ValueError
        If names or shapes differ.
    """
    with torch.device("meta"):
        sketch = build().state_dict()
    expected = {k: tuple(v.shape) for k, v in sketch.items() if not k.startswith(ignored)}
    given = {k: tuple(v.shape) for k, v in weights.items()}
    if expected != given:
        wrong = sorted(k for k in {*expected, *given} if expected.get(k) != given.get(k))
        raise ValueError(f"weights that do not fit: {', '.join(wrong[:5])}")
    return build()
