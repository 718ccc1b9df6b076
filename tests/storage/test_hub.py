"""Pushing and loading through huggingface_hub's own client, against a hub on this machine."""

import builtins
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import latentprior as lp
from fake_hub import TOKEN, FakeHub, serve
from latentprior.cli.main import main
from latentprior.models.networks import build_decoder, build_encoder, network_spec
from latentprior.storage.checkpoint import _checksum

pytest.importorskip("huggingface_hub")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    from huggingface_hub import constants, file_download

    with serve() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):
            if hasattr(module, "HUGGINGFACE_CO_URL_TEMPLATE"):
                monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.chdir(tmp_path)
        yield made


@pytest.fixture(scope="module")
def points() -> Tensor:
    return torch.randn(20, 2, generator=torch.Generator().manual_seed(3))


def saved_files(prior: Any, folder: Path) -> dict[str, bytes]:
    prior.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_pushed_prior_comes_back(hub: FakeHub, learned: lp.LatentPrior, points: Tensor, tmp_path: Path) -> None:
    done = learned.push_to_hub("someone/crescent", token=TOKEN, private=True, license="mit")
    repository = hub.repositories["someone/crescent"]
    assert repository.private
    assert done.oid == repository.branches["main"]
    assert done.commit_url.startswith(f"{hub.url}/someone/crescent/commit/")
    assert repository.messages[-1] == "Upload prior with latentprior"
    card = repository.files["README.md"].decode()
    assert "license: mit\n" in card
    assert 'from_pretrained("someone/crescent")' in card
    assert ("samples.png" in repository.files) == ("](samples.png)" in card)
    back = lp.LatentPrior.from_pretrained("someone/crescent", token=TOKEN)
    assert torch.equal(back.log_prob(points), learned.log_prob(points))
    assert sorted(hub.downloads)[0] == "config.json"
    assert all(re.fullmatch(r"config\.json|prior-[0-9a-f]{16}\.safetensors", name) for name in hub.downloads)


