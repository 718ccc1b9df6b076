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
    """The folder ``DIR/checkpoint`` in which a command keeps the state of its run.

    ``kinds`` names the kind of state that each folder in it holds; an empty name is the folder itself.
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
        """Let a run that is stopped within this context say whether it can go on.

        Once it has begun, its input has been found right: an error of the type ``failures`` then means that the work
        failed, not that the call was wrong.
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
