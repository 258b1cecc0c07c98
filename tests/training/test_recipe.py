"""The recipe: what it refuses, and in which words."""

import dataclasses
import json

import pytest

from msvit.training.recipe import FIELDS, Recipe, RecipeError, parse
from msvit.training.settings import expected


def test_every_field_says_what_it_is():
    for name, (_, field) in FIELDS.items():
        assert len(field.metadata["about"]) > 10, name
        assert expected(field), name


def test_a_recipe_survives_json_and_is_frozen():
    recipe = Recipe(lr=3e-4, loss_settings={"sigma": 0.2}, loss_weight=None, trim="none")
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.training.lr = 1.0


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"taget": 0.5}, r"no setting is called 'taget'; the nearest is 'target'. There are: data, size"),
        ({"xyzzy": 1}, r"no setting is called 'xyzzy'. There are: "),
        ({"target": 1.5}, r"target=1.5: expected a number in \(0, 1\)"),
        ({"target": 1}, r"target=1.0: expected a number in \(0, 1\)"),
        ({"target": float("nan")}, r"target=nan: expected"),
        ({"target": "0.5"}, r"target='0.5': expected a number"),
        ({"epochs": 2.0}, r"epochs=2.0 \(float\): expected a whole number in \[0, 1000000\]"),
        ({"epochs": True}, r"epochs=True \(bool\): expected"),
        ({"calibrate": 1}, r"calibrate=1 \(int\): expected true or false"),
        ({"trim": 1}, r"trim=1 \(int\): expected margin or batch or none"),
        ({"loss": "l0", "control": "projection"}, r"is the controller alone under another name.*say loss='none'"),
        ({"loss": "ratio", "control": "projection"}, r"is the controller alone under another name"),
        ({"lr": None}, r"lr=None \(NoneType\): expected a number"),
        ({"lr": -1e-3}, r"lr=-0.001: expected a number in \[0, 1e6\]"),
        ({"ema": 1.0}, r"ema=1.0: expected a number in \[0, 1\)"),
        ({"gating": "lerned"}, r"gating='lerned': expected learned or quota .* fine .*; the nearest is 'learned'"),
        ({"loss_settings": {"sigma": {"a": 1}}}, r"loss_settings=.*expected name=value pairs"),
        ({"epochs": 0, "epochs_dense": 0}, r"train nothing"),
        ({"lr": 0.0, "gate_lr": 0.0}, r"leave nothing to train"),
        ({"lr": 0.0, "gating": "random"}, r"leave nothing to train"),
        ({"lr_scale": 0.0, "gate_lr": 0.0}, r"lr \* lr_scale = 0 .* leave nothing to train"),
        ({"freeze": 2, "gating": "random"}, r"freeze=2 and .* gating='random' leave nothing to train"),
        ({"freeze": -1}, r"freeze=-1: expected a whole number in \[0, inf\)"),
        ({"lr": 0.0, "gating": "apt"}, r"leave nothing to train"),
        ({"lr": 0.0, "gating": "entropy", "coarse_lr": 1e-3}, r"leave nothing to train"),
        ({"gating": "apt", "coarse_embed": "own"}, r"gating='apt' embeds .* leave coarse_embed at shared or apt"),
        ({"rule_settings": {"thresholds": [5.0]}}, r"rule_settings are for .* gating='learned' has none"),
    ],
)
def test_what_cannot_be_is_refused(settings, words):
    with pytest.raises(RecipeError, match=words):
        Recipe.from_dict(settings)


def test_settings_of_version_0_1_are_read_as_what_they_were():
    """Trim and control were switches then, and a loss of the mean gate under the controller was the controller."""
    assert Recipe.from_dict({"trim": True, "control": True}) == Recipe(trim="margin", control="projection")
    assert Recipe.from_dict({"trim": False, "control": False}) == Recipe(trim="none", control="none")
    assert Recipe.from_dict({"control": True, "loss": "l0"}).gating.method == "controller-projection"
    assert Recipe.from_dict({"control": False, "loss": "l0"}).gating.loss == "l0"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"loss": "gbas", "control": "none"}, "gbas"),
        ({"loss": "gbas", "control": "bias"}, "gbas+bias"),
        ({"loss": "none", "control": "bias"}, "controller-bias"),
        ({"loss": "none", "control": "projection"}, "controller-projection"),
        ({"gating": "random", "control": "bias"}, "random"),
        ({"epochs": 0}, "dense"),
    ],
)
def test_a_name_for_each_algorithm(settings, name):
    assert Recipe(**settings).method == name


def test_settings_of_earlier_versions_are_read():
    for shared, name in ((True, "shared"), (False, "own")):
        earlier = {k: v for k, v in Recipe().to_dict().items() if k != "coarse_embed"} | {"share_embedding": shared}
        assert Recipe.from_dict(earlier) == Recipe(coarse_embed=name)


def test_what_embeds_coarse_patches_may_train_alone():
    assert Recipe(lr=0.0, gating="apt", coarse_lr=1e-3).training.coarse_lr == 1e-3
    assert Recipe(lr=0.0, gating="entropy", coarse_embed="apt", coarse_lr=1e-3).model.coarse_embed == "apt"


def test_replace_checks_too():
    assert Recipe().replace(epochs=3).training.epochs == 3
    with pytest.raises(RecipeError, match="nearest is 'epochs'"):
        Recipe().replace(epoch=3)
    with pytest.raises(RecipeError, match="batch=0"):
        Recipe().replace(batch=0)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("lr", "1e-3", 1e-3),
        ("lr", "1", 1.0),
        ("epochs", "7", 7),
        ("calibrate", "false", False),
        ("calibrate", "True", True),
        ("control", "none", "none"),
        ("loss_weight", "none", None),
        ("loss_weight", "4", 4.0),
        ("data", "none", "none"),
        ("loss_settings", "sigma=0.1, prior=beta ok=true", {"sigma": 0.1, "prior": "beta", "ok": True}),
        ("reducer_settings", "layers=[1, 2],keep=0.5", {"layers": [1, 2], "keep": 0.5}),
    ],
)  # fmt: skip
def test_parse_reads_what_is_typed(name, text, value):
    read = parse(name, text)
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "text"),
    [("trim", "maybe"), ("calibrate", "1"), ("epochs", "2.5"), ("lr", "fast"), ("loss_settings", "sigma")],
)
def test_parse_refuses_the_rest(name, text):
    with pytest.raises(RecipeError, match=f"{name}="):
        parse(name, text)


def test_a_name_of_long_letters_is_a_files_name_too():
    name = Recipe(data="folder:/" + "界" * 200).run_name
    assert len(name.encode()) <= 255
    assert name.startswith("界" * 80)
    assert name != Recipe(data="folder:/" + "界" * 201).run_name


def test_a_name_is_of_the_settings_that_matter():
    recipe = Recipe()
    assert recipe.run_name == Recipe(workers=4, device="cpu").run_name
    names = {
        recipe.run_name,
        *(recipe.replace(**change).run_name for change in ({"lr": 2e-3}, {"seed": 1}, {"trim": "none"})),
    }
    assert len(names) == 4
    assert recipe.difference(Recipe(workers=4)) == {}
    assert recipe.difference(Recipe(seed=3)) == {"seed": (0, 3)}
    assert "/" not in Recipe(data="folder:/some/where/pets", model="../runs/dense/").run_name
