"""latentprior: learn the latent prior that a generator should have had."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .cards import model_card
from .errors import (
    CheckpointError,
    ExportError,
    HubError,
    InvalidImagesError,
    InvalidLatentsError,
    LatentPriorError,
    LatentPriorWarning,
    LearningDivergedError,
    LearningRetriedWarning,
    LowESSWarning,
    MergeError,
    MissingExtraError,
    NormalizerBracketWarning,
    ProcessLostError,
    StageSaturatedWarning,
)
from .generator.alternating import train_alternating, train_under_prior
from .generator.model import LatentVariableModel
from .generator.training import TrainingConfig, TrainingEvent, train
from .generator.two_phase import AutoencoderConfig, train_autoencoder, train_two_phase
from .images import Images, read_images
from .latents import Latents
from .learning import Event, fit
from .merging import merge
from .normalizers import NormalizerCheck
from .onnx_graphs import export_onnx
from .prior import LatentPrior, Stage
from .progress import FitProgress
from .refining import refine
from .report import Report, write_report
from .stage_settings import StageSettings

if TYPE_CHECKING:
    from .detectors import RatioDetector as RatioDetector
    from .estimators import LatentDensity

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "Event",
    "ExportError",
    "FitProgress",
    "HubError",
    "Images",
    "InvalidImagesError",
    "InvalidLatentsError",
    "LatentDensity",
    "LatentPrior",
    "LatentPriorError",
    "LatentPriorWarning",
    "LatentVariableModel",
    "Latents",
    "LearningDivergedError",
    "LearningRetriedWarning",
    "LowESSWarning",
    "MergeError",
    "MissingExtraError",
    "NormalizerBracketWarning",
    "NormalizerCheck",
    "ProcessLostError",
    "Report",
    "Stage",
    "StageSaturatedWarning",
    "StageSettings",
    "TrainingConfig",
    "TrainingEvent",
    "__version__",
    "export_onnx",
    "fit",
    "merge",
    "model_card",
    "read_images",
    "refine",
    "train",
    "train_alternating",
    "train_autoencoder",
    "train_two_phase",
    "train_under_prior",
    "write_report",
]


_LATE = {"LatentDensity": "estimators", "RatioDetector": "detectors"}
"""Names imported when they are asked for: scikit-learn takes as long to import as torch, PyOD is an extra."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
