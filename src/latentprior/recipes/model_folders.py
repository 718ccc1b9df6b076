"""The folder of a trained model: made from a recipe, written, read again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..baselines.two_stage_vae import SkipPerceptron, TwoStageDistribution
from ..density.bases import DistributionBase
from ..density.samplers import check_options
from ..errors import CheckpointError, LatentPriorError
from ..models.model import LatentVariableModel
from ..models.networks import build_decoder, build_encoder, network_spec
from ..runtime.seeding import derived_generator
from ..storage.checkpoint import UNFIT, load_state, read_config, remove_checkpoint, save_state
from ..storage.sized_networks import built_for
from .recipe import Recipe, read_recipe

__all__ = ["image_size", "load_model", "new_model", "sampler_options", "save_model"]


def new_model(
    recipe: Recipe, image_shape: tuple[int, int, int], *, seed: int = 0, device: torch.device | str | None = None
) -> LatentVariableModel:
    """Return an untrained model for images ``(C, H, W)``, its prior N(0, I); weights are a function of ``seed``.

    Raises :class:`LatentPriorError` where the recipe's network makes no such images.
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
    """Write the model; beside it, in ``second``, the networks of a two-stage VAE's prior, which is a Distribution.

    The model names the digest of these networks, so that it is never read with those of another run.
    """
    second = _second(model)
    if second is not None:
        hidden = second.encoder.get_submodule("hidden")
        assert isinstance(hidden, nn.Sequential)
        config = {
            "gamma": second.gamma,
            "event_shape": list(second.event_shape),
            "width": hidden[0].out_features,
            "depth": sum(isinstance(layer, nn.Linear) for layer in hidden),
        }
        networks = nn.ModuleDict({"encoder": second.encoder, "decoder": second.decoder})
        save_state(folder / "second", "second", config, {"noise": second.noise, **networks.state_dict()})
        model.prior.info["second"] = read_config(folder / "second", "second")["sha256"]
    model.save_pretrained(folder)
    if second is None:
        remove_checkpoint(folder / "second", "second")


def load_model(folder: Path, device: torch.device | str | None = None) -> LatentVariableModel:
    """Load a model from the folder that ``latentprior train --out`` wrote, or from the ``model`` in it.

    Raises :class:`~latentprior.errors.CheckpointError` for anything absent, damaged or foreign.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the one that `latentprior train --out` wrote")
    if (folder / "model").is_dir():
        folder = folder / "model"
    elif (folder / "checkpoint").is_dir():
        raise CheckpointError(f"{folder}: its training has not ended; go on with `latentprior train ... --resume`")
    prior = _load_second(folder / "second", _digest_of_second(folder))
    return LatentVariableModel.from_pretrained(folder, prior=prior, device=device)


def image_size(folder: Path) -> int | None:
    """Side that the images of a training run were resized to, or None."""
    recipe = folder / "config.yaml"
    return read_recipe(recipe).image_size if recipe.is_file() else None


def sampler_options(model: LatentVariableModel) -> dict[str, Any]:
    """How the paper of the model's method samples, as arguments of ``generate``; SMC where it does not say."""
    found = model.prior.info.get("sampler")
    if not isinstance(found, Mapping):
        return {"sampler": "smc"}
    sampler, options = found.get("sampler"), {name: value for name, value in found.items() if name != "sampler"}
    try:
        check_options(sampler, options)
    except (LatentPriorError, TypeError) as error:
        raise CheckpointError(f"the model's own sampler cannot be used ({error}): choose one with --sampler") from None
    return {"sampler": sampler, **options}


def _second(model: LatentVariableModel) -> TwoStageDistribution | None:
    base = model.prior.base
    found = base.distribution if isinstance(base, DistributionBase) else None
    return found if isinstance(found, TwoStageDistribution) else None


def _digest_of_second(folder: Path) -> Any:
    """What a model says of the networks that its prior stands on: nothing where it is older, None if it needs none."""
    prior = read_config(folder, "model").get("prior")
    base, info = (prior.get(name) if isinstance(prior, Mapping) else None for name in ("base", "info"))
    if not isinstance(base, Mapping) or base.get("name") != DistributionBase.name or not isinstance(info, Mapping):
        return None
    return info.get("second", "")


def _load_second(folder: Path, digest: Any) -> TwoStageDistribution | None:
    if digest is None or not folder.is_dir():
        return None
    config, tensors = load_state(folder, "second")
    if digest not in ("", config["sha256"]):
        raise CheckpointError(f"{folder}: holds networks of another run than the model; train it again")
    try:
        d = math.prod(config["event_shape"])
        unused = torch.Generator()
        noise = tensors.pop("noise")
        if noise.shape[1] != d or not 0 <= config["depth"] <= len(tensors) or not config["gamma"] > 0:
            raise ValueError("shapes differ")

        def build() -> nn.ModuleDict:
            return nn.ModuleDict(
                {
                    "encoder": SkipPerceptron(d, 2 * d, config["width"], config["depth"], unused),
                    "decoder": SkipPerceptron(d, d, config["width"], config["depth"], unused),
                }
            )

        networks = built_for(tensors, build)
        networks.to(noise.dtype).load_state_dict(tensors)
        networks.requires_grad_(False).eval()
        return TwoStageDistribution(
            networks["encoder"], networks["decoder"], float(config["gamma"]), noise, config["event_shape"]
        )
    except UNFIT as error:
        line = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{folder}: configuration and tensors do not fit together ({line})") from None
