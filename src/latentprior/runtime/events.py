"""What callbacks of learning hear."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

__all__ = ["Callback", "Event", "TrainingEvent"]


class _Gain(NamedTuple):
    value: float
    stderr: float


UNMEASURED = _Gain(math.nan, math.nan)


@dataclass(frozen=True)
class Event:
    """What a callback hears.

    ``kind`` is ``base`` (the base is being fitted), ``stage`` (a stage begins), ``step``, ``evaluate`` (a held-out
    gain is known and, with a ``checkpoint_dir``, saved), ``learned`` (a stage joined the ladder),
    ``normalizer`` (log Z is being bracketed) or ``end``. ``gain`` is in nats; ``seconds`` since the call.
    """

    kind: Literal["base", "stage", "step", "evaluate", "learned", "normalizer", "end"]
    stage: int = 0
    step: int = 0
    steps: int = 0
    gain: float = math.nan
    gain_stderr: float = math.nan
    seconds: float = 0.0
    message: str = ""


Callback = Callable[[Event], None]


@dataclass(frozen=True)
class TrainingEvent:
    """What a callback hears.

    ``kind`` is ``step``, ``evaluate`` (held-out gain known; saved, with a ``checkpoint_dir``), ``learned`` (a stage
    joined the ladder), ``settle`` (a step of the generator alone), ``normalizer`` or ``end``. ``losses`` holds the
    logistic loss (``ratio``, nats), the squared error a pixel (``reconstruction``) and the encoder's, if it has one.
    """

    kind: str
    stage: int = 0
    step: int = 0
    steps: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    gain: Any = UNMEASURED
    seconds: float = 0.0
    model: Any = None
