"""Write requirements.lock: the core and what ``make demo`` needs, with hashes, for this Python and system.

``make lock`` resolves with constraints.txt. PyTorch stands outside: its builds (CPU, CUDA) share a version and differ
in their bytes, and which one fits is the machine's to say. Install it first, then
``pip install --require-hashes --no-deps -r requirements.lock``.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Resolve, and write the file."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place) / "report.json"
        call = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
        call += ["--report", str(report), "-c", "constraints.txt", ".[metrics,report]"]
        subprocess.run(call, cwd=ROOT, check=True)
        resolved = json.loads(report.read_text())["install"]
    by_name = {entry["metadata"]["name"].lower(): entry for entry in resolved}
    outside = ("latentprior", "torch", "triton", "nvidia-", "cuda-")
    lines = []
    for name, entry in sorted(by_name.items()):
        if name in outside or name.startswith(outside[3:]):
            continue
        digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
        lines.append(f"{name}=={entry['metadata']['version']} --hash=sha256:{digest}")
    version = ".".join(platform.python_version_tuple()[:2])
    head = [
        f"# For CPython {version}, {platform.system()} {platform.machine()}; by `make lock` from constraints.txt.",
        "# PyTorch first, then: pip install --require-hashes --no-deps -r requirements.lock",
    ]
    (ROOT / "requirements.lock").write_text("\n".join([*head, *lines]) + "\n")


if __name__ == "__main__":
    main()
