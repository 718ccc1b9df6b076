import json
import math
import os
import pickle
import signal
import subprocess
import sys
import types
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import latentprior as lp
from clocks import HANG_SECONDS
from latentprior.cli import main as cli
from latentprior.cli import train as training_command
from latentprior.cli.main import main
from latentprior.density.figures import record, strict_json, text
from latentprior.errors import LearningDivergedError, StageSaturatedWarning
from latentprior.fitting import fit as learning
from latentprior.fitting import start as fit_start
from latentprior.runtime import run as resumable_run
from latentprior.storage.checkpoint import LONGEST_NAME, _checksum
from latentprior.storage.output_files import ROOM

SMALL = lp.StageSettings(steps=200, width=16, batch_size=128)
# The command line with a small network, so that a run takes seconds.
# With STOP in its environment, it sends itself that signal when it has saved its state.
DRIVER = """
import os, sys
from functools import partial
import torch
torch.set_num_threads(1)
from latentprior import StageSettings
from latentprior.cli import main as cli
from latentprior.fitting import fit as learning
from latentprior.fitting.run import FitRun
learning.fit = partial(learning.fit, settings=StageSettings(steps=300, width=16, batch_size=128))
if "STOP" in os.environ:
    save = FitRun.save_fit
    def save_and_stop(self, *state):
        save(self, *state)
        os.kill(os.getpid(), int(os.environ["STOP"]))
    FitRun.save_fit = save_and_stop
sys.exit(cli.main())
"""
STAGE_KEYS = {"gain", "gain_stderr", "log_normalizer", "log_normalizer_stderr", "ess", "acceptance", "seconds"}


