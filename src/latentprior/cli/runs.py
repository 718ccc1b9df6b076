"""What ``fit`` and ``train`` share: the checkpoint in their folder, and how a run ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import LatentPriorError, LearningDivergedError
from ..runtime.progress import note
from ..runtime.stopping import Stopped
from ..storage.checkpoint import check_ours, remove_checkpoint
from .options import WorkFailed

__all__ = ["RunState"]


@dataclass(frozen=True)
class RunState:
    """The folder in which a command keeps the state of its run.

    Parameters
    ----------
    folder : Path
        ``DIR/checkpoint``.
    kinds : mapping
        The kind of state that each folder in it holds, by the folder's name; an empty name is the folder itself.
    """

    folder: Path
    kinds: Mapping[str, str]

    def unfinished(self) -> list[str]:
        """Return the names under which an unfinished run has left its state."""
        return [name for name in self.kinds if (self.folder / name / "config.json").exists()]

    def check(self) -> None:
        """Raise :class:`CheckpointError` if a folder holds anything that no run of ours has left."""
        for name, kind in self.kinds.items():
            check_ours(self.folder / name, kind)

    def remove(self) -> None:
        """Remove what a run has left."""
        # The folder itself comes last.
        for name, kind in reversed(list(self.kinds.items())):
            remove_checkpoint(self.folder / name, kind)

    def make_way(self, resume: bool) -> None:
        """Remove what an unfinished run has left, and say so, unless the run is to go on."""
        if not resume and self.unfinished():
            note("warning", f"{self.folder} held an unfinished run: starting anew; --resume would have gone on from it")
            self.remove()

    @contextlib.contextmanager
    def ending(self, has_begun: Callable[[], bool], failures: type[LatentPriorError]) -> Iterator[None]:
        """Within this context a run is learned.

        A run that is stopped says whether it can go on. Once it has begun, its input has been found right, so that an
        error of the type ``failures`` means that the work failed, not that the call was wrong.
        """
        try:
            yield
        except Stopped:
            if self.unfinished():
                raise Stopped(f"state saved in {self.folder}", resumable=True) from None
            raise
        except LearningDivergedError:
            raise
        except failures as error:
            if has_begun():
                raise WorkFailed(str(error)) from error
            raise
