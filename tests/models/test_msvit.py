"""One function in three executions, anchored in plain timm."""

from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import assert_all_fine_is_timm, encode, shake, slope_inside

import msvit
from msvit.core import backbone
from msvit.core.sampling import straight_through
from msvit.models.msvit import EXECUTIONS, Gating

# The list of the README. Depth is cut where a test would take long; everything else is as timm has it.
BACKBONES = {
    "vit_tiny_patch16_224": {"depth": 4},
    "vit_small_patch32_224": {"depth": 3, "img_size": 256},
    "vit_base_patch8_224": {"depth": 1},
    "vit_base_patch16_clip_224": {"depth": 2},  # norm before the blocks, no bias in the embedding
    "vit_base_patch16_clip_quickgelu_224": {"depth": 2},
    "vit_medium_patch16_gap_256": {"depth": 3},  # no class token, averaged
    "vit_betwixt_patch16_reg1_gap_256": {"depth": 2},  # a register
    "vit_base_patch16_reg4_gap_256": {"depth": 2},
    "vit_base_patch16_siglip_224": {"depth": 2},  # attention pooling
    "vit_base_patch16_siglip_gap_224": {"depth": 2},
    "vit_small_patch14_dinov2": {"depth": 3, "img_size": 224},  # LayerScale, patch 14
    "vit_small_patch14_reg4_dinov2": {"depth": 3, "img_size": 224},
    "vit_giant_patch14_reg4_dinov2": {"depth": 1, "img_size": 112},  # SwiGLU
    "deit_tiny_patch16_224": {"depth": 4},
    "deit_tiny_distilled_patch16_224": {"depth": 4},  # distillation token, two heads
    "deit3_small_patch16_224": {"depth": 3},  # LayerScale, positions without class
    "vit_mini_patch8_64": {},
}
VARIANTS = [
    {"qk_norm": True},
    {"scale_attn_norm": True, "scale_mlp_norm": True},
    {"global_pool": "max"},
    {"global_pool": "avgmax"},
    {"global_pool": "avg", "pool_include_prefix": True, "reg_tokens": 2},
    {"global_pool": "map", "class_token": False, "qk_norm": True},
    {"global_pool": "map", "reg_tokens": 1},
    {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    {"drop_path_rate": 0.5, "init_values": 0.1},
]


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.long
def test_all_fine_is_plain_timm(name):
    vit = timm.create_model(name, **{"num_classes": 10} | BACKBONES[name])
    assert_all_fine_is_timm(shake(vit), vit.patch_embed.img_size)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_fine_is_plain_timm_with_options(make_vit, variant):
    assert_all_fine_is_timm(shake(make_vit(**variant)), (64, 64))


@pytest.mark.parametrize("size", [(64, 96), (128, 64), (96, 96)])
@pytest.mark.parametrize("no_embed_class", [False, True])
def test_all_fine_is_plain_timm_at_other_sizes(make_vit, size, no_embed_class):
    assert_all_fine_is_timm(shake(make_vit(dynamic_img_size=True, no_embed_class=no_embed_class)), size)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
@pytest.mark.long
def test_all_executions_agree(name):
    vit = shake(timm.create_model(name, **{"num_classes": 10} | BACKBONES[name]))
    model = msvit.MSViT(vit).eval()
    size = vit.patch_embed.img_size
    images = torch.randn(3, 3, *size)
    mask = torch.rand(3, *model.grid(size)) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    masked, *others = (model.run(images, mask, e) for e in EXECUTIONS)
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
        assert torch.equal(masked.macs, other.macs)
    assert torch.equal(others[-1].coarse, mask)


@pytest.mark.parametrize("variant", [{}, *VARIANTS], ids=str)
@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_all_executions_agree_with_options(make_vit, variant, scale):
    model = msvit.MSViT(shake(make_vit(**variant)), scale=scale).eval()
    images = torch.randn(6, 3, 64, 96)
    mask = torch.rand(6, *model.grid((64, 96))) < 0.5
    mask[0], mask[1] = True, False
    masked, *others = (model.run(images, mask, e).logits for e in EXECUTIONS)
    for other in others:
        assert (masked - other).abs().max() <= 1e-4


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_a_picture_does_not_see_its_neighbours(tiny_vit, execution):
    model = msvit.MSViT(shake(tiny_vit)).eval()
    images = torch.randn(5, 3, 64, 64)
    model.threshold = model.run(images).gates.median().item()
    together = model.run(images, execution=execution)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert (model.run(images[order], execution=execution).logits - together.logits[order]).abs().max() <= 1e-4
    for b in range(5):
        alone = model.run(images[b : b + 1], execution=execution)
        assert (alone.logits - together.logits[b]).abs().max() <= 1e-4
        assert torch.equal(alone.coarse[0], together.coarse[b])


@pytest.mark.parametrize("coarse", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_equal_counts_and_extreme_masks(tiny_vit, coarse, batch):
    model = msvit.MSViT(shake(tiny_vit)).eval()
    mask = torch.full((4, 4), coarse)
    results = [model.run(torch.ones(batch, 3, 64, 64), mask, e) for e in EXECUTIONS]
    assert all((r.logits - results[0].logits).abs().max() <= 1e-4 for r in results)
    assert results[0].tokens.tolist() == [17 if coarse else 65] * batch


def gate_gradient(model, images, labels, scores, noise, execution):
    """dL/d scores, with the noise given."""
    scores = scores.clone().requires_grad_()
    soft = torch.sigmoid((scores + noise) / model.gate.tau)
    tokens = encode(model, images, Gating(scores, soft, straight_through(soft)), execution)
    F.cross_entropy(backbone.pooled_logits(model.vit, tokens), labels).backward()
    return scores.grad


@pytest.mark.parametrize("variant", [{}, {"class_token": False, "global_pool": "avg"}, {"global_pool": "map"}], ids=str)
def test_gate_gradient_is_the_finite_difference(make_vit, variant, unbounded):
    """dL/d logit = dL/dm dm/dlogit, with dL/dm by differences of the decision m itself, 0 and 1 alike."""
    model = msvit.MSViT(shake(make_vit(img_size=32, depth=2, **variant))).double()
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 5])
    scores = torch.randn(2, 2, 2).double()
    tau = model.gate.tau
    analytic = gate_gradient(model, images, labels, scores, 0.0, "masked")
    soft = torch.sigmoid(scores / tau)

    def loss(m):
        tokens = encode(model, images, Gating(scores, soft, m), "masked")
        return F.cross_entropy(backbone.pooled_logits(model.vit, tokens), labels).item()

    hard = (soft > 0.5).double()
    assert 0 < hard.sum() < hard.numel()
    for index in range(8):
        expected = slope_inside(loss, hard, index) * (soft * (1 - soft) / tau).flatten()[index]
        assert analytic.flatten()[index].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)


