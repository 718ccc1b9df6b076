"""latentprior: learn the latent prior that a generator should have had."""

from ._version import __version__
from .errors import (
    CheckpointError,
    InvalidImagesError,
    InvalidLatentsError,
    LatentPriorError,
    LatentPriorWarning,
    LearningDivergedError,
    LowESSWarning,
    MissingExtraError,
    NormalizerBracketWarning,
    StageSaturatedWarning,
)
from .latents import Latents
from .learning import Event, fit
from .normalizers import NormalizerCheck
from .prior import LatentPrior, Stage
from .progress import FitProgress
from .stage import StageSettings

__all__ = [
    "CheckpointError",
    "Event",
    "FitProgress",
    "InvalidImagesError",
    "InvalidLatentsError",
    "LatentPrior",
    "LatentPriorError",
    "LatentPriorWarning",
    "Latents",
    "LearningDivergedError",
    "LowESSWarning",
    "MissingExtraError",
    "NormalizerBracketWarning",
    "NormalizerCheck",
    "Stage",
    "StageSaturatedWarning",
    "StageSettings",
    "__version__",
    "fit",
]
