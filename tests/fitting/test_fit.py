import dataclasses
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import MultivariateNormal

import latentprior as lp
import latentprior.evaluation.known_densities
from clocks import Clock
from ladders import ladder_of
from latentprior import CheckpointError, Event, InvalidLatentsError, LatentPriorError, Latents
from latentprior.density.bases import NormalBase
from latentprior.density.ladder import Ladder, Stage, passed_afresh
from latentprior.density.ratios import Gain
from latentprior.evaluation.known_densities import Banana, SkewedProduct
from latentprior.fitting.run import Budget
from latentprior.fitting.stage import StageLearner
from latentprior.runtime.processes import SingleProcess

Fit = Callable[..., lp.LatentPrior]


BENT = Banana(curvature=0.5)


@pytest.fixture(scope="module")
def crescent() -> Tensor:
    """600 asymmetric rows ``(600, 2)``, less bent than those that other files share.

    The far tail of those is out of a normal's reach: the two ends of log Z then differ by a tenth of a nat on one
    release of torch and not on another, and ``fit`` warns. Here they differ by 0.03, the bound being 0.1.
    """
    return BENT.sample((600,), generator=torch.Generator().manual_seed(0)).float()


@pytest.fixture(scope="module")
def quick(crescent: Tensor) -> Fit:
    """A fit of two stages in a second."""
    stage = lp.StageSettings(width=16, depth=1, steps=400, batch_size=64, average=0.98, bound=1.5)

    def run(z: Any = crescent, **options: Any) -> lp.LatentPrior:
        return lp.fit(z, **{"base": "normal", "max_stages": 2, "settings": stage, **options})

    return run


