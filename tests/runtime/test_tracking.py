import json
import math
import sys

import pytest
import torch

import latentprior as lp
from latentprior.errors import LatentPriorError, MissingExtraError
from latentprior.runtime.events import Event
from latentprior.runtime.tracking import JSONLinesTracker, TensorBoardTracker, tracked


class Kept:
    def __init__(self):
        self.told = []

    def scalars(self, step, values):
        self.told.append((step, dict(values)))

    def images(self, step, name, x):
        self.told.append((step, name))

    def close(self):
        pass


def losses(k):
    return {"ratio": float(k), "reconstruction": 0.5}


def test_training_events_become_curves_by_phase():
    kept = Kept()
    tell = tracked(kept, every=2)
    for event in [
        *(Event("autoencoder", 0, k, 4, losses={"divergence": float(k)}) for k in (1, 2)),
        *(Event("step", 3, k, 4, losses=losses(k)) for k in (1, 2, 3)),
        Event("evaluate", 3, 3, 4, 0.25, 0.5, losses=losses(3)),
        Event("settle", 4, 2, 4, losses=losses(9)),
        Event("normalizer", 4),
        Event("end", 4),
    ]:
        tell(event)
    assert kept.told == [
        (2, {"autoencoder/divergence": 2.0}),
        (2, {"stage-3/ratio": 2.0, "stage-3/reconstruction": 0.5}),
        (3, {"stage-3/ratio": 3.0, "stage-3/reconstruction": 0.5, "stage-3/gain": 0.25, "stage-3/gain_stderr": 0.5}),
        (2, {"settle/ratio": 9.0, "settle/reconstruction": 0.5}),
    ]


def test_a_stage_that_joined_tells_its_gain():
    kept = Kept()
    tracked(kept)(Event("learned", 1, 40, 40, 0.25, 0.5))
    assert kept.told == [(1, {"ladder/gain": 0.25, "ladder/gain_stderr": 0.5})]


def test_a_fit_tells_evaluations_and_stages(crescent, tiny):
    kept = Kept()
    prior = lp.fit(crescent, base="normal", max_stages=1, settings=tiny, callbacks=[tracked(kept)])
    assert kept.told[0][1].keys() == {"prior-stage-0/gain", "prior-stage-0/gain_stderr"}
    assert kept.told[-1][0] == 0
    assert kept.told[-1][1]["ladder/gain"] == pytest.approx(prior.stages[0].gain)


def test_steps_that_count_are_checked():
    with pytest.raises(LatentPriorError, match="every"):
        tracked(Kept(), every=0)


def test_lines_are_json_at_once_and_appended(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    for step in (10, 20):
        tracker = JSONLinesTracker(path)
        tracker.scalars(step, {"a/b": math.nan if step == 20 else 1.5})
        # Before it is closed: a run that is killed keeps its lines.
        assert len(path.read_text().splitlines()) == step // 10
        tracker.images(step, "samples", torch.zeros(1, 1, 2, 2))
        tracker.close()
        tracker.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "a/b": 1.5},
        {"step": 20, "a/b": None},
    ]
    with pytest.raises(LatentPriorError, match="cannot write the log"):
        JSONLinesTracker(path / "below")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_numbers_and_images(tmp_path):
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tracker = TensorBoardTracker(tmp_path)
    for step in (10, 20):
        tracked(tracker)(Event("step", 0, step, 40, losses=losses(step)))
    x = torch.full((1, 1, 4, 4), -1.0)
    x[..., 0] = 1.0
    tracker.images(20, "samples", x)
    tracker.close()
    found = event_accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in found.Scalars("stage-0/ratio")] == [(10, 10.0), (20, 20.0)]
    (image,) = found.Images("samples")
    assert (image.step, image.width, image.height) == (20, 4, 4)


def test_without_tensorboard_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"latentprior\[tracking\]"):
        TensorBoardTracker(tmp_path)
