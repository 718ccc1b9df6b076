"""How a person stops a run in good order."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

__all__ = ["StopSignals", "Stopped"]


class Stopped(BaseException):
    """Somebody asked the run to end.

    Parameters
    ----------
    message : str
        What became of the state of the run.
    resumable : bool
        Whether the state is on disk, so that the run can be resumed.
    """

    def __init__(self, message: str = "nothing was saved", *, resumable: bool = False) -> None:
        super().__init__(message)
        self.resumable = resumable


class StopSignals:
    """A context within which Ctrl-C and SIGTERM raise :class:`Stopped`, wherever the run is.

    :meth:`check` is a callback for :func:`latentprior.fit` and the other functions that learn. It raises again at the
    next event, because the signal may have arrived in code that swallows exceptions, such as a finaliser.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise Stopped

    def check(self, event: object) -> None:
        """Raise :class:`Stopped` if a signal has arrived.

        Parameters
        ----------
        event : object
            The event of a callback; it is not read.
        """
        if self.asked:
            raise Stopped
