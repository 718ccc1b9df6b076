"""What the answers mean: samples, walks, p-values and tilts against what is known."""

import io
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

import latentprior as lp
from latentprior.data.pictures import picture
from latentprior.explorer.calibration import joint_score
from latentprior.explorer.explorer import open_explorer
from latentprior.explorer.properties import Brightness, Classes, Towards, fit_brightness, fit_classes, tilted_draws
from latentprior.explorer.requests import Fields, Refused
from latentprior.explorer.uploads import read_picture
from latentprior.recipes.model_folders import load_model


def test_samples_repeat_and_stages_are_coupled(model_explorer):
    last = model_explorer.stages[-1]
    ask = {"seed": 3, "n": 16}
    full, base = (model_explorer.sample(Fields({**ask, "stage": k})) for k in (last, 0))
    assert full == model_explorer.sample(Fields({**ask, "stage": last}))
    kept = [a["z"] == b["z"] for a, b in zip(full["items"], base["items"], strict=True)]
    assert full["coupled"]
    assert 0 < sum(kept) < 16
    z = torch.tensor([item["z"] for item in full["items"]])
    torch.testing.assert_close(
        model_explorer.prior.log_prob(z), torch.tensor([item["log_prob"] for item in full["items"]])
    )
    assert all(item["image"].startswith("data:image/png;base64,") for item in full["items"])


def test_few_sets_of_samples_are_kept(prior_explorer):
    for seed in range(12):
        prior_explorer.sample(Fields({"seed": seed, "n": 2}))
    assert prior_explorer._draws.cache_info().currsize == 8


def test_walk_joins_its_ends_and_avoids_the_void(prior_explorer):
    a, b = (item["z"] for item in prior_explorer.sample(Fields({"n": 2}))["items"])
    items = prior_explorer.walk(Fields({"start": a, "end": b, "n": 9}))["items"]
    assert len(items) == 9
    np.testing.assert_allclose([items[0]["z"], items[-1]["z"]], [a, b], rtol=1e-5, atol=1e-6)
    straight = torch.lerp(torch.tensor(a), torch.tensor(b), torch.linspace(0, 1, 9)[:, None])
    lowest = float(prior_explorer.prior.log_prob(straight).min())
    assert min(item["log_prob"] for item in items) >= lowest - 1e-3


def test_interpolate_still_decodes_that_path(saved):
    model = load_model(saved / "model")
    z = model.prior.sample((2,), generator=torch.Generator().manual_seed(0))
    assert model.interpolate(z[0], z[1], 5).shape == (5, 1, 8, 8)
    with pytest.raises(lp.LatentPriorError, match="2 points or more"):
        model.interpolate(z[0], z[1], 1)


def test_p_values_are_conformal(model_explorer):
    """Of m exchangeable scores the p-value of a new one is at most alpha with probability alpha or less."""
    scores = model_explorer.calibration.scores
    m = len(scores)
    assert model_explorer.calibration.p_value(math.inf) == 1 / (m + 1)
    assert model_explorer.calibration.p_value(-math.inf) == 1
    # The k-th largest of the scores themselves has k rows as odd as it.
    assert model_explorer.calibration.p_value(float(scores[-10])) == pytest.approx(11 / (m + 1))


