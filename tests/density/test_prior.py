import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import latentprior as lp
from latentprior import CheckpointError, InvalidLatentsError, LatentPriorError
from latentprior.density.samplers import SAMPLERS
from quadrature import grid, integral, moments


@pytest.fixture
def points(generator: torch.Generator) -> Tensor:
    return 2 * torch.randn(40, 2, generator=generator)


def whitened_log_prob(prior: lp.LatentPrior) -> Callable[[Tensor], Tensor]:
    return lambda u: prior.log_prob_whitened(u.to(prior.dtype)).double()


def test_log_prob_is_base_plus_stages_less_normaliser(learned: lp.LatentPrior, points: Tensor) -> None:
    u = learned.whitening.whiten(points)
    expected = learned.base.log_prob(u) + learned.whitening.log_abs_det
    for stage in learned.stages:
        expected = expected + stage.network(u) - stage.log_normalizer
    torch.testing.assert_close(learned.log_prob(points), expected, atol=1e-4, rtol=1e-5)


def test_learned_density_integrates_to_one(learned: lp.LatentPrior) -> None:
    total = integral(whitened_log_prob(learned), -12, 12, 2)
    # The stated error, 4.5 times: 1 in 150,000; the grid errs by less than 1e-3.
    assert abs(math.log(total)) < 4.5 * learned.log_prob_stderr + 1e-3


def test_log_prob_is_differentiable(learned: lp.LatentPrior, points: Tensor) -> None:
    double = learned.to(dtype=torch.float64)
    assert torch.autograd.gradcheck(double.log_prob, points[:4].double().requires_grad_(True))
    assert not learned.log_prob(points).requires_grad


def test_shapes_and_types(learned: lp.LatentPrior, points: Tensor) -> None:
    assert learned.event_shape == (2,)
    assert learned.batch_shape == ()
    value = learned.log_prob(points)
    assert value.shape == (40,)
    assert value.dtype == learned.dtype == torch.float32
    assert learned.log_prob(points[0]).shape == ()
    torch.testing.assert_close(learned.log_prob(points[0]), value[0])
    torch.testing.assert_close(learned.log_prob(points.double()), value)
    torch.testing.assert_close(learned.log_prob(points.numpy()), value)
    assert learned.log_prob(points[:0]).shape == (0,)
    assert learned.log_prob(points[:1]).shape == (1,)
    assert "stages=2" in repr(learned)
    assert learned.support.check(points).all()


@pytest.mark.parametrize("shape", [(3,), (4, 3), (2, 2, 2), (4, 1), ()])
def test_other_shapes_are_named(learned: lp.LatentPrior, shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidLatentsError, match=r"the prior expects \(n, 2\)"):
        learned.log_prob(torch.zeros(shape))


def test_nan_gives_nan_for_its_row_only(learned: lp.LatentPrior, points: Tensor) -> None:
    bad = points.clone()
    bad[3, 1] = math.nan
    value = learned.log_prob(bad)
    assert value[3].isnan()
    assert not value[[0, 1, 2, *range(4, 40)]].isnan().any()


def test_event_shapes_of_images(generator: torch.Generator) -> None:
    z = torch.randn(80, 2, 3, 4, generator=generator)
    prior = lp.fit(z, base="normal", max_stages=0)
    assert prior.log_prob(z).shape == (80,)
    assert prior.log_prob(z[0]).shape == ()
    assert prior.sample((5, 2), generator).shape == (5, 2, 2, 3, 4)
    assert prior.sample((), generator).shape == (2, 3, 4)


def test_to_double_and_back(learned: lp.LatentPrior, points: Tensor) -> None:
    double = learned.to(dtype=torch.float64)
    assert double.dtype == torch.float64
    assert learned.dtype == torch.float32
    assert double.log_prob(points).dtype == torch.float64
    torch.testing.assert_close(double.log_prob(points).float(), learned.log_prob(points), atol=1e-4, rtol=1e-4)
    assert double.sample((3,), torch.Generator()).dtype == torch.float64
    assert learned.to() is learned
    assert learned.to("cpu", torch.float32) is learned
    assert torch.equal(double.to(dtype=torch.float32).log_prob(points), learned.log_prob(points))


