"""Joint learning of a decoder and its multi-stage prior, in the order of the paper's algorithm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..data.images import Images
from ..models.model import LatentVariableModel
from ..runtime.events import Callback, Kind
from ..runtime.processes import Processes, SingleProcess
from ..runtime.run import Run
from .config import TrainingConfig
from .joint_learner import JointLearner
from .resumable import keep_snapshot, learn_with_one_retry

__all__ = ["TrainingConfig", "joint_run", "save", "start", "train"]


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
    r"""Learn the decoder :math:`p_\theta(x \mid z)` and the ladder :math:`p_k(z)` together.

    For every stage k: posterior samples :math:`z^+ \sim p_\theta(z \mid x) \propto p_\theta(x \mid z)\,p_k(z)` and
    prior samples :math:`z^- \sim p_k(z)`; the log ratio :math:`f_k` descends the logistic loss between them;
    :math:`\theta` ascends :math:`\log p_\theta(x \mid z^+)`. Then :math:`p_{k+1} = p_k\,e^{f_k - c_k}`: the prior has
    moved, and with it the posterior that the next stage aims at.

    Parameters
    ----------
    model : LatentVariableModel
        The model; it is changed. Its encoder, if it has one, must return ``(mean, scale)``.
    images : Images
        What it learns from. ``config.held_out`` of them, chosen at random, train nothing: gains are measured on them.
    config : TrainingConfig, optional
        The settings.
    seed : int
        Seed of all random draws.
    checkpoint_dir : str or Path, optional
        Folder where the state is saved at every evaluation.
    resume : bool
        Whether to go on from the state in ``checkpoint_dir``, if there is one. On a CPU with the same number of
        threads the run then ends with the same bytes as one that was never stopped.
    processes : Processes, optional
        Those that learn this model together; by default this one alone.
    callbacks : iterable of callables
        They receive every :class:`~latentprior.Event`. What they raise ends the run, which can then be resumed.

    Returns
    -------
    LatentVariableModel
        ``model``. Its networks have the moving average of their weights; its prior is the ladder, whose gains and
        normalisers are in nats.

    Raises
    ------
    CheckpointError
        For a ``checkpoint_dir`` of another run, or one that another run is writing to.
    LearningDivergedError
        When a loss is not finite or chains run away for the second time.
    LatentPriorError
        For too few images, or an encoder that does not serve.

    Warns
    -----
    LearningRetriedWarning
        When that happens for the first time: learning goes back to its last evaluation and continues with a quarter
        of its rates and step sizes.

    Notes
    -----
    Source: Xiao and Han (NeurIPS 2022), algorithm 1 and eqs. 5, 6 and 8; bounded ratios, normalisers, the encoder's
    start, particles and the adaptive switch are this package's.
    """
    learner = JointLearner(model, images, config or TrainingConfig(), seed, processes or SingleProcess(model.device))
    run = joint_run(learner, checkpoint_dir, callbacks)
    with run.lock():
        start(run, learner, resume=resume)
        learn_with_one_retry(run, learner, lambda: _learn(run, learner))
        run.tell("normalizer", learner.task.stage, model=model)
        learner.normalize()
        model.prior.info["total_seconds"] = run.seconds()
        save(run, learner)
        run.tell("end", learner.task.stage, model=model)
    return model


def _learn(run: Run, learner: JointLearner) -> None:
    """Go on from where the learner stands until nothing is left to learn: algorithm 1 of the paper."""
    task = learner.task
    while learner.wants_stage:
        while not learner.ratio.finished:
            x, index = task.batch()
            posterior = learner.posterior.sample(x, index)
            prior = learner.prior.sample(len(x))
            losses = learner.ratio.update(posterior, prior)
            losses |= learner.decoder.update(x, posterior)
            task.step += 1
            _tell(run, learner, "step", losses)
            if task.step % task.config.evaluate_every == 0:
                learner.evaluate()
                save(run, learner)
                _tell(run, learner, "evaluate", losses)
        k, steps = task.stage, task.step
        stage = learner.next_stage()
        save(run, learner)
        if stage is not None:
            gain = (stage.gain, stage.gain_stderr)
            run.tell("learned", k, steps, task.config.steps, gain, model=task.model)
    while task.settled < task.config.settle_steps:
        x, index = task.batch()
        losses = learner.decoder.update(x, learner.posterior.sample(x, index))
        task.settled += 1
        run.tell("settle", task.stage, task.settled, task.config.settle_steps, losses=losses, model=task.model)
        if task.settled % task.config.evaluate_every == 0:
            save(run, learner)


def _tell(run: Run, learner: JointLearner, kind: Kind, losses: Mapping[str, float]) -> None:
    task = learner.task
    run.tell(kind, task.stage, task.step, task.config.steps, learner.ratio.gain, losses=losses, model=task.model)


def joint_run(learner: JointLearner, folder: str | Path | None, callbacks: Iterable[Callback]) -> Run:
    """Return the run of a joint learner.

    Parameters
    ----------
    learner : JointLearner
        What learns.
    folder : str, Path or None
        Where its state is saved.
    callbacks : iterable of callables
        They receive every event.

    Returns
    -------
    Run
        A run of the kind ``"training"``.
    """
    return Run(folder, "training", learner.identity, callbacks, learner.task.processes.rank)


def start(run: Run, learner: JointLearner, *, resume: bool) -> None:
    """Let the learner stand where its run was saved, if it is to be resumed.

    Parameters
    ----------
    run : Run
        The run.
    learner : JointLearner
        What learns.
    resume : bool
        Whether to read the folder.
    """
    saved = run.load() if resume else None
    if saved is not None:
        with run.restoring():
            learner.restore(*saved)
    keep_snapshot(run, learner)


def save(run: Run, learner: JointLearner) -> None:
    """Save everything that the next step depends on; the other processes wait for the first one.

    Parameters
    ----------
    run : Run
        The run.
    learner : JointLearner
        What learns.
    """
    run.save(*keep_snapshot(run, learner))
    learner.task.processes.wait()