def test_only_json_and_safetensors_are_downloaded(hub: FakeHub, gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    files = saved_files(gaussian, tmp_path / "prior")
    others = {
        "pytorch_model.bin": b"pickle",
        "code.py": b"import os",
        "prior-x.safetensors": b"",
        "a/config.json": b"{}",
    }
    hub.add("someone/flat", {**files, **others})
    lp.LatentPrior.from_pretrained("someone/flat")
    assert sorted(hub.downloads) == sorted(files)


def test_the_snapshot_in_the_cache_serves_without_a_network(
    hub: FakeHub, gaussian: lp.LatentPrior, points: Tensor, tmp_path: Path
) -> None:
    hub.add("someone/flat", saved_files(gaussian, tmp_path / "prior"))
    cache = tmp_path / "cache"
    with pytest.raises(lp.CheckpointError, match="no prior of that name on the hub"):
        lp.LatentPrior.from_pretrained("someone/flat", cache_dir=cache, local_files_only=True)
    lp.LatentPrior.from_pretrained("someone/flat", cache_dir=cache)
    before = len(hub.downloads)
    back = lp.LatentPrior.from_pretrained("someone/flat", cache_dir=cache, local_files_only=True)
    assert len(hub.downloads) == before
    assert torch.equal(back.log_prob(points), gaussian.log_prob(points))
    # A snapshot consists of links into the cache's blobs.
    (config,) = cache.glob("models--someone--flat/snapshots/*/config.json")
    assert config.is_symlink()


def test_a_folder_here_wins(hub: FakeHub, gaussian: lp.LatentPrior, learned: lp.LatentPrior, tmp_path: Path) -> None:
    hub.add("someone/flat", saved_files(gaussian, tmp_path / "prior"))
    learned.save_pretrained(tmp_path / "someone" / "flat")
    assert len(lp.LatentPrior.from_pretrained("someone/flat").stages) == 2
    assert not hub.downloads


def test_revisions_and_pull_requests(hub: FakeHub, gaussian: lp.LatentPrior, learned: lp.LatentPrior) -> None:
    first = gaussian.push_to_hub("someone/both", token=TOKEN, card=False, commit_message="flat")
    learned.push_to_hub("someone/both", token=TOKEN, card=False)
    repository = hub.repositories["someone/both"]
    assert repository.messages == ["first", "flat", "Upload prior with latentprior"]
    # The tensors of the first prior are gone from the second commit, not from the first.
    assert sorted(Path(name).suffix for name in repository.files if not name.startswith(".")) == [
        ".json",
        ".safetensors",
    ]
    assert len(lp.LatentPrior.from_pretrained("someone/both").stages) == 2
    assert not lp.LatentPrior.from_pretrained("someone/both", revision=first.oid).stages
    gaussian.push_to_hub("someone/both", token=TOKEN, card=False, revision="flat")
    assert not lp.LatentPrior.from_pretrained("someone/both", revision="flat").stages
    asked = gaussian.push_to_hub("someone/both", token=TOKEN, card=False, create_pr=True)
    assert asked.pr_url == f"{hub.url}/someone/both/discussions/1"
    assert len(lp.LatentPrior.from_pretrained("someone/both").stages) == 2
    with pytest.raises(lp.CheckpointError, match="at revision 'nowhere' on the hub"):
        lp.LatentPrior.from_pretrained("someone/both", revision="nowhere")


def test_a_card_on_the_hub_stays_unless_told(hub: FakeHub, gaussian: lp.LatentPrior) -> None:
    hub.add("someone/mine", {"README.md": b"edited by hand"})
    repository = hub.repositories["someone/mine"]
    gaussian.push_to_hub("someone/mine", token=TOKEN)
    assert repository.files["README.md"] == b"edited by hand"
    gaussian.push_to_hub("someone/mine", token=TOKEN, card="# Words of my own")
    assert repository.files["README.md"] == b"# Words of my own"
    gaussian.push_to_hub("someone/mine", token=TOKEN, card=True)
    assert b"library_name: latentprior" in repository.files["README.md"]


def test_models_travel_too(hub: FakeHub, learned: lp.LatentPrior) -> None:
    spec = network_spec("mlp", latent_dim=2, width=8, image_shape=(1, 6, 6))
    g = torch.Generator().manual_seed(0)
    model = lp.LatentVariableModel(build_decoder(spec, g), learned, encoder=build_encoder(spec, g))
    model.push_to_hub("someone/model", token=TOKEN)
    assert b"LatentVariableModel" in hub.repositories["someone/model"].files["README.md"]
    back = lp.LatentVariableModel.from_pretrained("someone/model")
    a, b = (m.generate(3, generator=torch.Generator().manual_seed(1), sampler="sir") for m in (model, back))
    assert torch.equal(a, b)
    with pytest.raises(lp.CheckpointError, match="holds a 'model', not a 'prior'"):
        lp.LatentPrior.from_pretrained("someone/model")


@pytest.mark.parametrize(
    "name", ["../prior-0123456789abcdef.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..", "x\0.safetensors"]
)
def test_names_in_a_configuration_cannot_leave_the_snapshot(
    hub: FakeHub, gaussian: lp.LatentPrior, tmp_path: Path, name: str
) -> None:
    files = saved_files(gaussian, tmp_path / "prior")
    config = {**json.loads(files["config.json"]), "weights": name}
    config["checksum"] = _checksum(config)
    hub.add("someone/tricky", {**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(lp.CheckpointError, match=r"names no proper tensor file|cannot be read"):
        lp.LatentPrior.from_pretrained("someone/tricky")


def test_damage_on_the_hub_is_noticed(hub: FakeHub, gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    files = saved_files(gaussian, tmp_path / "prior")
    config = {**json.loads(files["config.json"]), "base": {"name": "copula"}}
    hub.add("someone/damaged", {**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(lp.CheckpointError, match="damaged"):
        lp.LatentPrior.from_pretrained("someone/damaged")


def test_what_is_nowhere_is_said_in_one_line(hub: FakeHub, gaussian: lp.LatentPrior) -> None:
    with pytest.raises(
        lp.CheckpointError, match=r"someone/typo: no such folder, and no prior .* check the path"
    ) as caught:
        lp.LatentPrior.from_pretrained("someone/typo")
    assert "\n" not in str(caught.value)
    for source in ("typo", "a/b/c", "../typo", Path("someone/typo"), "some one/typo"):
        with pytest.raises(lp.CheckpointError, match=r'holds no saved prior; .*"user/name" on the hub'):
            lp.LatentPrior.from_pretrained(source)
    assert not hub.downloads


def test_a_refused_push_says_what_to_do(hub: FakeHub, gaussian: lp.LatentPrior) -> None:
    with pytest.raises(lp.HubError, match="check the name, the network, and that your token may write") as caught:
        gaussian.push_to_hub("someone/flat", token="hf_wrong")
    assert "hf_wrong" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not hub.repositories


def test_a_tilted_prior_is_refused_before_anything_is_created(hub: FakeHub, gaussian: lp.LatentPrior) -> None:
    tilted = gaussian.tilt(lambda z: z[:, 0], particles=64)
    with pytest.raises(lp.CheckpointError, match="cannot be saved"):
        tilted.push_to_hub("someone/tilted", token=TOKEN)
    assert not hub.repositories


def test_the_command_line_pushes_priors_and_models(
    hub: FakeHub,
    learned: lp.LatentPrior,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    learned.save_pretrained(tmp_path / "prior")
    assert main(["push", "prior", "someone/pushed", "--private", "--license", "mit", "--json"]) == 1
    assert "your token may write" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["push", "prior", "someone/pushed", "--private", "--license", "mit", "--json"]) == 0
    repository = hub.repositories["someone/pushed"]
    assert json.loads(capsys.readouterr().out)["commit"] == repository.branches["main"]
    assert repository.private
    assert b"license: mit\n" in repository.files["README.md"]
    assert len(lp.LatentPrior.from_pretrained("someone/pushed").stages) == 2
    spec = network_spec("mlp", latent_dim=2, width=8, image_shape=(1, 6, 6))
    model = lp.LatentVariableModel(build_decoder(spec, torch.Generator().manual_seed(0)))
    model.save_pretrained(tmp_path / "run" / "model")
    assert main(["push", "run", "someone/model", "--message", "first try"]) == 0
    assert hub.repositories["someone/model"].messages[-1] == "first try"
    mine = lp.LatentVariableModel(model.decoder, MultivariateNormal(torch.zeros(2), torch.eye(2)))
    mine.save_pretrained(tmp_path / "mine")
    assert main(["push", "mine", "someone/mine"]) == 2
    assert main(["push", "nowhere", "someone/mine"]) == 2
    assert "someone/mine" not in hub.repositories


def test_without_the_extra(gaussian: lp.LatentPrior, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **options: Any) -> Any:
        if name.partition(".")[0] == "huggingface_hub":
            raise ImportError(name)
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(lp.MissingExtraError, match=r"latentprior\[hub\]"):
        gaussian.push_to_hub("someone/flat")
    with pytest.raises(lp.MissingExtraError, match=r"someone/flat is no folder here.*latentprior\[hub\]"):
        lp.LatentPrior.from_pretrained("someone/flat")
    gaussian.save_pretrained(tmp_path / "someone" / "flat")
    assert not lp.LatentPrior.from_pretrained("someone/flat").stages