def test_trimmed_gradients_are_masked_ones_where_everything_is_kept(tiny_vit):
    model = msvit.MSViT(shake(tiny_vit), margin=0.0).train()
    images, labels, scores = torch.randn(4, 3, 64, 64), torch.arange(4), torch.randn(4, 4, 4)
    masked, trimmed = (gate_gradient(model, images, labels, scores, 0.0, e) for e in ("masked", "trimmed"))
    assert masked.abs().max() > 1e-6
    torch.testing.assert_close(trimmed, masked, rtol=1e-4, atol=1e-8)


def test_trimming_keeps_the_gate_gradient_at_the_default_margin():
    """Boundary first: what is left out of a trimmed sequence hardly moves the gate."""
    vit = timm.create_model("deit_tiny_patch16_224", num_classes=8, depth=6)
    model = msvit.MSViT(vit).train()
    images, labels = torch.randn(8, 3, 224, 224), torch.arange(8)
    scores = 2 * torch.randn(8, 7, 7) + 0.4 + 0.5 * torch.randn(8, 1, 1)
    u = torch.rand_like(scores)
    noise = u.log() - (-u).log1p()
    masked, trimmed = (gate_gradient(model, images, labels, scores, noise, e) for e in ("masked", "trimmed"))
    cosine = F.cosine_similarity(masked.flatten(), trimmed.flatten(), 0)
    mass = trimmed.abs().sum() / masked.abs().sum()
    print(f"cosine {cosine:.4f}, share of the gradient's mass {mass:.3f}")
    assert cosine >= 0.95
    assert mass >= 0.8


