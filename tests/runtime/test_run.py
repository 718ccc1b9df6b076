import math
from pathlib import Path

import pytest
import torch

from latentprior import CheckpointError
from latentprior.runtime.events import Event
from latentprior.runtime.run import Run

STATE = {"step": 3}, {"weight": torch.arange(3.0)}


def test_a_run_goes_on_from_its_folder(tmp_path: Path) -> None:
    first = Run(tmp_path / "run", "fit", "one")
    assert Run(tmp_path / "run", "fit", "one").load() is None
    first.began -= 100
    first.save(*STATE)
    second = Run(tmp_path / "run", "fit", "one")
    state = second.load()
    assert state is not None
    assert state[0]["step"] == 3
    assert torch.equal(state[1]["weight"], STATE[1]["weight"])
    # The seconds of the first call count.
    assert second.seconds() >= 100


def test_folders_that_do_not_serve_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume=True needs the checkpoint_dir"):
        Run(None, "fit").load()
    Run(tmp_path, "fit", "one").save(*STATE)
    with pytest.raises(CheckpointError, match="holds a run on other data or settings; choose another folder"):
        Run(tmp_path, "fit", "two").load()
    with pytest.raises(CheckpointError, match="holds a 'fit', not a 'training'"):
        Run(tmp_path, "training", "one").load()
    run = Run(tmp_path, "fit", "one")
    with pytest.raises(CheckpointError, match=r"its checkpoint is damaged \(KeyError\); start afresh"), run.restoring():
        STATE[0]["absent"]


def test_without_a_folder_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run(None, "fit")
    with run.lock():
        run.save(*STATE)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_kept_to_one_run(tmp_path: Path) -> None:
    with Run(tmp_path, "fit").lock():
        with pytest.raises(CheckpointError, match="another run"), Run(tmp_path, "fit").lock():
            pass
        # Another process of the same run reads, and neither locks nor writes.
        other = Run(tmp_path, "fit", rank=1)
        with other.lock():
            other.save(*STATE)
    assert list(tmp_path.iterdir()) == []


def test_callbacks_of_the_first_process_hear_every_event() -> None:
    heard: list[Event] = []
    for rank in (0, 1):
        Run(None, "fit", callbacks=[heard.append, heard.append], rank=rank).tell(
            "step", 1, 2, 3, (0.5, 0.1), losses={"a": 1}
        )
    assert heard[0] is heard[1]
    (event,) = {id(event): event for event in heard}.values()
    assert (event.kind, event.stage, event.step, event.steps) == ("step", 1, 2, 3)
    assert (event.gain, event.gain_stderr, event.losses) == (0.5, 0.1, {"a": 1})
    assert event.seconds >= 0
    Run(None, "fit", callbacks=[heard.append]).tell("end")
    assert math.isnan(heard[-1].gain)


def test_a_snapshot_is_a_copy() -> None:
    run, weight = Run(None, "fit"), torch.zeros(2)
    run.snapshot({"step": 1}, {"weight": weight})
    weight += 1
    document, tensors = run.go_back()
    assert document == {"step": 1}
    assert tensors["weight"].tolist() == [0, 0]
