"""The two-stage VAE: a second VAE on the latents of the first is its prior."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, constraints

from ..data.images import Images
from ..data.latents import Latents
from ..density.bases import DistributionBase
from ..density.ladder import Ladder
from ..density.prior import LatentPrior
from ..density.whitening import identity_whitening
from ..errors import CheckpointError, LatentPriorError, LearningDivergedError
from ..models.model import LatentVariableModel
from ..runtime.events import TrainingEvent
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import UNFIT, load_state, locked, save_state
from ..storage.sized_networks import blank
from ..training.resumable import foreign, images_identity, network_state, phase_folder, restore_network
from ..training.two_phase import SAVE_EVERY, aggregate_posterior
from .vae import VAEConfig, learn_vae

__all__ = ["TwoStageDistribution", "TwoStageVAEConfig", "train_two_stage_vae"]

LOG_2PI = math.log(2 * math.pi)
LOG_SCALE_RANGE = (-7.0, 2.0)
ROWS = 1 << 15
"""Latents times draws that meet the second decoder at a time."""


@dataclass(frozen=True)
class TwoStageVAEConfig(VAEConfig):
    """How both VAEs are learned."""

    second_steps: int = 6000
    second_batch_size: int = 256
    second_learning_rate: float = 1e-3
    """Of Adam, falling to zero on a cosine."""
    width: int = 256
    """Units of a hidden layer of the second VAE (paper: 1,024)."""
    depth: int = 3
    samples: int = 64
    """Draws in the bound that ``log_prob`` returns."""

    def __post_init__(self) -> None:
        """Raise :class:`LatentPriorError` for settings that nothing can be learned with."""
        for name in ("second_steps", "second_batch_size", "width", "depth", "samples"):
            if getattr(self, name) < 1:
                raise LatentPriorError(f"{name} must be 1 or more, got {getattr(self, name)}")


class SkipPerceptron(nn.Module):
    """Hidden ReLU layers whose last reads, beside them, the input again: ``(n, d)`` to ``(n, outputs)``."""

    def __init__(self, dim: int, outputs: int, width: int, depth: int, generator: torch.Generator) -> None:
        super().__init__()
        hidden = [_linear(*pair, math.sqrt(2), generator) for pair in itertools.pairwise([dim, *[width] * depth])]
        self.hidden = nn.Sequential(*itertools.chain.from_iterable((layer, nn.ReLU()) for layer in hidden))
        self.last = _linear(width + dim, outputs, 1.0, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Rows to rows."""
        return self.last(torch.cat([self.hidden(x), x], 1))  # type: ignore[no-any-return]