def outcome(prior: lp.LatentPrior) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Everything a prior is, less the clock."""
    config, tensors = prior.state()
    config = {**config, "info": {k: v for k, v in config["info"].items() if k != "total_seconds"}}
    for stage in config["stages"]:
        stage["diagnostics"] = {k: v for k, v in stage["diagnostics"].items() if k != "seconds"}
    return config, tensors


def assert_same(a: lp.LatentPrior, b: lp.LatentPrior) -> None:
    (config_a, tensors_a), (config_b, tensors_b) = outcome(a), outcome(b)
    assert tensors_a.keys() == tensors_b.keys()
    for name, value in tensors_a.items():
        assert torch.equal(value, tensors_b[name]), name
    assert config_a == config_b


class Interruption(Exception):
    pass


ANY = -1


def interrupt(kind: str, stage: int, step: int) -> Callable[[Event], None]:
    def callback(event: Event) -> None:
        if event.kind == kind and stage in (event.stage, ANY) and event.step >= step:
            raise Interruption

    return callback


# Events, time and outcome


def test_events_come_in_order(quick: Fit) -> None:
    events: list[Event] = []
    prior = quick(callbacks=[events.append])
    kinds = "".join(
        {"base": "B", "stage": "S", "step": ".", "evaluate": "e", "learned": "L", "normalizer": "N", "end": "E"}[e.kind]
        for e in events
    )
    assert re.fullmatch(r"B(S(\.{100}e)+L){2}NE", kinds), kinds
    assert [e.seconds for e in events] == sorted(e.seconds for e in events)
    assert events[0].message == "normal"
    assert events[-1].message == prior.info["stopped"] == "max_stages"
    assert all(e.steps == 400 for e in events if e.kind in ("step", "evaluate"))
    learned = [e for e in events if e.kind == "learned"]
    assert [(e.stage, e.gain, e.gain_stderr) for e in learned] == [
        (i, s.gain, s.gain_stderr) for i, s in enumerate(prior.stages)
    ]
    steps = [e.step for e in events if e.kind == "step" and e.stage == 0]
    assert steps == list(range(1, len(steps) + 1))
    assert events[-2].seconds <= prior.info["total_seconds"] <= events[-1].seconds


@pytest.mark.parametrize(("rise", "stderr", "kept"), [(0.3, 0.01, True), (0.04, 0.001, False), (0.3, 0.16, False)])
def test_a_stage_is_kept_for_a_rise_that_is_large_and_sure(rise: float, stderr: float, kept: bool) -> None:
    stage = Stage(torch.nn.Identity(), 0.0, 0.0, 0.1, 0.01, {"log_prob_rise": rise, "log_prob_rise_stderr": stderr})
    assert stage.is_worthwhile is kept


def test_a_stage_is_measured_on_rows_and_particles_of_its_own(generator: torch.Generator) -> None:
    # f = a x + b on a standard normal: p e^f is N(a, 1) times exp(a^2 / 2 + b).
    a, b = 0.7, 0.4
    ratio = Affine(a, b)
    rows = a + torch.randn(4000, 1, generator=generator)
    before, after = (ladder_of(NormalBase(1), stages).fresh_particles(20_000, generator) for stages in ((), (ratio,)))
    ladder = ladder_of(NormalBase(1)).times(ratio, passed_afresh(before, after), Gain(0.1, 0.01), rows, steps=7)
    (stage,) = ladder.stages
    assert stage.log_normalizer == pytest.approx(a**2 / 2 + b, abs=4 * stage.log_normalizer_stderr)
    # The rise is KL(N(a, 1), N(0, 1)).
    error = stage.diagnostics["log_prob_rise_stderr"]
    assert stage.diagnostics["log_prob_rise"] == pytest.approx(a**2 / 2, abs=4 * error)
    assert error > max(stage.log_normalizer_stderr, a / math.sqrt(4000))
    assert (stage.gain, stage.gain_stderr, stage.diagnostics["steps"]) == (0.1, 0.01, 7)
    assert stage.is_worthwhile


class Affine(torch.nn.Module):
    def __init__(self, slope: float, shift: float) -> None:
        super().__init__()
        self.slope, self.shift = slope, shift

    def forward(self, u: Tensor) -> Tensor:
        return self.slope * u[:, 0] + self.shift


def test_a_stage_that_is_not_worthwhile_is_left_out(quick: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("latentprior.density.ladder.LEAST_RISE_NATS", 50.0)
    prior = quick()
    assert prior.stages == ()
    assert prior.info["stopped"] == "no rise"
    assert prior.log_prob_stderr == 0


def test_every_callback_hears_every_event(quick: Fit) -> None:
    a: list[Event] = []
    b: list[Event] = []
    quick(callbacks=iter([a.append, b.append]), max_stages=0)
    assert [e.kind for e in a] == [e.kind for e in b]
    assert [e.kind for e in a] == ["base", "normalizer", "end"]


def test_no_stages_is_the_base(quick: Fit, crescent: Tensor) -> None:
    prior = quick(max_stages=0)
    assert prior.stages == ()
    assert prior.log_prob_stderr == 0
    assert prior.bracket is None
    # The normal with the data's mean and the shrunk covariance.
    inverse = prior.whitening.inverse.double()
    exact = MultivariateNormal(prior.whitening.loc.double(), inverse @ inverse.T)
    torch.testing.assert_close(
        prior.log_prob(crescent), exact.log_prob(crescent.double()).float(), atol=1e-4, rtol=1e-4
    )


def test_stages_raise_the_held_out_density(quick: Fit, crescent: Tensor) -> None:
    test = BENT.sample((4000,), generator=torch.Generator().manual_seed(9)).float()
    none, two = quick(max_stages=0), quick(max_stages=1)
    rise = two.log_prob(test) - none.log_prob(test)
    # 4 standard errors above zero: not by chance.
    assert float(rise.mean()) > 4 * float(rise.std()) / math.sqrt(len(test))
    assert two.info["log_prob_held_out"] > two.info["log_prob_base"]


def test_no_gain_ends_the_ladder(generator: torch.Generator) -> None:
    z = torch.randn(3000, 2, generator=generator)
    short = lp.StageSettings(width=16, depth=1, steps=200, batch_size=128)
    prior = lp.fit(z, base="normal", settings=short)
    assert prior.stages == ()
    assert prior.info["stopped"] in ("no gain", "no rise")


def test_time_budget_is_kept_roughly(crescent: Tensor, clock: Clock) -> None:
    endless = lp.StageSettings(width=32, steps=10**6, batch_size=256, patience=10**6)
    begun, clock.pace = clock.now, 0.005
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LatentPriorWarning)
        prior = lp.fit(crescent, base="normal", max_stages=50, settings=endless, time_budget=3)
    assert clock.now - begun < 4
    assert prior.info["stopped"] == "time_budget"
    assert len(prior.stages) >= 1


def test_the_normaliser_is_left_what_it_takes_and_a_fifth_at_most() -> None:
    budget = Budget(100.0, SingleProcess())
    assert budget.deadline is not None
    assert budget.end is not None
    for seconds, reserved in ((3.0, 3.0), (50.0, 20.0)):
        budget.reserve(seconds)
        assert budget.end - budget.deadline == pytest.approx(reserved)
    endless = Budget(None, SingleProcess())
    endless.reserve(3.0)
    assert endless.deadline is None


@pytest.mark.filterwarnings("ignore::latentprior.LatentPriorWarning")
@pytest.mark.parametrize(("seconds", "begins"), [(0.2, 5.8), (100.0, 4.8)])
def test_a_stage_goes_on_until_the_normaliser_needs_the_time(
    crescent: Tensor, clock: Clock, monkeypatch: pytest.MonkeyPatch, seconds: float, begins: float
) -> None:
    monkeypatch.setattr("latentprior.fitting.fit.expected_seconds", lambda *_: seconds)
    endless = lp.StageSettings(width=16, depth=1, steps=10**6, batch_size=128, patience=10**6)
    events: list[Event] = []

    def tick(event: Event) -> None:
        # A step takes 5 ms, and nothing else takes any time. A stage looks at the clock every 100 steps.
        clock.advance(0.005 * (event.kind == "step"))

    lp.fit(crescent, base="normal", max_stages=1, settings=endless, time_budget=6, callbacks=[tick, events.append])
    normalizer = next(event.seconds for event in events if event.kind == "normalizer")
    assert begins - 1e-6 < normalizer < begins + 0.5 + 1e-6


def test_no_time_at_all_is_told_as_such(quick: Fit) -> None:
    prior = quick(time_budget=1e-6)
    assert prior.stages == ()
    assert prior.info["stopped"] == "time_budget"


def test_ample_time_changes_nothing(quick: Fit) -> None:
    without = quick(max_stages=1)
    assert len(without.stages) == 1
    assert_same(quick(max_stages=1, time_budget=3600), without)


# Determinism and resuming


@pytest.mark.parametrize("base", ["gmm:2", *(pytest.param(b, marks=pytest.mark.slow) for b in ("normal", "copula"))])
def test_same_seed_same_bits(quick: Fit, base: str) -> None:
    assert_same(quick(base=base, max_stages=1, seed=3), quick(base=base, max_stages=1, seed=3))


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("base", ["normal", pytest.param("flow", marks=pytest.mark.slow)])
def test_gradients_may_be_off_around_the_call(quick: Fit, crescent: Tensor, base: str, off: Any) -> None:
    if base == "flow":
        pytest.importorskip("zuko")
    with off():
        without = quick(base=base, max_stages=1)
    assert_same(without, quick(base=base, max_stages=1))


def test_other_seeds_differ(quick: Fit, crescent: Tensor) -> None:
    a, b = quick(max_stages=1, seed=3), quick(max_stages=1, seed=4)
    assert not torch.equal(a.log_prob(crescent), b.log_prob(crescent))
    assert not torch.equal(a.stages[0].network.network.last.weight, b.stages[0].network.network.last.weight)


def test_global_generator_decides_nothing(quick: Fit) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        a = quick(base="gmm:2", max_stages=1)
        torch.manual_seed(2)
        b = quick(base="gmm:2", max_stages=1)
    assert_same(a, b)


@pytest.fixture(scope="module")
def straight(quick: Fit) -> dict[str, lp.LatentPrior]:
    return {base: quick(base=base) for base in ("normal", "gmm:2")}


MOMENTS = [("base", 0, 0), ("step", 0, 30), ("step", 0, 250), ("learned", 0, 0), ("stage", 1, 0), ("step", 1, 199)]
MOMENTS += [("evaluate", 1, 300), ("normalizer", ANY, 0), ("end", ANY, 0)]


@pytest.mark.parametrize(
    ("base", "moments"),
    [
        ("normal", MOMENTS[2::3]),
        ("gmm:2", [MOMENTS[1], MOMENTS[-2]]),
        pytest.param("normal", MOMENTS, marks=pytest.mark.slow),
        pytest.param("gmm:2", [*MOMENTS[:3], *MOMENTS[-2:]], marks=pytest.mark.slow),
    ],
)
def test_resumed_run_ends_with_the_same_bits(
    quick: Fit, straight: dict[str, lp.LatentPrior], tmp_path: Path, base: str, moments: list
) -> None:
    for i, moment in enumerate(moments):
        folder = tmp_path / str(i)
        with pytest.raises(Interruption):
            quick(base=base, checkpoint_dir=folder, callbacks=[interrupt(*moment)])
        assert_same(quick(base=base, checkpoint_dir=folder, resume=True), straight[base])


def test_run_interrupted_again_and_again(quick: Fit, straight: dict[str, lp.LatentPrior], tmp_path: Path) -> None:
    for moment in (("step", 0, 150), ("step", 0, 350), ("step", 1, 150)):
        with pytest.raises(Interruption):
            quick(checkpoint_dir=tmp_path, resume=True, callbacks=[interrupt(*moment)])
    assert_same(quick(checkpoint_dir=tmp_path, resume=True), straight["normal"])


def test_resumed_steps_are_not_repeated(quick: Fit, tmp_path: Path) -> None:
    with pytest.raises(Interruption):
        quick(checkpoint_dir=tmp_path, callbacks=[interrupt("step", 0, 250)])
    events: list[Event] = []
    quick(checkpoint_dir=tmp_path, resume=True, callbacks=[events.append])
    assert next(e.step for e in events if e.kind == "step") == 201
    assert "base" not in {e.kind for e in events}
    assert events[0].seconds > 0


def test_resuming_a_finished_run_gives_it_again(
    quick: Fit, straight: dict[str, lp.LatentPrior], tmp_path: Path
) -> None:
    quick(checkpoint_dir=tmp_path)
    events: list[Event] = []
    again = quick(checkpoint_dir=tmp_path, resume=True, callbacks=[events.append])
    assert_same(again, straight["normal"])
    assert not [e for e in events if e.kind == "step"]


def test_checkpoints_change_nothing(quick: Fit, straight: dict[str, lp.LatentPrior], tmp_path: Path) -> None:
    assert_same(quick(checkpoint_dir=tmp_path), straight["normal"])
    assert len(list(tmp_path.iterdir())) == 2


def test_posteriors_resume_with_the_same_draws(quick: Fit, crescent: Tensor, tmp_path: Path) -> None:
    z = Latents.posterior(crescent, torch.full_like(crescent, 0.2))
    with pytest.raises(Interruption):
        quick(z, max_stages=1, checkpoint_dir=tmp_path, callbacks=[interrupt("step", 0, 150)])
    assert_same(quick(z, max_stages=1, checkpoint_dir=tmp_path, resume=True), quick(z, max_stages=1))


@pytest.mark.parametrize(
    "other",
    [
        {"z": "shifted"},
        {"seed": 1},
        {"base": "copula"},
        {"settings": lp.StageSettings(steps=100)},
        {"dtype": torch.float64},
        {"whitening": "diagonal"},
        {"validation": 0.2},
    ],
    ids=lambda v: next(iter(v)),
)
def test_checkpoint_of_another_run_is_refused(
    quick: Fit, crescent: Tensor, tmp_path: Path, other: dict[str, Any]
) -> None:
    quick(max_stages=0, checkpoint_dir=tmp_path)
    if other.get("z") == "shifted":
        other = {"z": crescent + 1e-3}
    with pytest.raises(CheckpointError, match="a run on other data or settings; choose another folder"):
        quick(checkpoint_dir=tmp_path, resume=True, **other)


def test_other_parameters_of_a_distribution_are_another_run(quick: Fit, tmp_path: Path) -> None:
    quick(max_stages=0, base=MultivariateNormal(torch.zeros(2), torch.eye(2)), checkpoint_dir=tmp_path)
    with pytest.raises(CheckpointError, match="other data or settings"):
        quick(max_stages=0, base=MultivariateNormal(torch.ones(2), torch.eye(2)), checkpoint_dir=tmp_path, resume=True)


def test_resume_needs_a_folder(quick: Fit, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="resume=True needs the checkpoint_dir"):
        quick(resume=True)
    assert quick(max_stages=0, checkpoint_dir=tmp_path / "new", resume=True).stages == ()


def test_prior_folder_is_no_checkpoint(quick: Fit, tmp_path: Path) -> None:
    quick(max_stages=0).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="holds a 'prior', not a 'fit'"):
        quick(checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("missing", ["seconds", "prior", "learner"])
def test_tampered_checkpoint_is_a_named_error(
    quick: Fit, tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from latentprior.runtime import run as resumable_run

    with pytest.raises(Interruption):
        quick(checkpoint_dir=tmp_path, callbacks=[interrupt("step", 0, 150)])
    real = resumable_run.load_state

    def tampered(*args: Any) -> Any:
        document, tensors = real(*args)
        document[missing] = {} if missing == "learner" else None
        return document, tensors

    monkeypatch.setattr(resumable_run, "load_state", tampered)
    with pytest.raises(CheckpointError):
        quick(checkpoint_dir=tmp_path, resume=True)


# Warnings and errors


def far_apart(n: int = 400) -> Tensor:
    return 6 + 0.3 * torch.randn(n, 2, generator=torch.Generator().manual_seed(0))


def test_saturation_is_told() -> None:
    short = lp.StageSettings(width=16, depth=1, steps=200, batch_size=128, average=0.95)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prior = lp.fit(far_apart(), base="normal", whitening="none", max_stages=1, settings=short)
    assert prior.stages[0].gain > 1.2
    told = [w for w in caught if issubclass(w.category, lp.StageSaturatedWarning)]
    assert len(told) == 1
    assert re.search(
        r"\(max_stages\) while stage 0 .* \(gain 1\.\d\d of 1\.39\): raise max_stages", str(told[0].message)
    )
    assert told[0].filename == __file__


def test_divergence_is_retried_once_then_named(quick: Fit) -> None:
    bad = lp.StageSettings(width=8, depth=1, steps=200, batch_size=64, learning_rate=1e30)
    events: list[Event] = []
    with (
        pytest.warns(lp.LearningRetriedWarning, match=r"at learning rate 1e\+30; .*; learned once more at 2\.5e\+29"),
        pytest.raises(lp.LearningDivergedError, match=r"stage 0: the held-out loss is not finite .* 2\.5e\+29"),
    ):
        quick(settings=bad, callbacks=[events.append])
    assert [e.step for e in events if e.kind == "step"].count(1) == 2


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning that meets NaN at step 250 of the first stage, but not at a smaller rate."""
    real = StageLearner._update

    def update(self: StageLearner, *args: Any) -> None:
        real(self, *args)
        if (self.index, self.step) == (0, 250) and self.learning_rate == self.settings.learning_rate:
            next(iter(self.optimisation.parameters.values())).data.fill_(math.nan)

    monkeypatch.setattr(StageLearner, "_update", update)


