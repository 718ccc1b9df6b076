"""Normalised densities that the ladder starts from; all live in standardised, flat coordinates."""

from .base import Base
from .blend import BlendBase
from .by_name import base_from_state, fit_base
from .copula import CopulaBase
from .distribution import DistributionBase
from .flow import FlowBase
from .low_rank import LowRankMixtureBase
from .mixture import GaussianMixtureBase
from .mixtures import MixtureBase
from .normal import NormalBase

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
