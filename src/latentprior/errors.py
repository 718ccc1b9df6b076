"""Named errors and warnings; each message says what was wrong, where, and how to mend it."""

from __future__ import annotations

import sys
import warnings

__all__ = [
    "CheckpointError",
    "ExportError",
    "HubError",
    "InvalidImagesError",
    "InvalidLatentsError",
    "LatentPriorError",
    "LatentPriorWarning",
    "LearningDivergedError",
    "LearningRetriedWarning",
    "LowESSWarning",
    "MissingExtraError",
    "NormalizerBracketWarning",
    "ProcessLostError",
    "StageSaturatedWarning",
]


LONGEST = 1500


def one_line(text: str) -> str:
    """A message that a file's contents can neither break into lines nor drown: escaped, and cut in its middle."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 500]} [...] {shown[-400:]}"


class LatentPriorError(Exception):
    """Base of every error that this package raises on purpose; its message is one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class InvalidLatentsError(LatentPriorError, ValueError):
    """The latents cannot be learned from or scored: wrong shape, type, or non-finite numbers."""


class InvalidImagesError(LatentPriorError, ValueError):
    """The images cannot be learned from or scored: wrong shape, type, range, or a damaged file."""


class CheckpointError(LatentPriorError, ValueError):
    """A file or folder on disk is not what it should be: absent, damaged, foreign or from another version."""


class HubError(LatentPriorError, RuntimeError):
    """The Hugging Face hub refused what was pushed, or was not reached."""


class ExportError(LatentPriorError, RuntimeError):
    """A part has no form in the format asked for: a base, a tilt or a network of your own."""


class MissingExtraError(LatentPriorError, ImportError):
    """A feature needs an optional dependency; the message names the extra to install."""

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'latentprior[{extra}]'")
        self.what = feature, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), self.what


class LearningDivergedError(LatentPriorError, RuntimeError):
    """Learning ran away, also after one retry with a smaller step: a loss, chains or particles are no use any more."""


class ProcessLostError(LatentPriorError, RuntimeError):
    """Another process of the same run has ended: start all again, they go on from the last checkpoint."""


class LatentPriorWarning(UserWarning):
    """Base of every warning that this package gives."""


class NormalizerBracketWarning(LatentPriorWarning):
    """The log normaliser from the base's end and from the data's end differ by more than 0.1 nats.

    Densities may then be off by as much as the bracket is wide: use a better base (``base="gmm"``), more
    particles, or treat ``log_prob`` as known up to that constant only.
    """


class StageSaturatedWarning(LatentPriorWarning):
    """The ladder ended while its last stage still told data from samples almost perfectly.

    The prior has not arrived: raise ``max_stages`` or start from a better base (``base="gmm"``).
    """


class LearningRetriedWarning(LatentPriorWarning):
    """Learning diverged, went back to the last good state and goes on with a smaller step.

    What comes out is whole; lower the learning rate that the message names, or look for extreme rows.
    """


class LowESSWarning(LatentPriorWarning):
    """A weighted population stands on too few effective particles for its result to be trusted."""


INSIDE = {"latentprior", "torch", "contextlib"}


def warn(message: str, category: type[LatentPriorWarning]) -> None:
    """Warn of the line that called this package, however deep inside the reason was found."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INSIDE:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
