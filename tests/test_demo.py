import contextlib
import io
import json

import numpy as np
import pytest
import torch

import latentprior as lp
from latentprior import demo

FILES = ("samples.png", "normal.png", "ladder.png", "reconstructions.png", "data.png", "vae.safetensors")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A run with a hurried autoencoder and one short stage."""
    out = tmp_path_factory.mktemp("a folder") / "demo"
    scale = demo._Scale(
        vae_epochs=15,
        classifier_epochs=3,
        max_stages=1,
        stage=lp.StageSettings(width=32, depth=1, steps=100, batch_size=128),
        check_draws=20_000,
    )
    state = torch.random.get_rng_state()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        found = demo._run(out, 0, False, scale)
    assert torch.equal(torch.random.get_rng_state(), state)
    return out, found, printed.getvalue()


def test_writes_what_it_returns(short):
    out, found, _ = short
    assert json.loads((out / "results.json").read_text()) == found
    assert list(found["rows"]) == [
        "N(0, I)",
        "fitted Gaussian",
        "GMM",
        "ladder",
        "reconstructions",
        "training data",
    ]
    for name in FILES:
        assert (out / name).stat().st_size > 500


def test_the_saved_prior_scores_the_saved_latents_as_reported(short):
    out, found, _ = short
    prior = lp.LatentPrior.from_pretrained(out / "prior")
    z = torch.from_numpy(np.load(out / "test_latents.npy"))
    assert z.shape == (400, demo.DIM)
    assert np.load(out / "latents.npy").shape == (1147, demo.DIM)
    # Written in double precision, scored in single: 1e-3 nats of rounding at most.
    assert float(prior.log_prob(z).mean()) == pytest.approx(found["rows"]["ladder"]["log_prob"], abs=1e-3)
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(1).mean()
    assert float(normal) == pytest.approx(found["rows"]["N(0, I)"]["log_prob"], abs=1e-3)


def test_prints_a_table_and_commands_that_can_be_pasted(short):
    out, found, printed = short
    for name, row in found["rows"].items():
        line = next(line for line in printed.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(f" {row['frechet_distance']:.2f}")
    for command in ("sample", "score", "fit"):
        assert f" {command} " in printed
    assert f"'{out / 'prior'}'" in printed  # the folder has a space


def test_the_split_is_disjoint_and_stratified():
    parts = demo._digits()
    assert [len(part.images) for part in parts] == [1147, 250, 400]
    shares = torch.stack([torch.bincount(part.labels, minlength=10) / len(part.labels) for part in parts])
    assert (shares - shares[0]).abs().max() < 0.01
    rows = [{tuple(row.tolist()) for row in part.images} for part in parts]
    assert not rows[0] & rows[2]


@pytest.mark.parametrize(("module", "extra"), [("matplotlib", "report"), ("torchmetrics", "metrics")])
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
    assert rows["ladder"]["frechet_distance"] < rows["N(0, I)"]["frechet_distance"] / 5
    # Two standard errors: the seed is fixed, and the ladder rises by many of them.
    assert above["log_prob"] > -2 * above["stderr"]
    # Four joint standard errors: a false alarm once in 16,000.
    assert abs(check["value"] - 1) < 4 * np.hypot(check["stderr"], check["log_normalizer_stderr"])
