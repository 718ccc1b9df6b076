"""Named errors and warnings; each message says in one line what is wrong, where, and how to mend it."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator

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

LONGEST_MESSAGE = 1500
"""Most characters of a message: about twenty lines of a terminal."""
LAST_PART = 400
"""Characters at the end of a longer message that are kept: the mend stands there."""


def one_line(text: str) -> str:
    """Escape what would break a message into lines, so that a file it quotes forges none, and cut out a long middle."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(escaped) <= LONGEST_MESSAGE:
        return escaped
    return f"{escaped[: LONGEST_MESSAGE - LAST_PART - 100]} [...] {escaped[-LAST_PART:]}"


def reason(error: BaseException) -> str:
    """Return what another library's error says without line breaks, or its name if it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


class LatentPriorError(Exception):
    """Base of every error that this package raises on purpose; its message is one line."""

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class InvalidLatentsError(LatentPriorError, ValueError):
    """The latents have a wrong shape or type, or hold NaN or infinite values: mend or remove what the message names."""


class InvalidImagesError(LatentPriorError, ValueError):
    """The images have a wrong shape, type or range, or are damaged: mend or replace what the message names."""


class CheckpointError(LatentPriorError, ValueError):
    """A file or folder is absent, damaged, foreign or of another version: give another, or write it anew."""


class HubError(LatentPriorError, RuntimeError):
    """The Hugging Face hub was not reached or refused: check the network, the name and your token, then try again."""


class ExportError(LatentPriorError, RuntimeError):
    """A base, a tilt or a network has no form in the format asked for: export without it, or fit with another base."""


class MissingExtraError(LatentPriorError, ImportError):
    """A feature needs a package that is not installed: run the ``pip install`` that the message gives.

    Parameters
    ----------
    feature, extra : str
        What needs the package, as the subject of the message, and the extra of latentprior that installs it.
    """

    def __init__(self, feature: str, extra: str) -> None:
        super().__init__(f"{feature} needs an extra: pip install 'latentprior[{extra}]'")
        self.feature, self.extra = feature, extra

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str]]:
        return type(self), (self.feature, self.extra)


@contextlib.contextmanager
def needs_extra(feature: str, extra: str) -> Iterator[None]:
    """Raise :class:`MissingExtraError` where an import inside the context fails."""
    try:
        yield
    except ImportError:
        raise MissingExtraError(feature, extra) from None


class LearningDivergedError(LatentPriorError, RuntimeError):
    """Learning diverged, and again after one retry with a smaller step: lower the rate that the message names."""


class ProcessLostError(LatentPriorError, RuntimeError):
    """Another process of the same run has ended: start all of them again, and they resume from the last checkpoint."""


class LatentPriorWarning(UserWarning):
    """Base of every warning that this package gives."""


class NormalizerBracketWarning(LatentPriorWarning):
    """The log normaliser from the base's end and that from the data's end differ by more than 0.1 nats.

    Densities may be off by as much. Use a better base (``base="gmm"``) or more particles, or treat ``log_prob`` as
    known up to that constant only.
    """


class StageSaturatedWarning(LatentPriorWarning):
    """The ladder ended while its last stage still told data from samples almost perfectly.

    The prior has not reached the data: raise ``max_stages``, or start from a better base (``base="gmm"``).
    """


class LearningRetriedWarning(LatentPriorWarning):
    """Learning diverged, went back to the last good state and goes on with a smaller step.

    The result is sound. To avoid the retry, lower the learning rate that the message names, or look for extreme rows.
    """


class LowESSWarning(LatentPriorWarning):
    """Too few effective particles stand behind a result: use more draws or particles, or a better base."""


INNER_PACKAGES = frozenset({"latentprior", "torch", "contextlib"})
"""Packages whose lines a warning does not name: the user's own line called them."""


def warn(message: str, category: type[LatentPriorWarning]) -> None:
    """Warn at the line that called this package, however deep inside the cause was found."""
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in INNER_PACKAGES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