def test_training_runs_trimmed_and_reaches_every_parameter(tiny_vit):
    model = msvit.MSViT(tiny_vit).train()
    result = model.run(torch.randn(4, 3, 64, 64))
    assert result.gates.requires_grad
    (result.logits.square().sum() + result.gates.mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


def test_drop_path_drops_whole_pictures(make_vit):
    """As in timm: with a rate near one, a picture keeps or loses the branch as a whole."""
    model = msvit.MSViT(shake(make_vit(depth=2, drop_path_rate=0.5))).train()
    images = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    outcomes = model.run(images, torch.rand(4, 4) < 0.5).logits.detach()
    assert 2 <= outcomes.mul(1e3).round().unique(dim=0).shape[0] <= 4


def test_no_parameter_is_added_to_the_backbone(tiny_vit):
    before = {k: v.clone() for k, v in tiny_vit.state_dict().items()}
    model = msvit.MSViT(tiny_vit)
    assert list(model.vit.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.vit.state_dict().items())
    assert model.vit is tiny_vit


def test_threshold_moves_the_share_and_calibration_meets_it(tiny_vit):
    model = msvit.MSViT(shake(tiny_vit)).eval()
    with torch.no_grad():
        for p in model.gate.mlp[-1].parameters():
            p.mul_(3)
    loader = [(torch.randn(16, 3, 64, 64), torch.zeros(16)) for _ in range(3)]
    for macs in (0.4, 0.6, 0.9):
        share = model.calibrate(loader, macs)
        assert share == pytest.approx(macs, abs=0.01)
        with torch.no_grad():
            measured = torch.cat([model.run(x).macs for x, _ in loader]).mean() / model.dense_macs((64, 64))
        assert measured.item() == pytest.approx(share, abs=1e-9)
    assert model.calibrate(loader, 0.01) == pytest.approx(
        model.macs_of(torch.tensor([16]), (64, 64)).item() / model.dense_macs((64, 64))
    )


class TestBadInput:
    @pytest.fixture
    def model(self, tiny_vit):
        return msvit.MSViT(tiny_vit).eval()

    @pytest.mark.parametrize("scale", [1, 0, 1.5, "2"])
    def test_scale(self, tiny_vit, scale):
        with pytest.raises(ValueError, match="scale="):
            msvit.MSViT(tiny_vit, scale=scale)

    def test_gate_of_another_patch_size(self, tiny_vit):
        with pytest.raises(ValueError, match=r"32 px.*scale=2.*16 px"):
            msvit.MSViT(tiny_vit, gate=msvit.Gate(32))

    def test_no_pixels(self, model):
        with pytest.raises(ValueError, match="a picture of 0 x 64 px; give at least one pixel"):
            model(torch.randn(1, 3, 0, 64))

    def test_channels(self, model):
        with pytest.raises(ValueError, match="1 channels, the backbone takes 3"):
            model(torch.randn(1, 1, 64, 64))

    @pytest.mark.parametrize(
        "images", [torch.zeros(1, 3, 64, 64, dtype=torch.uint8), torch.zeros(3, 64, 64), "cat.jpg"]
    )
    def test_no_pictures(self, model, images):
        with pytest.raises(ValueError, match=r"expected a float tensor \[B, 3, H, W\]"):
            model(images)

    def test_empty_batch(self, model):
        with pytest.raises(ValueError, match="empty batch"):
            model(torch.randn(0, 3, 64, 64))

    @pytest.mark.parametrize("shape", [(3, 3), (2, 4, 4), (1, 1, 4, 4), (16,)])
    def test_mask_shape(self, model, shape):
        with pytest.raises(ValueError, match=r"expected \[4, 4\] for all pictures or \[3, 4, 4\]"):
            model.run(torch.randn(3, 3, 64, 64), torch.zeros(shape, dtype=torch.bool))

    @pytest.mark.parametrize("mask", [torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.long), [[True]]])
    def test_mask_type(self, model, mask):
        with pytest.raises(TypeError, match="expected a bool tensor"):
            model.run(torch.randn(1, 3, 64, 64), mask)

    def test_execution(self, model):
        with pytest.raises(
            ValueError, match="execution='fast' is not known. There are: masked, trimmed, levelled, packed"
        ):
            model.run(torch.randn(1, 3, 64, 64), execution="fast")

    def test_nan_pixels_on_request(self, model):
        images = torch.randn(3, 3, 64, 64)
        images[1, 0, 5, 5] = torch.nan
        with pytest.raises(ValueError, match=r"pictures \[1\] of the batch have NaN"):
            model.run(images, check=True)
        assert model.run(images).logits[0].isfinite().all()

    @pytest.mark.parametrize(
        ("name", "why"),
        [
            ("swin_tiny_patch4_window7_224", r"SwinTransformer .*: it attends in windows .*docs/hierarchical.md"),
            ("hiera_tiny_224", r"Hiera .*: it attends in windows"),
            ("samvit_base_patch16_224", r"VisionTransformerSAM .*: it attends in windows"),
            ("naflexvit_base_patch16_gap", r"NaFlexVit .*: it embeds and packs pictures itself; a plain vit_\* takes"),
        ],
    )
    def test_backbones_that_are_no_sets_say_why(self, name, why):
        with torch.device("meta"):
            vit = timm.create_model(name)
        with pytest.raises(TypeError, match=why):
            msvit.MSViT(vit)
        assert (Path(__file__).parents[2] / "docs/hierarchical.md").exists()

    @pytest.mark.parametrize("name", ["resnet18", "swin_tiny_patch4_window7_224"])
    def test_other_architectures(self, name):
        with pytest.raises(TypeError, match="no plain vision transformer.*deit_.*msvit models"):
            msvit.MSViT(timm.create_model(name))

    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"attn_drop_rate": 0.1}, "attn_drop_rate"),
            ({"patch_drop_rate": 0.1}, "patch_drop_rate"),
            ({"attn_layer": "diff"}, "DiffAttention"),
            ({"global_pool": ""}, "supported are token, avg"),
            ({"patch_size": (8, 16)}, "square"),
        ],
    )
    def test_unsupported_options(self, make_vit, settings, match):
        with pytest.raises(ValueError, match=match):
            msvit.MSViT(make_vit(**settings))

    @pytest.mark.long
    def test_parallel_blocks(self):
        with pytest.raises(ValueError, match="ParallelThingsBlock.*standard blocks"):
            msvit.MSViT(timm.create_model("vit_small_patch16_18x2_224"))

    @pytest.mark.parametrize("threshold", [-0.1, 1.5])
    def test_threshold(self, model, threshold):
        with pytest.raises(ValueError, match="threshold="):
            model.threshold = threshold

    def test_calibrating_on_nothing(self, model):
        with pytest.raises(ValueError, match="loader is empty"):
            model.calibrate([])
        with pytest.raises(ValueError, match=r"macs=60.*0\.6"):
            model.calibrate([torch.randn(1, 3, 64, 64)], macs=60)


