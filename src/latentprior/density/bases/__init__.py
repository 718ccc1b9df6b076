"""Normalised densities that the ladder starts from; all live in standardised, flat coordinates."""

from .base import Base, BlendBase, NormalBase
from .by_name import base_from_state, fit_base
from .copula import CopulaBase
from .distribution import DistributionBase
from .flow import FlowBase
from .full_mixture import GaussianMixtureBase
from .low_rank_mixture import LowRankMixtureBase
from .mixture_base import MixtureBase

__all__ = [
    "Base",
    "BlendBase",
    "CopulaBase",
    "DistributionBase",
    "FlowBase",
    "GaussianMixtureBase",
    "LowRankMixtureBase",
    "MixtureBase",
    "NormalBase",
    "base_from_state",
    "fit_base",
]
