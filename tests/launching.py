"""Scripts run in several processes, as a launcher starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from clocks import HANG_SECONDS


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))}
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [inherited.get("PYTHONPATH")])])
    return inherited | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(worker: Path, folder: Path, task: str, count: int = 2) -> list[Ended]:
    """Run a worker in ``count`` processes and wait for them all."""
    port, running = free_port(), []
    for rank in range(count):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        env = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, **(own if count > 1 else {}))
        command = [sys.executable, str(worker), str(folder), task]
        running.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    try:
        texts = [process.communicate(timeout=HANG_SECONDS) for process in running]
    finally:
        for process in running:
            process.kill()
    return [Ended(p.returncode, *text) for p, text in zip(running, texts, strict=True)]
