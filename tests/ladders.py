"""Ladders of bare log ratios, for tests."""

from collections.abc import Sequence

from torch import nn

from latentprior.density.bases import Base, MixtureBase
from latentprior.density.ladder import Ladder, Stage


def ladder_of(base: Base, ratios: Sequence[nn.Module] = (), cover: MixtureBase | None = None) -> Ladder:
    """A ladder of these log ratios, whose constants are not known."""
    return Ladder(base, [Stage(ratio) for ratio in ratios], cover)
