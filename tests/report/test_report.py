import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from markupsafe import escape

import latentprior as lp
from latentprior import report
from latentprior.cli.main import main
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.whitening import identity_whitening
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.report.figures import number

VOID = {"meta", "img", "input", "br"}
EVIL = "<script>alert(1)</script>\"'&"


class Page(HTMLParser):
    """Elements, text and balance of a page."""

    def __init__(self, path):
        super().__init__()
        self.open, self.elements, self.parts = [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        self.close()
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.parts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.parts).split())

    def named(self, name):
        return [attributes for element, attributes in self.elements if element == name]

    def images(self, kind):
        return [image for image in self.named("img") if image["class"].split()[0] == kind]

    @property
    def own(self):
        """The document without the pictures in it."""
        return re.sub(r'"data:[^"]*"', "", self.source)


def images(n, seed=0):
    """Squares of random place, (n, 8, 8) bytes."""
    draws = np.random.default_rng(seed)
    x = np.zeros((n, 8, 8), np.uint8)
    for image, (row, column) in zip(x, draws.integers(0, 5, (n, 2)), strict=True):
        image[row : row + 3, column : column + 3] = draws.integers(100, 255)
    return x


@pytest.fixture(scope="module")
def model(learned):
    weights = torch.Generator().manual_seed(0)
    spec = network_spec("mlp", latent_dim=2, width=16, image_shape=(1, 8, 8))
    return lp.LatentVariableModel(build_decoder(spec, weights), learned, encoder=build_encoder(spec, weights))


@pytest.fixture(scope="module")
def work(tmp_path_factory, learned, model, crescent):
    """A folder with a prior, a model, latents and images with parts, and a report of the model."""
    folder = tmp_path_factory.mktemp("work")
    learned.save_pretrained(folder / "prior")
    model.save_pretrained(folder / "model-folder")
    np.save(folder / "z.npy", crescent[:400].numpy())
    np.save(folder / "more.npy", crescent[400:].numpy())
    np.savez(folder / "i.npz", x_train=images(120), x_test=images(60, 1))
    lp.write_report(folder / "model-folder", folder / "model.html", images=folder / "i.npz")
    return folder


def test_page_of_a_model_has_every_part(work):
    page = Page(work / "model.html")
    assert "Run the command again" not in page.text
    for words in ("Samples by stage", "Gain.", "Log normaliser.", "nearest training image", "two-sample AUC",
                  "i.npz (test): 60 used", "Most anomalous", "latentprior 0", "−log p(x, z)"):  # fmt: skip
        assert words in page.text, words
    # Base, two stages, the closest pairs and twelve odd images.
    assert len(page.images("picture")) == 3 + 1 + 12
    assert len({image["src"] for image in page.images("picture")[:3]}) > 1
    # Three of the stages, one plane of both sets, two comparisons, distances.
    assert len(page.images("chart")) == 3 + 2 + 2 + 1


def test_page_loads_nothing_and_runs_only_its_own_script(work):
    page = Page(work / "model.html")
    policy = page.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert "unsafe" not in policy
    for name, attributes in page.elements:
        assert "style" not in attributes
        assert not any(key.startswith("on") or key == "href" for key in attributes), name
        assert attributes.get("src", "data:").startswith("data:")
    assert not re.search(r"https?://|@import|url\(", page.own)
    assert len(page.named("script")) == 1