def moons(n=1500, seed=0):
    generator = np.random.default_rng(seed)
    z = generator.normal(size=(n, 3)).astype(np.float32)
    z[:, 1] += z[:, 0] ** 2
    return 10 * z + 5


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with latents ``z.npy`` and a prior fitted to them by the command line in ``prior``."""
    folder = tmp_path_factory.mktemp("work")
    np.save(folder / "z.npy", moons())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "fit", partial(learning.fit, settings=SMALL))
        call = ["fit", folder / "z.npy", "--out", folder / "prior", "--base", "normal", "--max-stages", "2"]
        assert main(list(map(str, call))) == 0
    return folder


@pytest.fixture
def run(capsys, monkeypatch):
    """Run the command line in this process: ``run(...) -> (code, stdout, stderr)``."""
    monkeypatch.setattr(learning, "fit", partial(learning.fit, settings=SMALL))

    def call(*args):
        capsys.readouterr()
        code = main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def assert_refused(result, *words, code=2):
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1, result[2]
    assert result[2].startswith("error: ")
    assert "Traceback" not in result[2]
    for word in words:
        assert word in result[2]


# What each command does.


def test_version_and_help(run):
    code, out, _ = run("--version")
    assert code == 0
    assert out.startswith(f"latentprior {lp.__version__} (torch {torch.__version__}, device ")
    for args in ([], ["--help"]):
        code, out, _ = run(*args)
        assert code == 0
        assert all(command in out for command in ("demo", "fit", "score", "sample", "info"))
    for command in ("demo", "fit", "score", "sample", "info"):
        code, out, _ = run(command, "--help")
        assert code == 0
        assert "Example" in out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("line", "found"),
    [
        pytest.param("latentprior re", {"reconstruct", "report"}, marks=pytest.mark.slow),
        ("latentprior fit --ba", {"--base"}),
    ],
)
def test_the_shell_completes_commands_and_options(line, found):
    words = {"COMP_WORDS": line, "COMP_CWORD": str(line.count(" ")), "_LATENTPRIOR_COMPLETE": "complete_bash"}
    done = subprocess.run(
        [sys.executable, "-c", "import sys; from latentprior.cli.main import main; sys.exit(main([]))"],
        env={**os.environ, **words}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert set(done.stdout.split()) == found


def test_fit_says_what_it_found_and_what_comes_next(run, work, tmp_path):
    code, out, err = run("fit", work / "z.npy", "--out", tmp_path / "p", "--base", "gmm:2", "--max-stages", 1)
    assert code == 0
    assert "1,500 rows of shape (3,)" in out
    assert "held-out log density" in out
    assert f"latentprior sample {tmp_path / 'p'}" in out
    assert f"latentprior score {tmp_path / 'p'} {work / 'z.npy'}" in out
    assert not (tmp_path / "p" / "checkpoint").exists()
    assert "Warning" not in err


def test_fit_and_info_print_the_same_object(run, work, tmp_path):
    call = ("fit", work / "z.npy", "--out", tmp_path, "--base", "normal", "--max-stages", 1, "--json")
    code, out, err = run(*call)
    assert (code, err) == (0, "")
    fitted = strict(out)
    assert strict(run("info", tmp_path, "--json")[1]) == fitted
    assert fitted["event_shape"] == [3]
    assert fitted["base"] == "normal"
    assert fitted["total_seconds"] > 0
    assert len(fitted["stages"]) == 1
    assert set(fitted["stages"][0]) == STAGE_KEYS
    # A stage must help here: y depends on x squared, which no normal density knows.
    assert fitted["log_prob_held_out"] > fitted["log_prob_base"]


def test_held_out_figures_are_in_the_coordinates_of_the_user(run, work):
    found = strict(run("info", work / "prior", "--json")[1])
    scored = strict(run("score", work / "prior", work / "z.npy", "--json")[1])
    # The 150 held-out rows are among the 1,500: five standard errors of their mean, chance below 1e-6.
    assert abs(found["log_prob_held_out"] - scored["mean_log_prob"]) < 5 * scored["stderr"] * math.sqrt(10)


def test_info_for_people(run, work):
    code, out, _ = run("info", work / "prior")
    assert code == 0
    assert "base normal" in out
    assert "log normaliser" in out


def test_a_prior_without_stages_can_be_used(run, work, tmp_path):
    assert run("fit", work / "z.npy", "--out", tmp_path, "--base", "normal", "--max-stages", 0)[0] == 0
    assert strict(run("info", tmp_path, "--json")[1])["stages"] == []
    assert "no stages" in run("info", tmp_path)[1]
    assert run("sample", tmp_path, "-n", 3, "--out", tmp_path / "x.npy")[0] == 0


def test_score_agrees_with_the_library_in_any_block_size(run, work, tmp_path, monkeypatch):
    monkeypatch.setattr("latentprior.cli.latents.SCORED_ROWS", 64)
    path = tmp_path / "deep" / "log_prob.npy"
    code, out, err = run("score", work / "prior", work / "z.npy", "--out", path, "--json")
    assert (code, err) == (0, "")
    found = strict(out)
    assert set(found) == {"n", "mean_log_prob", "stderr", "log_normalizer_stderr"}
    prior = lp.LatentPrior.from_pretrained(work / "prior")
    expected = prior.log_prob(torch.from_numpy(moons())).double().numpy()
    rows = np.load(path)
    assert rows.dtype == np.float64
    np.testing.assert_allclose(rows, expected, atol=1e-4)
    assert found["n"] == 1500
    assert found["mean_log_prob"] == pytest.approx(rows.mean(), abs=1e-9)
    assert found["stderr"] == pytest.approx(rows.std(ddof=1) / math.sqrt(1500), rel=1e-9)
    assert found["log_normalizer_stderr"] == prior.log_prob_stderr
    assert "1,500 rows" in run("score", work / "prior", work / "z.npy")[1]


def test_score_of_one_row_and_of_rows_too_far_out(run, work, tmp_path):
    np.save(tmp_path / "one.npy", moons(1))
    assert strict(run("score", work / "prior", tmp_path / "one.npy", "--json")[1])["stderr"] is None
    np.save(tmp_path / "far.npy", np.full((2, 3), 1e38))
    code, out, err = run("score", work / "prior", tmp_path / "far.npy", "--json")
    assert code == 0
    assert strict(out)["mean_log_prob"] is None
    assert err.startswith("warning: 2 of 2 rows")


@pytest.mark.parametrize(
    "sampler", ["smc", *(pytest.param(s, marks=pytest.mark.slow) for s in ("sir", "mala", "hmc", "langevin"))]
)
def test_sample_writes_the_draws_of_the_library(run, work, tmp_path, sampler):
    path = tmp_path / "new" / "x.npy"
    code, out, err = run("sample", work / "prior", "-n", 50, "--out", path, "--sampler", sampler, "--seed", 3, "--json")
    assert (code, err) == (0, "")
    assert strict(out) == {"n": 50, "shape": [50, 3], "dtype": "float32", "sampler": sampler, "seed": 3}
    prior = lp.LatentPrior.from_pretrained(work / "prior")
    expected = prior.sample((50,), generator=torch.Generator().manual_seed(3), sampler=sampler)
    np.testing.assert_array_equal(np.load(path), expected.numpy())
    assert list(path.parent.iterdir()) == [path]


def test_sample_in_blocks_is_sample_at_once(run, work, tmp_path, monkeypatch):
    monkeypatch.setattr("latentprior.cli.latents.SAMPLE_BLOCK", 20)
    monkeypatch.setattr("latentprior.density.prior.SAMPLE_BLOCK", 20)
    assert run("sample", work / "prior", "-n", 50, "--out", tmp_path / "x.npy", "--sampler", "sir")[0] == 0
    prior = lp.LatentPrior.from_pretrained(work / "prior")
    expected = prior.sample((50,), generator=torch.Generator().manual_seed(0), sampler="sir")
    # Equal but for rounding: matrix products of other sizes add in another order.
    np.testing.assert_allclose(np.load(tmp_path / "x.npy"), expected.numpy(), rtol=1e-4, atol=1e-4)


def test_demo_prints_what_it_returns(run, tmp_path, monkeypatch):
    def run_demo(out, seed=0, progress=True):
        print("chatter")
        return {"seed": seed, "log_prob": {"normal": -1.5, "ladder": math.nan}}

    stand_in = types.ModuleType("latentprior.cli.demo")
    stand_in.run_demo = run_demo
    monkeypatch.setitem(sys.modules, "latentprior.cli.demo", stand_in)
    code, out, err = run("demo", "--out", tmp_path, "--seed", 2, "--json")
    assert (code, err) == (0, "chatter\n")
    assert strict(out) == {"seed": 2, "log_prob": {"normal": -1.5, "ladder": None}}
    assert run("demo", "--out", tmp_path)[1] == "chatter\n"


def test_text_and_json_of_figures_that_are_not_finite():
    base = lp.fit(moons(200), base="normal", max_stages=0)
    found = record(base)
    found["stages"] = [dict.fromkeys(STAGE_KEYS, math.nan)]
    found["total_seconds"] = None
    assert "nan" not in "\n".join(text(found))
    assert strict(strict_json(found))["stages"][0]["gain"] is None


# Wrong calls and wrong input: exit code 2, one line.


def write_bad_inputs(folder):
    z = moons(40)
    np.save(folder / "nan.npy", np.where(np.arange(120).reshape(40, 3) == 7, np.nan, z))
    np.save(folder / "inf.npy", np.where(np.arange(120).reshape(40, 3) == 7, np.inf, z))
    np.save(folder / "one-row.npy", z[:1])
    np.save(folder / "no-rows.npy", z[:0])
    np.save(folder / "strings.npy", np.array([["a", "b"], ["c", "d"]]))
    np.save(folder / "objects.npy", np.array([[1, {}], [2, None]], dtype=object), allow_pickle=True)
    np.save(folder / "scalar.npy", np.float32(1))
    np.save(folder / "flat.npy", z[:, 0])
    np.save(folder / "complex.npy", z.astype(complex))
    (folder / "pickle.npy").write_bytes(pickle.dumps(z))
    (folder / "empty.npy").write_bytes(b"")
    torch.save(torch.from_numpy(z), folder / "tensor.pt")
    (folder / "pickle.pkl").write_bytes(pickle.dumps(z))
    (folder / "folder.npy").mkdir()
    np.save(folder / "whole.npy", z)
    np.savez(folder / "whole.npz", z=z)
    np.savez(folder / "several.npz", a=z, b=z)
    np.savez(folder / "objects.npz", z=np.array([[1, {}]], dtype=object))
    save_file({"z": torch.from_numpy(z)}, folder / "whole.safetensors")
    for kind in ("npy", "npz", "safetensors"):
        blob = (folder / f"whole.{kind}").read_bytes()
        (folder / f"cut.{kind}").write_bytes(blob[: len(blob) * 2 // 3])
        (folder / f"noise.{kind}").write_bytes(np.random.default_rng(0).bytes(500))
    return folder


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    return write_bad_inputs(tmp_path_factory.mktemp("bad"))


BAD_ARRAYS = ["nan", "inf", "no-rows", "strings", "objects", "scalar", "flat", "complex", "pickle", "empty", "folder"]
BAD_LATENTS = [
    *(f"{name}.npy" for name in BAD_ARRAYS),
    *(f"{name}.{kind}" for name in ("cut", "noise", "absent") for kind in ("npy", "npz", "safetensors")),
    *("tensor.pt", "pickle.pkl", "several.npz", "objects.npz", "."),
]


@pytest.mark.parametrize("name", BAD_LATENTS)
def test_fit_refuses(run, bad, tmp_path, name):
    assert_refused(run("fit", bad / name, "--out", tmp_path / "p"), name if name != "." else "")
    assert not (tmp_path / "p").exists()


def test_fit_refuses_one_row(run, bad, tmp_path):
    assert_refused(run("fit", bad / "one-row.npy", "--out", tmp_path), "at least 2 rows")


@pytest.mark.parametrize("name", [*BAD_LATENTS, "several.npz --key c", "whole.npz --key c"])
def test_score_refuses(run, bad, work, name):
    name, *rest = name.split()
    assert_refused(run("score", work / "prior", bad / name, *rest, "--json"), name if name != "." else "")


def test_key_chooses_an_array(run, bad, work):
    assert run("score", work / "prior", bad / "several.npz", "--key", "b")[0] == 0


def test_score_refuses_another_shape(run, work, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((5, 4)))
    assert_refused(run("score", work / "prior", tmp_path / "wide.npy"), "(4,)", "(3,)")


@pytest.mark.parametrize(
    "call",
    [
        "demo --out {long}",
        "fit {z} --out {long}",
        "fit {z} --out {long}/p --resume",
        "fit {long}.npy --out {t}/p",
        "sample {p} -n 5 --out {long}.npy",
        "sample {p} -n 5 --out {nearly}.npy",
        "sample {long} -n 5 --out {t}/x.npy",
        "score {p} {z} --out {long}.npy",
        "score {p} {z} --out {nearly}.npy",
        "score {p} {long}.npy",
        "info {long}",
        "report {p} --out {long}.html",
        "report {p} --out {nearly}.html",
        "explore {long}",
    ],
)
def test_names_longer_than_the_file_system_allows(run, work, tmp_path, call):
    # ``nearly`` leaves no room for the name that a file has while it is written.
    names = {"long": tmp_path / ("n" * 300), "nearly": tmp_path / ("n" * 245)}
    words = call.format(p=work / "prior", z=work / "z.npy", t=tmp_path, **names).split()
    assert_refused(run(*words), "File name too long")
    assert list(tmp_path.iterdir()) == []


def deep(folder, length):
    """A path in ``folder`` of so many bytes, in which no name is long."""
    left = length - len(os.fsencode(folder))
    names = ["d" * 99] * ((left - 2) // 100)
    return folder.joinpath(*names, "e" * (left - 100 * len(names) - 1))


LONGEST_PATH = os.pathconf("/", "PC_PATH_MAX") - 1 if hasattr(os, "pathconf") else 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits, and some none")
@pytest.mark.parametrize("spare", [0, 5, 10])
@pytest.mark.parametrize(
    "call",
    [
        "demo --out {}",
        "fit {z} --out {}",
        "fit {z} --out {} --resume",
        "fit {z} --out {}/p",
        "sample {p} -n 5 --out {}.npy",
        "score {p} {z} --out {}.npy",
        "report {p} --out {}.html",
    ],
)
def test_paths_longer_than_the_file_system_allows(run, work, tmp_path, call, spare):
    """The path itself may be given to the system, what is written in it or beside it on the way may not."""
    ending = call.partition("{}")[2].partition(" ")[0]
    if ending in ("", "/p"):
        # In a folder, states of a run have longer names than the file of results beside its place.
        spare *= 6
    out = deep(tmp_path, LONGEST_PATH - spare - len(ending))
    with pytest.raises(FileNotFoundError):
        os.lstat(f"{out}{ending}")
    words = call.format(out, p=work / "prior", z=work / "z.npy").split()
    assert_refused(run(*words), "File name too long")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other limits, and some none")
def test_the_longest_paths_that_are_taken_hold_all_that_is_written(run, work, tmp_path):
    file = deep(tmp_path, LONGEST_PATH - len(f"..{os.getpid()}.partial.npy")).with_suffix(".npy")
    assert run("sample", work / "prior", "-n", 5, "--out", file)[0] == 0
    assert os.listdir(file.parent) == [file.name]
    folder = deep(tmp_path, LONGEST_PATH - ROOM - 1)
    assert run("fit", work / "z.npy", "--out", folder, "--base", "normal", "--max-stages", 1)[0] == 0
    assert run("info", folder)[0] == 0
    for part, kind in training_command.STATES.items():
        name = f".{kind}-{'0' * 16}.safetensors.{1 << 22}.partial"
        assert len(name) <= LONGEST_NAME
        assert len(f"/checkpoint/{part}/{name}") <= ROOM


@pytest.mark.parametrize(
    "call",
    [
        "fit {z}",
        "fit {z} --out {t}/p --base gaussian",
        "fit {z} --out {t}/p --base gmm:0",
        "fit {z} --out {t}/p --max-stages -1",
        "fit {z} --out {t}/p --max-stages many",
        "fit {z} --out {t}/p --validation 1.5",
        "fit {z} --out {t}/p --validation nan",
        "fit {z} --out {t}/p --time-budget -1",
        "fit {z} --out {t}/p --device teapot",
        "fit {z} --out {t}/p --device cuda:77",
        "fit {z} --out {t}/p --seed -1",
        "fit {z} --out {t}/p --steps 3",
        "fit {z} --out {z}",
        "fit {z} --out {z}/p",
        "fit {z} --out {t}/foreign",
        "fit {z} --out /proc/nothing",
        "sample {p} -n 0 --out {t}/x.npy",
        "sample {p} -n -5 --out {t}/x.npy",
        "sample {p} -n 1.5 --out {t}/x.npy",
        "sample {p} --out {t}/x.npy",
        "sample {p} -n 5",
        "sample {p} -n 5 --out {t}/x.npy --sampler gibbs",
        "sample {p} -n 5 --out {t}/folder.npy",
        "sample {p} -n 5 --out {t}/x.txt",
        "sample {p} -n 5 --out {z}/x.npy",
        "sample {p} -n 5 --out /proc/x.npy",
        "sample {t} -n 5 --out {t}/x.npy",
        "score {p}",
        "score {p} {z} --out {t}/folder.npy",
        "score {t} {z}",
        "score {t}/absent {z}",
        "score someone/something {z}",
        "info {z}",
        "info {t}/absent",
        "info {t}/foreign",
        "info {t}/not-json",
        "info {t}/half",
        "info {t}/no-tensors",
        "info {t}/bad-tensors",
        "info {t}/other-version",
        "info",
        "draw {p}",
        "--verbose",
    ],
)
def test_wrong_calls_are_refused(run, work, tmp_path, call):
    (tmp_path / "folder.npy").mkdir()
    config = (work / "prior" / "config.json").read_text()
    weights = next((work / "prior").glob("*.safetensors"))
    half = {k: v for k, v in json.loads(config).items() if k != "stages"}
    half["checksum"] = _checksum(half)
    for name, content in {
        "foreign": '{"model_type": "bert"}',
        "not-json": config[: len(config) // 2],
        "half": json.dumps(half),
        "no-tensors": config,
        "bad-tensors": config,
        "other-version": config.replace('"format_version": 1', '"format_version": 99'),
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
        if name != "no-tensors":
            (tmp_path / name / weights.name).write_bytes(weights.read_bytes())
    (tmp_path / "bad-tensors" / weights.name).write_bytes(weights.read_bytes()[:-1])
    foreign = (tmp_path / "foreign" / "config.json").read_text()
    assert_refused(run(*call.format(z=work / "z.npy", p=work / "prior", t=tmp_path).split()))
    assert not (tmp_path / "x.npy").exists()
    assert (tmp_path / "foreign" / "config.json").read_text() == foreign


# Work that fails: exit code 1, one line.


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LearningDivergedError("stage 3: the held-out loss is not finite"), "stage 3"),
        (RuntimeError("something\nodd"), "unexpected RuntimeError: something odd"),
        (OSError(28, "No space left on device", "x"), "No space left"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_failures_are_one_line_and_exit_1(run, work, tmp_path, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(learning, "fit", fail)
    call = ("fit", work / "z.npy", "--out", tmp_path)
    assert_refused(run(*call), words, code=1)
    for debug in (("--debug", *call), (*call, "--debug")):
        code, _, err = run(*debug)
        assert code == 1
        assert "Traceback" in err
        assert "\nerror: " in err


def test_a_full_disk_while_learning_exits_1(run, work, tmp_path, monkeypatch):
    def full(*_, **__):
        raise lp.CheckpointError("cannot save (No space left on device)")

    monkeypatch.setattr(resumable_run, "save_state", full)
    call = ("fit", work / "z.npy", "--out", tmp_path, "--base", "normal")
    assert_refused(run(*call), "No space left", code=1)


def test_a_full_disk_while_sampling_leaves_nothing(run, work, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert_refused(run("sample", work / "prior", "-n", 5, "--out", tmp_path / "x.npy"), "No space left", code=1)
    assert not list(tmp_path.iterdir())


def test_warnings_are_one_line_and_not_on_stdout(run, work, tmp_path, monkeypatch):
    original = learning.fit

    def warn(*args, **options):
        warnings.warn("the ladder ended\nearly", StageSaturatedWarning, stacklevel=1)
        return original(*args, **options)

    monkeypatch.setattr(learning, "fit", warn)
    call = ("fit", work / "z.npy", "--out", tmp_path, "--base", "normal", "--max-stages", 0, "--json")
    code, out, err = run(*call)
    assert (code, err) == (0, "warning: the ladder ended early\n")
    strict(out)


# Stopping and going on.


def command(*args):
    return [sys.executable, "-c", DRIVER, *map(str, args)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def tensors(folder):
    (path,) = folder.glob("*.safetensors")
    return path.name, path.read_bytes()


def stop_after_checkpoint(call, folder, number):
    """Run until the first checkpoint has been written, when the run stops itself by a signal."""
    run = subprocess.Popen(
        call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment() | {"STOP": str(int(number))}
    )
    out, err = run.communicate(timeout=HANG_SECONDS)
    assert run.returncode == 1, err
    assert out == ""
    assert err.startswith(f"stopped: state saved in {folder}; go on with: latentprior fit ")
    assert err.endswith(" --resume\n")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_a_stopped_fit_goes_on_to_the_same_bytes(work, tmp_path):
    def call(name):
        return command("fit", work / "z.npy", "--out", tmp_path / name, "--base", "normal", "--max-stages", 2)

    checkpoint = tmp_path / "stopped" / "checkpoint"
    stop_after_checkpoint(call("stopped"), checkpoint, signal.SIGTERM)
    stop_after_checkpoint([*call("stopped"), "--resume"], checkpoint, signal.SIGINT)
    for again in ([*call("stopped"), "--resume"], [*call("whole"), "--json"]):
        done = subprocess.run(
            again, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
    strict(done.stdout)
    assert tensors(tmp_path / "stopped") == tensors(tmp_path / "whole")
    assert not checkpoint.exists()


def test_a_fit_stopped_while_its_base_is_fitted_says_so(run, work, tmp_path, monkeypatch):
    def slow(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal did not stop the fit")

    monkeypatch.setattr(fit_start, "fit_base", slow)
    code, out, err = run("fit", work / "z.npy", "--out", tmp_path, "--base", "normal")
    assert (code, out, err) == (1, "", "stopped: nothing was saved\n")


@pytest.mark.slow
def test_resume_with_nothing_there_with_another_run_and_with_damage(run, work, tmp_path, monkeypatch):
    call = ["fit", work / "z.npy", "--out", tmp_path / "p", "--base", "normal", "--max-stages", 1]
    assert run(*call, "--resume")[0] == 0
    assert run(*call, "--resume")[0] == 0

    def stop(self, event):
        if event.kind == "normalizer":
            raise cli.Stopped

    with monkeypatch.context() as patch:
        patch.setattr(cli.StopSignals, "check", stop)
        code, _, err = run(*call)
        assert code == 1
        assert err.startswith("stopped: state saved")
    saved = tmp_path / "p" / "checkpoint" / "config.json"
    assert_refused(run(*call, "--resume", "--seed", 9), "another folder")
    whole = saved.read_text()
    saved.write_text(whole[:-100])
    assert_refused(run(*call, "--resume"))
    assert_refused(run(*call), "nothing was overwritten")
    saved.write_text(whole)
    (tmp_path / "p" / "checkpoint" / "mine.txt").write_text("keep")
    code, _, err = run(*call)
    assert code == 0
    assert err.startswith("warning: ")
    assert "--resume" in err
    assert [path.name for path in (tmp_path / "p" / "checkpoint").iterdir()] == ["mine.txt"]


@pytest.mark.slow
def test_python_m_and_a_reader_that_leaves(work):
    call = [sys.executable, "-m", "latentprior", "info", str(work / "prior"), "--json"]
    done = subprocess.run(call, capture_output=True, text=True, env=environment(), timeout=HANG_SECONDS, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("\n") == 1
    strict(done.stdout)
    reader, writer = os.pipe()
    os.close(reader)
    gone = subprocess.run(
        call, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment(), timeout=HANG_SECONDS, check=False
    )
    os.close(writer)
    assert (gone.returncode, gone.stderr) == (1, "")


@pytest.mark.slow
def test_shells_complete_its_commands() -> None:
    environment = {
        **os.environ,
        "_LATENTPRIOR_COMPLETE": "complete_bash",
        "COMP_WORDS": "latentprior s",
        "COMP_CWORD": "1",
    }
    command = [sys.executable, "-m", "latentprior"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
    assert done.stdout.split() == ["score", "sample"], done.stderr
