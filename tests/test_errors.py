import inspect
import pickle

import pytest
import torch

import latentprior as lp
from latentprior import errors

NAMES = sorted(errors.__all__)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_is_public_documented_and_of_one_family(name: str) -> None:
    kind = getattr(errors, name)
    assert getattr(lp, name) is kind
    assert inspect.getdoc(kind)
    family = lp.LatentPriorWarning if name.endswith("Warning") else lp.LatentPriorError
    assert issubclass(kind, family)


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (lp.InvalidLatentsError, ValueError),
        (lp.CheckpointError, ValueError),
        (lp.MissingExtraError, ImportError),
        (lp.LearningDivergedError, RuntimeError),
        (lp.ProcessLostError, RuntimeError),
        (lp.LatentPriorWarning, UserWarning),
    ],
)
def test_errors_can_be_caught_by_their_builtin_kind(kind: type, builtin: type) -> None:
    assert issubclass(kind, builtin)


def test_errors_reach_other_processes_as_they_are() -> None:
    for error in (lp.MissingExtraError("base='flow'", "flow"), lp.CheckpointError("damaged")):
        found = pickle.loads(pickle.dumps(error))
        assert (type(found), str(found)) == (type(error), str(error))


def test_all_lists_every_class() -> None:
    defined = {n for n, v in vars(errors).items() if inspect.isclass(v) and v.__module__ == errors.__name__}
    assert defined == set(errors.__all__)


def test_missing_extra_names_the_command() -> None:
    assert (
        str(lp.MissingExtraError("base='flow'", "flow"))
        == "base='flow' needs an extra: pip install 'latentprior[flow]'"
    )


def test_warnings_name_the_line_that_called(generator: torch.Generator) -> None:
    prior = lp.fit(torch.randn(300, 2, generator=generator), base="normal", max_stages=0)
    far = torch.distributions.Independent(torch.distributions.Normal(torch.full((2,), 40.0), torch.ones(2)), 1)
    with pytest.warns(lp.LowESSWarning) as caught:
        prior.check_normalizer(far, draws=1000)
    assert [w.filename for w in caught] == [__file__]
    with pytest.warns(lp.LowESSWarning) as caught:
        errors.warn("told at once", lp.LowESSWarning)
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("Error") and name != "MissingExtraError"])
def test_messages_are_one_line_whatever_a_file_holds(name: str) -> None:
    kind = getattr(errors, name)
    # A line's end, a terminal's escape, a mark that turns the direction of text, half a surrogate pair.
    told = str(kind("file ± é: a\nb\r\x1b[31m\u202e\ud800"))
    assert told == "file ± é: a\\nb\\r\\x1b[31m\\u202e\\ud800"
    assert told.encode()
    again = pickle.loads(pickle.dumps(kind(told)))
    assert (type(again), str(again)) == (kind, told)


def test_long_messages_are_cut_in_their_middle() -> None:
    told = str(lp.CheckpointError("begin " + "x" * 10_000 + " end"))
    assert len(told) <= errors.LONGEST_MESSAGE
    assert told.startswith("begin xxx")
    assert told.endswith("xxx end")
    assert " [...] " in told
    whole = "y" * errors.LONGEST_MESSAGE
    assert str(lp.CheckpointError(whole)) == whole
