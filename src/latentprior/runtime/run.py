"""One run of learning: its clock, its callbacks, and its state on disk and in memory."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import CheckpointError
from ..storage.checkpoint import UNFIT, load_state, locked, save_state
from .events import Callback, Event, Kind

__all__ = ["Run", "State"]

State = tuple[dict[str, Any], dict[str, Tensor]]
"""Where something that learns stands: a document that JSON can hold, and tensors by name."""


class Run:
    """One call of a function that learns; a later call of the same kind and identity can continue it from its folder.

    The identity is a digest of everything that decides the outcome. Of several processes only that of rank 0 saves and
    calls the callbacks.
    """

    def __init__(
        self,
        folder: str | Path | None,
        kind: str,
        identity: str = "",
        callbacks: Iterable[Callback] = (),
        rank: int = 0,
    ) -> None:
        self.folder = None if folder is None else Path(folder)
        self.kind, self.identity, self.rank = kind, identity, rank
        self.callbacks = tuple(callbacks) if rank == 0 else ()
        self.began = time.monotonic()
        self._seconds_before = 0.0
        self._snapshot: State | None = None

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Return a context that keeps the folder to this run; it raises what :func:`locked` raises."""
        return locked(self.folder if self.rank == 0 else None)

    def seconds(self) -> float:
        """Return the seconds that the run has taken, with those of earlier calls that it continues."""
        return self._seconds_before + time.monotonic() - self.began

    def tell(
        self,
        kind: Kind,
        stage: int = 0,
        step: int = 0,
        steps: int = 0,
        gain: tuple[float, float] = (math.nan, math.nan),
        message: str = "",
        losses: Mapping[str, float] | None = None,
        model: Any = None,
    ) -> None:
        """Send an :class:`~latentprior.Event` to every callback; ``gain`` is a pair with its standard error."""
        event = Event(kind, stage, step, steps, *gain, self.seconds(), message, losses or {}, model)
        for callback in self.callbacks:
            callback(event)

    def save(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the state to the folder, if there is one, so that a kill leaves the old or the new one."""
        if self.folder is not None and self.rank == 0:
            head = {"identity": self.identity, "seconds": self.seconds()}
            save_state(self.folder, self.kind, {**head, **document}, tensors)

    def load(self) -> State | None:
        """Read the state that :meth:`save` wrote; None where nothing was saved yet.

        Raises :class:`CheckpointError` without a folder, for the folder of another run, and for a damaged one.
        """
        if self.folder is None:
            raise CheckpointError("resume=True needs the checkpoint_dir of the run to go on with")
        if not (self.folder / "config.json").exists():
            return None
        document, tensors = load_state(self.folder, self.kind)
        if document.get("identity") != self.identity:
            raise CheckpointError(
                f"{self.folder}: holds a run on other data or settings; choose another folder, or do not resume"
            )
        with self.restoring():
            self._seconds_before = float(document["seconds"])
        return document, tensors

    @contextlib.contextmanager
    def restoring(self) -> Iterator[None]:
        """Return a context for code that rebuilds objects from what :meth:`load` has returned.

        It raises :class:`CheckpointError` where the state described no such objects.
        """
        try:
            yield
        except UNFIT as error:
            raise CheckpointError(
                f"{self.folder}: its checkpoint is damaged ({type(error).__name__}); start afresh in another folder"
            ) from None

    def snapshot(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy of the state in memory."""
        self._snapshot = dict(document), {name: value.detach().clone() for name, value in tensors.items()}

    def go_back(self) -> State:
        """Return the last state that :meth:`snapshot` has kept, and forget it."""
        assert self._snapshot is not None, "there is no snapshot to go back to"
        state, self._snapshot = self._snapshot, None
        return state
