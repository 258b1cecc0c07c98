"""Graphs that run without the package: on pictures with other decisions they say what the model says."""

import pytest
import torch
from helpers import mini_model, segmenting, shake

import msvit
from msvit.models.export import GRAPHS, exported, save_exported

pytestmark = [
    pytest.mark.long,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def pictures(count):
    return torch.randn(count, 1, 3, 64, 64) * 2 + 0.5


def said(model, part, images):
    with torch.no_grad():
        return model.gate(images) if part == "gate" else model(images)


@pytest.mark.parametrize("part", GRAPHS)
def test_a_graph_says_what_the_model_says(part, tmp_path):
    """On pictures with other decisions, and other numbers of tokens, than that which the graph was made with."""
    model, given = mini_model(), pictures(6)
    program = exported(model, part, given[0])
    path = save_exported(program, tmp_path / part, "torch")
    loaded = torch.export.load(path).module()
    for images in given:
        torch.testing.assert_close(loaded(images), said(model, part, images), rtol=1e-4, atol=1e-4)
    tokens = [model.run(images).tokens.item() for images in given]
    assert len(set(tokens)) > 2
    if part == "gate":
        many = given.flatten(0, 1)
        torch.testing.assert_close(loaded(many), said(model, part, many), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("part", GRAPHS)
def test_onnx_says_what_the_model_says(part, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed (extra `tests`)")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed (extra `tests`)")
    model, given = mini_model(), pictures(6)
    path = save_exported(exported(model, part, given[0]), tmp_path / part)
    session = runtime.InferenceSession(path.read_bytes())
    name = session.get_inputs()[0].name
    for images in given:
        (found,) = session.run(None, {name: images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), said(model, part, images), rtol=1e-3, atol=1e-3)


def test_a_segmenter_is_exported_masked(make_vit):
    model = segmenting(msvit.MSViT(shake(make_vit(num_classes=0))), 4).eval()
    given = pictures(3)
    module = exported(model, "masked", given[0]).module()
    for images in given:
        torch.testing.assert_close(module(images), said(model, "masked", images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="dense head.*export 'masked'"):
        exported(model, "packed", given[0])


def test_what_cannot_be_exported_says_why(make_vit):
    vit = make_vit()
    images = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="ToMe drops or merges tokens"):
        exported(msvit.MSViT(vit, reducer=msvit.make_reducer("tome", vit, r=4)), "packed", images)
    with pytest.raises(ValueError, match="is a rule"):
        exported(msvit.MSViT(vit, gate=msvit.make_rule("fine")), "gate", images)
    with pytest.raises(ValueError, match="part='all' is not known"):
        exported(msvit.MSViT(vit), "all", images)
