"""The event that every callback of learning receives."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Callback", "Event", "Kind"]

Kind = Literal[
    "base", "stage", "step", "evaluate", "learned", "normalizer", "end", "settle", "autoencoder", "prior"
]  # fmt: skip


@dataclass(frozen=True)
class Event:
    """One moment of learning, as a callback receives it.

    Parameters
    ----------
    kind : str
        What has happened. Every function of learning sends some of these kinds:

        - ``"base"``: the base density is about to be fitted; ``message`` names it.
        - ``"stage"``: a stage of :func:`~latentprior.fit` begins; ``message`` names the source of its particles.
        - ``"step"``: one step of a stage has been taken.
        - ``"evaluate"``: the held-out gain of the stage was measured, and the state was saved if there is a
          ``checkpoint_dir``.
        - ``"learned"``: the stage has joined the ladder.
        - ``"settle"``: one step of the decoder alone, after the last stage, has been taken.
        - ``"autoencoder"``: one step of the decoder and the encoder, before there is a prior, has been taken.
        - ``"prior"``: one step of the second autoencoder of a two-stage VAE has been taken.
        - ``"normalizer"``: the log normaliser is about to be measured; ``stage`` counts the stages of the ladder.
        - ``"end"``: learning has ended; ``stage`` counts the stages of the ladder, ``message`` says why it ended.
    stage : int
        Index of the stage that the event is about, from 0.
    step : int
        Number of steps that have been taken in this part of the run.
    steps : int
        Number of steps that this part of the run takes at most.
    gain : float
        Held-out gain of the stage, in nats; NaN before it was measured.
    gain_stderr : float
        Standard error of ``gain``, in nats.
    seconds : float
        Seconds since the run began, with those of earlier calls that it resumed.
    message : str
        What the kind says about it; often empty.
    losses : mapping of str to float
        Losses of the step by name: ``"ratio"`` (logistic loss, nats), ``"reconstruction"`` (squared error a pixel),
        ``"encoder"`` (nats an image), ``"divergence"`` (nats an image), ``"energy"`` (nats). Empty in
        :func:`~latentprior.fit`.
    model : LatentVariableModel or None
        The model that is being learned; None in :func:`~latentprior.fit`.
    """

    kind: Kind
    stage: int = 0
    step: int = 0
    steps: int = 0
    gain: float = math.nan
    gain_stderr: float = math.nan
    seconds: float = 0.0
    message: str = ""
    losses: Mapping[str, float] = field(default_factory=dict)
    model: Any = None


Callback = Callable[[Event], None]
