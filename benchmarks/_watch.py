"""Memory of another process, watched from outside."""

from __future__ import annotations

import re
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

__all__ = ["Watched", "watched"]


class Watched(NamedTuple):
    """Time and memory of a command, and the text that it printed.

    ``anonymous_mib`` is the most memory it asked for; ``resident_mib`` adds the pages of files it mapped, which the
    system takes back whenever it needs them.
    """

    seconds: float
    anonymous_mib: float
    resident_mib: float
    out: str

    def figures(self) -> dict[str, float]:
        """Return everything except the text."""
        return {"seconds": self.seconds, "anonymous_mib": self.anonymous_mib, "resident_mib": self.resident_mib}


def watched(command: list[str]) -> Watched:
    """Run a command that prints little and read its memory fifty times a second; raise where it fails."""
    start = time.monotonic()
    peaks = {"RssAnon": 0.0, "VmHWM": 0.0}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            for name, kib in re.findall(r"^(RssAnon|VmHWM):\s+(\d+) kB", status, re.MULTILINE):
                peaks[name] = max(peaks[name], int(kib) / 1024)
            time.sleep(0.02)
        out, said = (stream.read() if stream else "" for stream in (process.stdout, process.stderr))
    if process.returncode:
        raise RuntimeError(f"{command} ended with {process.returncode}: {said}")
    return Watched(time.monotonic() - start, peaks["RssAnon"], peaks["VmHWM"], out)
