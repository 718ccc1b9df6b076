"""fit in two processes: as good as in one, the same in both, and able to go on when one of them is killed."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import latentprior as lp
from fit_worker import OPTIONS, estimates, figures, rows, stopped
from latentprior.runtime.processes import ALONE
from launching import launch

WORKER = Path(__file__).parents[1] / "fit_worker.py"
SPREAD = 0.05
FITS = ("whole", "chained", "budget", "retried", "stopped", "moved")


@pytest.fixture(scope="module")
def alone() -> lp.LatentPrior:
    return lp.fit(rows(), **OPTIONS)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, alone: lp.LatentPrior) -> Path:
    pytest.importorskip("accelerate")
    folder = tmp_path_factory.mktemp("pair")
    alone.save_pretrained(folder / "prior")
    stopped(folder / "moved")
    ended = launch(WORKER, folder, "check")
    assert [e.code for e in ended] == [0, 0], ended
    return folder


def of_rank(folder: Path, name: str) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(2)]


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a), [k for k in a if not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("name", FITS)
def test_processes_end_with_one_prior(pair: Path, name: str) -> None:
    first, second = of_rank(pair, name)
    assert any(key.startswith("stages.0.") for key in first)
    assert_same(first, second)


@pytest.mark.parametrize("name", ["whole", "chained", "moved"])
def test_two_processes_learn_what_one_does(pair: Path, alone: lp.LatentPrior, name: str) -> None:
    found = of_rank(pair, name)[0]["numbers"].tolist()
    # Over seeds, on one set of held-out rows, one process varies by 0.05: five of a difference, one in 10^6. The base
    # lies 0.9 below.
    assert found[2] == pytest.approx(alone.info["log_prob_held_out"], abs=5 * math.sqrt(2) * SPREAD)
    assert 0 < found[1] < 0.05


def test_log_z_of_a_ladder_is_the_same_by_two_processes_and_by_one(pair: Path, alone: lp.LatentPrior) -> None:
    one = estimates(alone, ALONE)
    first, second = of_rank(pair, "estimates")
    assert_same(first, second)
    best, error = alone.normalizer.value, alone.log_prob_stderr
    for name in ("estimate", "importance", "smc", "forward", "reverse"):
        (a, s), (b, t) = one[name].tolist(), first[name].tolist()
        # Five standard errors, which islands give to a third: one in 10^4 for each.
        assert a == pytest.approx(best, abs=5 * math.hypot(s, error)), name
        assert b == pytest.approx(best, abs=5 * math.hypot(t, error)), name
        # The standard errors are those of as many draws and islands in all: with 16 islands each is known to 18%.
        # That of the estimate takes in how far apart the two ends came out, which is chance.
        assert s / 3 < t < 3 * s or name == "estimate", name


@pytest.mark.parametrize("source", ["importance", "smc"])
def test_shares_of_the_particles_are_of_the_ladder_and_of_their_own(
    pair: Path, alone: lp.LatentPrior, source: str
) -> None:
    one, both = (found[f"{source} particles"] for found in (estimates(alone, ALONE), of_rank(pair, "estimates")[0]))
    assert both.shape == one.shape
    half = len(both) // 2
    # Whole rows, both numbers as one: single numbers of float32 meet by chance.
    bits = both.contiguous().view(torch.int64)
    assert not torch.isin(bits[:half], bits[half:]).any()
    for moment in (1, 2):
        a, b = one**moment, both**moment
        # Resampled rows count as a tenth of their number at the least: six standard errors, one in 10^8.
        error = (10 * (a.var(0) + b.var(0)) / len(a)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() < 6 * error).all()


def test_errors_are_those_of_all_processes(pair: Path) -> None:
    first, second = ((pair / f"told-{rank}.txt").read_text().splitlines() for rank in range(2))
    assert first == second
    assert first[0].startswith("InvalidLatentsError: the processes were given different latents or settings")
    assert first[1].startswith("InvalidLatentsError: constant latent coordinate(s) 1")
    assert first[2].startswith(f"CheckpointError: {pair / 'held'}: another run")
    assert first[3] == "MissingExtraError: a thing needs an extra: pip install 'latentprior[flow]'"


def test_a_fit_of_two_goes_on_in_one(pair: Path) -> None:
    events: list[lp.Event] = []
    resumed = lp.fit(rows(), checkpoint_dir=pair / "run", resume=True, callbacks=[events.append], **OPTIONS)
    assert {e.kind for e in events} == {"normalizer", "end"}
    wanted = of_rank(pair, "whole")[0]
    assert all(torch.equal(v, wanted[k]) for k, v in resumed.state()[1].items())


def test_a_stopped_fit_ends_with_the_bytes_of_one_never_stopped(pair: Path) -> None:
    assert_same(of_rank(pair, "stopped")[0], of_rank(pair, "whole")[0])


def test_a_fit_of_one_goes_on_in_two(pair: Path, alone: lp.LatentPrior) -> None:
    first, one = of_rank(pair, "moved")[0], figures(alone)
    kept = [key for key in one if key.startswith(("base.", "whitening.", "stages.0."))]
    assert all(torch.equal(first[key], one[key]) for key in kept)
    assert any(not torch.equal(first[key], one[key]) for key in one if key.startswith("stages.1."))


@pytest.mark.slow
def test_a_killed_process_ends_the_command_and_it_can_go_on(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main, killed = launch(WORKER, tmp_path, "die")
    assert killed.code == -9
    assert (main.code, main.out) == (1, ""), main
    line = main.err.strip().splitlines()[-1]
    assert line.startswith("error: another process of this run has ended")
    assert line.endswith("start all again with --resume")
    assert "Traceback" not in main.err
    ended = launch(WORKER, tmp_path, "go on")
    assert [e.code for e in ended] == [0, 0], ended
    assert len(json.loads(ended[0].out)["stages"]) == 2
    assert (ended[1].out, "Traceback" in ended[1].err) == ("", False)
    prior = lp.LatentPrior.from_pretrained(tmp_path / "out")
    assert prior.info["log_prob_held_out"] > prior.info["log_prob_base"]
    assert not (tmp_path / "out" / "checkpoint").exists()
