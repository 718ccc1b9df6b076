"""Bounds on memory and on the model's time: bodies that are still arriving, and requests that wait for the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from .requests import Refused

__all__ = ["Bodies", "Worker"]

T = TypeVar("T")
RETRY = {"Retry-After": "2"}


class Bodies:
    """Collects bodies of requests; those that are still arriving hold a bounded number of bytes together.

    Where they would hold more, the body that began first is dropped. A client that sends all but the end of a body
    thus keeps nobody else out.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._arriving: dict[int, bytearray] = {}

    async def read(self, blocks: AsyncIterable[bytes]) -> bytes:
        """Return one body from its parts; raise :class:`Refused` with status 503 where it was dropped."""
        body = bytearray()
        self._arriving[id(body)] = body
        try:
            async for block in blocks:
                body += block
                while sum(map(len, self._arriving.values())) > self._max_bytes:
                    self._arriving.pop(next(iter(self._arriving))).clear()
                if id(body) not in self._arriving:
                    raise Refused(503, "busy: too many bodies arrive at once; try again", RETRY)
        finally:
            self._arriving.pop(id(body), None)
        return bytes(body)


class Worker:
    """Runs functions one at a time, in a thread of its own and without gradients, each within some seconds.

    It refuses a function where all places are taken, as memory grows with those that wait or run.
    """

    def __init__(self, places: int = 16, seconds: float = 120.0) -> None:
        self._free, self._seconds = places, seconds
        # One thread for all: torch keeps a pool of threads with each thread that calls it.
        self._thread = ThreadPoolExecutor(1, "latentprior-model")

    async def run(self, function: Callable[[], T]) -> T:
        """Return the result of a function, or raise what it raises.

        Raises :class:`Refused` with status 503 where all places are taken or the time is over.
        """
        if not self._free:
            raise Refused(503, "busy: too many requests wait for the model; try again", RETRY)
        self._free -= 1
        try:
            future = asyncio.get_running_loop().run_in_executor(self._thread, torch.no_grad()(function))
            return await asyncio.wait_for(future, self._seconds)
        except asyncio.TimeoutError:
            raise Refused(503, f"no result within {self._seconds:g} s; try again or ask for less", RETRY) from None
        finally:
            self._free += 1

    def close(self) -> None:
        """Wait for the function that runs, and drop those that wait."""
        self._thread.shutdown(wait=True, cancel_futures=True)