def test_divergence_is_mended_by_a_smaller_step(quick: Fit, poisoned: None, tmp_path: Path) -> None:
    events: list[Event] = []
    with pytest.warns(lp.LearningRetriedWarning, match="stage 0: .* learned once more at 0.00075") as caught:
        prior = quick(callbacks=[events.append])
    assert caught[0].filename == __file__
    assert [e.step for e in events if e.kind == "step" and e.stage == 0].count(1) == 2
    assert len(prior.stages) >= 1
    assert math.isfinite(prior.info["log_prob_held_out"])
    # Stopped in the second attempt, it goes on there: the same bits, and no other warning.
    seconds = iter(range(2))

    def stop(event: Event) -> None:
        if (event.kind, event.stage, event.step) == ("step", 0, 150) and next(seconds) == 1:
            raise Interruption

    with pytest.warns(lp.LearningRetriedWarning), pytest.raises(Interruption):
        quick(checkpoint_dir=tmp_path, callbacks=[stop])
    assert_same(quick(checkpoint_dir=tmp_path, resume=True), prior)


def test_particles_that_stand_still_are_named(quick: Fit, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Ladder.fresh_particles
    monkeypatch.setattr(
        Ladder,
        "fresh_particles",
        lambda self, *args, **how: real(self, *args, **how)._replace(acceptance=0.001 if self.length else 1.0),
    )
    with (
        pytest.warns(lp.LearningRetriedWarning),
        pytest.raises(lp.LearningDivergedError, match=r"stage 0: its particles cannot be moved .* acceptance 0\.001"),
    ):
        quick()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"device": "nowhere"}, "cannot compute on device nowhere"),
        ({"dtype": torch.int32}, "dtype must be a floating type"),
        ({"time_budget": math.nan}, "time_budget must be seconds, 0 or more, got nan"),
        ({"whitening": "half"}, "unknown whitening 'half': choose full, diagonal, none"),
    ],
)
def test_senseless_options_are_named(quick: Fit, options: dict[str, Any], says: str) -> None:
    with pytest.raises(LatentPriorError, match=says):
        quick(max_stages=0, **options)