def test_normaliser_figures(learned: lp.LatentPrior) -> None:
    assert learned.log_prob_stderr == learned.normalizer.stderr > 0
    assert learned.bracket is learned.normalizer.bracket
    assert sum(s.log_normalizer for s in learned.stages) == pytest.approx(learned.normalizer.value)
    for stage in learned.stages:
        assert 0 < stage.gain < 1.386
        assert stage.gain_stderr > 0
        assert stage.log_normalizer_stderr > 0
        assert {"ess", "acceptance", "seconds"} <= stage.diagnostics.keys()


# Sampling


@pytest.mark.parametrize(
    "sampler", [pytest.param(s, marks=[pytest.mark.slow] * (s in ("hmc", "mala"))) for s in SAMPLERS if s != "langevin"]
)
def test_samplers_agree_with_quadrature(learned: lp.LatentPrior, sampler: str) -> None:
    mean, variance = moments(whitened_log_prob(learned), -12, 12, 2)
    means, squares = [], []
    for seed in range(8):
        z = learned.sample((500,), torch.Generator().manual_seed(seed), sampler)
        u = learned.whitening.whiten(z).double()
        means.append(u.mean(0))
        squares.append((u - mean).square().clamp_max(16).mean(0))
    nodes, _ = grid(-12, 12, 2)
    weight = torch.softmax(whitened_log_prob(learned)(nodes), 0)
    clamped = weight @ (nodes - mean).square().clamp_max(16)
    # Calls are independent, rows within one are not: |t_7| > 6 has chance 0.0005 a number.
    for values, exact in ((torch.stack(means), mean), (torch.stack(squares), clamped)):
        stderr = values.std(0) / math.sqrt(8)
        assert ((values.mean(0) - exact).abs() < 6 * stderr).all()
        assert (stderr < 0.1 * variance.sqrt() + 0.1).all()