def test_noise_is_odder_than_images_are(model_explorer, saved):
    assert model_explorer.calibration.data
    assert model_explorer.calibration.text == "400 images of images.npz"
    noise = torch.rand(1, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert model_explorer.score_image(noise)["p_value"] == pytest.approx(1 / 401)
    image = torch.from_numpy(np.load(saved / "images.npz")["images"][5]).float()[None, None] / 127.5 - 1
    found = model_explorer.score_image(image)
    assert found["p_value"] > 0.01
    _, score = joint_score(model_explorer.model, image)
    assert found["score"] == pytest.approx(float(score))
    assert found["squared_error"] < 0.3


def test_without_calibration_the_model_stands_in(saved):
    explorer = open_explorer(saved / "model")
    assert not explorer.calibration.data
    assert "samples of the model" in explorer.info["calibration"]["text"]
    assert explorer.classes is None


def test_a_prior_scores_latents(prior_explorer):
    z = prior_explorer.calibration.z[0]
    found = prior_explorer.score(Fields({"z": z.tolist()}))
    assert found["log_prob"] == pytest.approx(float(prior_explorer.prior.log_prob(z)), rel=1e-5)
    assert found["score"] == -found["log_prob"]
    far = prior_explorer.score(Fields({"z": [1e6] * 6}))
    assert far["p_value"] == pytest.approx(1 / 401)


@pytest.mark.parametrize(("name", "strength"), [("brightness", 3.0), ("brightness", -3.0), ("class", 3.0)])
def test_tilts_move_their_property(model_explorer, name, strength):
    fields = {"property": name, "strength": strength, "n": 8, **({"class": 1} if name == "class" else {})}
    found = model_explorer.tilt(Fields(fields))
    assert (found["after"] - found["before"]) * strength > 0.05
    assert found["r_squared" if name == "brightness" else "accuracy"] > 0.5
    assert len(found["items"]) == 8


def test_tilt_towards_a_latent_comes_closer(prior_explorer):
    (item,) = prior_explorer.sample(Fields({"n": 1, "seed": 9}))["items"]
    found = prior_explorer.tilt(Fields({"property": "towards", "strength": 5.0, "z": item["z"], "n": 64}))
    assert found["after"] < 0.7 * found["before"]
    untilted = prior_explorer.tilt(Fields({"property": "towards", "strength": 0, "z": item["z"], "n": 4}))
    assert untilted["log_normalizer"] == pytest.approx(0, abs=1e-6)


def test_tilted_normal_is_the_posterior_known_exactly(gaussian):
    """N(0, I) times exp(-s/2 |u - a|^2) is N(s a / (1 + s), I / (1 + s)), with log Z below."""
    draws = torch.Generator().manual_seed(0)
    start, a, s = gaussian.sample((4096,), generator=draws), torch.tensor([[1.5, -0.5]]), 2.0
    found = tilted_draws(gaussian, start, Towards(a, s), 4096, draws)
    # Resampled draws repeat: a quarter of the rows as independent ones gives the error, 4.5 of them a false alarm
    # of 2e-5 in two dimensions.
    error = 4.5 * math.sqrt(1 / (1 + s) / 1024)
    assert (found.u.mean(0) - s * a[0] / (1 + s)).abs().max() < error
    exact = -math.log(1 + s) - 0.5 * s / (1 + s) * float(a.square().sum())
    assert abs(found.log_normalizer.value - exact) < 5 * found.log_normalizer.stderr


def test_regressions_find_quadratic_brightness_and_classes():
    u = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0))
    brightness = 0.2 * u[:, 0] - 0.3 * u[:, 1] * u[:, 2] + 0.05
    found = fit_brightness(u, brightness)
    assert found.r_squared > 0.99
    # Bounded, and straight where it is small.
    g = found.at(2.0)
    assert isinstance(g, Brightness)
    assert g(100 * u).abs().max() <= 6.0
    labels = (u[:, 0] * u[:, 1] > 0).long() + 4
    classes = fit_classes(u, labels)
    assert isinstance(classes, Classes)
    assert classes.names == [4, 5]
    # Chance is 0.5; 200 rows have a standard error of 0.035.
    assert classes.accuracy > 0.85
    sure = classes.at(5, 1.0).log_probability(torch.tensor([[2.0, 2.0, 0.0], [2.0, -2.0, 0.0]])).exp()
    assert sure[0] > 0.9
    assert sure[1] < 0.1
    assert fit_classes(u, torch.zeros(1000, dtype=torch.long)) is None