def test_page_is_accessible(work):
    page = Page(work / "model.html")
    assert page.named("html") == [{"lang": "en"}]
    assert all(len(image["alt"]) > 5 for image in page.named("img"))
    (slider,) = page.named("input")
    assert {"for": slider["id"]} in page.named("label")
    assert slider["max"] == "2"
    levels = [int(name[1]) for name, _ in page.elements if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1
    assert set(levels[1:]) == {2}


def test_equal_calls_write_equal_bytes(work, tmp_path):
    for seed, same in ((0, True), (1, False)):
        done = lp.write_report(work / "model-folder", tmp_path / "m.html", images=work / "i.npz", seed=seed)
        assert (done.path.read_bytes() == (work / "model.html").read_bytes()) is same
    assert (done.bytes, done.stages) == (done.path.stat().st_size, 2)
    assert list(tmp_path.iterdir()) == [done.path]


def test_figures_are_those_of_the_prior(work, learned, tmp_path):
    lp.write_report(learned, tmp_path / "p.html")
    text = Page(tmp_path / "p.html").text
    base, ladder = (
        learned.info[k] + float(learned.whitening.log_abs_det) for k in ("log_prob_base", "log_prob_held_out")
    )
    assert f"went from {number(base, 2)} to {number(ladder, 2)} nats" in text
    for stage in learned.stages:
        assert f"{stage.gain:.3f} ± {stage.gain_stderr:.3f}" in text
    # Without data the page says which option brings it: planes, comparison, copying, oddities.
    assert text.count("--latents FILE") == 4


def test_rows_that_are_not_named_held_out_are_said_to_flatter(work, learned, tmp_path):
    lp.write_report(learned, tmp_path / "p.html", work / "z.npy")
    lp.write_report(learned, tmp_path / "q.html", work / "z.npy", held_out=work / "more.npy")
    first, second = Page(tmp_path / "p.html").text, Page(tmp_path / "q.html").text
    assert "then flattering" in first
    assert "then flattering" not in second
    assert "more.npy: 200 used" in second
    value = float(learned.log_prob(torch.from_numpy(np.load(work / "more.npy"))).mean())
    assert f"log density of held-out rows, nats {number(value, 2)}" in second


def test_a_prior_that_copies_is_found_out(model, tmp_path):
    """A prior of narrow peaks on training latents gives samples next to training images."""
    z = 2 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    train, test = z[:40], z[40:]
    peaks = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(40)),
        torch.distributions.Independent(torch.distributions.Normal(train, 1e-3), 1),
    )
    honest = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(2), 2 * torch.ones(2)), 1)
    for prior, words in ((peaks, "more than chance"), (honest, "No sign of copying")):
        copier = lp.LatentVariableModel(model.decoder, prior).prior
        with torch.random.fork_rng():
            lp.write_report(copier, tmp_path / "p.html", train, held_out=test)
        assert words in Page(tmp_path / "p.html").text


@pytest.mark.parametrize("module", ["jinja2", "matplotlib", "PIL"])
def test_without_the_extra(learned, tmp_path, module, monkeypatch):
    real = report.find_spec
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == module else real(name))
    with pytest.raises(lp.MissingExtraError, match=r"latentprior\[report\]"):
        lp.write_report(learned, tmp_path / "p.html")
    assert not list(tmp_path.iterdir())


def test_hostile_names_and_settings_are_only_text(work, learned, tmp_path):
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    prior = learned.with_ladder(
        learned.ladder, learned.normalizer, {**learned.info, EVIL: {EVIL: EVIL}, "stopped": EVIL}
    )
    prior.save_pretrained(folder)
    lp.write_report(folder, tmp_path / "p.html", work / "z.npy")
    page = Page(tmp_path / "p.html")
    assert all(image["src"].startswith("data:image/") for image in page.named("img"))
    assert len(page.named("script")) == 1
    assert page.source.count(escape(EVIL)) >= 3
    assert EVIL in page.text


@pytest.mark.parametrize("shape", [(1,), (3,), (2, 4, 4)])
def test_bases_alone_and_latents_of_any_shape(shape, tmp_path, generator):
    z = torch.randn(60, *shape, generator=generator)
    lp.write_report(lp.fit(z, base="normal", max_stages=0), tmp_path / "p.html", z)
    page = Page(tmp_path / "p.html")
    assert "No stage was learned" in page.text
    assert not page.named("input")
    assert "nan" not in page.own


def test_latents_with_their_images_show_them(work, learned, crescent, tmp_path):
    lp.write_report(learned, tmp_path / "p.html", crescent[:120], images(120))
    assert len(Page(tmp_path / "p.html").images("picture")) == 12
    with pytest.raises(lp.InvalidImagesError, match="120 images for 100 latents"):
        lp.write_report(learned, tmp_path / "q.html", crescent[:100], images(120))
    assert not (tmp_path / "q.html").exists()


def test_tilted_priors_and_models_without_an_encoder(model, learned, tmp_path):
    tilted = learned.tilt(lambda z: -z.square().sum(1), particles=512)
    bare = lp.LatentVariableModel(model.decoder, tilted)
    lp.write_report(bare, tmp_path / "p.html", images=images(24))
    page = Page(tmp_path / "p.html")
    assert "nan" not in page.text
    assert "encoder none" in page.text


