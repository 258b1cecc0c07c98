"""Names of timm that are plain vision transformers, or why not."""

import pytest
import timm
import torch

import msvit
from msvit.models.names import TIMM_MODULES, list_backbones

NARROW = {"embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 5}
PIECES = 24  # in which all names are walked


def test_a_name_says_what_it_builds():
    (found,) = list_backbones("vit_small_patch16_rope_mixed_ape_224")
    assert found == (found.name, 16, "224 x 224", 197, "learned, rotary (mixed)", "")
    (found,) = list_backbones("vit_small_patch16_36x1_224")
    assert (found.positions, found.refused) == ("learned", "")
    (found,) = list_backbones("vit_small_patch16_18x2_224")
    assert found.refused.startswith(
        "VisionTransformer has ['ParallelThingsBlock']; supported are timm's standard blocks"
    )
    with pytest.raises(ValueError, match=r"of its \d+ names that match 'swin\*', none is a plain vision transformer"):
        list_backbones("swin*")
    with pytest.raises(ValueError, match="timm has no name that matches 'vitt'"):
        list_backbones("vitt")


def narrow(name, patch):
    """A narrow variant for pictures of six by four patches; everything else is as timm has it."""
    own = {"num_kv_heads": (4, 2)} if "sapiens2" in name else {}
    if "giant_patch14" in name:
        own["embed_dim"] = 96  # of which 16/3, the width of DINOv2's halved MLP, is even
    vit = timm.create_model(name, img_size=(6 * patch, 4 * patch), **NARROW | own).eval()
    for p in vit.parameters():
        p.add_(0.1 * torch.randn_like(p))
    return vit


@pytest.mark.slow
@pytest.mark.parametrize("piece", range(PIECES))
@torch.no_grad()
def test_every_name_works_or_is_refused_in_words(piece):
    """All fine is timm to 1e-5 of the largest logit, and executions agree, for all names that are listed as working."""
    wrong = []
    for name in timm.list_models(module=TIMM_MODULES)[piece::PIECES]:
        (found,) = list_backbones(name)
        if found.refused:
            assert len(found.refused) > 20
            continue
        vit = narrow(name, found.patch)
        model, images = msvit.MSViT(vit).eval(), torch.randn(1, 3, *vit.patch_embed.img_size)
        expected, size = vit(images), images.shape[-2:]
        allowed = 1e-5 * max(1.0, expected.abs().max().item())
        fine = [model.run(images, model.all_fine(size), execution).logits for execution in ("masked", "packed")]
        mixed = [model.run(images, torch.eye(3, 2) > 0, execution).logits for execution in ("masked", "packed")]
        if any((logits - expected).abs().max() > allowed for logits in fine):
            wrong.append(name)
        if (mixed[0] - mixed[1]).abs().max() > 10 * allowed:
            wrong.append(f"{name}: executions")
    assert wrong == []
