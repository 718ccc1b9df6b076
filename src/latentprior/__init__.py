"""latentprior: learn the latent prior that a generator should have had."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .data.images import Images, read_images
from .data.latents import Latents
from .density.ladder import Stage
from .density.normalizer_check import NormalizerCheck
from .density.prior import LatentPrior
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
    MissingExtraError,
    NormalizerBracketWarning,
    ProcessLostError,
    StageSaturatedWarning,
)
from .fitting.fit import fit
from .fitting.refine import refine
from .fitting.settings import StageSettings
from .integrations.onnx_export import export_onnx
from .models.model import LatentVariableModel
from .report import Report, write_report
from .runtime.events import Event
from .runtime.progress import Progress
from .storage.cards import model_card
from .training.alternating import train_alternating, train_under_prior
from .training.config import AutoencoderConfig, TrainingConfig
from .training.joint import train
from .training.two_phase import train_autoencoder, train_two_phase

if TYPE_CHECKING:
    from .integrations.pyod_detector import RatioDetector as RatioDetector
    from .integrations.sklearn_density import LatentDensity
    from .models.adapters import from_any, from_callables, from_diffusers, from_pythae

__all__ = [
    "AutoencoderConfig",
    "CheckpointError",
    "Event",
    "ExportError",
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
    "MissingExtraError",
    "NormalizerBracketWarning",
    "NormalizerCheck",
    "ProcessLostError",
    "Progress",
    "Report",
    "Stage",
    "StageSaturatedWarning",
    "StageSettings",
    "TrainingConfig",
    "__version__",
    "export_onnx",
    "fit",
    "from_any",
    "from_callables",
    "from_diffusers",
    "from_pythae",
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


_LATE = {
    "LatentDensity": "integrations.sklearn_density",
    "RatioDetector": "integrations.pyod_detector",
    "from_any": "models.adapters",
    "from_callables": "models.adapters",
    "from_diffusers": "models.adapters",
    "from_pythae": "models.adapters",
}
"""Names that are imported when they are asked for, since scikit-learn and PyOD are extras and slow to import."""


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATE[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATE})