BAD_COLUMNS = {
    "duplicate": lambda z: torch.cat([z, z], 1),
    "collinear": lambda z: torch.cat([z, z @ torch.tensor([[1.0], [2.0]])], 1),
    "fewer rows than columns": lambda z: torch.randn(10, 30, generator=torch.Generator().manual_seed(1)),
    "one row apart": lambda z: torch.cat([torch.zeros(300, 2), torch.ones(1, 2)]),
    "a row far out": lambda z: torch.cat([z, torch.full((1, 2), 1e30)]),
}


@pytest.mark.filterwarnings("ignore::latentprior.LatentPriorWarning")
@pytest.mark.parametrize("name", BAD_COLUMNS)
def test_bad_columns_give_a_density(quick: Fit, crescent: Tensor, name: str) -> None:
    z = BAD_COLUMNS[name](crescent)
    prior = quick(z, base="gmm:2", max_stages=1)
    assert prior.log_prob(z[:5]).isfinite().all()
    assert prior.sample((20,), torch.Generator().manual_seed(0)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, torch.uint8])
def test_types_of_rows(quick: Fit, crescent: Tensor, dtype: torch.dtype) -> None:
    z = (10 * crescent).round().abs().clamp_max(200).to(dtype)
    assert_same(quick(z, max_stages=0), quick(z.double(), max_stages=0))


