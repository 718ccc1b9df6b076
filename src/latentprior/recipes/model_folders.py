"""The folder of a trained model: made from a recipe, written, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..baselines import TwoStageDistribution
from ..density.bases import DistributionBase
from ..errors import CheckpointError, LatentPriorError
from ..models.model import LatentVariableModel
from ..models.networks import build_decoder, build_encoder, network_spec
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import load_state, save_state, tensors_under
from .recipe import Recipe, read_recipe

__all__ = ["image_size", "load_model", "new_model", "save_model"]

PART = "distribution"
"""Key of the Distribution that a rival's prior stands on, in ``config.json``; its tensors have names that begin so."""
TWO_STAGE = "two-stage-vae"
"""Name of the only such Distribution, :class:`TwoStageDistribution`, in ``config.json``."""


def new_model(
    recipe: Recipe, image_shape: tuple[int, int, int], *, seed: int = 0, device: torch.device | str | None = None
) -> LatentVariableModel:
    """Return an untrained model whose prior is N(0, I), or raise where the recipe's network makes no such images."""
    network = recipe.network
    try:
        spec = network_spec(network.family, network.latent_dim, network.width, image_shape)
    except CheckpointError as error:
        raise LatentPriorError(f"network: {error}") from None
    cpu = torch.device("cpu")
    decoder = build_decoder(spec, derived_generator(cpu, seed, "generator"))
    encoder = build_encoder(spec, derived_generator(cpu, seed, "encoder")) if recipe.has_encoder else None
    return LatentVariableModel(decoder.to(device), None, recipe.sigma, encoder).moved(device)


def save_model(model: LatentVariableModel, folder: Path) -> None:
    """Write the model, and with it the Distribution that its prior stands on, where it is a rival's.

    Both are one file of tensors and one of JSON, so that a model is never read with the networks of another run.
    """
    document, tensors = model.state()
    base = model.prior.base
    if isinstance(base, DistributionBase) and isinstance(base.distribution, TwoStageDistribution):
        config, networks = base.distribution.state()
        document[PART] = {"name": TWO_STAGE, **config}
        tensors |= {f"{PART}.{key}": value for key, value in networks.items()}
    save_state(folder, model.kind, document, tensors)


def load_model(folder: Path, device: torch.device | str | None = None) -> LatentVariableModel:
    """Load a model from the folder that ``latentprior train --out`` wrote, or from the ``model`` in it.

    It raises :class:`CheckpointError` for anything absent, damaged or foreign.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one that `latentprior train --out` wrote")
    if (folder / "model").is_dir():
        folder = folder / "model"
    elif (folder / "checkpoint").is_dir():
        raise CheckpointError(f"{folder}: its training has not ended; go on with `latentprior train ... --resume`")
    document, tensors = load_state(folder, LatentVariableModel.kind)
    distribution = _saved_distribution(document.get(PART), tensors_under(tensors, f"{PART}."), folder)
    return LatentVariableModel.from_state(document, tensors, prior=distribution).moved(device)


def _saved_distribution(config: Any, tensors: Mapping[str, Tensor], folder: Path) -> Distribution | None:
    if config is None:
        return None
    if not isinstance(config, Mapping) or config.get("name") != TWO_STAGE:
        raise CheckpointError(f"{folder}: its prior stands on a distribution that is not known here")
    return TwoStageDistribution.from_state(config, tensors)


def image_size(folder: Path) -> int | None:
    """Side that the images of a training run were resized to, or None; ``folder`` is what ``--out`` named."""
    recipe = folder / "config.yaml"
    return read_recipe(recipe).image_size if recipe.is_file() else None
