import pickle
from dataclasses import asdict

import pytest
import torch

from latentprior.errors import LatentPriorError
from latentprior.models.networks import FAMILIES, build_decoder, network_spec
from latentprior.recipes.model_folders import new_model
from latentprior.recipes.recipe import (
    BY_SHAPE,
    METHODS,
    OURS,
    RIVAL_METHODS,
    Recipe,
    changed,
    read_recipe,
    recipe_for,
    recipe_names,
    rival,
    to_yaml,
)

SETS = ("mnist", "svhn", "cifar10", "celeba64")


def written(folder, text):
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


def refused(call, *words):
    with pytest.raises(LatentPriorError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_every_data_set_of_the_paper_has_both_scales():
    assert {f"{name}-{scale}" for name in SETS for scale in ("cpu", "paper")} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_builds_its_networks(name):
    recipe = read_recipe(name)
    shape = FAMILIES[recipe.network.family].image_shape
    assert recipe.image_size in (None, shape[1])
    if name.endswith("-cpu"):
        model = new_model(recipe, shape)
        assert (model.encoder is not None) == recipe.has_encoder
        generator = model.decoder
    else:
        # Weights of no size: nothing is drawn.
        with torch.device("meta"):
            generator = build_decoder(network_spec(**asdict(recipe.network), image_shape=shape), torch.Generator())
    assert tuple(generator.image_shape) == shape
    assert tuple(generator.latent_shape) == (recipe.network.latent_dim,)


@pytest.mark.parametrize("name", SETS)
def test_paper_scale_has_the_numbers_of_the_paper(name):
    recipe = read_recipe(f"{name}-paper")
    joint = recipe.joint
    assert recipe.network.latent_dim == (128 if name == "cifar10" else 100)
    assert (recipe.sigma, recipe.has_encoder, joint.batch_size, joint.decay) == (0.3, False, 100, 0.998)
    assert (joint.posterior_start, joint.posterior_steps, joint.posterior_step_size) == ("prior", 20, 0.1)
    assert (joint.prior_sampler, joint.prior_steps, joint.prior_step_size) == ("langevin", 60, 0.4)
    assert (joint.learning_rate, joint.ratio_learning_rate) == (1e-4, 2e-5)


def test_the_recipe_follows_the_size_of_images():
    assert recipe_for((1, 28, 28)) == "mnist-alternating-cpu"
    assert recipe_for((3, 32, 32)) == "cifar10-alternating-cpu"
    assert recipe_for((3, 64, 64), several=True) == "celeba64-cpu"
    assert recipe_for((1, 32, 32)) == recipe_for((3, 5, 9)) == recipe_for() == "mlp-alternating-cpu"
    # Only what recipe_for names for several processes may be launched in them.
    assert {read_recipe(recipe_for(shape, several=True)).method for shape in [*BY_SHAPE, ()]} == {"joint"}


def test_what_is_written_is_read_again(tmp_path):
    recipe = changed(read_recipe("svhn-cpu"), ["fit.time_budget=1.5", "fit.settings.width=32", "fit.whitening=none"])
    assert recipe.fit.whitening == "none"
    assert read_recipe(written(tmp_path, to_yaml(recipe))) == recipe
    assert read_recipe(written(tmp_path, "")) == Recipe()


def test_settings_change_one_key_each():
    before = read_recipe("mnist-cpu")
    after = changed(before, ["joint.steps=7", "joint.learning_rate=1e-5", "encoder=false", "image_size=", "sigma=1"])
    assert (after.joint.steps, after.joint.learning_rate, after.encoder, after.image_size) == (7, 1e-5, False, None)
    assert (type(after.sigma), after.sigma) == (float, 1.0)
    same = changed(after, [f"joint.steps={before.joint.steps}", f"joint.learning_rate={before.joint.learning_rate}"])
    assert asdict(changed(same, ["encoder=true", "sigma=0.3"])) == asdict(before)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sigm: 1", ["'sigm'", "sigma"]),
        ("joint: {step: 5}", ["'joint.step'", "joint.steps"]),
        ("fit: {settings: {widht: 5}}", ["fit.settings.width"]),
        ("joint: {steps: many}", ["joint.steps", "whole number", "many"]),
        ("joint: {steps: 1.5}", ["joint.steps", "whole number"]),
        ("joint: {steps: true}", ["joint.steps"]),
        ("joint: {steps: 0}", ["joint", "steps must be 1 or more"]),
        ("joint: 5", ["joint", "mapping"]),
        ("joint: {switch: never}", ["joint.switch", "adaptive"]),
        ("joint: {decay: fast}", ["joint.decay", "number"]),
        ("encoder: 1", ["encoder", "true or false"]),
        ("sigma: .inf", ["sigma"]),
        ("sigma: -1", ["sigma"]),
        ("sigma: 0x" + "f" * 400, ["sigma", "finite"]),
        ("method: magic", ["method", "two-phase"]),
        ("method: [joint]", ["method"]),
        ("network: {family: 5}", ["network.family", "text"]),
        ("fit: {base: gaussian}", ["fit", "gmm"]),
        ("fit: {base: 'gmm:0'}", ["fit", "gmm:K"]),
        ("fit: {validation: 1}", ["validation"]),
        ("autoencoder: {kind: gan}", ["autoencoder.kind"]),
        ("image_size: 0", ["image_size"]),
        ("rival: {steps: 5}", ["rival", "joint"]),
        ("rivals: {magic: {steps: 5}}", ["rival", "'magic'", "lebm"]),
        ("rivals: {joint: {steps: 5}}", ["rival", "'joint'"]),
        ("rivals: {lebm: {stepps: 5}}", ["rivals.lebm.stepps", "rivals.lebm.steps"]),
        ("rivals: {two-stage-vae: {width: 0}}", ["rivals.two-stage-vae", "width"]),
        ("method: rae\nrival: {stepps: 5}", ["rival.stepps", "rival.steps"]),
        ("method: rae\nrival: [5]", ["rival", "mapping"]),
        ("- 1", ["mapping"]),
        ("5: 5", ["5"]),
        ("a: [", ["no YAML"]),
        ("!!python/object/apply:os.system [exit]", ["no YAML"]),
        ("sigma: " + "[" * 5000, ["recipe.yaml"]),
    ],
)
def test_wrong_recipes_name_the_file_and_the_key(tmp_path, text, words):
    refused(lambda: read_recipe(written(tmp_path, text)), "recipe.yaml", *words)


