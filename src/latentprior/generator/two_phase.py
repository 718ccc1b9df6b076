"""Two-phase learning: an autoencoder first, then the ladder on its aggregate posterior."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import LatentPriorError, LearningDivergedError
from ..images import Images
from ..latents import Latents
from ..learning import Callback as FitCallback
from ..learning import fit
from ..prior import LatentPrior
from ..stage import derived_generator
from .model import LatentVariableModel
from .training import TrainingEvent

__all__ = ["AutoencoderConfig", "aggregate_posterior", "train_autoencoder", "train_two_phase"]


@dataclass(frozen=True)
class AutoencoderConfig:
    """How generator and encoder are learned before there is a prior."""

    kind: Literal["vae", "ae"] = "vae"
    """``vae``: the evidence lower bound under N(0, I); ``ae``: squared error with noise on the latents."""
    steps: int = 6000
    batch_size: int = 128
    learning_rate: float = 1e-3
    """Of Adam, falling to zero on a cosine."""
    learn_sigma: bool = True
    """``vae``: keep sigma at the root of the mean squared error, where the bound is highest, instead of fixed."""
    noise: float = 0.1
    """``ae``: standard deviation of the noise on latents, which the penalty keeps from growing."""
    latent_penalty: float = 1e-3
    """``ae``: weight of half the squared norm of latents beside the squared error."""
    weight_decay: float = 0.0
    """Of the generator (decoupled from Adam)."""
    average: float = 0.999

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that nothing can be learned with."""
        if self.kind not in ("vae", "ae"):
            raise LatentPriorError(f"unknown kind {self.kind!r}: choose vae or ae")
        if min(self.steps, self.batch_size) < 1 or self.noise < 0 or self.latent_penalty < 0:
            raise LatentPriorError("steps and batch_size must be 1 or more, noise and latent_penalty 0 or more")


def train_autoencoder(
    model: LatentVariableModel,
    images: Images,
    config: AutoencoderConfig | None = None,
    *,
    seed: int = 0,
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
) -> LatentVariableModel:
    r"""Learn the generator and the encoder of ``model``; its prior is left as it is. Returns ``model``.

    ``vae`` ascends :math:`\mathbb E_{q(z \mid x)} \log\mathcal N(x; g(z), \sigma^2 I) - KL(q(z \mid x)\,\|\,N(0, I))`,
    with :math:`\sigma^2` at its optimum, the mean squared error (Rybkin, Daniilidis and Levine 2021, eq. 6), unless
    it is kept fixed. ``ae`` descends :math:`\|x - g(e(x) + s\,\epsilon)\|^2 + \lambda \|e(x)\|^2 / 2` (Ghosh et al.
    2020, eq. 8, with noise).

    The networks end with the moving average of their weights. Raises
    :class:`~latentprior.errors.LearningDivergedError` when the loss is not finite.
    """
    config = config or AutoencoderConfig()
    if model.encoder is None:
        raise LatentPriorError("two-phase learning needs a model with an encoder")
    model.generator.requires_grad_(True).train()
    model.encoder.requires_grad_(True).train()
    groups: list[dict[str, Any]] = [
        {"params": list(model.generator.parameters()), "weight_decay": config.weight_decay},
        {"params": list(model.encoder.parameters()), "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    networks = torch.nn.ModuleList([model.generator, model.encoder])
    average = {name: p.detach().clone() for name, p in networks.named_parameters()}
    device, begun, error = model.device, time.monotonic(), math.nan
    for step in range(config.steps):
        draws = derived_generator(device, seed, "autoencoder", step)
        x = images.batch(_rows(len(images), config.batch_size, step, seed), device=device).to(model.prior.dtype)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.steps))
        out = model.encoder(x)
        mean, scale = out if isinstance(out, tuple) else (out, torch.zeros_like(out))
        noise = torch.randn(mean.shape, generator=draws, device=device, dtype=mean.dtype)
        z = mean + (scale if config.kind == "vae" else config.noise) * noise
        squared = (model.generator(z) - x).square().flatten(1).sum(1).mean()
        pixels = x[0].numel()
        error = _follow(error, float(squared.detach()) / pixels)
        if config.kind == "vae":
            if config.learn_sigma:
                model.sigma = max(1e-3, math.sqrt(error))
            divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).flatten(1).sum(1).mean()
            loss = squared / (2 * model.sigma**2) + divergence
            losses = {"reconstruction": float(squared.detach()) / pixels, "divergence": float(divergence.detach())}
        else:
            loss = squared + config.latent_penalty * 0.5 * mean.square().flatten(1).sum(1).mean()
            losses = {"reconstruction": float(squared.detach()) / pixels}
        if not math.isfinite(float(loss.detach())):
            raise LearningDivergedError(f"the autoencoder's loss is not finite at step {step}; lower learning_rate")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(config.average, (step + 1) / (step + 10))
            for name, parameter in networks.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        event = TrainingEvent(
            "autoencoder", 0, step + 1, config.steps, losses, seconds=time.monotonic() - begun, model=model
        )
        for callback in callbacks:
            callback(event)
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            parameter.copy_(average[name])
    if config.kind == "ae":
        model.sigma = max(1e-3, math.sqrt(error))
    networks.requires_grad_(False).eval()
    return model


def aggregate_posterior(
    model: LatentVariableModel,
    images: Images,
    *,
    source: Literal["encoder", "means", "posterior"] = "encoder",
    noise: float = 0.0,
    batch_size: int = 256,
    generator: torch.Generator | None = None,
    **options: Any,
) -> Latents:
    """The latents that a prior is to be learned on.

    ``encoder`` : the encoder's posteriors, drawn afresh at every use. ``means`` : its means, with ``noise`` on them.
    ``posterior`` : one draw an image of :meth:`LatentVariableModel.infer`, which takes ``options``.
    """
    means, scales = [], []
    for x in images.batches(batch_size, device=model.device):
        if source == "posterior":
            means.append(model.infer(x, generator=generator, **options).cpu())
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
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
    fit_callbacks: Iterable[FitCallback] = (),
    **fit_options: Any,
) -> LatentVariableModel:
    """:func:`train_autoencoder`, then :func:`latentprior.fit` on the aggregate posterior with fresh draws.

    ``fit_options`` go to :func:`latentprior.fit`. The model's prior is the learned ladder.
    """
    config = config or AutoencoderConfig()
    train_autoencoder(model, images, config, seed=seed, callbacks=callbacks)
    noisy = config.kind == "ae"
    latents = aggregate_posterior(model, images, source="means" if noisy else "encoder", noise=config.noise * noisy)
    prior: LatentPrior = fit(latents, seed=seed, device=model.device, callbacks=fit_callbacks, **fit_options)
    model.prior = prior
    return model


def _rows(n: int, size: int, step: int, seed: int) -> Tensor:
    """The rows of a step: every image once an epoch, in an order of its own."""
    wanted = torch.arange(step * size, (step + 1) * size)
    cpu = torch.device("cpu")
    picks = [
        torch.randperm(n, generator=derived_generator(cpu, seed, "epoch", epoch))[wanted[wanted // n == epoch] % n]
        for epoch in torch.unique(wanted // n).tolist()
    ]
    return torch.cat(picks)


def _follow(average: float, value: float) -> float:
    return value if math.isnan(average) else 0.99 * average + 0.01 * value