def test_short_run_langevin_comes_near(learned: lp.LatentPrior, generator: torch.Generator) -> None:
    mean, variance = moments(whitened_log_prob(learned), -12, 12, 2)
    z = learned.sample((4000,), generator, "langevin", steps=200, step_size=0.15)
    u = learned.whitening.whiten(z).double()
    # Biased by O(s^2) and by its short run: near, not equal. The base's own mean of zero tells nothing, its shape does.
    assert (u.mean(0) - mean).abs().max() < 0.2
    assert float(learned.log_prob(z).mean()) == pytest.approx(
        float(learned.log_prob(learned.sample((4000,), generator)).mean()), abs=0.25
    )
    assert (u.var(0) / variance - 1).abs().max() < 0.5


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (7,), (2, 3)])
def test_sample_shapes(learned: lp.LatentPrior, gaussian: lp.LatentPrior, sampler: str, shape: tuple[int, ...]) -> None:
    for prior in (learned, gaussian):
        options = {"steps": 2} if sampler in ("mala", "hmc", "langevin") else {}
        z = prior.sample(shape, torch.Generator().manual_seed(0), sampler, **options)
        assert z.shape == (*shape, 2)
        assert z.dtype == prior.dtype
        assert torch.isfinite(z).all()
        assert not z.requires_grad


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_are_a_function_of_the_generator(learned: lp.LatentPrior, sampler: str) -> None:
    a, b, c = (learned.sample((20,), torch.Generator().manual_seed(s), sampler) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_samples_are_exchangeable(learned: lp.LatentPrior) -> None:
    # Neighbouring rows are as far from each other as distant ones: no families side by side. Ratio of two means of
    # 2000 distances, each with relative deviation of 0.6: standard error 0.02; 5 of them.
    z = learned.sample((4000,), torch.Generator().manual_seed(0))
    near = (z[0::2] - z[1::2]).norm(dim=1)
    far = (z[:2000] - z[2000:]).norm(dim=1)
    assert float(near.mean() / far.mean()) == pytest.approx(1, abs=0.1)
    assert len(z.unique(dim=0)) > 3900


@pytest.mark.parametrize(
    ("sampler", "options", "said"),
    [
        ("smc", {"steps": 5}, "smc has no option 'steps'; it has ess, moves"),
        ("sir", {"steps": 5}, "no option"),
        ("sir", {"candidates": 0}, "candidates must be a whole number of 1 or more, got 0"),
        ("smc", {"moves": -1}, "of 0 or more"),
        ("smc", {"ess": math.nan}, "ess must be"),
        ("mala", {"steps": 2.5}, "steps must be a whole number"),
        ("hmc", {"leapfrog_steps": True}, "got True"),
        ("langevin", {"step_size": "a"}, "step_size must be positive and finite, got 'a'"),
        ("langevin", {"step_size": math.inf}, "step_size must be"),
    ],
)
def test_samplers_refuse_options_that_are_not_theirs(
    gaussian: lp.LatentPrior, sampler: str, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(LatentPriorError, match=said):
        gaussian.sample((2,), sampler=sampler, **options)
    numbers: dict[str, Any] = {"steps": np.int64(2), "step_size": np.float32(0.5)}
    assert gaussian.sample((2,), torch.Generator().manual_seed(0), "mala", **numbers).shape == (2, 2)


@pytest.mark.parametrize("shape", [3, None, "3", (2.0,)])
def test_a_sample_shape_is_a_shape(gaussian: lp.LatentPrior, shape: Any) -> None:
    with pytest.raises(LatentPriorError, match=r"sample_shape must be whole numbers, as in \(1000,\)"):
        gaussian.sample(shape)


def test_unknown_sampler_lists_the_choices(learned: lp.LatentPrior) -> None:
    with pytest.raises(LatentPriorError, match="choose one of smc, mala, hmc, langevin, sir"):
        learned.sample((1,), sampler="gibbs")


# Saving


@pytest.mark.parametrize("base", ["normal", "gmm", "copula", "flow"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_save_and_load_give_the_same_bits(
    crescent: Tensor, points: Tensor, tmp_path: Path, base: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentprior.density.bases import FlowBase

    fit_flow = FlowBase.fit.__func__
    monkeypatch.setattr(FlowBase, "fit", classmethod(lambda cls, *a, **k: fit_flow(cls, *a, max_epochs=1, **k)))
    prior = lp.fit(crescent[:300], base=base, max_stages=0, dtype=dtype)
    prior.save_pretrained(tmp_path)
    back = lp.LatentPrior.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(back.log_prob(points), prior.log_prob(points))
    a, b = (p.sample((9,), torch.Generator().manual_seed(0)) for p in (prior, back))
    assert torch.equal(a, b)
    assert back.dtype == dtype


def test_save_and_load_of_a_ladder(learned: lp.LatentPrior, points: Tensor, tmp_path: Path) -> None:
    learned.save_pretrained(tmp_path / "a")
    back = lp.LatentPrior.from_pretrained(str(tmp_path / "a"), device="cpu")
    assert torch.equal(back.log_prob(points), learned.log_prob(points))
    assert back.normalizer == learned.normalizer
    assert back.info == json.loads(json.dumps(learned.info))
    assert [s.gain for s in back.stages] == [s.gain for s in learned.stages]
    a, b = (p.sample((9,), torch.Generator().manual_seed(0)) for p in (learned, back))
    assert torch.equal(a, b)
    back.save_pretrained(tmp_path / "b")
    files = [sorted((p.name, p.read_bytes()) for p in (tmp_path / f).iterdir()) for f in "ab"]
    assert files[0] == files[1]
    assert sorted(Path(n).suffix for n, _ in files[0]) == [".json", ".safetensors"]


def test_prior_on_a_distribution_needs_it_again(
    crescent: Tensor, points: Tensor, tmp_path: Path, tiny: lp.StageSettings
) -> None:
    mine = MultivariateNormal(crescent.mean(0), torch.cov(crescent.T))
    prior = lp.fit(crescent, base=mine, max_stages=1, settings=tiny)
    prior.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="pass it again"):
        lp.LatentPrior.from_pretrained(tmp_path)
    back = lp.LatentPrior.from_pretrained(tmp_path, base=mine)
    assert torch.equal(back.log_prob(points), prior.log_prob(points))


def test_absent_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no saved prior"):
        lp.LatentPrior.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds no saved prior"):
        lp.LatentPrior.from_pretrained(str(tmp_path / "nothing" / "here"))


def test_pickles_are_refused(tmp_path: Path) -> None:
    for name in ("config.json", "prior-0.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError):
        lp.LatentPrior.from_pretrained(tmp_path)
    torch.save({"a": torch.ones(1)}, tmp_path / "config.json")
    with pytest.raises(CheckpointError):
        lp.LatentPrior.from_pretrained(tmp_path)


def changes() -> dict[str, Callable[[dict], Any]]:
    return {
        "no whitening": lambda c: c.pop("whitening"),
        "no stages": lambda c: c.pop("stages"),
        "stages of another type": lambda c: c.update(stages=3),
        "stage without spec": lambda c: c["stages"][0].pop("spec"),
        "stage too many": lambda c: c["stages"].append(c["stages"][0]),
        "other width": lambda c: c["stages"][0]["spec"].update(width=7),
        "other kind": lambda c: c["stages"][0]["spec"].update(kind="mlp"),
        "unknown kind": lambda c: c["stages"][0]["spec"].update(kind="os.system"),
        "text for a number": lambda c: c["stages"][0].update(log_normalizer="x"),
        "nan normaliser": lambda c: c["normalizer"].update(value=math.nan),
        "null normaliser": lambda c: c.update(normalizer=None),
        "negative bound": lambda c: c["stages"][0]["spec"].update(bound=-1),
        "infinite bound": lambda c: c["stages"][0]["spec"].update(bound=math.inf),
        "unknown base": lambda c: c["base"].update(name="x"),
        "base of another kind": lambda c: c["base"].update(name="gmm"),
        "other event shape": lambda c: c.update(event_shape=[3]),
        "event shape of text": lambda c: c.update(event_shape="xy"),
        "negative shape": lambda c: c.update(event_shape=[-1, -2]),
        "vast network": lambda c: c["stages"][0]["spec"].update(width=10**7),
        "deep network": lambda c: c["stages"][0]["spec"].update(depth=10**9),
        "number too large for a float": lambda c: c["stages"][0].update(gain=10**400),
        "shape too large for memory": lambda c: c.update(event_shape=[10**9, 10**9]),
        "figures of text": lambda c: c["stages"][0]["diagnostics"].update(ess="high"),
        "figures of another type": lambda c: c["stages"][0].update(diagnostics=[1]),
        "unknown whitening": lambda c: c.update(whitening="x"),
    }


@pytest.mark.parametrize("change", changes())
def test_configurations_that_do_not_fit_are_one_line(learned: lp.LatentPrior, change: str) -> None:
    config, tensors = learned.state()
    config = json.loads(json.dumps(config))
    changes()[change](config)
    with pytest.raises(CheckpointError) as caught:
        lp.LatentPrior.from_state(config, tensors)
    assert "\n" not in str(caught.value)


def test_missing_and_surplus_tensors(learned: lp.LatentPrior) -> None:
    config, tensors = learned.state()
    for name in tensors:
        with pytest.raises(CheckpointError, match="do not fit together"):
            lp.LatentPrior.from_state(config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(CheckpointError, match="do not fit together"):
        lp.LatentPrior.from_state(config, {**tensors, "stages.0.network.stranger": torch.ones(1)})


@pytest.mark.parametrize("name", ["whitening.matrix", "stages.0.network.last.weight"])
def test_saved_nan_is_refused(learned: lp.LatentPrior, name: str) -> None:
    config, tensors = learned.state()
    with pytest.raises(CheckpointError, match=f"{name} holds NaN"):
        lp.LatentPrior.from_state(config, {**tensors, name: torch.full_like(tensors[name], math.nan)})


@pytest.mark.parametrize("scale", [1e12, 1e30, math.inf])
def test_rows_too_far_out_have_no_density(learned: lp.LatentPrior, points: Tensor, scale: float) -> None:
    value = learned.log_prob(scale * points.abs() + 1)
    assert not value.isnan().any()
    assert (value < -1e9).all()


@pytest.mark.parametrize(
    "value",
    [
        np.array([["a", "b"]]),
        np.array([[1, None]], dtype=object),
        [[1.0, 2.0], [3.0]],
        None,
        torch.zeros(3, 2, dtype=torch.complex64),
        torch.eye(2).to_sparse(),
        torch.zeros(3, 2, device="meta"),
    ],
    ids=["text", "objects", "ragged", "None", "complex", "sparse", "meta"],
)
def test_what_is_no_row_of_numbers_is_named(learned: lp.LatentPrior, value: Any) -> None:
    with pytest.raises(InvalidLatentsError):
        learned.log_prob(value)


def test_arrays_of_any_order_and_type_are_scored(learned: lp.LatentPrior, points: Tensor) -> None:
    whole = points.round()
    expected, array = learned.log_prob(whole), whole.numpy()
    others = [array.astype(">f4"), array.astype(np.longdouble), array[::-1][::-1], array.astype(np.int8), whole.half()]
    for other in [*others, whole.bfloat16(), whole.T.contiguous().T, whole.tolist(), whole.requires_grad_(True)]:
        torch.testing.assert_close(learned.log_prob(other).detach(), expected)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sampler": "langevin", "step_size": 100.0}, "ran away: lower step_size"),
        ({"sampler": "mala", "step_size": math.nan}, "step_size must be positive and finite, got nan"),
        ({"sample_shape": (-1,)}, r"0 or more in every place, got \(-1,\)"),
    ],
)
def test_draws_that_cannot_be_are_named(learned: lp.LatentPrior, options: dict[str, Any], says: str) -> None:
    with pytest.raises(LatentPriorError, match=says):
        learned.sample(**{"sample_shape": (3,), "generator": torch.Generator(), **options})


# Tilting

SLOPE = torch.tensor([0.8, -0.6])


def slope(z: Tensor) -> Tensor:
    return z @ SLOPE


def squeeze(z: Tensor) -> Tensor:
    return -0.5 * 3.0 * z[:, 0].square()


def exact_tilts(which: str) -> tuple[Callable[[Tensor], Tensor], MultivariateNormal, float]:
    """A log potential on N(0, I), the normal that it makes, and log Z."""
    if which == "linear":
        return slope, MultivariateNormal(SLOPE, torch.eye(2)), 0.5
    if which == "steep linear":
        return (lambda z: 5 * slope(z)), MultivariateNormal(5 * SLOPE, torch.eye(2)), 12.5
    if which == "quadratic":
        return squeeze, MultivariateNormal(torch.zeros(2), torch.diag(torch.tensor([0.25, 1.0]))), -0.5 * math.log(4)
    likelihood = lambda z: -0.5 * ((z[:, 0] - 3.0) / 0.05).square()  # noqa: E731
    shrink = 1 / (1 + 0.05**-2)
    normal = MultivariateNormal(torch.tensor([3.0 * (1 - shrink), 0.0]), torch.diag(torch.tensor([shrink, 1.0])))
    return likelihood, normal, 0.5 * math.log(shrink) - 0.5 * 9 / (1 + 0.05**2)


@pytest.mark.parametrize("which", ["linear", "quadratic", "steep linear", "sharp likelihood"])
def test_tilted_normal_is_the_exact_normal(gaussian: lp.LatentPrior, which: str) -> None:
    g, exact, log_z = exact_tilts(which)
    tilted = gaussian.tilt(g, generator=torch.Generator().manual_seed(0))
    assert tilted.normalizer.source == "tilt"
    # |t_15| > 5 has chance 0.0002.
    assert abs(tilted.stages[-1].log_normalizer - log_z) < 5 * tilted.log_prob_stderr + 1e-6
    assert tilted.log_prob_stderr < 0.1
    z = exact.loc + torch.randn(200, 2, generator=torch.Generator().manual_seed(1)) @ exact.scale_tril.T
    torch.testing.assert_close(
        tilted.log_prob(z), exact.log_prob(z) + (log_z - tilted.stages[-1].log_normalizer), atol=2e-3, rtol=1e-4
    )
    means = torch.stack([tilted.sample((500,), torch.Generator().manual_seed(s)).mean(0) for s in range(10)])
    # |t_9| > 6 has chance 0.0002 a coordinate.
    assert ((means.mean(0) - exact.loc).abs() < 6 * means.std(0) / math.sqrt(10) + 1e-4).all()
    assert (means.std(0) < 8 * exact.stddev / math.sqrt(500)).all()


def test_tilt_of_a_tilt_is_the_tilt_by_the_sum(gaussian: lp.LatentPrior, points: Tensor) -> None:
    twice = gaussian.tilt(slope).tilt(squeeze)
    once = gaussian.tilt(lambda z: slope(z) + squeeze(z))
    error = 5 * math.hypot(twice.log_prob_stderr, once.log_prob_stderr)
    assert (twice.log_prob(points) - once.log_prob(points)).abs().max() < error + 1e-4
    exact = MultivariateNormal(torch.tensor([0.2, -0.6]), torch.diag(torch.tensor([0.25, 1.0])))
    assert (twice.log_prob(points) - exact.log_prob(points)).abs().max() < error + 1e-3


def test_tilt_of_a_learned_prior_is_normalised(learned: lp.LatentPrior) -> None:
    tilted = learned.tilt(lambda z: 0.7 * z[:, 1] - 0.2 * z[:, 0])
    total = integral(whitened_log_prob(tilted), -14, 14, 2)
    assert abs(math.log(total)) < 5 * tilted.log_prob_stderr + 1e-3
    assert len(tilted.stages) == len(learned.stages) + 1
    assert tilted.log_prob_stderr >= learned.log_prob_stderr


def test_tilt_takes_the_users_coordinates_and_shape(generator: torch.Generator) -> None:
    z = 5 + 3 * torch.randn(200, 1, 2, generator=generator)
    prior = lp.fit(z, base="normal", max_stages=0)
    seen: list[torch.Size] = []

    def g(x: Tensor) -> Tensor:
        seen.append(x.shape[1:])
        return x[:, 0, 0]

    tilted = prior.tilt(g, particles=1024)
    assert set(seen) == {torch.Size([1, 2])}
    difference = tilted.log_prob(z) - prior.log_prob(z) - z[:, 0, 0]
    torch.testing.assert_close(difference, difference.mean().expand(200), atol=1e-3, rtol=0)


def test_constraint_as_a_tilt(gaussian: lp.LatentPrior) -> None:
    # A half plane: -inf outside. Z is its mass, 0.5 by symmetry.
    tilted = gaussian.tilt(lambda z: torch.where(z[:, 0] > 0, 0.0 * z[:, 0], -math.inf))
    assert abs(tilted.normalizer.value - math.log(0.5)) < 5 * tilted.log_prob_stderr
    z = tilted.sample((500,), torch.Generator().manual_seed(0))
    assert (z[:, 0] > 0).all()
    # |mean of 500 half normals| : sd 0.6 / sqrt(500); 5 of them.
    assert float(z[:, 0].mean()) == pytest.approx(math.sqrt(2 / math.pi), abs=0.15)


@pytest.mark.parametrize("low", [pytest.param(low, marks=pytest.mark.slow) for low in (-math.inf, -20.0)])
def test_a_tilt_without_gradient_is_as_exact(learned: lp.LatentPrior, low: float) -> None:
    def step(z: Tensor) -> Tensor:
        return torch.where(z[:, 0] > 0.5, 0.0, low)

    tilted = learned.tilt(step, generator=torch.Generator().manual_seed(0))
    u, cell = grid(-9, 9, 2, 801)
    z = learned.whitening.unwhiten(u.float())
    mass = (learned.log_prob_whitened(u.float()).double() + step(z).double()).exp().sum() * cell
    # Five standard errors, a false alarm in a million runs, and half a percent for cells that the step cuts.
    shift = tilted.normalizer.value - learned.normalizer.value
    assert abs(shift - float(mass.log())) < 5 * tilted.log_prob_stderr + 0.005
    draws = tilted.sample((4000,), generator=torch.Generator().manual_seed(1))
    assert (draws[:, 0] > 0.5).all()
    inside = learned.sample((20_000,), generator=torch.Generator().manual_seed(2))
    inside = inside[inside[:, 0] > 0.5]
    error = inside.std(0) * math.sqrt(1 / 2000 + 1 / len(inside))
    # Draws count for half of their number, as families; five standard errors.
    assert ((draws.mean(0) - inside.mean(0)).abs() < 5 * error).all()


def test_inference_mode_changes_nothing(learned: lp.LatentPrior) -> None:
    def at(z: Tensor) -> Tensor:
        return -z.square().sum(1)

    def drawn() -> Tensor:
        tilted = learned.tilt(at, particles=512, generator=torch.Generator().manual_seed(0))
        return tilted.sample((50,), generator=torch.Generator().manual_seed(1))

    with torch.inference_mode():
        inside = drawn()
    assert torch.equal(inside, drawn())


@pytest.mark.parametrize("found", [1.0, None, np.zeros(16)])
def test_a_tilt_returns_a_tensor(gaussian: lp.LatentPrior, found: Any) -> None:
    with pytest.raises(LatentPriorError, match=f"the tilt returned a {type(found).__name__} for"):
        gaussian.tilt(lambda z: found, particles=16)


def test_tilt_errors(gaussian: lp.LatentPrior, tmp_path: Path) -> None:
    with pytest.raises(LatentPriorError, match=r"returned shape \(.*, 1\) for .* rows: return one log potential a row"):
        gaussian.tilt(lambda z: z[:, :1])
    for bad in (math.nan, math.inf, -math.inf):
        with pytest.raises(LatentPriorError, match="it has no normaliser"):
            gaussian.tilt(lambda z, bad=bad: torch.full_like(z[:, 0], bad))
    with pytest.raises(CheckpointError, match="cannot be saved"):
        gaussian.tilt(slope).save_pretrained(tmp_path / "tilted")
    assert not (tmp_path / "tilted").exists()


def test_tilt_is_repeatable(gaussian: lp.LatentPrior) -> None:
    assert gaussian.tilt(slope).normalizer == gaussian.tilt(slope).normalizer


# Checking


@pytest.mark.parametrize("reference", ["gmm", "base"])
def test_right_normaliser_passes_and_shifted_fails(learned: lp.LatentPrior, reference: str) -> None:
    got = learned.check_normalizer(reference, draws=60_000)
    assert got.passed, got
    assert got.reference == reference
    assert got.stderr < 0.03
    for shift in (0.2,) if reference == "gmm" else (0.2, -0.2):
        normalizer = learned.normalizer._replace(value=learned.normalizer.value + shift)
        wrong = learned.with_ladder(learned.ladder, normalizer)
        result = wrong.check_normalizer(reference, draws=60_000)
        assert not result.passed, result
        assert result.value == pytest.approx(math.exp(-shift), abs=0.1)


@pytest.mark.parametrize("theirs", [torch.float32, torch.float64])
def test_check_by_a_distribution_of_the_users_own(crescent: Tensor, theirs: torch.dtype) -> None:
    prior = lp.fit(crescent, base="gmm:4", max_stages=0)
    wide = Independent(Normal(torch.zeros(2, dtype=theirs), torch.tensor([1.5, 3.0], dtype=theirs)), 1)
    got = prior.check_normalizer(wide, draws=100_000)
    assert got.passed, got
    assert got.reference == "Independent"


def test_check_warns_of_weights_with_a_heavy_tail(gaussian: lp.LatentPrior) -> None:
    # Their tail is of shape 1 - 0.35^2.
    narrow = Independent(Normal(torch.zeros(2), torch.tensor([0.35, 1.2])), 1)
    generator = torch.Generator().manual_seed(2)
    with pytest.warns(lp.LowESSWarning, match="the largest weights of 'Independent' follow a tail of shape"):
        found = gaussian.check_normalizer(narrow, draws=50_000, generator=generator)
    assert found.tail_shape == pytest.approx(1 - 0.35**2, abs=0.15)


def test_check_warns_and_refuses(gaussian: lp.LatentPrior) -> None:
    far = Independent(Normal(torch.full((2,), 9.0), torch.ones(2)), 1)
    with pytest.warns(lp.LowESSWarning, match="effective draws of the reference 'Independent'"):
        gaussian.check_normalizer(far, draws=2000)
    with pytest.raises(LatentPriorError, match="draws must be 1 or more, got 0"):
        gaussian.check_normalizer(draws=0)
    with pytest.raises(LatentPriorError, match="unknown reference 'x': choose gmm, base"):
        gaussian.check_normalizer("x")
