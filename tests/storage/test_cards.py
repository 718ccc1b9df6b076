"""Model cards: what they say, that it is escaped, and that the code in them runs."""

import builtins
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.distributions import MultivariateNormal

import latentprior as lp
from latentprior.models.networks import build_decoder, network_spec
from latentprior.storage.card_pictures import samples_png

PNG = b"\x89PNG\r\n\x1a\n"


def front(card: str) -> dict[str, Any]:
    opened, matter, _ = card.split("---\n", 2)
    assert not opened
    return yaml.safe_load(matter)


def snippet(card: str) -> str:
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    return code


def row(card: str, head: str) -> str:
    return re.search(rf"^\| {head} \| (.*) \|$", card, re.MULTILINE)[1]


@pytest.fixture(scope="module")
def saved(learned: lp.LatentPrior, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "crescent"
    learned.save_pretrained(folder, card=True, license="apache-2.0")
    return folder


@pytest.fixture(scope="module")
def card(saved: Path) -> str:
    return (saved / "README.md").read_text(encoding="utf-8")


def test_front_matter_is_yaml_for_the_hub(card: str) -> None:
    found = front(card)
    assert found["library_name"] == "latentprior"
    assert found["license"] == "apache-2.0"
    assert "density-estimation" in found["tags"]
    assert "pipeline_tag" not in found


def test_the_code_of_a_card_runs(saved: Path, card: str, learned: lp.LatentPrior) -> None:
    done = subprocess.run(
        [sys.executable, "-c", snippet(card)], cwd=saved.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    z = learned.sample((16,), generator=torch.Generator().manual_seed(0))
    assert done.stdout == f"{learned.log_prob(z)}\n"


def test_figures_are_those_of_the_prior(card: str, learned: lp.LatentPrior) -> None:
    jacobian = float(learned.whitening.log_abs_det)
    low, high = (learned.info[key] + jacobian for key in ("log_prob_base", "log_prob_held_out"))
    assert row(card, "held-out log density, nats") == f"base {low:.3f}, ladder {high:.3f}"
    assert row(card, "log Z, nats") == f"{learned.normalizer.value:.4f} ± {learned.log_prob_stderr:.4f}"
    assert row(card, "log Z from the base").startswith(f"{learned.bracket.forward.value:.4f}")
    for i, stage in enumerate(learned.stages):
        assert f"{stage.gain:.3f} ± {stage.gain_stderr:.3f}" in row(card, str(i))
    check = learned.check_normalizer()
    assert f"{check.value:.4f} ± {check.stderr:.4f}, passed |" in card
    assert f"torch {learned.info['versions']['torch']}" in card


def test_a_failed_check_is_said_aloud(gaussian: lp.LatentPrior) -> None:
    wrong = gaussian.with_ladder(gaussian.ladder, gaussian.normalizer._replace(value=0.5))
    assert "**failed: do not take the density as normalised**" in lp.model_card(wrong)
    assert "failed" not in lp.model_card(gaussian)
    assert "importance sampling" not in lp.model_card(wrong, check=False)


@pytest.mark.parametrize(("method", "words"), [("importance", "importance sampling"), ("annealing", "annealing")])
def test_the_method_of_the_check_is_told(
    gaussian: lp.LatentPrior, method: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = gaussian.check_normalizer()._replace(method=method, reference="a_b")
    monkeypatch.setattr(lp.LatentPrior, "check_normalizer", lambda self: check)
    assert f"| integral, by {words} from another density (a\\_b, ESS " in lp.model_card(gaussian)


def test_without_the_extra(gaussian: lp.LatentPrior, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(lp.MissingExtraError, match=r"latentprior\[hub\]"):
        lp.model_card(gaussian)
    with pytest.raises(lp.MissingExtraError, match=r"latentprior\[hub\]"):
        gaussian.save_pretrained(tmp_path, card=True)
    gaussian.save_pretrained(tmp_path, card="# Mine")


def test_a_picture_stands_beside_the_card_if_matplotlib_is_there(
    saved: Path, card: str, gaussian: lp.LatentPrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    assert (saved / "samples.png").read_bytes().startswith(PNG)
    assert "](samples.png)" in card
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    gaussian.save_pretrained(tmp_path, card=True)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md", ".safetensors"]
    assert "samples.png" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("shape", [(50, 1), (50, 2), (50, 3, 2), (5, 1, 4, 4), (5, 2, 4, 4), (5, 3, 4, 4)])
def test_pictures_of_every_shape(shape: tuple[int, ...], generator: torch.Generator) -> None:
    pytest.importorskip("matplotlib")
    draws = {name: torch.randn(shape, generator=generator) for name in ("a", "b")}
    first, again = samples_png(draws), samples_png(draws)
    assert first.startswith(PNG)
    assert first == again


def test_no_card_unless_asked_and_a_text_of_your_own(gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    gaussian.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    gaussian.save_pretrained(tmp_path, card="# Mine\n")
    assert (tmp_path / "README.md").read_text() == "# Mine\n"
    gaussian.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# Mine\n"


def test_what_a_prior_quotes_is_escaped(gaussian: lp.LatentPrior) -> None:
    evil = "</table><script>alert(1)</script>\n---\n| ![x](http://a) `b` *c*"
    prior = gaussian.with_ladder(
        gaussian.ladder, gaussian.normalizer, {"stopped": evil, "versions": {evil: evil}, "total_seconds": evil}
    )
    card = lp.model_card(prior, name=evil, license='mit"\nlibrary_name: other', check=False)
    prose = card.replace(snippet(card), "")
    assert "<script" not in prose
    assert "![" not in prose
    assert front(card)["license"] == 'mit"\nlibrary_name: other'
    assert front(card)["library_name"] == "latentprior"
    assert card.count("\n---\n") == 1
    assert f"from_pretrained({json.dumps(evil, ensure_ascii=False)})" in card
    compile(snippet(card), "card", "exec")
    table = [line for line in card.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in table)


@pytest.mark.slow
def test_models_and_parts_of_your_own(learned: lp.LatentPrior, gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    spec = network_spec("mlp", latent_dim=2, width=8, image_shape=(1, 6, 6))
    model = lp.LatentVariableModel(build_decoder(spec, torch.Generator().manual_seed(0)), gaussian)
    model.save_pretrained(tmp_path / "tiny", card=True)
    card = (tmp_path / "tiny" / "README.md").read_text()
    assert front(card)["pipeline_tag"] == "unconditional-image-generation"
    assert row(card, "decoder").startswith("family mlp, latent\\_dim 2")
    assert row(card, "encoder") == "none"
    done = subprocess.run(
        [sys.executable, "-c", snippet(card)], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("torch.Size([16, 1, 6, 6])")
    mine = lp.LatentVariableModel(
        torch.nn.Unflatten(1, (1, 1, 2)), MultivariateNormal(torch.zeros(2), torch.eye(2)), encoder=torch.nn.Flatten()
    )
    card = lp.model_card(mine, check=False)
    assert 'from_pretrained("my-prior", prior=distribution, decoder=decoder, encoder=encoder)' in card
    assert row(card, "decoder") == "the author's own"


def test_a_tilted_prior_has_no_card(gaussian: lp.LatentPrior) -> None:
    with pytest.raises(lp.CheckpointError, match="cannot be saved"):
        lp.model_card(gaussian.tilt(lambda z: z[:, 0], particles=64))