def test_aliases_that_stand_for_billions_are_refused_at_once(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 12)]
    refused(lambda: read_recipe(written(tmp_path, "\n".join([*lines, "sigma: *a11"]))), "a0")
    nested = "\n".join(f"  {line}" for line in lines)
    text = f"method: rae\nrival:\n{nested}\n  steps: *a11\n"
    refused(lambda: read_recipe(written(tmp_path, text)), "rival")


def test_files_that_are_no_recipes(tmp_path):
    refused(lambda: read_recipe(tmp_path / "absent.yaml"), "no such file", "mnist-cpu")
    refused(lambda: read_recipe("mnist"), "mnist-paper")
    (tmp_path / "pickle.yaml").write_bytes(pickle.dumps({"sigma": 1}))
    refused(lambda: read_recipe(tmp_path / "pickle.yaml"), "pickle.yaml")
    refused(lambda: read_recipe(written(tmp_path, "#" * (1 << 20) + "##")), "too large")


@pytest.mark.parametrize("setting", ["steps", "=5", "joint.stepz=5", "sigma.x=5", "joint.steps=[", "nothing.at.all=1"])
def test_wrong_settings_are_refused(setting):
    refused(lambda: changed(Recipe(), [setting]))


@pytest.mark.parametrize("name", recipe_names())
def test_every_row_of_the_tables_is_a_recipe_and_a_method(name):
    recipe = read_recipe(name)
    assert set(recipe.rivals) == set(RIVAL_METHODS)
    for method in METHODS:
        row = changed(recipe, [f"method={method}"])
        assert row.network == recipe.network
        # Rivals have the autoencoder that two-phase learning has, and the chains of their papers.
        own = row.rival_config()
        if method in ("sri", "lebm"):
            assert (own.posterior_steps, own.posterior_step_size, row.has_encoder) == (20, 0.1, recipe.has_encoder)
        elif method in RIVAL_METHODS:
            assert (own.steps, own.batch_size) == (row.autoencoder.steps, row.autoencoder.batch_size)
        if method not in ("joint", "sri", "lebm"):
            assert row.has_encoder
    paper = changed(recipe, ["method=lebm"]).rival_config()
    if name.endswith("-paper"):
        assert (paper.learning_rate, paper.energy_learning_rate, paper.decay) == (1e-4, 2e-5, 0.998)
        assert paper.steps == recipe.joint.stages * recipe.joint.steps
        assert not recipe.has_encoder


def test_settings_of_the_rival_at_hand_come_before_those_of_the_recipe():
    recipe = Recipe(method="lebm", rivals={"lebm": {"steps": 7, "width": 9}, "vae": {"steps": 1}}, rival={"steps": 3})
    assert (recipe.rival_config().steps, recipe.rival_config().width) == (3, 9)
    assert changed(recipe, ["method=sri", "rival.steps=4"]).rival_config().steps == 4


def test_every_method_can_be_trained():
    for method in METHODS:
        recipe = changed(Recipe(), [f"method={method}"])
        if method in OURS:
            assert recipe.rival_config() is None
        else:
            assert callable(rival(method))
            assert recipe.rival_config().steps > 0
    assert changed(Recipe(), ["method=ncp-vae", "rival.ratio.width=8"]).rival_config().ratio.width == 8
