"""The rivals that the learned prior is compared with, on the same networks and by the same methods of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from ..models.model import LatentVariableModel
from .lebm import LEBMConfig, train_lebm
from .ncp_vae import NCPVAEConfig, train_ncp_vae
from .rae import RAEConfig, train_rae
from .sri import SRIConfig, train_sri
from .two_stage_distribution import TwoStageDistribution
from .two_stage_vae import TwoStageVAEConfig, train_two_stage_vae
from .vae import LatentFlowConfig, LatentGMMConfig, VAEConfig, train_latent_flow, train_latent_gmm, train_vae

__all__ = [
    "RIVALS",
    "LEBMConfig",
    "LatentFlowConfig",
    "LatentGMMConfig",
    "NCPVAEConfig",
    "RAEConfig",
    "SRIConfig",
    "TwoStageDistribution",
    "TwoStageVAEConfig",
    "VAEConfig",
    "train_latent_flow",
    "train_latent_gmm",
    "train_lebm",
    "train_ncp_vae",
    "train_rae",
    "train_sri",
    "train_two_stage_vae",
    "train_vae",
]

RIVALS: Mapping[str, Callable[..., LatentVariableModel]] = MappingProxyType(
    {
        "vae": train_vae,
        "two_stage_vae": train_two_stage_vae,
        "rae": train_rae,
        "sri": train_sri,
        "ncp_vae": train_ncp_vae,
        "lebm": train_lebm,
        "latent_gmm": train_latent_gmm,
        "latent_flow": train_latent_flow,
    }
)
"""The training function of every rival: ``train(model, images, config, *, seed, checkpoint_dir, resume, callbacks)``.

With a ``checkpoint_dir`` each saves its state there, and ``resume=True`` goes on from it to the same weights. Each sets
``model.sampler`` to the sampler of its paper, which ``model.generate(n)`` then uses.
"""
