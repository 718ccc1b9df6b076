"""The folder of a trained model: made from a recipe, written, read again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

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


class SavedDistribution(Protocol):
    """A torch Distribution that is written into the folder of a model whose prior stands on it."""

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Configuration (JSON) and tensors."""

    @classmethod
    def from_state(cls, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Distribution:
        """Rebuild from :meth:`state`; raises :class:`CheckpointError` where the two do not fit together."""


DISTRIBUTIONS: Mapping[str, type[SavedDistribution]] = MappingProxyType({"two-stage-vae": TwoStageDistribution})
"""Distributions that a model's prior may stand on and be saved with, by the name in ``config.json``."""
PART = "distribution"
"""Where ``config.json`` describes such a distribution; its tensors have names that begin so."""


def new_model(
    recipe: Recipe, image_shape: tuple[int, int, int], *, seed: int = 0, device: torch.device | str | None = None
) -> LatentVariableModel:
    """Return an untrained model whose prior is N(0, I).

    Parameters
    ----------
    recipe : Recipe
        The recipe that describes its networks and sigma.
    image_shape : tuple of int
        Shape (C, H, W) of its images.
    seed : int
        Seed of its weights.
    device : torch.device or str, optional
        Where it is put; by default the CPU.

    Raises
    ------
    LatentPriorError
        Where the recipe's network makes no such images.
    """
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
    """Write the model, and with it the Distribution that its prior stands on, where it is one of a rival's.

    Both are one file of tensors and one of JSON, so that a model is never read with the networks of another run.

    Parameters
    ----------
    model : LatentVariableModel
        The model to write.
    folder : Path
        Where it is written.

    Raises
    ------
    CheckpointError
        Where the folder cannot be written.
    """
    document, tensors = model.state()
    base = model.prior.base
    distribution: Any = base.distribution if isinstance(base, DistributionBase) else None
    for name, kind in DISTRIBUTIONS.items():
        if type(distribution) is kind:
            config, networks = distribution.state()
            document[PART] = {"name": name, **config}
            tensors |= {f"{PART}.{key}": value for key, value in networks.items()}
    save_state(folder, model.kind, document, tensors)


def load_model(folder: Path, device: torch.device | str | None = None) -> LatentVariableModel:
    """Load a model from the folder that ``latentprior train --out`` wrote, or from the ``model`` in it.

    Parameters
    ----------
    folder : Path
        The folder.
    device : torch.device or str, optional
        Where the model is put; by default the CPU.

    Raises
    ------
    CheckpointError
        For anything absent, damaged or foreign.
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
    if not isinstance(config, Mapping) or config.get("name") not in list(DISTRIBUTIONS):
        raise CheckpointError(f"{folder}: its prior stands on a distribution that is not known here")
    return DISTRIBUTIONS[config["name"]].from_state(config, tensors)


def image_size(folder: Path) -> int | None:
    """Side that the images of a training run were resized to, or None.

    Parameters
    ----------
    folder : Path
        The folder that ``latentprior train --out`` wrote.
    """
    recipe = folder / "config.yaml"
    return read_recipe(recipe).image_size if recipe.is_file() else None
