"""The closed form of the MACs against what torch counts while the packed model runs."""

import pytest
import timm
import torch

import msvit
from msvit.bench.timing import counted_macs

counted = torch.no_grad()(counted_macs)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("deit_tiny_patch16_224", {}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_medium_patch16_gap_256", {"depth": 3}),
        ("vit_giant_patch14_reg4_dinov2", {"depth": 2, "img_size": 224, "num_classes": 5}),  # SwiGLU
        ("vit_base_patch32_clip_224", {"depth": 2, "img_size": 256}),
    ],
)
@pytest.mark.long
def test_closed_form_equals_the_count_to_the_last_unit(name, settings):
    model = msvit.MSViT(timm.create_model(name, **settings)).eval()
    size = model.vit.patch_embed.img_size
    images = torch.randn(3, 3, *size)
    results = []
    model.threshold = model.run(images).gates.median().item()
    assert counted(lambda: results.append(model.run(images))) == results[0].macs.sum().item()
    assert results[0].coarse.flatten(1).sum(1).unique().numel() > 1
    assert torch.equal(model.macs_of(results[0].coarse.sum((1, 2)), size), results[0].macs)
    assert counted(lambda: model.vit(images[:1])) == model.dense_macs(size)


def test_attention_pooling_is_counted(make_vit):
    """The latent query is projected once for the whole batch, which belongs to no picture."""
    vit = make_vit(class_token=False, global_pool="map")
    model = msvit.MSViT(vit).eval().requires_grad_(False)
    mask = torch.rand(4, 4) < 0.5
    results = []
    total = counted(lambda: results.append(model.run(torch.randn(3, 3, 64, 64), mask)))
    assert total == results[0].macs.sum().item() + 64 * 64


def test_a_mask_does_without_the_gate(tiny_vit):
    model = msvit.MSViT(tiny_vit).eval()
    images, fine = torch.randn(2, 3, 64, 64), torch.zeros(4, 4, dtype=torch.bool)
    assert model.run(images, fine).macs.tolist() == [model.dense_macs((64, 64))] * 2


def test_published_figure_of_deit_small():
    """4.6 GMACs (Touvron et al. 2021, table 5)."""
    model = msvit.MSViT(timm.create_model("deit_small_patch16_224"))
    assert model.dense_macs((224, 224)) / 1e9 == pytest.approx(4.6, abs=0.05)
