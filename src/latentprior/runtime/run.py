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
    """One call of a function that learns; a later call can continue it from its folder.

    Parameters
    ----------
    folder : str, Path or None
        Where the state is saved; None saves nothing.
    kind : str
        What is saved there, such as ``"fit"``. It is part of the names of the files.
    identity : str
        A digest of everything that decides the outcome. Only a run of the same identity continues another.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event`.
    rank : int
        Rank of this process in a run of several. Only the first one, of rank 0, saves and calls the callbacks.
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
        """Return a context that keeps the folder to this run.

        Raises
        ------
        CheckpointError
            When the context is entered while another run holds the folder, or where it cannot be written.
        """
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
        """Send an event to every callback.

        Parameters
        ----------
        kind, stage, step, steps, message, losses, model
            As in :class:`~latentprior.Event`.
        gain : pair of float
            The held-out gain and its standard error, in nats.
        """
        event = Event(kind, stage, step, steps, *gain, self.seconds(), message, losses or {}, model)
        for callback in self.callbacks:
            callback(event)

    def save(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Write the state to the folder, if there is one, so that a kill at any moment leaves the old or the new one.

        Parameters
        ----------
        document : mapping
            The part of the state that JSON can hold.
        tensors : mapping of str to Tensor
            The other part of the state.

        Raises
        ------
        CheckpointError
            Where the folder cannot be written.
        """
        if self.folder is not None and self.rank == 0:
            head = {"identity": self.identity, "seconds": self.seconds()}
            save_state(self.folder, self.kind, {**head, **document}, tensors)

    def load(self) -> State | None:
        """Read the state that the folder holds.

        Returns
        -------
        (dict, dict) or None
            The document and the tensors that :meth:`save` was given; None where nothing was saved yet.

        Raises
        ------
        CheckpointError
            Without a folder, for the folder of another run, and for a damaged one.
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

        Raises
        ------
        CheckpointError
            At the end of the context, where the state described no such objects.
        """
        try:
            yield
        except UNFIT as error:
            raise CheckpointError(
                f"{self.folder}: its checkpoint is damaged ({type(error).__name__}); start afresh in another folder"
            ) from None

    def snapshot(self, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep a copy of the state in memory.

        Parameters
        ----------
        document : mapping
            The part of the state that JSON can hold.
        tensors : mapping of str to Tensor
            The other part of the state.
        """
        self._snapshot = dict(document), {name: value.detach().clone() for name, value in tensors.items()}

    def go_back(self) -> State:
        """Return the last state that :meth:`snapshot` has kept, and forget it.

        Returns
        -------
        (dict, dict)
            The document and the tensors.
        """
        assert self._snapshot is not None, "there is no snapshot to go back to"
        state, self._snapshot = self._snapshot, None
        return state
