"""A gate that has learned nothing says so when it decides: once for a model, and never where something else decides."""

import copy
import warnings

import pytest
import torch

import msvit
from msvit.gating.gate import Quadtree
from msvit.gating.learned import Pattern, Quota

IMAGES = torch.zeros(1, 3, 64, 64)
WORDS = "has learned nothing"


@pytest.fixture(autouse=True)
def strict():
    """Elsewhere in the tests gates are new on purpose, see pyproject.toml."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.parametrize("make", [None, lambda: Quota(16), lambda: Pattern((4, 4), 16), lambda: Quadtree(16)])
def test_a_new_gate_is_said_to_be_one_once(tiny_vit, make):
    model = msvit.MSViT(tiny_vit, gate=make and make()).eval()
    again = copy.deepcopy(model)
    for one in (model, again):
        with pytest.warns(UserWarning, match=WORDS) as said:
            one(IMAGES)
        assert len(said) == 1
        one(IMAGES)


def test_calibration_and_other_precisions_ask_too(tiny_vit):
    with pytest.warns(UserWarning, match=WORDS):
        msvit.MSViT(tiny_vit).eval().calibrate([torch.rand(2, 3, 64, 64)], 0.6)
    with pytest.warns(UserWarning, match=WORDS):
        msvit.MSViT(tiny_vit).bfloat16().eval()(IMAGES.bfloat16())


def test_what_has_learned_is_not(tiny_vit):
    model = msvit.MSViT(tiny_vit)
    model.run(IMAGES).gates.sum().backward()  # training: nothing is said, whatever the gate knows
    torch.optim.SGD(model.gate.parameters(), 0.1).step()
    state = copy.deepcopy(model.state_dict())
    model.eval()(IMAGES)
    other = msvit.MSViT(tiny_vit).eval()
    other.load_state_dict(state)
    other(IMAGES)
    msvit.load("scenes")(IMAGES)


def test_masks_rules_and_training_are_not(tiny_vit):
    model = msvit.MSViT(tiny_vit)
    model(IMAGES)
    model.eval().run(IMAGES, torch.ones(4, 4, dtype=torch.bool))
    msvit.MSViT(tiny_vit, gate=msvit.make_rule("fine")).eval()(IMAGES)
    counted = copy.deepcopy(model)
    counted.gate.count_as_trained()
    counted(IMAGES)
    with pytest.warns(UserWarning, match=WORDS):
        model(IMAGES)  # none of these was an answer to the question


def test_what_cannot_be_compared_is_not_asked_about(tiny_vit):
    model = msvit.MSViT(tiny_vit).eval()
    warnings.filterwarnings("ignore", ".*quantized tensor creation")
    warnings.simplefilter("ignore", DeprecationWarning)
    assert not torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}).gate.is_new()
    with torch.device("meta"):
        assert not type(model.gate)(8).is_new()


def test_models_from_before_load(tiny_vit):
    """Neither folders nor pickles know of the warning."""
    model = msvit.MSViT(tiny_vit).eval()
    assert not [key for key in model.state_dict() if "initial" in key]
    del model.gate._initial
    model(IMAGES)