def test_wide_brackets_and_saturated_stages_are_cautioned(learned, tmp_path):
    lp.write_report(learned, tmp_path / "p.html")
    assert not [a for a in Page(tmp_path / "p.html").named("ul") if a["class"] == "warnings"]
    ends = learned.bracket._replace(reverse=learned.bracket.forward._replace(value=9.0))
    stages = [*learned.stages[:-1], lp.Stage(learned.stages[-1].network, 0.0, 0.1, 1.3, 0.01)]
    info = {**learned.info, "stopped": "max_stages"}
    doubtful = learned.with_ladder(Ladder(learned.base, stages), learned.normalizer._replace(bracket=ends), info)
    lp.write_report(doubtful, tmp_path / "p.html")
    text = Page(tmp_path / "p.html").text
    assert "log Z differs by" in text
    assert "almost perfectly" in text


def test_a_density_that_is_nowhere_finite_on_the_data_is_drawn(tmp_path, generator):
    prior = lp.LatentPrior(Ladder(NormalBase(2).float()), identity_whitening(2), (2,))
    z = torch.randn(40, 2, generator=generator) * 1e25
    lp.write_report(prior, tmp_path / "p.html", z, held_out=z)
    assert not re.search(r"[\" ]nan\b|NaN", Page(tmp_path / "p.html").own)


# The command.


@pytest.fixture
def run(capsys):
    def call(*args):
        capsys.readouterr()
        code = main(["report", *(str(arg) for arg in args)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_command_writes_into_the_folder(run, work):
    code, out, err = run(work / "prior", "--latents", work / "z.npy", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    path = work / "prior" / "report.html"
    assert found.keys() == {"path", "bytes", "stages", "seconds"}
    assert (found["path"], found["bytes"], found["stages"]) == (str(path), path.stat().st_size, 2)
    assert found["seconds"] > 0
    # A folder with a report in it is still the folder of a prior.
    assert run(work / "prior", "--out", work / "again.html")[1].startswith(f"{work / 'again.html'}: ")


def test_what_a_demo_left_is_found(run, work, learned, tmp_path):
    learned.save_pretrained(tmp_path / "prior")
    (tmp_path / "results.json").write_text("{}")
    np.save(tmp_path / "latents.npy", np.load(work / "z.npy"))
    np.save(tmp_path / "test_latents.npy", np.load(work / "more.npy"))
    np.savez(tmp_path / "images.npz", x_train=images(400))
    for folder in (tmp_path, tmp_path / "prior"):
        assert run(folder, "--out", tmp_path / "p.html")[0] == 0
        text = Page(tmp_path / "p.html").text
        assert "/latents.npy: 400 used" in text
        assert "test_latents.npy: 200 used" in text
        assert len(Page(tmp_path / "p.html").images("picture")) == 12


def test_wrong_calls_are_refused_in_one_line(run, work, tmp_path):
    np.save(tmp_path / "three.npy", np.zeros((9, 3), np.float32))
    np.savez(tmp_path / "big.npz", x_train=np.zeros((9, 16, 16), np.uint8))
    (tmp_path / "empty").mkdir()
    out = ("--out", tmp_path / "p.html")
    calls = [
        ((tmp_path / "none", *out), "no such folder"),
        ((tmp_path / "empty", *out), "holds no prior and no model"),
        ((work / "prior", "--out", tmp_path / "p.txt"), ".html"),
        ((work / "prior", "--latents", tmp_path / "three.npy", *out), "shape (3,)"),
        ((work / "prior", "--images", work / "i.npz", *out), "without a decoder"),
        ((work / "prior", "--held-out", work / "z.npy", *out), "--latents or --images"),
        ((work / "model-folder", "--images", tmp_path / "big.npz", *out), "(1, 16, 16)"),
        ((work / "prior", "--latents", tmp_path / "none.npy", *out), "no such file"),
    ]
    for call, words in calls:
        code, printed, err = run(*call)
        assert (code, printed, err.count("\n")) == (2, "", 1), err
        assert err.startswith("error: ")
        assert words in err
    assert not (tmp_path / "p.html").exists()


def test_damaged_and_unfinished_folders_are_refused(run, work, learned, tmp_path):
    learned.save_pretrained(tmp_path / "damaged")
    config = tmp_path / "damaged" / "config.json"
    config.write_text(config.read_text().replace("0.", "1.", 1))
    (tmp_path / "begun" / "checkpoint").mkdir(parents=True)
    (tmp_path / "begun" / "checkpoint" / "config.json").write_text('{"kind": "fit"}')
    for folder, words in (("damaged", "damaged"), ("begun", "--resume")):
        code, _, err = run(tmp_path / folder, "--out", tmp_path / "p.html")
        assert (code, err.count("\n")) == (2, 1)
        assert words in err
