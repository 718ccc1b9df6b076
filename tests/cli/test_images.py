import json
import math
import os
import pickle
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import latentprior as lp
from clocks import HANG_SECONDS
from latentprior.baselines import two_stage_vae
from latentprior.cli import train as training_command
from latentprior.cli.main import main
from latentprior.data.images import read_images
from latentprior.evaluation.metrics import average_precision
from latentprior.recipes.model_folders import load_model
from latentprior.recipes.recipe import METHODS, OURS, read_recipe
from latentprior.runtime import run as resumable_run
from latentprior.runtime.stopping import Stopped
from latentprior.storage.checkpoint import read_config
from latentprior.training import autoencoder

NETWORK = ("network.width=16", "network.latent_dim=2")
CHAINS = (
    "joint.steps=40",
    "joint.stages=1",
    "joint.switch=schedule",
    "joint.held_out=40",
    "joint.evaluate_every=20",
    "joint.ratio_width=16",
)
JOINT = ("method=joint", "joint.settle_steps=0", "joint.posterior_step_size=0.1", "joint.learning_rate=1e-3", *CHAINS)
TWO_PHASE = (
    "method=two-phase",
    "autoencoder.steps=30",
    "fit.base=normal",
    "fit.max_stages=1",
    "fit.settings.steps=200",
    "fit.settings.width=16",
)
STEPS = "rival.steps=3"
RIVALS = {
    "vae": (STEPS,),
    "rae": (STEPS, "rival.components=2"),
    "sri": (STEPS, "rival.posterior_steps=2"),
    "lebm": (STEPS, "rival.posterior_steps=2", "rival.width=8", "rival.held_out=20"),
    "ncp-vae": (STEPS, "rival.ratio.steps=20", "rival.ratio.width=8", "rival.ratio.depth=1"),
    "two-stage-vae": (STEPS, "rival.second_steps=3", "rival.width=8", "rival.depth=2", "rival.samples=4"),
    "gmm": (STEPS, "rival.components=2"),
    "flow": (STEPS,),
}


def spots(n, seed=0):
    """Images (n, 8, 8) of one soft spot each."""
    centre = np.random.default_rng(seed).uniform(1.5, 5.5, (n, 2, 1, 1))
    row, column = np.mgrid[0:8, 0:8]
    return (255 * np.exp(-((row - centre[:, 0]) ** 2 + (column - centre[:, 1]) ** 2) / 3)).astype(np.uint8)


def pixels_of(path):
    with Image.open(path) as picture:
        return np.array(picture)


def settings(*pairs):
    return [word for pair in pairs for word in ("--set", pair)]


