"""Joint learning of a decoder and its multi-stage prior, in the order of the paper's algorithm."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from ..data.images import Images
from ..errors import LearningDivergedError, LearningRetriedWarning, warn
from ..models.model import LatentVariableModel
from ..runtime.events import TrainingEvent
from ..runtime.processes import Processes, SingleProcess
from ..storage.checkpoint import locked
from .config import TrainingConfig
from .joint_learner import JointLearner
from .joint_run import TrainingRun

__all__ = ["TrainingConfig", "TrainingEvent", "train"]


Callback = Callable[[TrainingEvent], None]


def train(
    model: LatentVariableModel,
    images: Images,
    config: TrainingConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    processes: Processes | None = None,
    callbacks: Iterable[Callback] = (),
) -> LatentVariableModel:
    r"""Learn the decoder :math:`p_\theta(x \mid z)` and the ladder :math:`p_k(z)` together; returns ``model``.

    For every stage k: posterior samples :math:`z^+ \sim p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)` and
    prior samples :math:`z^- \sim p_k(z)`; the log ratio :math:`f_k` descends the logistic loss between them;
    :math:`\theta` ascends :math:`\log p_\theta(x \mid z^+)`. Then :math:`p_{k+1} = p_k\,e^{f_k - c_k}`: the prior, and
    with it the posterior that the next stage aims at, have both moved.

    The last ``held_out`` images after a shuffle train nothing: gains are measured on them. Gains and normalisers
    are in nats. The model's networks end with the moving average of their weights.

    Where a loss is not finite or chains run away, learning goes back to its last evaluation and on with quarter rates
    and steps, with a :class:`~latentprior.errors.LearningRetriedWarning`; the second time it raises
    :class:`~latentprior.errors.LearningDivergedError`. Raises :class:`~latentprior.errors.CheckpointError` for a
    ``checkpoint_dir`` of another run, or one that another run is writing to.

    Source: Xiao and Han (NeurIPS 2022), algorithm 1 and eqs. 5 to 9; bounded ratios, normalisers, the encoder's
    start, particles and the adaptive switch are this package's.
    """
    learner = JointLearner(model, images, config or TrainingConfig(), seed, processes or SingleProcess(model.device))
    run = TrainingRun(learner, checkpoint_dir, callbacks)
    with locked(run.folder if learner.processes.rank == 0 else None):
        if resume:
            run.load()
        run.keep()
        while True:
            try:
                _learn(run, learner)
                break
            except LearningDivergedError as error:
                if learner.pace < 1:
                    raise
                run.go_back()
                learner.pace = 0.25
                message = (
                    f"{error}; gone back to step {learner.step} of stage {learner.stage}, on at a quarter of these"
                )
                warn(message, LearningRetriedWarning)
        run.tell("normalizer", {})
        learner.normalize()
        model.prior.info["total_seconds"] = run.seconds()
        run.save()
        run.tell("end", {})
    return model


def _learn(run: TrainingRun, learner: JointLearner) -> None:
    """Go on from where the learner stands until nothing is left to learn."""
    while learner.stage_wanted:
        while not learner.stage_finished:
            x, index = learner.batch()
            posterior = learner.posterior_samples(x, index)
            prior = learner.prior_samples(len(x))
            losses = learner.update_ratio(posterior, prior)
            losses |= learner.update_decoder(x, posterior)
            learner.step += 1
            run.tell("step", losses)
            if learner.step % learner.config.evaluate_every == 0:
                learner.evaluate()
                run.save()
                run.tell("evaluate", losses)
        learner.next_stage()
        run.save()
        run.tell("learned", {})
    while learner.settled < learner.config.settle_steps:
        x, index = learner.batch()
        losses = learner.update_decoder(x, learner.posterior_samples(x, index))
        learner.settled += 1
        run.tell("settle", losses)
        if learner.settled % learner.config.evaluate_every == 0:
            run.save()