@pytest.mark.parametrize(
    ("z", "options", "says"),
    [
        (np.ma.masked_greater(np.arange(20.0).reshape(10, 2), 15), {}, "masked values"),
        (torch.zeros(10, 2, device="meta"), {}, "on the device meta"),
        (torch.eye(10).to_sparse(), {}, "nested or sparse"),
        (np.zeros((10, 2)), {}, r"constant latent coordinate\(s\) 0, 1"),
        (np.c_[np.arange(10.0), np.full(10, 7.0)], {}, r"constant latent coordinate\(s\) 1 have no density: drop them"),
        (np.ones((1, 3)), {}, "need at least 2 rows to learn a prior, got 1"),
        (np.full((4, 2), np.nan), {}, "row 0"),
        (np.arange(4.0), {}, r"shape \(4,\)"),
        ("/nowhere/z.npy", {}, "no such file"),
        (None, {"max_stages": -1}, "max_stages must not be negative"),
        (None, {"validation": 0.0}, "share between 0 and 1, got 0"),
        (None, {"validation": 1.0}, "share between 0 and 1, got 1"),
        (None, {"validation": 7}, "share between 0 and 1, got 7"),
        (None, {"validation": np.ones((4, 3))}, r"held-out latents have shape \(3,\) a row, latents \(2,\)"),
        (None, {"validation": np.full((4, 2), np.inf)}, "NaN or infinite"),
    ],
)
def test_input_errors(quick: Fit, z: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidLatentsError, match=says):
        quick(**({} if z is None else {"z": z}), **options)