def invoke(*args):
    return main([str(arg) for arg in args])


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with images ``i.npz`` and a model that the command line learned on them in ``run``."""
    folder = tmp_path_factory.mktemp("work")
    odd = (np.arange(30) % 5 == 0).astype(np.int64)
    test = spots(30, 1)
    test[odd == 1] = 255 - test[odd == 1]
    np.savez(folder / "i.npz", x_train=spots(160), x_test=test, y_test=odd, odd=odd, class_of=odd + 6)
    call = ("train", folder / "i.npz", "--out", folder / "run", *settings(*NETWORK, *JOINT))
    assert invoke(*call, "--tensorboard") == 0
    return folder


@pytest.fixture
def run(capsys):
    def call(*args):
        capsys.readouterr()
        code = invoke(*args)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def strict(line):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    assert line.count("\n") == 1
    return json.loads(line, parse_constant=refuse)


def assert_refused(result, *words, code=2):
    assert result[0] == code, result
    assert result[1] == ""
    assert result[2].count("\n") == 1, result[2]
    assert result[2].startswith("error: ")
    for word in words:
        assert word in result[2]


def tensors(folder):
    (path,) = folder.glob("*.safetensors")
    return path.name, path.read_bytes()


# What each command does.


def test_help_has_examples(run):
    code, out, _ = run("--help")
    for command in ("train", "generate", "reconstruct", "detect", "evaluate"):
        assert command in out
        code, text, _ = run(command, "--help")
        assert code == 0
        assert "Example" in text
        assert "--json" in text


def test_train_leaves_model_recipe_curves_and_pictures(work):
    folder = work / "run"
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "log.jsonl",
        "metrics.json",
        "model",
        "samples.png",
        "tensorboard",
    }
    recipe = read_recipe(folder / "config.yaml")
    assert (recipe.method, recipe.network.family, recipe.joint.steps) == ("joint", "mlp", 40)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "stage-0/gain" in line] == [20, 40]
    assert lines[-1].keys() == {"step", "ladder/gain", "ladder/gain_stderr"}
    found = strict((folder / "metrics.json").read_text())
    assert (found["method"], found["images"], found["image_shape"]) == ("joint", 160, [1, 8, 8])
    assert found["losses"]["reconstruction"] > 0
    assert len(found["prior"]["stages"]) == 1
    # 64 pictures of 8 pixels, 7 white lines of 2 between them.
    assert pixels_of(folder / "samples.png").shape == (78, 78)
    assert list((folder / "tensorboard").iterdir())


def test_generate_writes_the_images_of_the_library(run, work, tmp_path):
    path = tmp_path / "new" / "x.npy"
    code, out, err = run("generate", work / "run", "-n", 40, "--out", path, "--seed", 3, "--json")
    assert (code, err) == (0, "")
    assert strict(out) == {"n": 40, "shape": [40, 1, 8, 8], "sampler": "smc", "seed": 3}
    model = lp.LatentVariableModel.from_pretrained(work / "run" / "model")
    expected = model.generate(40, generator=torch.Generator().manual_seed(3))
    np.testing.assert_array_equal(np.load(path), expected.numpy())
    assert list(path.parent.iterdir()) == [path]
    # The same pixels in a grid and in a folder, and images can be read back.
    assert run("generate", work / "run", "-n", 40, "--out", tmp_path / "x.png", "--seed", 3)[0] == 0
    assert run("generate", work / "run", "-n", 40, "--out", tmp_path / "x", "--seed", 3)[0] == 0
    pixels = ((expected + 1) * 127.5).round().to(torch.uint8).numpy()[:, 0]
    grid = pixels_of(tmp_path / "x.png")
    assert grid.shape == (6 * 10 - 2, 7 * 10 - 2)
    np.testing.assert_array_equal(grid[10:18, 20:28], pixels[7 + 2])
    assert (grid[8:10] == 255).all()
    names = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert names == [f"{k:05}.png" for k in range(40)]
    again = read_images(tmp_path / "x").batch(torch.arange(40))
    np.testing.assert_allclose(again, expected, atol=1 / 127.5)
    assert len(read_images(path)) == 40


def test_generate_by_another_sampler(run, work, tmp_path):
    code, out, _ = run(
        "generate", work / "run", "-n", 2, "--out", tmp_path / "x.npy", "--sampler", "langevin", "--json"
    )
    assert (code, strict(out)["sampler"]) == (0, "langevin")


def test_reconstruct_measures_and_shows(run, work, tmp_path):
    call = ("reconstruct", work / "run", work / "i.npz", "--split", "test", "--method", "encoder")
    code, out, err = run(*call, "--json", "--out", tmp_path / "r.npy")
    assert (code, err) == (0, "")
    found = strict(out)
    again = torch.from_numpy(np.load(tmp_path / "r.npy"))
    x = read_images(work / "i.npz", split="test").batch(torch.arange(30))
    errors = (again - x).square().flatten(1).mean(1)
    assert found == {
        "n": 30,
        "mean_squared_error": pytest.approx(float(errors.mean()), rel=1e-5),
        "stderr": pytest.approx(float(errors.std()) / math.sqrt(30), rel=1e-5),
    }
    assert run(*call, "--out", tmp_path / "r.png", "--limit", 3)[0] == 0
    grid = pixels_of(tmp_path / "r.png")
    np.testing.assert_array_equal(grid[:8, :8], np.load(work / "i.npz")["x_test"][0])
    np.testing.assert_array_equal(grid[:8, 10:18], ((again[0, 0] + 1) * 127.5).round().to(torch.uint8))
    assert strict(run(*call, "--limit", 1, "--json")[1])["stderr"] is None


def test_detect_scores_and_measures(run, work, tmp_path):
    call = ("detect", work / "run", work / "i.npz", "--method", "encoder", "--json")
    code, out, err = run(*call, "--split", "test", "--out", tmp_path / "s.npy")
    assert (code, err) == (0, "")
    found, scores = strict(out), np.load(tmp_path / "s.npy")
    assert (found["n"], found["kind"], found["prevalence"]) == (30, "joint", 0.2)
    assert found["mean"] == pytest.approx(scores.mean())
    assert found["stderr"] == pytest.approx(scores.std(ddof=1) / math.sqrt(30))
    odd = torch.from_numpy(np.load(work / "i.npz")["odd"])
    assert found["auprc"] == average_precision(odd, torch.from_numpy(scores)).auprc
    # Inverted pictures: far from every image that the generator makes.
    assert found["auprc"] == 1.0
    for more in (["--labels-key", "odd"], ["--labels-key", "class_of", "--anomaly", 7], ["--anomaly", 1]):
        same = strict(run(*call, "--split", "test", *more)[1])
        assert (same["auprc"], same["prevalence"]) == (1.0, 0.2)
    swapped = strict(run(*call, "--split", "test", "--anomaly", 0)[1])
    assert swapped["prevalence"] == 0.8
    assert swapped["auprc"] < 0.95
    assert "auprc" not in strict(run(*call, "--limit", 5)[1])
    assert strict(run(*call, "--kind", "reconstruction")[1])["kind"] == "reconstruction"
    assert strict(run(*call, "--kind", "marginal", "--limit", 2)[1])["n"] == 2


def test_evaluate_reports_samples_and_floors(run, work, tmp_path):
    call = ("evaluate", work / "run", work / "i.npz", "--features", "pixels", "--method", "encoder")
    code, out, err = run(*call, "-n", 20, "--json")
    assert (code, err) == (0, "")
    found = strict(out)
    assert (found["images"], found["feature_network"], found["sampler"]) == (20, "pixels-16px", "smc")
    for name in ("generated", "reconstructions", "real"):
        assert found[name].keys() >= {"frechet", "kernel", "kernel_stderr"}
    # A model of 40 steps is far off: the images themselves are nearer to each other than its samples are.
    assert found["real"]["frechet"] < found["generated"]["frechet"]
    assert found["reconstructions"]["mean_squared_error"] > 0
    np.save(tmp_path / "test.npy", np.load(work / "i.npz")["x_test"])
    np.save(tmp_path / "train.npy", np.load(work / "i.npz")["x_train"])
    alone = ("evaluate", work / "run", tmp_path / "train.npy", *call[3:], "-n", 20)
    assert strict(run(*alone, "--test", tmp_path / "test.npy", "--json")[1]) == found
    assert_refused(run(*alone), "--test")
    code, out, _ = run(*call)
    assert code == 0
    assert "30 images each" in out


# Training by every method, and going on.


@pytest.mark.parametrize("method", [name for name in METHODS if name not in OURS])
def test_rivals_train_and_generate(run, work, tmp_path, method):
    if method == "flow":
        pytest.importorskip("zuko")
    chosen = settings(f"method={method}", *NETWORK, *RIVALS[method])
    code, out, _ = run("train", work / "i.npz", "--out", tmp_path / "m", *chosen, "--json")
    assert code == 0
    assert strict(out)["method"] == method
    paths = [tmp_path / f"{k}.npy" for k in (0, 1)]
    for path in paths:
        code, out, _ = run("generate", tmp_path / "m", "-n", 4, "--out", path, "--json")
        assert code == 0
    assert strict(out)["sampler"] == {"ncp-vae": "sir", "lebm": "langevin"}.get(method, "smc")
    assert np.isfinite(np.load(paths[0])).all()
    np.testing.assert_array_equal(*map(np.load, paths))


@pytest.mark.parametrize("method", ["vae", "two-phase"])
def test_a_recipe_without_encoder_gives_one_to_methods_that_need_it(run, work, tmp_path, method):
    small = ("network.family=mlp", "image_size=8", *NETWORK)
    row = (STEPS,) if method == "vae" else TWO_PHASE
    call = ("--config", "cifar10-paper", *settings(*small, *row, f"method={method}"), "--json")
    code, out, _ = run("train", work / "i.npz", "--out", tmp_path / "m", *call)
    assert (code, strict(out)["method"]) == (0, method)
    assert load_model(tmp_path / "m").encoder is not None
    written = read_recipe(tmp_path / "m" / "config.yaml")
    assert (written.encoder, written.rivals) == (None, read_recipe("cifar10-paper").rivals)
    code, out, _ = run(
        "reconstruct", tmp_path / "m", work / "i.npz", "--out", tmp_path / "r.png", "--limit", 4, "--json"
    )
    assert code == 0
    assert math.isfinite(strict(out)["mean_squared_error"])


def stop_at(monkeypatch, kind, number=1, *, of_fit=None):
    """Make the ``number``-th event of this kind end the run, as a signal would; of a fit alone, if ``of_fit``."""
    seen = []

    def check(self, event):
        seen.extend([event] if event.kind == kind and of_fit in (None, event.model is None) else [])
        if len(seen) >= number:
            raise Stopped

    monkeypatch.setattr(training_command.StopSignals, "check", check)


def test_a_stopped_training_goes_on_to_the_same_bytes(run, work, tmp_path):
    call = ["train", work / "i.npz", "--out", tmp_path / "p", *settings(*NETWORK, *JOINT)]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "evaluate")
        code, out, err = run(*call)
    assert (code, out) == (1, "")
    assert err.startswith(f"stopped: state saved in {tmp_path / 'p' / 'checkpoint'}; go on with: latentprior train ")
    assert err.endswith(" --resume\n")
    assert not (tmp_path / "p" / "model").exists()
    assert_refused(run("generate", tmp_path / "p", "-n", 2, "--out", tmp_path / "x.npy"), "--resume")
    # Another seed is another run; without --config the run's own recipe serves.
    assert_refused(run(*call, "--resume", "--seed", 5), "another folder")
    code, _, err = run("train", work / "i.npz", "--out", tmp_path / "p", "--resume")
    assert (code, err.count("warning: log Z")) == (0, err.count("\n"))
    assert tensors(tmp_path / "p" / "model") == tensors(work / "run" / "model")
    assert not (tmp_path / "p" / "checkpoint").exists()


def test_a_stopped_two_phase_run_goes_on_to_the_same_bytes(run, work, tmp_path, monkeypatch):
    def call(name):
        return ["train", work / "i.npz", "--out", tmp_path / name, *settings(*NETWORK, *TWO_PHASE), "--json"]

    assert run(*call("whole"))[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, "autoencoder")
        assert run(*call("p"))[2] == "stopped: nothing was saved\n"
    monkeypatch.setattr(autoencoder, "SAVE_STEPS", 10)
    with monkeypatch.context() as patch:
        stop_at(patch, "autoencoder", 15)
        assert "state saved" in run(*call("p"))[2]
    with monkeypatch.context() as patch:
        stop_at(patch, "evaluate", of_fit=True)
        assert "state saved" in run(*call("p"), "--resume")[2]

    def forbidden(*_):
        raise AssertionError("the autoencoder was saved")

    with monkeypatch.context() as patch:
        assert_refused(run(*call("p"), "--resume", "--set", "autoencoder.steps=31"), "another folder")
        patch.setattr(autoencoder.AutoencoderLearner, "update", forbidden)
        assert run(*call("p"), "--resume")[0] == 0
    assert tensors(tmp_path / "p" / "model") == tensors(tmp_path / "whole" / "model")
    assert sorted(path.name for path in (tmp_path / "p").iterdir()) == [
        "config.yaml",
        "log.jsonl",
        "metrics.json",
        "model",
        "samples.png",
    ]


@pytest.mark.slow
def test_a_stopped_alternating_run_goes_on_to_the_same_bytes(run, work, tmp_path, monkeypatch):
    told = [*NETWORK, *TWO_PHASE, *CHAINS, "method=alternating", "joint.settle_steps=25"]

    def call(name):
        return ["train", work / "i.npz", "--out", tmp_path / name, *settings(*told), "--json"]

    code, out, _ = run(*call("whole"))
    assert (code, json.loads(out)["method"]) == (0, "alternating")
    log = (tmp_path / "whole" / "log.jsonl").read_text()
    assert '"autoencoder/' in log
    assert '"settle/' in log
    # One stop in every part, each found again by the next call; the last one is in the second fit.
    stops = [("autoencoder", False, 30), ("evaluate", True, 1), ("evaluate", False, 1)]
    for kind, of_fit, number in [*stops, ("settle", False, 24), ("evaluate", True, 1)]:
        with monkeypatch.context() as patch:
            stop_at(patch, kind, number, of_fit=of_fit)
            assert "state saved" in run(*call("p"), "--resume")[2]
    assert_refused(run(*call("p"), "--resume", "--set", "joint.steps=41"), "another folder", code=1)
    monkeypatch.setattr(autoencoder.AutoencoderLearner, "update", None)
    assert run(*call("p"), "--resume")[0] == 0
    assert tensors(tmp_path / "p" / "model") == tensors(tmp_path / "whole" / "model")
    assert not (tmp_path / "p" / "checkpoint").exists()


@pytest.mark.parametrize(("method", "kind", "event"), [("vae", "autoencoder", 2), ("two-stage-vae", "prior", 3)])
def test_a_stopped_rival_goes_on_to_the_same_bytes(run, work, tmp_path, monkeypatch, method, kind, event):
    monkeypatch.setattr(autoencoder, "SAVE_STEPS", 2)
    monkeypatch.setattr(two_stage_vae, "SAVE_STEPS", 2)

    def call(name):
        chosen = settings(f"method={method}", *NETWORK, *RIVALS[method])
        return ["train", work / "i.npz", "--out", tmp_path / name, *chosen, "--json"]

    assert run(*call("whole"))[0] == 0
    with monkeypatch.context() as patch:
        stop_at(patch, kind, event)
        assert "go on with: latentprior train " in run(*call("p"))[2]
    folder = tmp_path / "p" / "checkpoint" / ("second" if kind == "prior" else "autoencoder")
    assert read_config(folder, folder.name)["step"] == 2
    assert run(*call("p"), "--resume")[0] == 0
    assert tensors(tmp_path / "p" / "model") == tensors(tmp_path / "whole" / "model")
    assert not (tmp_path / "p" / "checkpoint").exists()


def test_a_run_of_another_method_is_not_gone_on_with(run, work, tmp_path):
    call = ["train", work / "i.npz", "--out", tmp_path / "p"]
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, "evaluate")
        assert run(*call, *settings(*NETWORK, *JOINT))[0] == 1
    assert_refused(run(*call, *settings(*NETWORK, STEPS, "method=vae"), "--resume"), "another method than vae")
    assert (tmp_path / "p" / "checkpoint" / "config.json").exists()


def test_a_second_vae_is_read_with_its_own_model_alone(run, work, tmp_path):
    def trained(method, *more):
        chosen = settings(f"method={method}", *NETWORK, *RIVALS[method])
        assert run("train", work / "i.npz", "--out", tmp_path / "m", *chosen, *more)[0] == 0
        return load_model(tmp_path / "m").prior

    z, first = torch.zeros(1, 2), trained("two-stage-vae")
    assert first.base.name == "distribution"
    assert torch.equal(load_model(tmp_path / "m").prior.log_prob(z), first.log_prob(z))
    assert not torch.equal(trained("two-stage-vae", "--seed", "7").log_prob(z), first.log_prob(z))
    assert trained("vae").base.name == "normal"


def test_an_unfinished_run_is_named_before_it_is_started_anew(run, work, tmp_path, monkeypatch):
    call = ["train", work / "i.npz", "--out", tmp_path, *settings(*NETWORK, *TWO_PHASE)]
    with monkeypatch.context() as patch:
        stop_at(patch, "stage")
        assert run(*call)[0] == 1
    (tmp_path / "checkpoint" / "mine.txt").write_text("keep")
    with monkeypatch.context() as patch:
        stop_at(patch, "autoencoder", 2)
        code, _, err = run(*call)
    assert code == 1
    assert err.splitlines()[0].startswith("warning: ")
    assert err.splitlines()[1] == "stopped: nothing was saved"
    assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["mine.txt"]


def test_a_recipe_file_in_its_own_folder_is_left_as_it_is(run, work, tmp_path):
    text = "# mine\nmethod: vae\nnetwork: {width: 8, latent_dim: 2}\nrival: {steps: 2}\n"
    (tmp_path / "config.yaml").write_text(text)
    assert run("train", work / "i.npz", "--out", tmp_path, "--config", tmp_path / "config.yaml", "--limit", 20)[0] == 0
    assert (tmp_path / "config.yaml").read_text() == text
    assert strict((tmp_path / "metrics.json").read_text())["images"] == 20


def test_images_are_resized_as_in_training(run, tmp_path):
    (tmp_path / "big").mkdir()
    for k, x in enumerate(np.kron(spots(12), np.ones((2, 2), np.uint8))):
        Image.fromarray(x).save(tmp_path / "big" / f"{k}.png")
    chosen = settings("method=vae", "rival.steps=2", "image_size=8", *NETWORK)
    assert run("train", tmp_path / "big", "--out", tmp_path / "m", *chosen)[0] == 0
    code, out, _ = run("reconstruct", tmp_path / "m", tmp_path / "big", "--json")
    assert (code, strict(out)["n"]) == (0, 12)


# Wrong calls and wrong input: exit code 2, one line.


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "pickle.npy").write_bytes(pickle.dumps(spots(3)))
    (folder / "pickle.pkl").write_bytes(pickle.dumps(spots(3)))
    np.save(folder / "wide.npy", np.zeros((4, 9, 9), np.uint8))
    np.save(folder / "cut.npy", spots(4))
    (folder / "cut.npy").write_bytes((folder / "cut.npy").read_bytes()[:-50])
    np.save(folder / "nan.npy", np.full((4, 1, 8, 8), np.nan, np.float32))
    (folder / "pictures").mkdir()
    Image.fromarray(spots(1)[0]).save(folder / "pictures" / "a.png")
    blob = (folder / "pictures" / "a.png").read_bytes()
    (folder / "pictures" / "b.png").write_bytes(blob[: len(blob) // 2])
    (folder / "wrong.yaml").write_text("joint: {stepz: 5}")
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("keep")
    (folder / "foreign" / "model").mkdir(parents=True)
    (folder / "foreign" / "model" / "config.json").write_text('{"model_type": "bert"}')
    return folder


@pytest.mark.parametrize("command", ["train", "detect", "reconstruct", "evaluate"])
@pytest.mark.parametrize("name", ["absent.npy", "pickle.npy", "pickle.pkl", "cut.npy", "nan.npy", "pictures", "full"])
def test_bad_images_are_refused(run, work, bad, tmp_path, command, name):
    call = [bad / name, "--out", tmp_path / "m"] if command == "train" else [work / "run", bad / name]
    more = ["--features", "pixels"] if command == "evaluate" else []
    assert_refused(run(command, *call, *more), name if name != "pictures" else "b.png")
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("command", ["detect", "reconstruct", "evaluate --features pixels"])
def test_images_of_another_shape_are_refused(run, work, bad, command):
    command, *more = command.split()
    assert_refused(run(command, work / "run", bad / "wide.npy", *more), "(1, 9, 9)", "(1, 8, 8)")


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ("train {i} --out {t}/m --config {b}/wrong.yaml", "joint.steps"),
        ("train {i} --out {t}/m --config {b}/absent.yaml", "mnist-cpu"),
        ("train {i} --out {t}/m --set joint.stepz=5", "joint.steps"),
        ("train {i} --out {t}/m --set joint.steps", "key=value"),
        ("train {i} --out {t}/m --set joint.held_out=500", "held_out"),
        ("train {i} --out {t}/m --set method=vae --set encoder=false", "encoder"),
        ("train {i} --out {t}/m --config mnist-cpu", "28 x 28"),
        ("train {i} --out {t}/m --key nothing", "nothing"),
        ("train {i} --out {t}/m --limit 0", "--limit"),
        ("train {i} --out {t}/m --device teapot", "teapot"),
        ("train {i} --out {i}", "cannot write"),
        ("train {i} --out {t}/{long}", "File name too long"),
        ("train {i} --out {t}/{long} --resume", "File name too long"),
        ("train {i} --out {t}/m --config {t}/{long}.yaml", "File name too long"),
        ("train {t}/{long} --out {t}/m", "File name too long"),
        ("train {i} --out {b}/foreign", "nothing was overwritten"),
        ("train {t}/absent.npz --out {b}/foreign", "nothing was overwritten"),
        ("train {t}/absent.npz --out {i}", "cannot write"),
        ("train {i}", "--out"),
        ("generate {m} -n 0 --out {t}/x.png", "-n"),
        ("generate {m} -n 4", "--out"),
        ("generate {m} -n 4 --out {t}/x.jpg", ".npy or .png"),
        ("generate {m} -n 4 --out {b}/full", "new folder"),
        ("generate {m} -n 4 --out {i}/x.png", "cannot write"),
        ("generate {m} -n 4 --out {t}/{long}.png", "File name too long"),
        ("generate {m} -n 4 --out {t}/{long}.npy", "File name too long"),
        ("generate {m} -n 4 --out {t}/{long}", "File name too long"),
        ("generate {m} -n 4 --out {t}/{nearly}", "File name too long"),
        ("generate {m} -n 4 --out {deep}", "File name too long"),
        ("generate {m} -n 4 --out {deep}.npy", "File name too long"),
        ("train {i} --out {deep}", "File name too long"),
        ("generate {m} -n 5000 --out {t}/x.png", "4,096"),
        ("generate {m} -n 4 --out {t}/x.png --sampler gibbs", "smc"),
        ("generate {b}/absent -n 4 --out {t}/x.png", "no such folder"),
        ("generate {b}/full -n 4 --out {t}/x.png", "config.json is absent"),
        ("generate {b}/foreign -n 4 --out {t}/x.png", "not written by latentprior"),
        ("reconstruct {m} {i} --method magic", "encoder"),
        ("reconstruct {m} {i} --out {t}/x.txt", ".npy or .png"),
        ("reconstruct {m} {i} --split val", "val"),
        ("detect {m} {i} --kind magic", "marginal"),
        ("detect {m} {i} --method magic", "mala"),
        ("detect {m} {i} --out {t}/x.png", ".npy"),
        ("detect {m} {i} --anomaly 1", "no labels"),
        ("detect {m} {i} --split test --labels-key class_of", "0 and 1"),
        ("detect {m} {i} --split test --labels-key x_train", "x_train"),
        ("detect {m} {i} --split test --labels-key nothing", "nothing"),
        ("detect {m} {i} --labels-key odd", "160"),
        ("detect {m} {i} --split test --anomaly 9 --method encoder", "alike"),
        ("evaluate {m} {i} --features magic", "pixels"),
        ("evaluate {m} {i} --features pixels --weights {i}", "weights"),
        ("evaluate {m} {i} --features lenet --weights {i}", "no LeNet-5 weights"),
        ("evaluate {m} {i} --features pixels -n 3", "-n"),
    ],
)
def test_wrong_calls_are_refused(run, work, bad, tmp_path, call, word):
    names = {"long": "n" * 300, "nearly": "n" * 250}
    # Of 4,095 bytes, the most that Linux takes, a few are left.
    names["deep"] = f"{tmp_path}/{'d/' * ((4080 - len(str(tmp_path))) // 2)}d"
    words = call.format(i=work / "i.npz", m=work / "run", b=bad, t=tmp_path, **names).split()
    assert_refused(run(*words), word)
    assert not (tmp_path / "x.png").exists()
    assert [path.name for path in (bad / "full").iterdir()] == ["mine.txt"]
    assert not (bad / "foreign" / "config.yaml").exists()


def test_a_damaged_model_is_refused(run, work, tmp_path):
    for path in (work / "run" / "model").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes()[:-1])
    assert_refused(run("generate", tmp_path, "-n", 2, "--out", tmp_path / "x.npy"), "damaged")


# Work that fails: exit code 1, one line, and nothing half written.


def test_a_full_disk_leaves_nothing(run, work, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(os, "replace", full)
    for name in ("x.npy", "x.png", "x"):
        assert_refused(run("generate", work / "run", "-n", 3, "--out", tmp_path / name), "No space left", code=1)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_while_training_exits_1(run, work, tmp_path, monkeypatch):
    def full(*_, **__):
        raise lp.CheckpointError("cannot save (No space left on device)")

    monkeypatch.setattr(resumable_run, "save_state", full)
    call = ("train", work / "i.npz", "--out", tmp_path, *settings(*NETWORK, *JOINT))
    assert_refused(run(*call), "No space left", code=1)


# Several processes.


def test_other_processes_of_a_launcher_keep_quiet(run, bad, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert run("train", bad / "absent.npy", "--out", tmp_path) == (2, "", "")


def test_methods_of_one_process_refuse_a_launcher(run, work, tmp_path, monkeypatch):
    several = types.SimpleNamespace(rank=0, count=2, device=torch.device("cpu"))
    monkeypatch.setattr(training_command, "launched_processes", lambda device: several)
    chosen = settings(*NETWORK, *TWO_PHASE)
    assert_refused(run("train", work / "i.npz", "--out", tmp_path / "m", *chosen), "one process", "joint")


@pytest.mark.slow
def test_two_processes_learn_one_model(work, tmp_path):
    pytest.importorskip("accelerate")
    chosen = settings(*NETWORK, *JOINT)
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call += [
        "-m",
        "latentprior",
        "train",
        work / "i.npz",
        "--out",
        tmp_path / "m",
        *chosen,
        "--json",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        list(map(str, call)), capture_output=True, text=True, env=environment, timeout=HANG_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert strict(done.stdout)["images"] == 160
    assert load_model(tmp_path / "m").generate(2, generator=torch.Generator()).shape == (2, 1, 8, 8)