class TwoStageDistribution(Distribution):
    r""":math:`p(z) = \int N(z; g(u), \gamma^2 I)\,N(u; 0, I)\,du`, the density that the second VAE defines.

    ``sample`` is ancestral, exact, from torch's own random state as every torch Distribution. ``log_prob`` is a
    lower bound of the log density on average, in nats, from K fixed draws :math:`\epsilon_k`:

    .. math:: \log \frac1K \sum_k \frac{N(z; g(u_k), \gamma^2 I)\,N(u_k; 0, I)}{q(u_k \mid z)},
              \quad u_k = m(z) + s(z)\,\epsilon_k

    ``(n, *event_shape)`` to ``(n,)``; differentiable, and the same at every call. Source: Dai and Wipf (ICLR 2019),
    section 4; Burda, Grosse and Salakhutdinov (2016), eq. 8, for the bound.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {}

    def __init__(
        self, encoder: nn.Module, decoder: nn.Module, gamma: float, noise: Tensor, event_shape: Sequence[int]
    ) -> None:
        super().__init__(torch.Size(), torch.Size(event_shape), validate_args=False)
        self.encoder, self.decoder, self.gamma, self.noise = encoder, decoder, gamma, noise

    @property
    def support(self) -> constraints.Constraint:
        """All of real space."""
        return constraints.independent(constraints.real, len(self.event_shape))

    @torch.no_grad()
    def sample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draw u, then z around its image, ``(*sample_shape, *event_shape)``."""
        n = math.prod(sample_shape)
        u = torch.randn(n, self.noise.shape[1], dtype=self.noise.dtype, device=self.noise.device)
        z: Tensor = self.decoder(u)
        return (z + self.gamma * torch.randn_like(z)).reshape(*sample_shape, *self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Importance-weighted lower bound, ``(*, *event_shape) -> (*)`` nats."""
        k, d = self.noise.shape
        rows = value.reshape(-1, d)
        if not len(rows):
            return value.new_zeros(value.shape[: value.ndim - len(self.event_shape)])
        bounds = torch.cat([self._bound(block) for block in rows.split(max(1, ROWS // k))])
        return bounds.reshape(value.shape[: value.ndim - len(self.event_shape)])

    def _bound(self, z: Tensor) -> Tensor:
        (k, d), n = self.noise.shape, len(z)
        mean, scale = posterior(self.encoder, z)
        u = mean[:, None] + scale[:, None] * self.noise
        log_q = -0.5 * self.noise.square().sum(1) - scale.log().sum(1, keepdim=True)
        miss = (z[:, None] - self.decoder(u.reshape(n * k, d)).reshape(n, k, d)) / self.gamma
        log_joint = -0.5 * (miss.square() + u.square()).sum(2) - d * (math.log(self.gamma) + 0.5 * LOG_2PI)
        return torch.logsumexp(log_joint - log_q, 1) - math.log(k)


def posterior(encoder: nn.Module, z: Tensor) -> tuple[Tensor, Tensor]:
    """Means and standard deviations of :math:`q(u | z)`, each ``(n, d)``."""
    mean, log_scale = encoder(z).chunk(2, 1)
    return mean, log_scale.clamp(*LOG_SCALE_RANGE).exp()


def train_two_stage_vae(
    model: LatentVariableModel,
    images: Images,
    config: TwoStageVAEConfig | None = None,
    *,
    seed: int = 0,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callbacks: Iterable[Callable[[TrainingEvent], None]] = (),
    autoencoder: LatentVariableModel | None = None,
) -> LatentVariableModel:
    """A VAE with learned sigma, then a second VAE of the same dimension on fresh draws of its posteriors.

    Returns ``model``, whose prior stands on a :class:`TwoStageDistribution`: what is saved needs it again,
    ``LatentVariableModel.from_pretrained(folder, prior=distribution)`` with ``model.prior.base.distribution``. With a
    trained ``autoencoder`` only the second VAE is learned. Raises :class:`~latentprior.errors.LearningDivergedError`
    when its loss is not finite. Source: Dai and Wipf (ICLR 2019), section 4.
    """
    config = config or TwoStageVAEConfig()
    callbacks = tuple(callbacks)
    learn_vae(model, images, config, autoencoder, seed, callbacks, checkpoint_dir, resume)
    folder = phase_folder(checkpoint_dir, "second")
    identity = images_identity(("second", asdict(config), seed, model.sigma), images)
    with locked(folder):
        second = _learn_second(
            aggregate_posterior(model, images), config, model, seed, callbacks, folder, identity, resume
        )
    flat = identity_whitening(math.prod(model.event_shape)).to(device=model.device, dtype=model.prior.dtype)
    info = {"sampler": {"sampler": "smc"}}
    model.prior = LatentPrior(Ladder(DistributionBase(second, flat)), flat, model.event_shape, info=info)
    return model


def _learn_second(
    latents: Latents,
    config: TwoStageVAEConfig,
    model: LatentVariableModel,
    seed: int,
    callbacks: Sequence[Callable[[TrainingEvent], None]],
    folder: Path | None,
    identity: str,
    resume: bool,
) -> TwoStageDistribution:
    r"""Ascend :math:`\mathbb E_{q(u|z)} \log N(z; g(u), \gamma^2 I) - KL(q(u|z)\,\|\,N(0, I))`, gamma optimal."""
    d, device, dtype = latents.dim, model.device, model.prior.dtype
    weights = derived_generator(torch.device("cpu"), seed, "second vae", "weights")
    encoder = SkipPerceptron(d, 2 * d, config.width, config.depth, weights)
    decoder = SkipPerceptron(d, d, config.width, config.depth, weights)
    networks = nn.ModuleList([encoder, decoder]).to(device=device, dtype=dtype)
    average = {name: p.detach().clone() for name, p in networks.named_parameters()}
    optimizer = torch.optim.Adam(networks.parameters(), lr=config.second_learning_rate)
    everything = ("networks", networks, average, optimizer)
    begun, first, error = time.monotonic(), 0, math.nan
    if resume and folder is not None and (folder / "config.json").exists():
        document, tensors = load_state(folder, "second")
        if document.get("identity") != identity:
            raise foreign(folder)
        try:
            restore_network(*everything, tensors)
            first, error = int(document["step"]), float(document["error"])
        except UNFIT as damage:
            raise CheckpointError(f"{folder}: its checkpoint is damaged ({type(damage).__name__})") from None
    for step in range(first, config.second_steps):
        draws = derived_generator(device, seed, "second vae", step)
        rows = torch.randint(len(latents), (config.second_batch_size,), generator=draws, device=device).cpu()
        z = latents.draw(rows, draws, device=device, dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = config.second_learning_rate * 0.5 * (1 + math.cos(math.pi * step / config.second_steps))
        mean, scale = posterior(encoder, z)
        u = mean + scale * torch.randn(mean.shape, generator=draws, device=device, dtype=dtype)
        squared = (decoder(u) - z).square().mean()
        now = float(squared.detach())
        if not math.isfinite(now):
            raise LearningDivergedError(f"the second VAE is not finite at step {step}; lower second_learning_rate")
        error = now if math.isnan(error) else 0.99 * error + 0.01 * now
        divergence = (0.5 * (mean.square() + scale.square() - 1) - scale.log()).sum(1).mean()
        loss = 0.5 * d * squared / max(error, 1e-6) + divergence
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            decay = min(config.average, (step + 1) / (step + 10))
            for name, parameter in networks.named_parameters():
                average[name].lerp_(parameter, 1 - decay)
        losses: dict[str, Any] = {"reconstruction": now, "divergence": float(divergence.detach())}
        event = TrainingEvent(
            "prior", 0, step + 1, config.second_steps, losses, seconds=time.monotonic() - begun, model=model
        )
        for callback in callbacks:
            callback(event)
        if folder is not None and ((step + 1) % SAVE_EVERY == 0 or step + 1 == config.second_steps):
            document = {"identity": identity, "step": step + 1, "error": error}
            save_state(folder, "second", document, network_state(*everything))
    with torch.no_grad():
        for name, parameter in networks.named_parameters():
            parameter.copy_(average[name])
    networks.requires_grad_(False).eval()
    draws = derived_generator(device, seed, "second vae", "bound")
    noise = torch.randn(config.samples, d, generator=draws, device=device, dtype=dtype)
    return TwoStageDistribution(encoder, decoder, math.sqrt(max(error, 1e-6)), noise, latents.event_shape)


def _linear(fan_in: int, fan_out: int, scale: float, generator: torch.Generator) -> nn.Linear:
    layer: nn.Linear = blank(nn.Linear, fan_in, fan_out)
    nn.init.normal_(layer.weight, std=scale / math.sqrt(fan_in), generator=generator)
    nn.init.zeros_(layer.bias)
    return layer
