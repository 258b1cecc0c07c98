"""A quota or a learned pattern in the gate's place: executions, counts, MACs, budgets, and folders."""

import json

import pytest
import timm
import torch
from helpers import segmenter_of, shake
from torch.utils.flop_counter import FlopCounterMode

import msvit
from msvit.gating.gate import Decider
from msvit.gating.learned import Pattern, Quota
from msvit.models.tokenizer import EXECUTIONS
from msvit.reducers.registry import make_reducer

SIZE = (64, 96)
VARIANTS = [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}]


def model_of(vit, kind, **settings):
    """A model with a gate that is not the same everywhere."""
    patch = 2 * vit.patch_embed.patch_size[0]
    gate = Quota(patch, rate=0.4) if kind == "quota" else Pattern((4, 6), patch)
    if kind == "pattern":
        gate.weight.data = torch.randn(4, 6) / gate.GAIN
    return msvit.MSViT(shake(vit), gate=gate, **settings).eval()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["quota", "pattern"])
@torch.no_grad()
def test_executions_agree_and_all_pictures_have_as_many_tokens(make_vit, kind, variant):
    model, images = model_of(make_vit(**variant), kind), torch.randn(5, 3, *SIZE)
    results = [model.run(images, execution=execution) for execution in EXECUTIONS]
    for result in results:
        assert (result.logits - results[0].logits).abs().max() <= 1e-4
        assert torch.equal(result.coarse, results[0].coarse)
        assert len(result.tokens.unique()) == 1
    layout = model.tokenize(images, model.decide(images), "packed").layout
    assert layout.uniform, "packed execution needs no padding"
    if kind == "quota":
        assert results[0].coarse.sum((1, 2)).tolist() == [10] * 5
        assert len(results[0].coarse.flatten(1).unique(dim=0)) > 1
    else:
        assert len(results[0].coarse.unique(dim=0)) == 1


@pytest.mark.parametrize("kind", ["quota", "pattern"])
def test_training_reaches_every_parameter_and_double_stays_double(make_vit, kind):
    for dtype in (torch.float32, torch.float64):
        model = model_of(make_vit(), kind).to(dtype).train()
        result = model.run(torch.randn(4, 3, *SIZE, dtype=dtype))
        assert result.gates.dtype == result.logits.dtype == dtype
        assert len(result.tokens.unique()) == 1 or kind == "pattern"
        result.logits.square().sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if n != "gate.mlp.9.bias"}
        assert [n for n, g in found.items() if g is None or not g.abs().sum() > 0] == []


@torch.no_grad()
def test_half_precision_has_the_same_counts(make_vit):
    model, images = model_of(make_vit(), "quota"), torch.randn(4, 3, *SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.run(images).coarse, model.run(images).coarse)
        assert model.run(images).coarse.sum((1, 2)).tolist() == [10] * 4
    assert model.bfloat16().run(images.bfloat16()).coarse.sum((1, 2)).tolist() == [10] * 4


@pytest.mark.parametrize("kind", ["quota", "pattern"])
@torch.no_grad()
def test_macs_are_what_is_counted(make_vit, kind):
    model, images = model_of(make_vit(), kind), torch.randn(1, 3, *SIZE)
    result = model.run(images)
    with FlopCounterMode(display=False) as counter:
        model.run(images)
    assert counter.get_total_flops() / 2 == result.macs.item()
    gate = result.macs.item() - model.run(images, result.coarse).macs.item()
    assert (gate == 0) == (kind == "pattern")
    assert model.macs_of(result.coarse.sum((1, 2)), SIZE).item() == result.macs.item()