def test_unknown_base(quick: Fit) -> None:
    with pytest.raises(LatentPriorError, match="unknown base 'gauss'"):
        quick(base="gauss")


SENSELESS = [{"batch_size": 0}, {"width": 0}, {"bound": 0.0}, {"ratio": "x"}, {"learning_rate": math.inf}]
SENSELESS += [{"weight_decay": math.nan}, {"average": 2.0}, {"bound": math.inf}, {"precision": "float16"}]


@pytest.mark.parametrize("bad", SENSELESS)
def test_senseless_settings_are_named(quick: Fit, bad: dict[str, Any]) -> None:
    with pytest.raises(LatentPriorError):
        quick(settings=dataclasses.replace(lp.StageSettings(width=8, depth=1, steps=100, batch_size=64), **bad))


# Inputs


@pytest.mark.parametrize("n", [2, 3, 5])
@pytest.mark.parametrize("base", ["normal", "gmm", "copula"])
@pytest.mark.parametrize("max_stages", [0, 1])
def test_very_few_rows_give_a_prior(
    crescent: Tensor, tiny: lp.StageSettings, n: int, base: str, max_stages: int
) -> None:
    def fitted() -> lp.LatentPrior:
        return lp.fit(crescent[:n], base=base, max_stages=max_stages, settings=tiny)

    if base == "copula" and n == 2:
        # One row is held out: the other has no spread.
        with pytest.raises(LatentPriorError, match="marginals need at least 2 rows to learn from, got 1"):
            fitted()
        return
    prior = fitted()
    # The single row held out is no evidence for a stage.
    assert (prior.stages, prior.info["stopped"]) == ((), "no gain" if max_stages else "max_stages")
    assert torch.isfinite(prior.log_prob(crescent[:n])).all()
    assert (prior.log_prob(crescent[:n]) > prior.log_prob(crescent[:n] + 100)).all()
    assert torch.isfinite(prior.sample((50,), torch.Generator().manual_seed(0))).all()


