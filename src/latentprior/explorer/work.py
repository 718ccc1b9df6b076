"""One model, one worker: requests that need it wait in a short line, and are sent away when it is full.

Only what has wholly arrived may stand in the line; memory for what is still to arrive has a bound of its own.
"""

from __future__ import annotations

import contextlib
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from concurrent.futures import TimeoutError as TookTooLong
from typing import TypeVar

import torch

from .requests import Refused

__all__ = ["Bodies", "Worker"]

T = TypeVar("T")
RETRY = {"Retry-After": "2"}
BLOCK = 1 << 16


class Bodies:
    """Reads bodies, of which those that have arrived in part hold ``most`` bytes together.

    One byte more and the body that began first is dropped (503), however slowly its client would go on: who holds
    memory by sending all but the end keeps nobody else out.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: dict[int, bytearray] = {}

    def read(self, stream: io.BufferedIOBase, length: int) -> bytes:
        """The next ``length`` bytes of a stream, fewer where it ends; raises what the stream raises."""
        body, left = bytearray(), length
        with self._lock:
            self._held[id(body)] = body
        try:
            while left and (block := stream.read1(min(left, BLOCK))):
                left -= len(block)
                with self._lock:
                    if id(body) not in self._held:
                        break
                    body += block
                    while sum(map(len, self._held.values())) > self._most:
                        self._held.pop(next(iter(self._held))).clear()
        finally:
            with self._lock:
                dropped = self._held.pop(id(body), None) is None
        if dropped:
            raise Refused(503, "busy: too many bodies arrive at once; try again", RETRY)
        return bytes(body)


class Worker:
    """Runs functions one at a time in a thread of its own.

    Arguments
    ---------
    places : most requests that wait or run at once; memory grows with them, so the rest is refused (503).
    seconds : how long one waits for its result before it is refused (503).
    """

    def __init__(self, places: int = 16, seconds: float = 120.0) -> None:
        self._places = threading.BoundedSemaphore(places)
        self._seconds = seconds
        # A thread that lives: torch keeps its pool of threads with the thread that calls it.
        self._thread = ThreadPoolExecutor(1, "latentprior-model")

    @contextlib.contextmanager
    def place(self) -> Iterator[None]:
        """Hold a place in the line while the context lasts."""
        if not self._places.acquire(blocking=False):
            raise Refused(503, "busy: too many requests wait for the model; try again", RETRY)
        try:
            yield
        finally:
            self._places.release()

    def __call__(self, function: Callable[[], T]) -> T:
        """Wait for the result of ``function``, evaluated without gradients."""
        try:
            future = self._thread.submit(_without_gradients, function)
        except RuntimeError:
            raise Refused(503, "the server is stopping", RETRY) from None
        try:
            return future.result(self._seconds)
        except (TookTooLong, CancelledError):
            future.cancel()
            raise Refused(503, f"no result within {self._seconds:g} s; try again or ask for less", RETRY) from None

    def close(self) -> None:
        """Wait for the function that runs, drop those that wait."""
        self._thread.shutdown(wait=True, cancel_futures=True)


def _without_gradients(function: Callable[[], T]) -> T:
    with torch.no_grad():
        return function()
