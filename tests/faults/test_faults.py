"""Nothing is lost: kills, signals, full disks, read-only folders, collisions and clock jumps (see ``harness.py``).

``LATENTPRIOR_STOPS=50`` sets how often runs are killed or stopped in the slow test.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clocks import HANG_SECONDS

HARNESS = Path(__file__).with_name("harness.py")
SOURCES = Path(__file__).parents[2] / "src" / "latentprior"
QUICK = ("kill", "sigterm", "ctrl-c", "collided", "clocked", "read-only")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the harness forks")


def harness(folder: Path, *words: object) -> dict[str, Any]:
    call = [sys.executable, "-W", "ignore", HARNESS, folder, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, call)), capture_output=True, text=True, env=environment, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for name, scenario in found.items():
        assert not isinstance(scenario, dict) or "failed" not in scenario, f"{name}: {scenario['failed']}"
    return found


@pytest.fixture(scope="module")
def survived(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Most scenarios of ``fit``, two stops each: of kills the second falls amid a save."""
    chosen = [word for name in QUICK for word in ("--scenario", name)]
    return harness(tmp_path_factory.mktemp("faults"), "--kind", "fit", "--stops", 2, *chosen)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bytes(survived: dict[str, Any]) -> None:
    assert_stopped(survived["kill"], 2, kills=True)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["sigterm", "ctrl-c"])
def test_stopped_runs_resume_to_the_same_bytes(survived: dict[str, Any], how: str) -> None:
    assert_stopped(survived[how], 2, kills=False)


def assert_stopped(found: dict[str, Any], wanted: int, *, kills: bool) -> None:
    """That so many stops ended in the same bytes, and that some of them could have ended otherwise."""
    assert (found["stops"], found["identical"]) == (wanted, True)
    assert found["runs"] >= 1
    # The first stop waits for a state to resume from; of kills the second falls amid a save.
    assert found["states_found"] >= 1
    assert (found["while_saving"] >= 1) if kills else (found["while_saving"] == 0)


@pytest.mark.slow
def test_files_that_cannot_grow_leave_the_last_good_state(tmp_path: Path) -> None:
    assert harness(tmp_path, "--scenario", "starved")["starved"] == {"failures": 4, "identical": True}


@pytest.mark.slow
def test_a_full_file_system_leaves_the_last_good_state(tmp_path: Path) -> None:
    found = harness(tmp_path, "--scenario", "full")["full"]
    if not found["mounted"]:
        pytest.skip("only root may mount a small file system")
    assert found == {"mounted": True, "failures": 3, "identical": True}


@pytest.mark.slow
def test_two_runs_in_one_folder_do_not_meet(survived: dict[str, Any]) -> None:
    assert survived["collided"] == {"refused": 2, "identical": True}


@pytest.mark.slow
def test_the_wall_clock_decides_nothing(survived: dict[str, Any]) -> None:
    assert survived["clocked"] == {"identical": True}


@pytest.mark.slow
def test_a_read_only_folder_is_refused_before_work(survived: dict[str, Any]) -> None:
    assert survived["read-only"]["refused"] == 1
    assert survived["read-only"]["left"] == 0


def test_no_module_asks_the_wall_clock() -> None:
    asked = {("time", name) for name in ("time", "time_ns", "localtime", "gmtime", "ctime", "strftime", "asctime")}
    asked |= {("datetime", name) for name in ("now", "utcnow", "today")} | {("date", "today")}
    paths = list(SOURCES.rglob("*.py"))
    assert paths
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            found: set[tuple[str | None, str]] = set()
            if isinstance(node, ast.Attribute):
                # Of datetime.datetime.now as well, whose owner is an attribute itself.
                found = {(getattr(node.value, "id", getattr(node.value, "attr", None)), node.attr)}
            elif isinstance(node, ast.ImportFrom):
                found = {(node.module, alias.name) for alias in node.names}
            assert not found & asked, f"{path.name}:{getattr(node, 'lineno', 0)}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fit", "train"])
@pytest.mark.parametrize("scenario", ["kill", "sigterm", "ctrl-c"])
def test_many_stops(tmp_path: Path, kind: str, scenario: str) -> None:
    wanted = int(os.environ.get("LATENTPRIOR_STOPS", "50"))
    found = harness(tmp_path, "--kind", kind, "--scenario", scenario, "--stops", wanted)[scenario]
    assert_stopped(found, wanted, kills=scenario == "kill")


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["starved", "collided", "clocked"])
def test_training_survives(tmp_path: Path, scenario: str) -> None:
    assert harness(tmp_path, "--kind", "train", "--scenario", scenario)[scenario]["identical"] is True