@torch.no_grad()
def test_an_embedding_of_their_own_for_coarse_patches(tmp_path):
    """It starts as a copy of the shared one, and is then a parameter of its own, in all executions and on disk."""
    vit = shake(timm.create_model("vit_mini_patch8_64"))
    shared, own = msvit.MSViT(vit).eval(), msvit.MSViT(vit, coarse_embed="own").eval()
    images, mask = torch.randn(3, 3, 64, 64), torch.rand(3, 4, 4) < 0.5
    same, copied = shared.run(images, mask), own.run(images, mask)
    assert (same.logits - copied.logits).abs().max() <= 1e-5
    assert torch.equal(same.macs, copied.macs)
    for p in own.coarse_embed.parameters():
        p.add_(0.1 * torch.randn_like(p))
    changed = [own.run(images, mask, execution).logits for execution in EXECUTIONS]
    assert (changed[0] - same.logits).abs().max() > 1e-3
    assert all((logits - changed[0]).abs().max() <= 1e-4 for logits in changed)
    assert (own.run(images, torch.zeros(4, 4, dtype=torch.bool)).logits - vit(images)).abs().max() <= 1e-5
    own.save_pretrained(tmp_path)
    assert torch.equal(msvit.MSViT.from_pretrained(tmp_path).run(images, mask).logits, own.run(images, mask).logits)
