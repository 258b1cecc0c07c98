"""ToMe and EViT against what their authors' own code computed, on the same weights and pictures."""

import json
from dataclasses import replace
from pathlib import Path

import peers
import pytest
import torch
import torch.nn.functional as F

import msvit
from msvit.core.backbone import pooled_logits
from msvit.core.blocks import run_blocks
from msvit.core.macs import token_counts
from msvit.gating.rules import make_rule
from msvit.reducers.evit import EViT
from msvit.reducers.registry import make_reducer
from msvit.reducers.tome import ToMe

DTYPES = [torch.float64, torch.float32]
KEPT = json.loads((Path(__file__).parent / "data" / "published.json").read_text())


def ran(name, dtype, reducer, **settings):
    """The case, the model, and its result on the case's pictures."""
    case = peers.case(name)
    vit = peers.backbone(case["backbone"], dtype)
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer(reducer, vit, **settings)).to(dtype).eval()
    return case, model, model.run(peers.images(dtype))


def deviation(result, expected):
    return (result - expected).abs().max().item()


def tome_settings(settings):
    return {key: settings[key] for key in ("r", "inflect", "prop_attn", "order") if key in settings}


def evit_settings(settings):
    return {key: settings[key] for key in ("layers", "keep", "fuse")}


def partition(where, tokens):
    """For each patch `[B, n]` the number of its token within the picture, which has so many."""
    return where.flatten(1) - tokens * torch.arange(len(where))[:, None]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", peers.names("tome/"))
@torch.no_grad()
def test_tome(name, dtype):
    case, model, result = ran(name, dtype, "tome", **tome_settings(peers.case(name)["settings"]))
    assert list(model.reducer.r.values()) == case["settings"]["r_per_layer"]
    assert result.counts[:, 1, 0].tolist() == case["counts"]
    assert deviation(result.logits, peers.output(case, "logits")) <= peers.TOLERANCE[dtype]
    for stage, expected in zip(result.stages[1:], peers.output(case, "partitions"), strict=True):
        assert torch.equal(partition(stage.where, case["counts"][stage.layer]), expected[:, 1:].long())
    sizes = result.final.size if result.final.size is not None else torch.ones(len(result.final.x))
    assert torch.equal(result.final.layout.pad(sizes), peers.output(case, "sizes").to(sizes.dtype))


def kept_by(result, layers, fuse, picture):
    """What each layer keeps of a picture: for each token's name a patch under it.

    A token is named by its patch, or -1 - m if layer m fused it; what the layer fuses itself is the last entry.
    """
    names, where = {patch: patch for patch in range(64)}, {stage.layer: stage.where for stage in result.stages}
    for layer in layers:
        row = where[layer][picture].flatten().tolist()
        last = max(row) if fuse else None
        kept = {name: patch for name, patch in names.items() if row[patch] >= 0 and row[patch] != last}
        gone = [patch for name, patch in names.items() if name not in kept]
        names = kept | ({-1 - layer: gone[0]} if fuse else {})
        yield layer, names


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", peers.names("evit/keep") + peers.names("evit/rates"))
@torch.no_grad()
def test_evit(name, dtype):
    case, _, result = ran(name, dtype, "evit", **evit_settings(peers.case(name)["settings"]))
    layers, fuse = case["settings"]["layers"], case["settings"]["fuse"]
    assert result.counts[:, 1, 0].tolist() == case["counts"]
    assert deviation(result.logits, peers.output(case, "logits")) <= peers.TOLERANCE[dtype]
    for b in range(4):
        order = list(range(64))  # of the published code: by descending attention, the fused one last
        for layer, names in kept_by(result, layers, fuse, b):
            kept = sorted(name for name in names if name != -1 - layer)
            assert kept == peers.output(case, f"kept_{layer}")[b].tolist()
            chosen = peers.output(case, f"index_{layer}")[b].tolist()
            order = [order[i] for i in chosen] + ([-1 - layer] if fuse else [])
        if "final" in case["tensors"]:
            first = result.final.layout.ends[b]
            rows = torch.stack([first, *(result.final.where[b].flatten()[names[name]] for name in order)])
            assert deviation(result.final.x[rows], peers.output(case, "final")[b]) <= peers.TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["alone", "with a gate that learns"])
@pytest.mark.parametrize("name", peers.names("evit/gradient"))
def test_evit_gradients(name, training, dtype):
    """Each parameter's gradient; with all tokens' activity at 1 and its gradient asked for, it is the same."""
    case = peers.case(name)
    vit = peers.backbone(case["backbone"], dtype)
    model = msvit.MSViT(
        vit, gate=make_rule("fine"), reducer=make_reducer("evit", vit, **evit_settings(case["settings"]))
    )
    model, images = model.to(dtype).eval(), peers.images(dtype)
    tokens = model.tokenize(images, model.decide(images), "packed")
    if training:
        tokens = replace(tokens, activity=torch.ones(len(tokens.x), dtype=dtype, requires_grad=True))
    logits = pooled_logits(vit, run_blocks(vit, tokens, model.reducer).final)
    loss = F.cross_entropy(logits, peers.labels())
    loss.backward()
    assert deviation(logits, peers.output(case, "logits")) <= peers.TOLERANCE[dtype]
    assert abs(loss.item() - case["loss"]) <= peers.TOLERANCE[dtype]
    gradients = {n: p.grad for n, p in vit.named_parameters()}
    for key in (key for key in case["tensors"] if key.startswith("gradient/")):
        expected = peers.output(case, key)
        assert deviation(gradients[key.removeprefix("gradient/")], expected) <= peers.TOLERANCE[dtype] * expected.norm()
    for key, norm in case["gradient_norms"].items():
        assert gradients[key].norm().item() == pytest.approx(norm, rel=peers.TOLERANCE[dtype])


def check_rate(value, make_vit):
    """EViT's keep rate, by shares of the stage in place of epochs."""
    epochs = 20
    settings = {key: value[f"{name}_epochs"] / epochs for key, name in (("warmup", "warmup"), ("ramp_end", "total"))}
    reducer = EViT(make_vit(), keep=value["base_keep_rate"], **settings).train()
    reducer.begin(value["iters"] / (epochs * value["ITERS_PER_EPOCH"]))
    assert [reducer.rate(layer) for layer in reducer.layers] == pytest.approx([value["keep_rate"]] * 3, abs=1e-12)
    assert reducer.eval().rate(reducer.layers[0]) == value["base_keep_rate"]


@pytest.mark.parametrize("name", peers.names("evit/schedule"))
def test_evit_schedule(name, make_vit):
    for value in peers.case(name)["values"]:
        check_rate(value, make_vit)


class TestWithoutTheFile:
    """The part of the reference that is kept here."""

    @pytest.mark.parametrize("value", KEPT["evit_schedule"], ids=lambda value: f"iteration {value['iters']}")
    def test_evit_schedule(self, value, make_vit):
        check_rate(value, make_vit)

    @pytest.mark.parametrize("case", KEPT["evit"], ids=lambda case: str(case["settings"]))
    def test_evit_counts(self, case, make_vit):
        counts = token_counts(6, torch.tensor([65]), EViT(make_vit(depth=6), **case["settings"]))
        assert counts[:, 1, 0].tolist() == case["counts"]

    @pytest.mark.parametrize("case", KEPT["tome"], ids=lambda case: str(case["settings"]))
    def test_tome_counts(self, case, make_vit):
        reducer = ToMe(make_vit(depth=6), **case["settings"])
        assert list(reducer.r.values()) == case["r_per_layer"]
        assert token_counts(6, torch.tensor([65]), reducer)[:, 1, 0].tolist() == case["counts"]
