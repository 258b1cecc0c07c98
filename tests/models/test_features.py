"""MSViT in the place of a timm encoder: features on the fine grid, or as mixed-scale tokens."""

import pytest
import torch
import torch.nn.functional as F
from helpers import mini_model, shake

import msvit

FINE = torch.zeros(4, 4, dtype=torch.bool)
INDICES = [None, 2, [0, 2], [-1], (2, 0)]


@pytest.fixture(
    params=[
        {},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 3, "no_embed_class": True, "init_values": 0.1},
        {"pre_norm": True, "global_pool": "avg"},
    ],
    ids=["class", "none", "registers", "avg"],
)
def vit(request, make_vit):
    return shake(make_vit(dynamic_img_size=True, **request.param))


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_all_fine_they_are_timm_s(vit, size):
    images, mask = torch.randn(2, 3, *size), torch.zeros(size[0] // 16, size[1] // 16, dtype=torch.bool)
    model = msvit.MSViT(vit).eval()
    torch.testing.assert_close(model.forward_features(images, mask), vit.forward_features(images), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("indices", INDICES)
@pytest.mark.parametrize("options", [{}, {"norm": True}, {"return_prefix_tokens": True, "output_fmt": "NLC"}])
def test_intermediates_are_timm_s_where_all_is_fine(vit, indices, options):
    if options.get("return_prefix_tokens") and not vit.num_prefix_tokens:
        pytest.skip("timm gives no pairs where there are no prefix tokens")
    images, model = torch.randn(2, 3, 64, 64), msvit.MSViT(vit).eval()
    given = indices if indices is None or isinstance(indices, int) else list(indices)
    final, expected = vit.forward_intermediates(images, given, **options)
    found_final, found = model.forward_intermediates(images, indices, mask=FINE, **options)
    torch.testing.assert_close(found_final, final, rtol=0, atol=1e-5)
    assert len(found) == len(expected)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    alone = model.forward_intermediates(images, indices, mask=FINE, intermediates_only=True, **options)
    torch.testing.assert_close(alone, found)


@torch.no_grad()
def test_a_coarse_region_has_one_token_on_all_of_its_patches():
    model, images = mini_model(), torch.randn(2, 3, 64, 64)
    mask = torch.rand(2, 4, 4) < 0.5
    final, (maps,) = model.forward_intermediates(images, [1], mask=mask)
    _, (tokens,) = model.forward_intermediates(images, [1], mask=mask, output_fmt="tokens")
    assert maps.shape == (2, 64, 8, 8)
    assert torch.equal(tokens.scatter().permute(0, 3, 1, 2), maps)
    assert len(tokens.x) == model.run(images, mask).tokens.sum()
    regions = maps.unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
    assert torch.equal((regions == regions[..., :1]).all(4).all(1), mask)
    torch.testing.assert_close(final[:, 1:], model.run(images, mask).final.scatter().flatten(1, 2))
    torch.testing.assert_close(model.forward_features(images, mask), final)
    pooled = model.vit.forward_head(final)
    torch.testing.assert_close(pooled, model.run(images, mask).logits, rtol=0, atol=1e-5)


def test_the_gate_decides_and_gradients_reach_the_images():
    model, images = mini_model(), torch.randn(2, 3, 64, 64, requires_grad=True)
    assert torch.equal(model.forward_features(images), model.forward_features(images, model.run(images).coarse))
    model.forward_features(images).sum().backward()
    assert images.grad.abs().sum() > 0


def test_what_it_does_not_take_is_said():
    model, images = mini_model(), torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match="output_fmt='NHWC' is not known.*NCHW, NLC, tokens"):
        model.forward_intermediates(images, output_fmt="NHWC")
    with pytest.raises(ValueError, match="first rows of each picture's"):
        model.forward_intermediates(images, output_fmt="tokens", return_prefix_tokens=True)
    for indices in ([7], [-4], 9, 0):
        with pytest.raises(ValueError, match="indices=.* lies outside"):
            model.forward_intermediates(images, indices)
    with pytest.raises(ValueError, match="channels"):
        model.forward_features(torch.randn(1, 1, 64, 64))


def test_a_linear_head_on_a_frozen_encoder_learns_a_dense_map():
    """Where the picture is bright: a head on the maps sees it through coarse tokens too."""
    model = mini_model().requires_grad_(False)
    images = torch.randn(64, 3, 1, 1).expand(-1, -1, 8, 8) + torch.randn(64, 3, 8, 8)
    images = F.interpolate(images, scale_factor=8)
    truth = F.avg_pool2d(images.mean(1, keepdim=True), 8)
    with torch.no_grad():
        maps = model.forward_intermediates(images, [-1], intermediates_only=True)[0].movedim(1, -1).flatten(0, 2)
    train, held = maps.unflatten(0, (64, -1))[:48], maps.unflatten(0, (64, -1))[48:]
    target = truth.flatten(1)
    weights = torch.linalg.lstsq(F.pad(train.flatten(0, 1), (0, 1), value=1.0), target[:48].flatten()).solution
    error = (F.pad(held, (0, 1), value=1.0) @ weights - target[48:]).square().mean()
    assert error < 0.5 * target[48:].var()