@pytest.mark.parametrize("kind", ["quota", "pattern"])
@pytest.mark.parametrize("reducer", [None, "tome"])
def test_budgets_are_met_to_a_region(make_vit, kind, reducer):
    vit = make_vit()
    model = model_of(vit, kind, reducer=reducer and make_reducer(reducer, vit))
    loader = [torch.randn(4, 3, *SIZE) for _ in range(2)]
    shares = model.macs_of(torch.arange(25), SIZE) / model.dense_macs(SIZE)
    for budget in (0.4, 0.6, 0.8):
        reached = model.calibrate(loader, budget)
        assert reached == pytest.approx(min(shares.tolist(), key=lambda share: abs(share - budget)))
        with torch.no_grad():
            results = [model.run(images) for images in loader]
        macs = torch.cat([r.macs for r in results]) / model.dense_macs(SIZE)
        torch.testing.assert_close(macs, torch.full_like(macs, reached))
    assert model.calibrate(loader, 1e-3) == pytest.approx(shares[24].item())
    assert model.calibrate(loader, 1.1) == pytest.approx(shares[0].item())


def test_calibrating_an_adaptive_reducer_runs_the_model_and_leaves_no_trace_when_it_fails(make_vit):
    vit = make_vit()
    model = model_of(vit, "quota", reducer=make_reducer("grid", vit))
    assert model.adaptive
    loader = [torch.randn(3, 3, *SIZE)]
    reached = model.calibrate(loader, 0.5)
    with torch.no_grad():
        assert model.run(loader[0]).macs.mean().item() / model.dense_macs(SIZE) == pytest.approx(reached)
    rate = model.gate.rate
    with pytest.raises(ValueError, match="loader is empty"):
        model.calibrate([], 0.9)
    assert model.gate.rate == rate


def test_a_quota_has_no_threshold(make_vit):
    with pytest.raises(ValueError, match="a quota has no threshold: set model.gate.rate"):
        model_of(make_vit(), "quota").threshold = 0.4


@pytest.mark.parametrize("kind", ["quota", "supervised", "pattern"])
def test_folders_keep_all_of_them(kind, tmp_path):
    torch.manual_seed(1)
    gate = Pattern((4, 4), 16) if kind == "pattern" else Quota(16, rate=0.3, supervised=kind == "supervised")
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"), gate=gate).eval()
    if kind == "pattern":
        gate.weight.data.normal_()
    else:
        model.calibrate([torch.randn(2, 3, 64, 64)], 0.7)
    gate.temperature = 0.2
    model.save_pretrained(tmp_path)
    again, images = msvit.MSViT.from_pretrained(tmp_path), torch.randn(3, 3, 64, 64)
    assert type(again.gate) is type(gate)
    assert repr(again.gate) == repr(gate.eval())
    with torch.no_grad():
        assert torch.equal(again.run(images).logits, model.run(images).logits)
    assert json.loads((tmp_path / "config.json").read_text())["gate"]["name"] == kind.replace("supervised", "quota")


def test_a_subclass_of_a_gate_is_refused(tmp_path):
    class Other(Quota):
        """One that no config knows."""

    with pytest.raises(ValueError, match=r"gate is .*Other instead of .*Quota"):
        msvit.MSViT(timm.create_model("vit_mini_patch8_64"), gate=Other(16)).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_gate_says_what_builds_it_again():
    for gate in (
        msvit.Gate(16, 1, 8),
        Quota(16, 1, width=8, supervised=True),
        msvit.Gate(16, network="filters"),
        Pattern((2, 3), 16),
    ):
        settings = {key: value for key, value in gate.settings.items() if key != "name"}
        again = type(gate)(**settings)
        assert isinstance(again, Decider)
        assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in gate.state_dict().items()}
        assert again.settings == gate.settings


@torch.no_grad()
def test_a_segmenter_pads_and_keeps_its_quota():
    model = segmenter_of()
    model.gate = Quota(16, rate=0.25, supervised=True).eval()
    result = model.run(torch.randn(2, 3, 50, 70))
    assert result.logits.shape[-2:] == (50, 70)
    assert result.coarse.sum((1, 2)).tolist() == [5, 5]  # of 4 x 5 regions
