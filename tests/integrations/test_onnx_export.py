"""ONNX graphs against torch, run by onnxruntime."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import latentprior as lp
from latentprior.density.bases import CopulaBase, GaussianMixtureBase, LowRankMixtureBase, MixtureBase, NormalBase
from latentprior.density.ladder import Ladder
from latentprior.density.ratios import build_ratio
from latentprior.density.whitening import identity_whitening
from latentprior.evaluation.metrics import two_sample_auc
from latentprior.models.networks import build_decoder, network_spec

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


def run(path: Path, **inputs: Tensor) -> Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert [i.name for i in session.get_inputs()] == list(inputs)
    return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in inputs.items()})[0])


def mixture(d: int, seed: int) -> GaussianMixtureBase:
    g = torch.Generator().manual_seed(seed)
    factors = 0.3 * torch.randn(3, d, d, generator=g).tril(-1) + 0.7 * torch.eye(d)
    return GaussianMixtureBase(torch.tensor([0.5, 0.3, 0.2]), torch.randn(3, d, generator=g), factors)


def low_rank(d: int) -> LowRankMixtureBase:
    g = torch.Generator().manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(3, d, 2, generator=g)).Q
    values, weights = torch.rand(3, 2, generator=g) + 0.2, torch.tensor([0.5, 0.3, 0.2])
    return LowRankMixtureBase(weights, torch.randn(3, d, generator=g), vectors, values, torch.full((3,), 0.6))


def untrained(kind: str, base: Any, shape: tuple[int, ...], cover: GaussianMixtureBase | None = None) -> lp.LatentPrior:
    """A prior whose two stages have random weights: as unlike a constant as a learned one."""
    read = base if isinstance(base, MixtureBase) else cover
    spec = {
        "kind": kind, "event_shape": shape, "width": 16, "depth": 1, "bound": 2.0, "features": read is not None
    }  # fmt: skip
    networks = [build_ratio(spec, torch.Generator().manual_seed(seed), read) for seed in (1, 2)]
    stages = [lp.Stage(network.requires_grad_(False), 0.3, 0.0, 0.1, 0.0) for network in networks]
    whitening = identity_whitening(base_dim(base))
    whitening.loc += 0.5
    return lp.LatentPrior(Ladder(base, stages, cover), whitening, shape)


def base_dim(base: Any) -> int:
    if isinstance(base, MixtureBase):
        return base.means.shape[1]
    return len(base.zero if base.name == "normal" else base.centers)


def priors() -> dict[str, lp.LatentPrior]:
    centers = torch.linspace(-1, 1, 5).expand(3, 5).clone()
    return {
        "gmm, residual": untrained("residual", mixture(3, 0), (3,)),
        "normal, mlp, cover": untrained("mlp", NormalBase(3).float(), (3,), cover=mixture(3, 0)),
        "copula, residual": untrained("residual", CopulaBase(centers, torch.full((3, 5), 0.4)), (3,)),
        "gmm, conv": untrained("conv", mixture(16, 0), (1, 4, 4)),
        "low rank, residual": untrained("residual", low_rank(5), (5,)),
    }


@pytest.mark.parametrize("name", list(priors()))
def test_log_prob_is_that_of_torch_for_any_number_of_rows(name: str, tmp_path: Path) -> None:
    prior = priors()[name]
    path = lp.export_onnx(prior, tmp_path / "p.onnx")
    z = 2 * torch.randn(70, *prior.event_shape, generator=torch.Generator().manual_seed(0))
    expected = prior.log_prob(z)
    assert float(expected.std()) > 0.5
    for n in (1, 2, 70):
        torch.testing.assert_close(run(path, z=z[:n]), expected[:n], atol=1e-4, rtol=1e-5)


def test_a_learned_prior_from_disk_in_double(learned: lp.LatentPrior, crescent: Tensor, tmp_path: Path) -> None:
    learned.save_pretrained(tmp_path / "prior")
    back = lp.LatentPrior.from_pretrained(tmp_path / "prior").to(dtype=torch.float64)
    found = run(lp.export_onnx(back, tmp_path / "p.onnx"), z=crescent)
    torch.testing.assert_close(found, learned.log_prob(crescent), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", [pytest.param("gmm, residual", marks=pytest.mark.slow), "normal, mlp, cover"])
def test_the_sampler_follows_the_prior(name: str, tmp_path: Path, generator: torch.Generator) -> None:
    prior = priors()[name]
    path = lp.export_onnx(prior, tmp_path / "s.onnx", "sampler", candidates=128)
    n = 4000
    inputs = {
        "normal": torch.randn(n, 128, 3, generator=generator), "uniform": torch.rand(n, 129, generator=generator)
    }  # fmt: skip
    z = run(path, **inputs)
    assert z.shape == (n, 3)
    assert torch.equal(run(path, **{k: v[:1] for k, v in inputs.items()}), z[:1])
    exact = prior.sample((n,), generator=generator)
    # The base alone is told from the prior with an AUC of 0.6 and more; its standard error here is 0.01.
    base = prior.whitening.unwhiten(prior.base.sample(n, generator))
    assert two_sample_auc(z, exact).auc < 0.54
    assert two_sample_auc(base, exact).auc > 0.58
    # Means: 4.5 standard errors of the difference, a false alarm in 1 of 25,000 runs of six comparisons.
    stderr = ((z.var(0) + exact.var(0)) / n).sqrt()
    assert (z.mean(0) - exact.mean(0)).abs().lt(4.5 * stderr).all()


def test_without_stages_the_sampler_draws_the_base(tmp_path: Path, generator: torch.Generator) -> None:
    whitening = identity_whitening(2)
    base = GaussianMixtureBase(
        torch.tensor([0.2, 0.8]), torch.tensor([[-5.0, 0], [5, 1]]), torch.eye(2).repeat(2, 1, 1)
    )
    path = lp.export_onnx(lp.LatentPrior(Ladder(base), whitening, (2,)), tmp_path / "s.onnx", "sampler", candidates=1)
    n = 4000
    z = run(path, normal=torch.randn(n, 1, 2, generator=generator), uniform=torch.rand(n, 2, generator=generator))
    left = z[:, 0] < 0
    # 4.5 standard errors, each: false alarms once in 20,000 runs.
    assert abs(float(left.double().mean()) - 0.2) < 4.5 * (0.2 * 0.8 / n) ** 0.5
    assert abs(float(z[~left, 1].mean()) - 1) < 4.5 / float((~left).sum()) ** 0.5


def test_images_of_a_model(tmp_path: Path, generator: torch.Generator) -> None:
    spec = network_spec("mnist", latent_dim=3, width=4)
    model = lp.LatentVariableModel(build_decoder(spec, generator), priors()["gmm, residual"])
    z = torch.randn(5, 3, generator=generator)
    found = run(lp.export_onnx(model, tmp_path / "d.onnx", "decoder"), z=z)
    torch.testing.assert_close(found, model.decode(z), atol=1e-4, rtol=1e-4)
    inputs = {"normal": torch.randn(2, 8, 3, generator=generator), "uniform": torch.rand(2, 9, generator=generator)}
    latents = run(lp.export_onnx(model, tmp_path / "s.onnx", "sampler", candidates=8), **inputs)
    images = run(lp.export_onnx(model, tmp_path / "g.onnx", "generate", candidates=8), **inputs)
    torch.testing.assert_close(images, model.decode(latents), atol=1e-4, rtol=1e-4)


class Untraceable(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return z if float(z.sum()) > np.pi else -z


def test_what_has_no_graph_is_refused_by_name(gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    path = tmp_path / "x.onnx"
    with pytest.raises(lp.ExportError, match="unknown graph 'score': choose log_prob"):
        lp.export_onnx(gaussian, path, "score")
    with pytest.raises(lp.ExportError, match="makes no images"):
        lp.export_onnx(gaussian, path, "generate")
    with pytest.raises(lp.ExportError, match="candidates must be 1 or more"):
        lp.export_onnx(gaussian, path, "sampler", candidates=0)
    with pytest.raises(lp.ExportError, match="a tilted prior"):
        lp.export_onnx(gaussian.tilt(lambda z: z[:, 0], particles=64), path)
    with pytest.raises(lp.ExportError, match="'copula' has no ONNX sampler"):
        lp.export_onnx(priors()["copula, residual"], path, "sampler")
    mine = lp.LatentVariableModel(Untraceable(), MultivariateNormal(torch.zeros(2), torch.eye(2)))
    with pytest.raises(lp.ExportError, match="'distribution' has no ONNX graph: fit with base='gmm'"):
        lp.export_onnx(mine, path)
    with pytest.raises(lp.ExportError, match="torch cannot turn this into ONNX"):
        lp.export_onnx(mine, path, "decoder")
    assert not path.exists()


def test_without_the_extra(
    gaussian: lp.LatentPrior, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(lp.MissingExtraError, match=r"latentprior\[onnx\]"):
        lp.export_onnx(gaussian, tmp_path / "x.onnx")
    monkeypatch.undo()
    lp.export_onnx(gaussian, tmp_path / "x.onnx")
    # torch's exporter has much to say about packages that it could use.
    assert capfd.readouterr() == ("", "")


def test_export_leaves_the_prior_as_it_was(tmp_path: Path) -> None:
    prior = priors()["gmm, residual"]
    spec = network_spec("mlp", latent_dim=3, width=4, image_shape=(1, 2, 2))
    model = lp.LatentVariableModel(build_decoder(spec, torch.Generator().manual_seed(0)).train(), prior)
    z = torch.zeros(4, 3)
    before = model.prior.log_prob(z)
    lp.export_onnx(model, tmp_path / "g.onnx", "generate", candidates=2)
    assert torch.equal(model.prior.log_prob(z), before)
    assert model.decoder.training
    assert all(p.requires_grad for p in model.decoder.parameters())
