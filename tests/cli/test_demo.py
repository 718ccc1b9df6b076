import contextlib
import dataclasses
import io
import json
import re

import numpy as np
import pytest
import torch

import latentprior as lp
from latentprior.cli import demo

FILES = ("samples.png", "report.html", "model/config.json", "prior/config.json")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run with a hurried autoencoder and one short stage."""
    out = tmp_path_factory.mktemp("a folder") / "demo"
    state, printed = torch.random.get_rng_state(), io.StringIO()
    with pytest.MonkeyPatch.context() as patched, contextlib.redirect_stdout(printed):
        patched.setattr(demo, "AUTOENCODER", dataclasses.replace(demo.AUTOENCODER, steps=150))
        patched.setattr(demo, "STAGE", lp.StageSettings(width=32, depth=1, steps=100, batch_size=128))
        patched.setattr(demo, "CHECK_DRAWS", 20_000)
        patched.setattr(demo, "FIT_SECONDS", None)
        found = demo.run_demo(out, 0, progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    return out, found, printed.getvalue()


def test_writes_what_it_returns(short):
    out, found, _ = short
    assert json.loads((out / "results.json").read_text()) == found
    assert list(found["rows"]) == ["N(0, I)", "fitted Gaussian", "GMM", "ladder", "reconstructions", "training data"]
    for name in FILES:
        assert (out / name).stat().st_size > 500


def test_the_saved_prior_scores_the_saved_latents_as_reported(short):
    out, found, _ = short
    prior = lp.LatentPrior.from_pretrained(out / "prior")
    z = torch.from_numpy(np.load(out / "test_latents.npy"))
    assert z.shape == (400, demo.LATENT_DIM)
    assert np.load(out / "latents.npy").shape == (1147, demo.LATENT_DIM)
    # Written in double precision, scored in single: 1e-3 nats of rounding at most.
    assert float(prior.log_prob(z).mean()) == pytest.approx(found["rows"]["ladder"]["log_prob"], abs=1e-3)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1).mean()
    assert float(normal) == pytest.approx(found["rows"]["N(0, I)"]["log_prob"], abs=1e-3)


def test_figures_follow_from_the_files(short):
    """What the demo says of latents, decoder and ladder, computed anew from what it wrote."""
    out, found, _ = short
    prior = lp.LatentPrior.from_pretrained(out / "prior")
    z = torch.from_numpy(np.load(out / "test_latents.npy"))
    assert (len(prior.stages), prior.info["stopped"]) == (found["stages"], found["stopped"])
    assert prior.log_prob_stderr == pytest.approx(found["normalizer_check"]["log_normalizer_stderr"])
    base = prior.with_ladder(prior.ladder.first(0))
    values = {"ladder": prior.log_prob(z).double(), "GMM": base.log_prob(z).double()}
    for name, value in values.items():
        row = found["rows"][name]
        assert float(value.mean()) == pytest.approx(row["log_prob"], abs=1e-3)
        assert float(value.std()) / 20 == pytest.approx(row["log_prob_stderr"], rel=1e-3)
    # Paired: row by row on the same 400 latents.
    above = values["ladder"] - values["GMM"]
    assert float(above.mean()) == pytest.approx(found["ladder_above_gmm"]["log_prob"], abs=1e-3)
    assert float(above.std()) / 20 == pytest.approx(found["ladder_above_gmm"]["stderr"], rel=1e-3, abs=1e-5)
    with np.load(out / "images.npz") as images:
        assert {name: len(images[name]) for name in images.files} == {
            "x_train": 1147, "y_train": 1147, "x_test": 400, "y_test": 400,
        }  # fmt: skip
        x = torch.from_numpy(images["x_test"])[:, None] / 127.5 - 1
    model = lp.LatentVariableModel.from_pretrained(out / "model")
    error = float((model.decode(z) - x).square().mean())
    assert error == pytest.approx(found["vae"]["test_mean_squared_error"], rel=1e-5)
    assert error < float((x - x.mean(0)).square().mean())
    assert torch.equal(model.prior.log_prob(z), prior.log_prob(z))


def cell(row, name, digits):
    return "-" if row[name] is None else f"{row[name]:.{digits}f} ± {row[f'{name}_stderr']:.{digits}f}"


def test_prints_what_it_writes(short):
    """Every number of the table and below it stands in ``results.json``."""
    out, _, printed = short
    found = json.loads((out / "results.json").read_text())
    lines = printed.splitlines()
    assert lines[0].startswith("1,797 scans of digits")
    assert lines[0].endswith("1,147 to train, 250 to validate, 400 to test")
    assert found["data"] == {"name": "scikit-learn digits", "train": 1147, "validation": 250, "test": 400}
    for name, row in found["rows"].items():
        (line,) = (line for line in lines if line.startswith(f"{name:18}"))
        cells = [cell(row, "log_prob", 2), cell(row, "auc", 3), f"{row['frechet_distance']:.2f}"]
        assert re.split(r" {2,}", line.removeprefix(name).strip()) == cells
    above, check, seconds = found["ladder_above_gmm"], found["normalizer_check"], found["seconds"]
    assert f"ladder above GMM: {above['log_prob']:+.2f} ± {above['stderr']:.2f} nats" in printed
    assert f"independent mixture: {check['value']:.4f} ± {check['stderr']:.4f} " in printed
    assert f"log Z is known to ± {check['log_normalizer_stderr']:.4f})" in printed
    total, fitting = round(seconds["total"]), round(seconds["fit"])
    # The one stage may have been left out.
    count = {0: "0 stages", 1: "1 stage"}[found["stages"]]
    assert f"{count}; {total} s, of which {fitting} s for the prior" in printed
    assert seconds["vae"] + seconds["fit"] <= seconds["total"]


def test_prints_commands_that_can_be_pasted(short):
    out, _, printed = short
    for command in ("sample", "score", "generate", "fit", "train"):
        assert f" {command} " in printed
    assert f"'{out / 'prior'}'" in printed  # the folder has a space


def test_the_split_is_disjoint_and_stratified():
    parts = demo._digits()
    assert [len(part) for part in parts] == [1147, 250, 400]
    shares = torch.stack([torch.bincount(part.labels, minlength=10) / len(part.labels) for part in parts])
    assert (shares - shares[0]).abs().max() < 0.01
    rows = [{tuple(row.flatten().tolist()) for row in part.batch(range(len(part)))} for part in parts]
    assert not rows[0] & rows[2]


@pytest.mark.parametrize(("module", "extra"), list(demo.EXTRAS.items()))
def test_names_the_extra_before_it_works(module, extra, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "find_spec", lambda name: None if name == module else object())
    with pytest.raises(lp.MissingExtraError, match=rf"latentprior\[{extra}\]"):
        demo.run_demo(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_ladder_beats_the_nominal_prior_and_does_not_fall_behind_its_base(tmp_path):
    found = demo.run_demo(tmp_path / "out", progress=False)
    rows, above, check = found["rows"], found["ladder_above_gmm"], found["normalizer_check"]
    assert rows["ladder"]["log_prob"] > rows["N(0, I)"]["log_prob"] + 3
    assert rows["ladder"]["frechet_distance"] < rows["N(0, I)"]["frechet_distance"] / 2
    assert rows["ladder"]["auc"] < rows["GMM"]["auc"]
    # 2.3 nats were measured; a machine so slow that the time budget ends the stage reaches less.
    assert above["log_prob"] > 1
    # Four joint standard errors: a false alarm once in 16,000.
    assert abs(check["value"] - 1) < 4 * np.hypot(check["stderr"], check["log_normalizer_stderr"])
