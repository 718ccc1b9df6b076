import math

import pytest
import torch
from torch.distributions import MultivariateNormal

from latentprior.baselines import TwoStageDistribution
from latentprior.baselines.two_stage_distribution import second_vae
from latentprior.errors import CheckpointError
from latentprior.models.model import LatentVariableModel
from latentprior.recipes.model_folders import load_model, new_model, save_model
from latentprior.recipes.recipe import Recipe, changed
from latentprior.storage.checkpoint import load_state, save_state

SHAPE = (1, 4, 4)


def model(prior=None):
    made = new_model(changed(Recipe(), ["network.latent_dim=2", "network.width=8"]), SHAPE)
    return made if prior is None else LatentVariableModel(made.decoder, prior, 0.3, made.encoder)


def two_stage(seed=0):
    generator = torch.Generator().manual_seed(seed)
    networks = second_vae(2, 4, 1, generator).requires_grad_(False)
    noise = torch.randn(5, 2, generator=generator)
    return TwoStageDistribution(networks["encoder"], networks["decoder"], 0.5, noise, [2])


def test_a_model_is_saved_with_the_distribution_that_its_prior_stands_on(tmp_path):
    whole, z = model(two_stage()), torch.randn(9, 2, generator=torch.Generator().manual_seed(1))
    save_model(whole, tmp_path)
    again = load_model(tmp_path)
    assert torch.equal(again.prior.log_prob(z), whole.prior.log_prob(z))
    images = [m.generate(3, generator=torch.Generator().manual_seed(2)) for m in (whole, again)]
    assert torch.equal(*images)
    # A model without one, saved over it, leaves nothing of it.
    save_model(model(), tmp_path)
    assert load_model(tmp_path).prior.base.name == "normal"
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_distribution_of_the_users_is_asked_for(tmp_path):
    save_model(model(MultivariateNormal(torch.zeros(2), torch.eye(2))), tmp_path)
    with pytest.raises(CheckpointError, match="Distribution of yours"):
        load_model(tmp_path)


@pytest.mark.parametrize("entry", ["x", {"name": "other"}, {"name": ["two-stage-vae"]}, {}, {"name": "two-stage-vae"}])
def test_a_damaged_distribution_is_refused(tmp_path, entry):
    save_model(model(two_stage()), tmp_path)
    document, tensors = load_state(tmp_path, "model")
    document = {key: document[key] for key in ("sigma", "sampler", "prior", "decoder", "encoder")}
    save_state(tmp_path, "model", {**document, "distribution": entry}, tensors)
    with pytest.raises(CheckpointError, match=r"not known here|do not fit together") as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)


def test_folders_without_a_model_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "absent")
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(CheckpointError, match="has not ended"):
        load_model(tmp_path)
    save_model(model(), tmp_path / "model")
    assert math.isclose(load_model(tmp_path).sigma, 0.3)
