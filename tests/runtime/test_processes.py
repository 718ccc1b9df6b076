import itertools
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from latentprior import LatentPriorError, MissingExtraError
from latentprior.models.model import LatentVariableModel
from latentprior.runtime.events import Event
from latentprior.runtime.processes import AccelerateProcesses, SingleProcess, in_unison, joined, launched_processes
from latentprior.training.joint import train
from launching import Ended, environment, free_port, launch
from process_worker import CONFIG, followed, images, model

WORKER = Path(__file__).parents[1] / "process_worker.py"


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor], atol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def straight(**options: object) -> tuple[LatentVariableModel, list[Event]]:
    events: list[Event] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return train(model(), images(), CONFIG, callbacks=[events.append], **options), events


# One process


def test_one_process_is_rank_0_of_1() -> None:
    alone = SingleProcess()
    values = [torch.tensor([1.0, 2.0])]
    alone.average(values)
    alone.wait()
    assert values[0].tolist() == [1.0, 2.0]
    assert (alone.rank, alone.count, alone.device) == (0, 1, torch.device("cpu"))
    assert (alone.gather("a"), alone.first("b"), alone.share(7), alone.keys) == (["a"], "b", 7, ())
    assert alone.stripe(values[0]).tolist() == [1.0, 2.0]
    assert joined(alone, values[0]) is values[0]
    with pytest.raises(LatentPriorError, match="mine"), in_unison(alone):
        raise LatentPriorError("mine")


@pytest.mark.parametrize(("rows", "count"), [(10, 3), (3, 3), (2, 3), (5, 1)])
def test_stripes_are_all_rows_once_or_all_rows_each(rows: int, count: int) -> None:
    parts = []
    for rank in range(count):
        one = SingleProcess()
        one.rank, one.count = rank, count
        parts.append(one.stripe(torch.arange(rows)).tolist())
        assert len(parts[-1]) <= max(one.share(rows), rows if rows < count else 0)
        assert one.keys == ((rank,) if count > 1 else ())
    if rows < count:
        assert parts == [list(range(rows))] * count
    else:
        assert sorted(itertools.chain(*parts)) == list(range(rows))


@pytest.mark.parametrize("size", [None, "", "1"])
def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch, size: str | None) -> None:
    if size is None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("WORLD_SIZE", size)
    assert isinstance(launched_processes("cpu"), SingleProcess)


def test_a_launcher_without_accelerate_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(MissingExtraError, match="distributed"):
        launched_processes()
    with pytest.raises(MissingExtraError, match="distributed"):
        AccelerateProcesses()


# Two processes


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Ended]]:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("pair")
    return folder, launch(WORKER, folder, "check")


def test_two_processes_end_well(pair: tuple[Path, list[Ended]]) -> None:
    _, ended = pair
    assert [e.code for e in ended] == [0, 0], ended
    # Only the main process speaks.
    assert "step 0 6" in ended[0].out
    assert ended[0].out.splitlines()[-1] == "end 1 0"
    assert ended[1].out == ""
    assert "Traceback" not in ended[0].err + ended[1].err


def test_means_over_processes_are_exact(pair: tuple[Path, list[Ended]]) -> None:
    folder, _ = pair
    for rank in range(2):
        found = load_file(folder / f"found-{rank}.safetensors")
        assert found["whole"].tolist() == [0.0, 0.5 * (1 + 1e8), 0.5 * (2 + 2e8)]
        assert found["half"].tolist() == [[1.5, 1.5], [1.5, 1.5]]


def test_values_of_all_and_of_the_first_process_reach_every_one(pair: tuple[Path, list[Ended]]) -> None:
    folder, _ = pair
    for rank in range(2):
        found = load_file(folder / f"found-{rank}.safetensors")
        assert found["ranks"].tolist() == [0.0, 10.0, 7.0, 2.0]
        assert found["joined"].tolist() == [0, 2, 4, 1, 3]


def test_shares_of_a_batch_add_up_to_its_gradient(pair: tuple[Path, list[Ended]]) -> None:
    folder, _ = pair
    alone = followed(SingleProcess(), 5)
    first, second = (load_file(folder / f"found-{rank}.safetensors") for rank in range(2))
    for found in (first, second):
        assert_close({k: v for k, v in found.items() if "." in k}, alone, atol=1e-5)
    assert all(torch.equal(first[k], second[k]) for k in first)


def test_processes_end_with_one_model(pair: tuple[Path, list[Ended]]) -> None:
    folder, _ = pair
    first, second = (load_file(folder / f"made-{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    # Other noise than one process draws, and nearly the same model: ten steps of Adam at 1e-3 (ratio: 1e-2).
    alone = straight()[0].state()[1]
    assert first.keys() == alone.keys()
    for name, value in alone.items():
        if name.startswith(("decoder.", "encoder.")):
            torch.testing.assert_close(first[name], value, atol=0.012, rtol=0)


def test_a_run_of_two_goes_on_in_one(pair: tuple[Path, list[Ended]]) -> None:
    folder, _ = pair
    resumed, events = straight(checkpoint_dir=folder / "run", resume=True)
    assert [e.kind for e in events] == ["normalizer", "end"]
    wanted = load_file(folder / "made-0.safetensors")
    assert all(torch.equal(v, wanted[k]) for k, v in resumed.state()[1].items())


@pytest.mark.slow
def test_a_killed_process_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main, killed = launch(WORKER, tmp_path, "die")
    assert killed.code == -9
    assert main.code == 1
    assert main.err.strip().splitlines()[-1].startswith("another process of this run has ended")
    assert "start all again with --resume" in main.err
    assert "Traceback" not in main.err
    assert not (tmp_path / "made-0.safetensors").exists()
    ended = launch(WORKER, tmp_path, "go on")
    assert [e.code for e in ended] == [0, 0], ended
    # The last checkpoint is that of the fourth step.
    assert ended[0].out.startswith("step 0 5\n")
    assert ended[0].out.endswith("end 1 0\n")


@pytest.mark.slow
def test_a_run_moves_between_one_and_two_processes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    one = launch(WORKER, tmp_path, "stop", count=1)[0]
    assert one.code != 0
    assert "step 0 5" in one.out
    two = launch(WORKER, tmp_path, "stop")
    assert two[0].code != 0
    assert two[0].out.startswith("step 0 5\n")
    last = launch(WORKER, tmp_path, "go on", count=1)[0]
    assert last.code == 0, last
    assert last.out.startswith("step 0 5\n")


@pytest.mark.slow
def test_torchrun_ends_when_a_worker_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    options = {"env": environment(), "capture_output": True, "text": True, "timeout": 200}
    found = subprocess.run([*command, str(WORKER), str(tmp_path), "die"], **options)
    assert found.returncode != 0
    assert "Signal 9" in found.stderr
    found = subprocess.run([*command, str(WORKER), str(tmp_path), "go on"], **options)
    assert found.returncode == 0, found.stderr
    assert "end 1 0" in found.stdout
