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
from .generator.alternating import train_alternating, train_under_prior
from .generator.model import LatentVariableModel
from .generator.training import TrainingConfig, TrainingEvent, train
from .generator.two_phase import AutoencoderConfig, train_autoencoder, train_two_phase
from .images import Images, read_images
from .latents import Latents
from .learning import Event, fit
from .normalizers import NormalizerCheck
from .prior import LatentPrior, Stage
from .progress import FitProgress
from .report import Report, write_report
from .stage import StageSettings

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "Event",
    "FitProgress",
    "Images",
    "InvalidImagesError",
    "InvalidLatentsError",
    "LatentPrior",
    "LatentPriorError",
    "LatentPriorWarning",
    "LatentVariableModel",
    "Latents",
    "LearningDivergedError",
    "LowESSWarning",
    "MissingExtraError",
    "NormalizerBracketWarning",
    "NormalizerCheck",
    "Report",
    "Stage",
    "StageSaturatedWarning",
    "StageSettings",
    "TrainingConfig",
    "TrainingEvent",
    "__version__",
    "fit",
    "read_images",
    "train",
    "train_alternating",
    "train_autoencoder",
    "train_two_phase",
    "train_under_prior",
    "write_report",
]
