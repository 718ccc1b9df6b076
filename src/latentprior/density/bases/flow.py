"""A normalising flow, learned by maximum likelihood."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, MissingExtraError
from .base import Base, device_of, normal_noise

__all__ = ["FlowBase"]


class FlowBase(Base):
    r"""A neural spline flow (zuko; extra ``flow``), :math:`\log p_0(u) = \log N(T(u)) + \log|\det J_T(u)|`.

    Durkan, Bekasov, Murray and Papamakarios (NeurIPS 2019). Trained by maximum likelihood with Adam at 1e-3,
    stopped on held-out log density.
    """

    name = "flow"

    def __init__(self, dim: int, transforms: int = 3, hidden: tuple[int, ...] = (128, 128)) -> None:
        super().__init__()
        try:
            import zuko
        except ImportError:
            raise MissingExtraError("base='flow'", "flow") from None
        self.size, self.transforms, self.hidden = dim, transforms, tuple(hidden)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.flow = zuko.flows.NSF(dim, transforms=transforms, hidden_features=self.hidden, bins=8)

    @property
    def dim(self) -> int:
        return self.size

    def config(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dim": self.size,
            "transforms": self.transforms,
            "hidden": list(self.hidden),
            "log_prob_at_zero": self.at_zero(),
        }

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FlowBase:
        dim, transforms, hidden = int(config["dim"]), int(config["transforms"]), tuple(map(int, config["hidden"]))
        # A line of JSON must not ask for more memory than the weights beside it fill.
        most = sum(v.numel() for v in tensors.values())
        if not 0 < transforms <= len(tensors) or any(a * b > most for a, b in itertools.pairwise((dim, *hidden, dim))):
            raise ValueError("a flow larger than its weights")
        base = cls(dim, transforms, hidden)
        dtype = next((v.dtype for v in tensors.values() if v.is_floating_point()), None)
        # Releases of zuko give the constants of N(0, I), the flow's own base, names that differ.
        constants = {k: v for k, v in base.to(dtype).state_dict().items() if k.startswith("flow.base.")}
        learned = {k: v for k, v in tensors.items() if not k.startswith("flow.base.")}
        base.load_state_dict({**learned, **constants})
        then, now = float(config.get("log_prob_at_zero", base.at_zero())), base.at_zero()
        if not abs(then - now) < 1e-3 * (1 + abs(then)):
            raise CheckpointError(
                f"flow of log density {then:.4f} at zero has {now:.4f} here: its splines are those of another release "
                "of zuko; install the one that it was saved with"
            )
        return base.requires_grad_(False)

    @torch.no_grad()
    def at_zero(self) -> float:
        """Log density of the origin: by it a saved flow is known again, since splines differ between zukos."""
        return float(self.log_prob(next(self.flow.parameters()).new_zeros(1, self.size)))

    @classmethod
    @torch.enable_grad()
    def fit(
        cls,
        train: Tensor,
        validation: Tensor,
        *,
        max_epochs: int = 30,
        batch_size: int = 512,
        patience: int = 3,
        generator: torch.Generator | None = None,
    ) -> FlowBase:
        """Maximise the log density of ``train``; keep the weights best on ``validation``."""
        base = cls(train.shape[1]).to(device=train.device, dtype=train.dtype)
        optimizer = torch.optim.Adam(base.flow.parameters(), lr=1e-3)
        best, best_state, waited = -math.inf, base.state_dict(), 0
        for _ in range(max_epochs):
            order = torch.randperm(len(train), generator=generator, device=device_of(generator)).to(train.device)
            for index in order.split(batch_size):
                loss = -base.flow().log_prob(train[index]).mean()
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(base.flow.parameters(), 10.0)
                optimizer.step()
            with torch.no_grad():
                score = float(base.log_prob(validation).mean())
            waited += 1
            if score > best:
                best, waited = score, 0
                best_state = {key: value.clone() for key, value in base.state_dict().items()}
            if waited >= patience:
                break
        base.load_state_dict(best_state)
        return base.requires_grad_(False)

    def log_prob(self, u: Tensor) -> Tensor:
        if not len(u):
            return u.sum(1)
        return torch.cat([self.flow().log_prob(block) for block in u.split(4096)])

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        like = next(self.flow.parameters())
        with torch.no_grad():
            inverse = self.flow().transform.inv
            noise = normal_noise((n, self.size), like, generator)
            return torch.cat([inverse(block) for block in noise.split(4096)])
