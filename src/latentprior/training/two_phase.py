"""Two-phase learning: an autoencoder first, then the ladder on its aggregate posterior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.images import Images
from ..data.latents import Latents
from ..errors import CheckpointError, LatentPriorError, LearningDivergedError, LearningRetriedWarning, warn
from ..fitting.fit import fit
from ..models.model import LatentVariableModel
from ..runtime.events import Callback as FitCallback
from ..runtime.events import TrainingEvent
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import UNFIT, load_state, locked, save_state
from .config import AutoencoderConfig
from .resumable import epoch_rows, foreign, images_identity, network_state, phase_folder, restore_network

__all__ = ["AutoencoderConfig", "aggregate_posterior", "refit_prior", "train_autoencoder", "train_two_phase"]

SAVE_EVERY, SAVE_SECONDS = 250, 20.0


def train_autoencoder(
    model: LatentVariableModel,
    images: Images,
    config: AutoencoderConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
) -> LatentVariableModel:
    r"""Learn the decoder and the encoder of ``model``; its prior is left as it is. Returns ``model``.

    ``vae`` ascends :math:`\mathbb E_{q(z \mid x)} \log\mathcal N(x; g(z), \sigma^2 I) - KL(q(z \mid x)\,\|\,N(0, I))`,
    with :math:`\sigma^2` at its optimum, the mean squared error (Rybkin, Daniilidis and Levine 2021, eq. 6), unless
    it is kept fixed. ``ae`` descends :math:`\|x - g(e(x) + s\,\epsilon)\|^2 + \lambda \|e(x)\|^2 / 2` (Ghosh et al.
    2020, eq. 8, with noise).

    The networks end with the moving average of their weights. With a ``checkpoint_dir`` the state is saved every 250
    steps or 20 seconds, and ``resume=True`` goes on from there. Where the loss is not finite, learning goes back 250
    steps at most and on at a quarter of the rate, with a :class:`~latentprior.errors.LearningRetriedWarning`; the
    second time it raises :class:`~latentprior.errors.LearningDivergedError`. Raises
    :class:`~latentprior.errors.CheckpointError` for a ``checkpoint_dir`` of another run, or one in use.
    """
    learner = _AutoencoderLearner(model, images, config or AutoencoderConfig(), seed)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    with locked(folder):
        if resume:
            learner.load(folder)
        _learn(learner, folder, tuple(callbacks))
    return model


def _learn(
    learner: _AutoencoderLearner, folder: Path | None, callbacks: tuple[Callable[[TrainingEvent], None], ...]
) -> None:
    """Take all steps that are left; retried once where the loss stops being finite."""
    model = learner.model
    begun = saved = time.monotonic()
    kept = _copied(learner.state())
    while learner.step < learner.config.steps:
        try:
            losses = learner.update()
        except LearningDivergedError as error:
            if learner.pace < 1:
                raise
            learner.restore(*kept)
            learner.pace = 0.25
            message = f"{error}; gone back to step {learner.step}, on at a quarter of it"
            warn(message, LearningRetriedWarning)
            continue
        if learner.step % SAVE_EVERY == 0 and learner.pace == 1:
            kept = _copied(learner.state())
        due = learner.step % SAVE_EVERY == 0 or learner.step == learner.config.steps
        if folder is not None and (due or time.monotonic() - saved > SAVE_SECONDS):
            learner.save(folder)
            saved = time.monotonic()
        seconds = time.monotonic() - begun
        event = TrainingEvent(
            "autoencoder", 0, learner.step, learner.config.steps, losses, seconds=seconds, model=model
        )
        for callback in callbacks:
            callback(event)
    learner.finish()


State = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _copied(state: State) -> State:
    return state[0], {name: value.detach().clone() for name, value in state[1].items()}


class _AutoencoderLearner:
    """The networks, their moving averages and the optimiser; all draws are functions of ``seed`` and the step."""

    def __init__(self, model: LatentVariableModel, images: Images, config: AutoencoderConfig, seed: int) -> None:
        if model.encoder is None:
            raise LatentPriorError("two-phase learning needs a model with an encoder")
        self.model, self.encoder, self.images, self.config, self.seed = model, model.encoder, images, config, seed
        self.networks = torch.nn.ModuleDict({"decoder": model.decoder, "encoder": model.encoder})
        self.networks.requires_grad_(True).train()
        self.average = {name: p.detach().clone() for name, p in self.networks.named_parameters()}
        groups: list[dict[str, Any]] = [
            {"params": list(model.decoder.parameters()), "weight_decay": config.weight_decay},
            {"params": list(model.encoder.parameters()), "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
        shapes = [(k, tuple(v.shape)) for k, v in self.networks.named_parameters()]
        self.identity = images_identity(("autoencoder", asdict(config), seed, model.sigma, shapes), images)
        self.step, self.error, self.pace = 0, 0.0, 1.0

    def update(self) -> dict[str, float]:
        """One step; returns the losses, per pixel and in nats an image."""
        config, model, step = self.config, self.model, self.step
        draws = derived_generator(model.device, self.seed, "autoencoder", step)
        rows = epoch_rows(len(self.images), step * config.batch_size, config.batch_size, self._order)
        x = self.images.batch(rows, device=model.device).to(model.prior.dtype)
        for group in self.optimizer.param_groups:
            group["lr"] = self.pace * config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        out = self.encoder(x)
        if config.kind == "vae" and not isinstance(out, tuple):
            raise LatentPriorError("kind='vae' needs an encoder that returns (mean, scale): give one, or kind='ae'")
        mean, scale = out if isinstance(out, tuple) else (out, torch.zeros_like(out))
        noise = torch.randn(mean.shape, generator=draws, device=draws.device, dtype=mean.dtype)
        z = mean + (scale if config.kind == "vae" else config.noise) * noise
        squared = (model.decoder(z.reshape(len(x), *model.event_shape)) - x).square().flatten(1).sum(1).mean()
        reconstruction = float(squared.detach()) / x[0].numel()
        # Short at first, or the untrained networks' error would stay in sigma for hundreds of steps.
        memory = min(0.99, step / (step + 9))
        self.error = memory * self.error + (1 - memory) * reconstruction
        if config.kind == "vae":
            if config.learn_sigma:
                model.sigma = max(1e-3, math.sqrt(self.error))
            divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).flatten(1).sum(1).mean()
            loss = squared / (2 * model.sigma**2) + divergence
            losses = {"reconstruction": reconstruction, "divergence": float(divergence.detach())}
        else:
            loss = squared + config.latent_penalty * 0.5 * mean.square().flatten(1).sum(1).mean()
            losses = {"reconstruction": reconstruction}
        if not math.isfinite(float(loss.detach())):
            raise LearningDivergedError(f"the autoencoder's loss is not finite at step {step}; lower learning_rate")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        decay = min(config.average, self.step / (self.step + 9))
        with torch.no_grad():
            for name, parameter in self.networks.named_parameters():
                self.average[name].lerp_(parameter, 1 - decay)
        return losses

    def _order(self, epoch: int) -> torch.Generator:
        return derived_generator(torch.device("cpu"), self.seed, "epoch", epoch)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the averaged weights in place."""
        for name, parameter in self.networks.named_parameters():
            parameter.copy_(self.average[name])
        if self.config.kind == "ae":
            self.model.sigma = max(1e-3, math.sqrt(self.error))
        self.networks.requires_grad_(False).eval()

    def save(self, folder: Path) -> None:
        """Write everything that the next step depends on, atomically."""
        document, tensors = self.state()
        save_state(folder, "autoencoder", {"identity": self.identity, **document}, tensors)

    def state(self) -> State:
        """What :meth:`restore` needs, as JSON and tensors."""
        document = {"step": self.step, "error": self.error, "pace": self.pace, "sigma": self.model.sigma}
        return document, network_state("networks", self.networks, self.average, self.optimizer)

    def restore(self, document: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """Stand where :meth:`state` was taken."""
        restore_network("networks", self.networks, self.average, self.optimizer, tensors)
        self.step, self.error = int(document["step"]), float(document["error"])
        self.pace, self.model.sigma = float(document.get("pace", 1.0)), float(document["sigma"])

    def load(self, folder: Path | None) -> None:
        """Stand where the folder's run was saved; a folder without one begins afresh."""
        if folder is None:
            raise CheckpointError("resume=True needs the checkpoint_dir of the run to go on with")
        if not (folder / "config.json").exists():
            return
        state, tensors = load_state(folder, "autoencoder")
        if state.get("identity") != self.identity:
            raise foreign(folder)
        try:
            self.restore(state, tensors)
        except UNFIT as error:
            raise CheckpointError(f"{folder}: its checkpoint is damaged ({type(error).__name__})") from None


def aggregate_posterior(
    model: LatentVariableModel,
    images: Images,
    *,
    source: Literal["encoder", "means", "posterior"] = "encoder",
    noise: float = 0.0,
    draws: int = 1,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Latents:
    r"""The latents that a prior is to be learned on.

    ``encoder`` : the encoder's posteriors, drawn afresh at every use. ``means`` : its means, with ``noise`` on them.
    ``posterior`` : one draw an image of :meth:`LatentVariableModel.infer`, which takes ``options``; of more ``draws``
    the mean :math:`\bar z` and, drawn afresh at every use, normal noise of their own scale
    :math:`\sqrt{\sum_j (z_j - \bar z)^2 / m}`, which gives the mixture of all images the right second moments.
    """
    if source not in ("encoder", "means", "posterior"):
        raise LatentPriorError(f"unknown source {source!r}: choose encoder, means or posterior")
    if draws < 1:
        raise LatentPriorError(f"draws must be 1 or more, got {draws}")
    means, scales = [], []
    for x in images.batches(batch_size, device=model.device):
        if source == "posterior":
            z = torch.stack([model.infer(x, generator=generator, **options).cpu() for _ in range(draws)])
            means.append(z.mean(0))
            if draws > 1:
                scales.append(z.std(0, correction=0))
            continue
        mean, scale = model.encode(x)
        means.append(mean.cpu())
        if source == "encoder" and scale is not None:
            scales.append(scale.cpu())
        elif noise > 0:
            scales.append(torch.full_like(means[-1], noise))
    return Latents(torch.cat(means), torch.cat(scales) if scales else None)


def train_two_phase(
    model: LatentVariableModel,
    images: Images,
    config: AutoencoderConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
    fit_callbacks: Iterable[FitCallback] = (),
    **fit_options: Any,
) -> LatentVariableModel:
    """:func:`train_autoencoder`, then :func:`latentprior.fit` on the aggregate posterior with fresh draws.

    ``fit_options`` go to :func:`latentprior.fit`. The model's prior is the learned ladder. With a
    ``checkpoint_dir`` both phases save their state there, and ``resume=True`` goes on in the phase that was stopped.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from latentprior.models.networks import build_encoder, build_decoder, network_spec
    >>> images = Images((load_digits().images[:200] * 15).astype("uint8"))
    >>> spec = network_spec("mlp", latent_dim=2, width=16, image_shape=images.shape)
    >>> g = torch.Generator().manual_seed(0)
    >>> model = LatentVariableModel(build_decoder(spec, g), encoder=build_encoder(spec, g))
    >>> model = train_two_phase(model, images, AutoencoderConfig(steps=20), base="gmm:2", max_stages=0)
    >>> model.prior.base.name, model.generate(3, generator=g).shape
    ('gmm', torch.Size([3, 1, 8, 8]))
    """
    config = config or AutoencoderConfig()
    phases = [phase_folder(checkpoint_dir, name) for name in ("autoencoder", "prior")]
    train_autoencoder(model, images, config, seed=seed, checkpoint_dir=phases[0], resume=resume, callbacks=callbacks)
    noisy = config.kind == "ae"
    latents = aggregate_posterior(model, images, source="means" if noisy else "encoder", noise=config.noise * noisy)
    return refit_prior(
        model, latents, seed=seed, checkpoint_dir=phases[1], resume=resume, callbacks=fit_callbacks, **fit_options
    )


def refit_prior(
    model: LatentVariableModel, latents: Latents, *, seed: int = 0, **fit_options: Any
) -> LatentVariableModel:
    """Give ``model`` the ladder that :func:`latentprior.fit` learns on ``latents``, its networks left as they are.

    Also the end of joint learning: a last ladder on posterior draws of the finished decoder, from a mixture.
    """
    model.prior = fit(latents, seed=seed, device=model.device, **fit_options)
    return model
