"""Backbones of timm's `Eva` class: EVA-02, DINOv3, Perception Encoder and others, rotary positions and all."""

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import ROTARY, assert_all_fine_is_timm, encode, shake, slope_inside

import msvit
from msvit.bench.timing import counted_macs
from msvit.core import backbone
from msvit.core.sampling import straight_through
from msvit.models.msvit import EXECUTIONS, Gating

# The list of the README, narrow and shallow; everything else is as timm has it.
NARROW = {"embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
BACKBONES = {
    "eva_giant_patch14_clip_224": {"mlp_ratio": 2.0},  # learned positions alone
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_448": {"img_size": 224},  # q, k and v apart, norms in the MLP
    "eva02_large_patch14_clip_336": {"img_size": 224},  # a norm in attention
    "eva02_enormous_patch14_clip_224": {"mlp_ratio": 2.0},  # norms after the branches
    "vit_medium_patch16_rope_reg1_gap_256": {},
    "vit_mediumd_patch16_rope_reg1_gap_256": {},  # no bias
    "vit_betwixt_patch16_rope_reg4_gap_256": {},
    "vit_small_patch16_rope_224": {},
    "vit_small_patch16_rope_mixed_224": {},
    "vit_base_patch16_rope_ape_224": {},
    "vit_base_patch16_rope_mixed_ape_224": {},
    "vit_pe_core_base_patch16_224": {},  # attention pooling
    "vit_pe_core_gigantic_patch14_448": {"img_size": 224},  # no class token
    "vit_pe_lang_large_patch14_448": {"img_size": 224},  # no norm at the end
    "vit_pe_spatial_base_patch16_512": {"img_size": 256},
    "vit_small_patch16_dinov3": {"img_size": 224},
    "vit_small_plus_patch16_dinov3_qkvb": {"img_size": 224},  # SwiGLU, biases
    "vit_7b_patch16_dinov3": {"img_size": 224, "global_pool": "token"},
    "vit_base_patch16_lingbot": {"img_size": 224},
    "vit_large_patch16_sapiens2": {"img_size": (256, 192), "num_kv_heads": (4, 2)},  # grouped queries
}
VARIANTS = [
    *ROTARY,
    {"global_pool": "avg", "rope_type": "dinov3", "num_reg_tokens": 2},
    {"global_pool": "avgmax"},
    {"global_pool": "max", "class_token": False},
    {"global_pool": "map"},
    {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 2, "qk_norm": True},
    {"swiglu_mlp": True, "swiglu_align_to": 8, "scale_mlp": True, "scale_attn_inner": True, "qkv_fused": False},
    {"use_post_norm": True, "qkv_bias": False},
    {"init_values": 0.1, "attn_only_layer_scale": True, "use_pre_transformer_norm": True},
]


def shaken(vit):
    """As `shake`, and layers of random weights so large that positions show in the logits."""
    with torch.no_grad():
        for block in vit.blocks:
            for p in block.parameters():
                if p.dim() == 2:
                    p.normal_(std=0.15)
        if isinstance(vit.head, torch.nn.Linear):
            vit.head.weight.normal_(std=0.05)
    return shake(vit)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.long
def test_all_fine_is_plain_timm(name):
    vit = timm.create_model(name, **NARROW | BACKBONES[name])
    assert_all_fine_is_timm(shaken(vit), vit.patch_embed.img_size)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_fine_is_plain_timm_with_options(make_eva, variant):
    assert_all_fine_is_timm(shaken(make_eva(**variant)), (64, 64))


@pytest.mark.parametrize("size", [(64, 96), (128, 64)])
@pytest.mark.parametrize("variant", ROTARY, ids=str)
def test_all_fine_is_plain_timm_at_other_sizes(make_eva, size, variant):
    assert_all_fine_is_timm(shaken(make_eva(dynamic_img_size=True, **variant)), size)


@torch.no_grad()
def test_what_is_rotated_shows(make_eva):
    """A backbone that forgot its rotation would not have these logits."""
    vit = shaken(make_eva(use_abs_pos_emb=False))
    model, images, mask = msvit.MSViT(vit).eval(), torch.randn(2, 3, 64, 64), torch.rand(4, 4) < 0.5
    whole = model.run(images, mask).logits
    vit.rope = None
    assert (model.run(images, mask).logits - whole).abs().max() > 1e-3


def assert_executions_agree(vit, size, scale=2):
    model = msvit.MSViT(shaken(vit), scale=scale).eval()
    images = torch.randn(3, 3, *size)
    mask = torch.rand(3, *model.grid(size)) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    masked, *others = (model.run(images, mask, e) for e in EXECUTIONS)
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
        assert torch.equal(masked.macs, other.macs)


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
@pytest.mark.long
def test_all_executions_agree(name):
    vit = timm.create_model(name, **NARROW | BACKBONES[name])
    assert_executions_agree(vit, vit.patch_embed.img_size)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_all_executions_agree_with_options(make_eva, variant, scale):
    assert_executions_agree(make_eva(**variant), (64, 96), scale)


@pytest.mark.parametrize("size", [(64, 96), (41, 71)])
@pytest.mark.parametrize("variant", ROTARY, ids=str)
@torch.no_grad()
def test_three_scales(make_eva, variant, size):
    """All fine is timm, and executions agree for random decisions at two levels, also where pictures are padded."""
    vit = shaken(make_eva(dynamic_img_size=True, dynamic_img_pad=True, **variant))
    model, images = msvit.MSViT(vit, scales=(1, 2, 4)).eval(), torch.randn(3, 3, *size)
    masks, expected = [torch.rand(3, *grid) < 0.4 for grid in model.grids(size)], vit(images)
    for execution in EXECUTIONS:
        assert (model.run(images, model.all_fine(size), execution).logits - expected).abs().max() <= 1e-5
    masked, *others = (model.run(images, masks, execution) for execution in EXECUTIONS)
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
        assert torch.equal(masked.macs, other.macs)
    assert {1.0, 4.0, 16.0} <= set(others[-1].final.area.tolist())
    assert (masked.logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_closed_form_macs_equal_the_count(make_eva, variant):
    """The latent query of attention pooling is projected once for the whole batch, which belongs to no picture."""
    model = msvit.MSViT(make_eva(**variant)).eval().requires_grad_(False)
    images, mask, results = torch.randn(3, 3, 64, 96), torch.rand(3, 4, 6) < 0.5, []
    once = 64 * 64 if variant.get("global_pool") == "map" else 0
    assert counted_macs(lambda: results.append(model.run(images, mask))) == results[0].macs.sum().item() + once
    assert counted_macs(lambda: model.vit(images[:1, :, :64, :64])) == model.dense_macs((64, 64)) + once


@pytest.mark.parametrize("variant", [ROTARY[1], ROTARY[3], ROTARY[4], {"global_pool": "map"}], ids=str)
def test_gate_gradient_is_the_finite_difference(make_eva, variant, unbounded):
    """dL/d logit = dL/dm dm/dlogit, with dL/dm by differences of the decision m itself, 0 and 1 alike."""
    model = msvit.MSViT(shaken(make_eva(img_size=32, depth=2, **variant))).double()
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.tensor([1, 5])
    scores = torch.randn(2, 2, 2).double().requires_grad_()
    tau = model.gate.tau

    def loss(soft, m):
        tokens = encode(model, images, Gating(scores, soft, m), "masked")
        return F.cross_entropy(backbone.pooled_logits(model.vit, tokens), labels)

    soft = torch.sigmoid(scores / tau)
    loss(soft, straight_through(soft)).backward()
    soft = soft.detach()
    hard = (soft > 0.5).double()
    assert 0 < hard.sum() < hard.numel()
    for index in range(8):
        slope = slope_inside(lambda m: loss(soft, m), hard, index, eps=1e-5)
        expected = slope * (soft * (1 - soft) / tau).flatten()[index]
        assert scores.grad.flatten()[index].item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("variant", [{}, ROTARY[4], {"rope_type": "dinov3", "rope_shift_coords": 0.2}], ids=str)
def test_training_runs_trimmed_and_reaches_every_parameter(make_eva, variant):
    model = msvit.MSViT(shaken(make_eva(**variant))).train()
    result = model.run(torch.randn(4, 3, 64, 64))
    (result.logits.square().sum() + result.gates.mean()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@torch.no_grad()
def test_bfloat16_keeps_angles_in_full(make_eva):
    """Under autocast the logits are those of float32 but for rounding."""
    model = msvit.MSViT(shaken(make_eva(rope_type="dinov3"))).eval()
    images, mask = torch.randn(3, 3, 64, 64), torch.rand(3, 4, 4) < 0.5
    expected = model.run(images, mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model.run(images, mask).logits
    assert (found.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("eva02_tiny_patch14_224", {}),
        ("eva02_tiny_patch14_224", ROTARY[1] | {"scale_mlp": True, "swiglu_mlp": True, "qkv_fused": False}),
        ("vit_small_patch16_dinov3", {"rope_shift_coords": 0.1, "num_reg_tokens": 2, "use_fc_norm": True}),
        ("vit_small_patch16_rope_mixed_224", {"rope_temperature": 20.0}),
        ("vit_pe_core_base_patch16_224", {"attn_pool_num_heads": 2, "scale_attn_inner": True}),
    ],
)
@torch.no_grad()
def test_saves_and_loads(tmp_path, name, settings):
    """With arguments that `Eva` alone has, too."""
    model = msvit.MSViT(shaken(timm.create_model(name, **NARROW | {"img_size": 224} | settings))).eval()
    size = model.vit.patch_embed.img_size
    images, mask = torch.randn(2, 3, *size), torch.rand(2, *model.grid(size)) < 0.5
    model.save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    assert torch.equal(again.run(images, mask).logits, model.run(images, mask).logits)


@pytest.mark.parametrize("variant", [{}, {"use_post_norm": True}, {"init_values": 0.1}], ids=str)
@torch.no_grad()
def test_blocks_of_a_derived_class(make_vit, make_eva, variant):
    """As FSDP2 makes them of a built backbone's."""
    for vit in (make_eva(**variant), *([] if "use_post_norm" in variant else [make_vit(**variant)])):
        model, images = msvit.MSViT(shaken(vit)).eval(), torch.randn(2, 3, 64, 64)
        expected = model(images)
        for block in vit.blocks:
            block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
        assert torch.equal(model(images), expected)