def test_three_classes_keep_their_order():
    u = torch.randn(600, 2, generator=torch.Generator().manual_seed(0))
    labels = torch.bucketize(u[:, 0].contiguous(), torch.tensor([-0.5, 0.5])) * 10
    classes = fit_classes(u, labels)
    where = torch.tensor([[-2.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    for row, name in enumerate([0, 10, 20]):
        assert classes.at(name, 1.0).log_probability(where).argmax() == row


def png(shape, colour=0):
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB" if colour else "L", shape, 200 if not colour else (255, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_pictures_of_any_size_and_colour_fit():
    pytest.importorskip("PIL")
    x = read_picture(png((31, 7)), "image/png", (1, 8, 8))
    torch.testing.assert_close(x, torch.full((1, 1, 8, 8), 200 / 127.5 - 1))
    red = read_picture(png((3, 50), colour=1), "image/png", (3, 8, 16))
    assert red.shape == (1, 3, 8, 16)
    assert red[0, :, 0, 0].tolist() == [1, -1, -1]
    grey = read_picture(png((8, 8), colour=1), "image/png", (1, 8, 8))
    torch.testing.assert_close(grey, torch.full((1, 1, 8, 8), 0.299 * 2 - 1))


def at_once(body, shape):
    """What ``read_picture`` gives, from all pixels as floats together."""
    pixels = torch.from_numpy(picture(body, "x").copy())
    x = pixels[None, None].float() if pixels.ndim == 2 else pixels.permute(2, 0, 1)[None].float()
    h, w = x.shape[-2:]
    tall, wide = min(h, max(1, w * shape[1] // shape[2])), min(w, max(1, h * shape[2] // shape[1]))
    top, left = (h - tall) // 2, (w - wide) // 2
    x = x[..., top : top + tall, left : left + wide]
    if (tall, wide) != tuple(shape[1:]):
        x = interpolate(x, tuple(shape[1:]), mode="bilinear", antialias=True)
    if shape[0] == 1 and x.shape[1] == 3:
        x = (x * x.new_tensor((0.299, 0.587, 0.114))[:, None, None]).sum(1, keepdim=True)
    return (x.expand(1, shape[0], -1, -1) / 127.5 - 1).clamp(-1, 1)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "turned"])
def test_pictures_read_in_strips_are_those_read_at_once(monkeypatch, mode):
    """To the byte; what fits into one strip has the same strides, too, which a network's arithmetic may follow."""
    image = pytest.importorskip("PIL.Image")
    draws = np.random.default_rng(0)
    for width, height in ((211, 90), (37, 230), (64, 64), (8, 8), (5, 3), (1, 50), (300, 1)):
        noise = image.fromarray(draws.integers(0, 256, (height, width, 4), dtype=np.uint8))
        kind, options = "PNG", {}
        if mode == "I;16":
            noise = image.fromarray(draws.integers(0, 1 << 16, (height, width), dtype=np.uint16))
        elif mode == "turned":
            exif = image.Exif()
            exif[0x112] = 6
            noise, kind, options = noise.convert("RGB"), "JPEG", {"exif": exif}
        elif mode != "RGBA":
            noise, kind = noise.convert("RGB").convert(mode), "JPEG" if mode == "CMYK" else "PNG"
        buffer = io.BytesIO()
        noise.save(buffer, kind, **options)
        for shape in ((1, 8, 8), (3, 16, 12), (3, 64, 64), (1, 3, 5)):
            wanted = at_once(buffer.getvalue(), shape)
            for strip in (700, 1 << 20):
                monkeypatch.setattr("latentprior.explorer.uploads.STRIP_PIXELS", strip)
                got = read_picture(buffer.getvalue(), f"image/{kind.lower()}", shape)
                assert torch.equal(got, wanted)
            if min(width, height) > 1:
                assert got.stride() == wanted.stride()


PEAK = """
import re, sys, warnings
from pathlib import Path
import torch
from latentprior.explorer.uploads import read_picture
from PIL import Image

Image.init()

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

torch.set_num_threads(1)
warnings.simplefilter("error")
for name in sys.argv[1:]:
    body, before = Path(name).read_bytes(), peak()
    read_picture(body, "image/" + name.rpartition(".")[2], (3, 64, 64))
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads what Linux says of memory")
@pytest.mark.parametrize(("kind", "mode", "most"), [("png", "RGBA", 160), ("jpeg", "RGB", 160)])
def test_memory_for_the_largest_picture(tmp_path, kind, mode, most):
    """Four bytes a pixel are 64 MiB; floats of all pixels would be 192, and a few times over."""
    image = pytest.importorskip("PIL.Image")
    path = tmp_path / f"x.{kind}"
    image.new(mode, (1 << 12, 1 << 12), "red").save(path, **({"compress_level": 1} if kind == "png" else {}))
    done = subprocess.run([sys.executable, "-c", PEAK, path], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < most


def test_wrong_folders_and_data_are_refused(saved, tmp_path):
    with pytest.raises(lp.CheckpointError, match="no such folder"):
        open_explorer(tmp_path / "absent")
    np.save(tmp_path / "wide.npy", np.zeros((5, 4), np.float32))
    with pytest.raises(lp.InvalidLatentsError, match="rows have shape"):
        open_explorer(saved / "prior", tmp_path / "wide.npy")
    np.save(tmp_path / "big.npy", np.zeros((5, 9, 9), np.uint8))
    with pytest.raises(lp.InvalidImagesError, match="images have shape"):
        open_explorer(saved / "model", tmp_path / "big.npy")
    with pytest.raises(lp.LatentPriorError, match="is a folder"):
        open_explorer(saved / "prior", tmp_path)


def test_a_prior_takes_no_pictures_and_a_model_no_latents(model_explorer, prior_explorer):
    with pytest.raises(Refused, match="pictures"):
        model_explorer.score(Fields({"z": [0] * 6}))
    with pytest.raises(Refused, match="latents"):
        prior_explorer.score_image(torch.zeros(1, 1, 8, 8))
