"""Memory stays flat over time and bounded over rows: the benchmarks' short forms."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clocks import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


def script(name: str, *words: object) -> list[Any]:
    call = [sys.executable, "-W", "ignore", ROOT / "benchmarks" / f"{name}.py", "--json", *words]
    done = subprocess.run(list(map(str, call)), capture_output=True, text=True, check=False, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_memory_is_flat_while_sampling_and_scoring() -> None:
    pytest.importorskip("zuko")
    # By rounds, not by the clock: on a busy machine the first long round must not come late.
    (found,) = script("soak", "--minutes", 4, "--share", 1, "--every", 0, "--rounds", 80)
    assert found["rounds"] == 80
    assert found["rise_mib"] < found["allowed_mib"]


@pytest.mark.slow
def test_memory_does_not_grow_with_rows() -> None:
    pytest.importorskip("zuko")
    few, many = script("load", "--rows", 100_000, 1_500_000)
    for name in ("score", "sample"):
        grown = many["calls"][name]["anonymous_mib"] - few["calls"][name]["anonymous_mib"]
        # 1.4 million rows more are 43 MiB in, and as many out; blocks of unequal fate cost the allocator some.
        assert grown < 100, name
