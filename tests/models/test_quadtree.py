"""A model of three and four scales: its executions, gradients, budgets, costs, and what stands on the disk."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import encode, segmenting, shake, slope_inside

import msvit
from msvit.bench.timing import counted_macs
from msvit.core.sampling import straight_through
from msvit.core.scales import grids_of
from msvit.gating.gate import Quadtree
from msvit.gating.rules import make_rule
from msvit.models.msvit import EXECUTIONS
from msvit.models.sliding import slide
from msvit.models.tokenizer import Gating

THREE, FOUR = (1, 2, 4), (1, 2, 4, 8)
VARIANTS = [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}]


def quadtree(make_vit, scales=THREE, **settings):
    """A model whose gates decide about as often for as against one token."""
    model = msvit.MSViT(shake(make_vit(dynamic_img_size=True, **settings)), scales=scales).eval()
    for gate in model.gate.levels:
        gate.mlp[-1].weight.data *= 8
        gate.mlp[-1].bias.data -= gate(torch.randn(8, 3, 64, 64)).median()
    return model


def drawn_masks(model, size, pictures=3):
    return [torch.rand(pictures, *grid) < 0.35 for grid in model.grids(size)]


@pytest.mark.parametrize("scales", [THREE, FOUR])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@torch.no_grad()
def test_all_fine_is_timm(make_vit, variant, scales):
    vit = shake(make_vit(**variant))
    model, images = msvit.MSViT(vit, scales=scales).eval(), torch.randn(2, 3, 64, 64)
    expected = vit(images)
    for execution in EXECUTIONS:
        assert (model.run(images, model.all_fine((64, 64)), execution).logits - expected).abs().max() <= 1e-5
    model.threshold = 1.0
    assert (model(images) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("scales", [THREE, FOUR])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (80, 112)])
@torch.no_grad()
def test_executions_agree_for_random_decisions(make_vit, variant, scales, size):
    model, images = quadtree(make_vit, scales, **variant), torch.randn(3, 3, *size)
    masks = drawn_masks(model, size)
    masked, *others = (model.run(images, masks, execution) for execution in EXECUTIONS)
    assert masked.tokens.unique().numel() > 1
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
        assert torch.equal(masked.macs, other.macs)
    assert len(set(others[-1].final.area.tolist()) - {0.0}) >= 3
    assert others[-1].final.layout.sum(others[-1].final.area).tolist() == [size[0] * size[1] / 64] * 3


@torch.no_grad()
def test_executions_agree_for_its_gates_and_ask_what_they_count(make_vit):
    """Where gates are asked everywhere, the decisions are the same; unasked regions say so."""
    model, images, size = quadtree(make_vit, FOUR), torch.randn(4, 3, 64, 128), (64, 128)
    results = []
    assert counted_macs(lambda: results.append(model.run(images))) == results[0].macs.sum().item()
    result = results[0]
    counts = [u.sum((1, 2)) for u in result.gating.undivided]
    assert torch.equal(model.macs_of(counts, size), result.macs)
    assert all(0 < n.sum() < level.decisions.numel() for n, level in zip(counts, result.gating.levels, strict=True))
    small, large = result.gating.levels[0], result.gating.undivided[1]
    inside = large.repeat_interleave(2, 1).repeat_interleave(2, 2) > 0.5
    assert torch.equal(small.scores == -torch.inf, inside)
    everywhere = model.decide(images, everywhere=True)
    for one, other in zip(everywhere.undivided, result.gating.undivided, strict=True):
        assert torch.equal(one, other)
    assert everywhere.scores.isfinite().all()
    for execution in EXECUTIONS:
        assert (model.run(images, execution=execution).logits - result.logits).abs().max() <= 1e-4


def loss_of(model, images, labels, soft, execution):
    """The loss of given soft values, whose hard decisions run through an execution."""
    first, *larger = (Gating(None, s, straight_through(s)) for s in soft)
    tokens = encode(model, images, first._replace(larger=tuple(larger)), execution)
    rows = tokens.x if tokens.activity is None else tokens.x * tokens.activity[:, None]
    pooled = tokens.layout.sum(rows * tokens.area[:, None].to(rows.dtype)) / 16
    return F.cross_entropy(pooled[:, :8], labels)


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_two_levels_are_the_finite_differences(make_vit, seed, unbounded):
    """By moving each m from 0 or 1 to between them, those of hidden regions too: float64, tangents not cut."""
    torch.manual_seed(seed)
    vit = make_vit(img_size=32, depth=2, embed_dim=32, num_heads=2, class_token=False, global_pool="avg")
    model = msvit.MSViT(shake(vit), scales=THREE).double().train()
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.randint(8, (2,))
    soft = [torch.rand(2, 2, 2), torch.tensor([0.3, 0.8]).view(2, 1, 1)]
    soft = [s.double().requires_grad_() for s in soft]

    def loss(levels):
        first, *larger = (Gating(None, m.detach(), m) for m in levels)
        tokens = encode(model, images, first._replace(larger=tuple(larger)), "masked")
        weight = (tokens.area * tokens.activity)[:, None]
        return F.cross_entropy(model.vit.head(tokens.layout.sum(tokens.x * weight) / 16), labels)

    loss([straight_through(s) for s in soft]).backward()
    hard = [(s.detach() > 0.5).double() for s in soft]
    assert all(0 < m.sum() < m.numel() for m in hard)
    for level, value in enumerate(soft):
        for at in range(value.numel()):
            slope = slope_inside(lambda m, i=level: loss([*hard[:i], m, *hard[i + 1 :]]), hard[level], at)
            assert value.grad.flatten()[at].item() == pytest.approx(slope, rel=1e-4, abs=1e-8)
    inside = hard[1].repeat_interleave(2, 1).repeat_interleave(2, 2) > 0.5
    assert (soft[0].grad[inside] == 0).all()  # not asked
    assert (soft[0].grad[~inside] != 0).all()
    assert (soft[1].grad != 0).all()


def test_trimming_keeps_the_gradient(make_vit):
    """All of it where the margin is 0, nearly all where it is not, with fewer rows."""
    model = msvit.MSViT(make_vit(), scales=THREE).train()
    images, labels = torch.randn(6, 3, 64, 64), torch.randint(8, (6,))
    scores = [2 * torch.randn(6, *grid) for grid in model.grids((64, 64))]

    def gradient(execution):
        leaves = [s.clone().requires_grad_() for s in scores]
        loss_of(model, images, labels, [torch.sigmoid(s / 0.3) for s in leaves], execution).backward()
        return torch.cat([s.grad.flatten() for s in leaves])

    masked, near = gradient("masked"), gradient("trimmed")
    model.margin = 0.0
    torch.testing.assert_close(gradient("trimmed"), masked, rtol=1e-3, atol=1e-6)
    assert F.cosine_similarity(near, masked, 0) > 0.9
    model.margin = 0.1
    first, *larger = (Gating(None, s := torch.sigmoid(x / 0.3), straight_through(s)) for x in scores)
    gating = first._replace(larger=tuple(larger))
    rows = {e: len(model.tokenize(images, gating, e).x) for e in EXECUTIONS}
    assert rows["packed"] <= rows["levelled"] < rows["masked"]


def test_training_reaches_every_parameter(make_vit):
    model = msvit.MSViT(make_vit(), scales=FOUR).train()
    images = torch.randn(8, 3, 64, 64)
    result = model.run(images)
    (result.logits.square().sum() + sum(m.sum() for m in result.gating.nested)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("scatter", ["after", "before"])
def test_a_decoder_reads_all_scales_and_teaches_the_gates(make_vit, scatter):
    model = segmenting(quadtree(make_vit), 5, "linear", scatter)
    size, images = (80, 112), torch.randn(2, 3, 80, 112)
    masks = drawn_masks(model, size, 2)
    with torch.no_grad():
        masked, *others = (model.run(images, masks, execution).logits for execution in EXECUTIONS)
        assert masked.shape == (2, 5, *size)
        assert all((masked - other).abs().max() <= 1e-4 for other in others)
        whole = slide(model, images[..., :64, :96], 64, 32, None)
        assert whole.logits.shape == (2, 5, 64, 96)
        assert torch.equal(whole.coarse, model.run(images[..., :64, :96]).coarse)
        with pytest.raises(ValueError, match="coarse patch of 32 px"):
            slide(model, images, 64, 16)
    model.train()
    F.cross_entropy(model.run(images).logits, torch.randint(5, (2, *size))).backward()
    assert all(gate.mlp[0].weight.grad.abs().sum() > 0 for gate in model.gate.levels)


@torch.no_grad()
def test_windows_follow_the_decisions_about_the_whole_picture(make_vit):
    """At its border too, where a window sees what is left, and no whole larger region may fit."""
    model, images = segmenting(quadtree(make_vit), 5), torch.randn(2, 3, 73, 110)
    whole, found = model.run(images), slide(model, images, 64, 32)
    small, large = (u > 0.5 for u in whole.gating.undivided)
    assert torch.equal(found.coarse, small)
    torch.testing.assert_close(slide(model, images, 128, 64).logits, whole.logits)
    total, count, tokens = torch.zeros(2, 5, 73, 110), torch.zeros(73, 110), 0
    for y in (0, 32):
        for x in (0, 32, 64):
            parts = ((small[:, y // 16 :, x // 16 :], 4), (large[:, y // 32 :, x // 32 :], 2))
            masks = [u[:, :n, :n] for u, n in parts]
            seen = model.run(images[..., y : y + 64, x : x + 64], masks)
            total[..., y : y + 64, x : x + 64] += seen.logits
            count[y : y + 64, x : x + 64] += 1
            tokens = tokens + seen.tokens
    torch.testing.assert_close(found.logits, total / count)
    assert torch.equal(found.tokens, tokens)
    with pytest.raises(ValueError, match="window=32 holds one token .* 73 x 110 px .* windows of 64 px or more"):
        slide(model, images, 32, 32)


@pytest.mark.parametrize("coarse_embed", ["shared", "own", "apt"])
@torch.no_grad()
def test_macs_are_counted_and_a_budget_is_met_over_all_levels(make_vit, coarse_embed):
    model = msvit.MSViT(shake(make_vit()), scales=THREE, coarse_embed=coarse_embed).eval()
    images = torch.randn(16, 3, 64, 64) * torch.rand(16, 1, 1, 1)
    for target in (0.35, 0.6):
        share = model.calibrate([images], target)
        results = []
        assert counted_macs(lambda found=results: found.append(model.run(images))) == results[0].macs.sum().item()
        assert results[0].macs.mean().item() / model.dense_macs((64, 64)) == pytest.approx(share, abs=1e-9)
        assert share == pytest.approx(target, abs=0.03)


@pytest.mark.parametrize("scales", [THREE, FOUR])
def test_saves_and_loads(tmp_path, scales):
    torch.manual_seed(0)
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"), scales=scales).eval()
    model.threshold, model.gate.temperature = 0.45, 0.2
    model.save_pretrained(tmp_path)
    again, images = msvit.MSViT.from_pretrained(tmp_path), torch.randn(2, 3, 64, 64)
    assert again.scales == scales
    assert [gate.patch for gate in again.gate.levels] == [8 * side for side in scales[1:]]
    assert again.gate.temperature == pytest.approx(0.2)
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


@pytest.mark.parametrize("thresholds", [None, [5.5, 4.5]])
def test_folders_with_one_scale_in_their_config_load(tmp_path, thresholds):
    """Until version 0.1: of two scales, or of three that a rule with two thresholds stood for."""
    gate = make_rule("entropy", thresholds=thresholds) if thresholds else None
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"), gate=gate).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("scales") == list(model.scales)
    path.write_text(json.dumps(config | {"scale": 2}))
    again, images = msvit.MSViT.from_pretrained(tmp_path), torch.randn(2, 3, 64, 64)
    assert again.scales == ((1, 2, 4) if thresholds else (1, 2))
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


def test_two_scales_are_what_they_were(tiny_vit):
    model = msvit.MSViT(tiny_vit, scales=(1, 2)).eval()
    assert type(model.gate) is msvit.Gate
    assert (model.scale, model.coarse_patch, model.grids((64, 64))) == (2, 16, [(4, 4)])
    mask = torch.rand(4, 4) < 0.5
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        one, other = (model.run(images, given) for given in (mask, [mask]))
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.coarse[0], mask)
    assert one.gating.larger == ()


def test_bad_input(tiny_vit):
    with pytest.raises(ValueError, match=r"scales=\(1, 2, 8\).*use \(1, 2\), \(1, 2, 4\)"):
        msvit.MSViT(tiny_vit, scales=(1, 2, 8))
    with pytest.raises(ValueError, match="2 sizes above the fine one, and the gate decides about 1"):
        msvit.MSViT(tiny_vit, gate=msvit.Gate(16), scales=THREE)
    with pytest.raises(ValueError, match=r"gate decides about 3.*use scales=\(1, 2, 4, 8\)"):
        msvit.MSViT(tiny_vit, gate=Quadtree(16, 3), scales=THREE)
    with pytest.raises(ValueError, match=r"gate looks at coarse patches of 32 px"):
        msvit.MSViT(tiny_vit, gate=Quadtree(32, 2), scales=THREE)
    model = msvit.MSViT(tiny_vit, scales=FOUR)
    with pytest.raises(ValueError, match=r"8 fine patches of 8 px does not fit .* 48 x 64 px; use scales=\(1, 2, 4\)"):
        model(torch.randn(1, 3, 48, 64))
    masks = [torch.zeros(grid).bool() for grid in grids_of((4, 4), FOUR)]
    with pytest.raises(ValueError, match=r"1 mask for 3 sizes of regions; give a list .* \[4, 4\] and \[2, 2\]"):
        model.run(torch.randn(1, 3, 64, 64), masks[0])
    with pytest.raises(ValueError, match=r"mask 1 \(small regions first\) has shape \[4, 4\]; expected \[2, 2\]"):
        model.run(torch.randn(1, 3, 64, 64), [masks[0], masks[0], masks[2]])
    with pytest.raises(TypeError, match="mask 2 .* torch.float32; expected a bool tensor"):
        model.run(torch.randn(1, 3, 64, 64), [*masks[:2], masks[2].float()])