def test_duplicates_are_learned_from(crescent: Tensor, quick: Fit) -> None:
    prior = quick(crescent[:20].repeat(30, 1), base="gmm:2", max_stages=0)
    assert torch.isfinite(prior.log_prob(crescent)).all()


def test_held_out_latents_are_used(quick: Fit, crescent: Tensor) -> None:
    prior = quick(crescent[100:], validation=crescent[:100].numpy(), max_stages=1)
    assert prior.info["log_prob_held_out"] == pytest.approx(
        float(prior.log_prob(crescent[:100]).mean()) - float(prior.whitening.log_abs_det), abs=1e-4
    )


def test_files_arrays_and_tensors_agree(quick: Fit, crescent: Tensor, tmp_path: Path) -> None:
    np.save(tmp_path / "z.npy", crescent.numpy())
    a = quick(max_stages=0)
    for z in (crescent.numpy(), tmp_path / "z.npy", str(tmp_path / "z.npy"), Latents(crescent), crescent.double()):
        assert_same(quick(z, max_stages=0), a)


def test_posteriors_widen_the_prior(crescent: Tensor) -> None:
    wide = lp.fit(Latents.posterior(crescent, torch.full_like(crescent, 2.0)), base="normal", max_stages=0)
    inverse = wide.whitening.inverse
    variance = (inverse @ inverse.T).diagonal()
    # Variance of the means + 4; a sample variance of 600 rows errs by sqrt(2/600) of itself: 5 of them.
    assert ((variance / (crescent.var(0) + 4) - 1).abs() < 5 * math.sqrt(2 / 600)).all()


def test_double_precision_throughout(quick: Fit, crescent: Tensor) -> None:
    prior = quick(dtype=torch.float64, max_stages=1)
    assert prior.log_prob(crescent.double()).dtype == torch.float64
    assert all(p.dtype == torch.float64 for p in prior.stages[0].network.parameters())


def test_spatial_latents_get_a_convolutional_ratio(generator: torch.Generator) -> None:
    volume = (0.8 * torch.randn(600, 1, 1, 1, generator=generator)).exp()
    z = volume * torch.randn(600, 2, 4, 4, generator=generator)
    short = lp.StageSettings(width=16, depth=1, steps=200, batch_size=64, average=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lp.LatentPriorWarning)
        prior = lp.fit(z, base="normal", max_stages=1, settings=short)
    assert len(prior.stages) == 1
    assert prior.stages[0].network.spec["kind"] == "conv"
    assert prior.sample((3,), generator).shape == (3, 2, 4, 4)


def test_distribution_as_base(quick: Fit, crescent: Tensor) -> None:
    mine = MultivariateNormal(crescent.mean(0), torch.cov(crescent.T))
    torch.testing.assert_close(
        quick(base=mine, max_stages=0).log_prob(crescent), mine.log_prob(crescent), atol=1e-4, rtol=1e-4
    )
    assert quick(base=mine, max_stages=1).check_normalizer("base", draws=20_000).passed


def test_caller_data_is_not_changed(quick: Fit, crescent: Tensor) -> None:
    before = crescent.clone()
    quick(max_stages=1)
    assert torch.equal(crescent, before)


# Affine equivariance: log p_{a z + b}(a z + b) = log p_z(z) - sum log |a|

SCALES = st.tuples(*[st.sampled_from([-40.0, -0.02, 0.5, 3.0, 1e4]) for _ in range(2)])
SHIFTS = st.tuples(*[st.sampled_from([0.0, -3.0, 100.0]) for _ in range(2)])


