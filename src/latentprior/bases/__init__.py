"""Normalised densities that the ladder starts from; all live in standardised, flat coordinates."""

from .base import Base
from .blend import BlendBase
from .by_name import base_from_state, fit_base
from .copula import CopulaBase
from .distribution import DistributionBase
from .flow import FlowBase
from .mixture import GaussianMixtureBase
from .normal import NormalBase

__all__ = [
    "Base",
    "BlendBase",
    "CopulaBase",
    "DistributionBase",
    "FlowBase",
    "GaussianMixtureBase",
    "NormalBase",
    "base_from_state",
    "fit_base",
]