def equivariance_error(quick: Fit, z: Tensor, a: tuple, b: tuple, **options: Any) -> float:
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64) * torch.tensor(a).abs()
    z = z.double()
    one = quick(z, dtype=torch.float64, **options).log_prob(z)
    two = quick(a * z + b, dtype=torch.float64, **options).log_prob(a * z + b) + a.abs().log().sum()
    return float((one - two).abs().max())


@settings(deadline=None, max_examples=12, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCALES, SHIFTS)
def test_normal_base_is_equivariant(quick: Fit, crescent: Tensor, a: tuple, b: tuple) -> None:
    assert equivariance_error(quick, crescent, a, b, max_stages=0) < 1e-6


@settings(deadline=None, max_examples=6, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SCALES, SHIFTS)
def test_mixture_base_is_equivariant(quick: Fit, crescent: Tensor, a: tuple, b: tuple) -> None:
    # A change of sign or rounding may lead EM by another way to the same place or nearly so; scales do not.
    positive = tuple(abs(v) for v in a)
    assert equivariance_error(quick, crescent, positive, b, base="gmm:2", max_stages=0) < 1e-2


def test_ladder_is_equivariant(quick: Fit, crescent: Tensor) -> None:
    # The same arithmetic up to rounding, which a few hundred steps of learning amplify.
    assert equivariance_error(quick, crescent, (40.0, 0.02), (1.0, -3.0), max_stages=1) < 0.02


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_huge_and_tiny_units(quick: Fit, crescent: Tensor, scale: float) -> None:
    z = crescent.double() * scale
    value = quick(z, base="gmm:2", max_stages=0).log_prob(z)
    expected = quick(base="gmm:2", max_stages=0).log_prob(crescent) - 2 * math.log(scale)
    torch.testing.assert_close(value, expected, atol=0.02, rtol=1e-3)


@pytest.mark.parametrize(
    ("z", "says"),
    [
        (lambda z: z * 1e50, r"coordinate\(s\) \[0, 1\] are too large, small or far from zero for torch.float32"),
        (lambda z: z * 1e-50, "too large, small or far from zero"),
        (lambda z: z + 1e8, "too large, small or far from zero"),
        (lambda z: z * torch.tensor([1.0, 1e60], dtype=torch.float64), r"coordinate\(s\) \[1\] are too large"),
    ],
)
def test_numbers_beyond_single_precision_are_named(
    quick: Fit, crescent: Tensor, z: Callable[[Tensor], Tensor], says: str
) -> None:
    # Learned in float32, such rows overflow, vanish or fall onto a few steps of rounding.
    with pytest.raises(InvalidLatentsError, match=says):
        quick(z(crescent.double()), base="gmm:2", max_stages=0)


@settings(deadline=None, max_examples=10, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.sampled_from(["normal", "copula"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_shape_fits_scores_and_samples(m: int, shape: list[int], base: str, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(m)
    z = SkewedProduct(math.prod(shape)).sample((40,), generator=g).reshape(40, *shape)
    prior = lp.fit(z, base=base, max_stages=0, dtype=dtype)
    value = prior.log_prob(z[:m])
    assert value.shape == (m,)
    assert value.dtype == dtype
    assert torch.isfinite(value).all()
    assert prior.sample((m, 2), g).shape == (m, 2, *shape)
    assert prior.log_prob(prior.sample((m,), g)).shape == (m,)


@pytest.mark.parametrize("bound", [0.1, -0.1])
def test_a_ladder_ends_by_the_gain_at_the_odds(crescent: Tensor, monkeypatch: pytest.MonkeyPatch, bound: float) -> None:
    """Not by the balanced one, which is told."""

    def learn(self: StageLearner, *args: Any, real: Any = StageLearner.learn, **options: Any) -> Any:
        return real(self, *args, **options)._replace(bound=bound, gain=Gain(-bound, 0.01))

    monkeypatch.setattr(StageLearner, "learn", learn)
    settings = lp.StageSettings(width=16, depth=1, steps=200, batch_size=64, average=0.95, weight_decay=0.1)
    prior = lp.fit(crescent, base="normal", max_stages=1, settings=settings)
    assert len(prior.stages) == (bound > 0)
    assert prior.info["stopped"] == ("max_stages" if bound > 0 else "no gain")
