"""Attention as a low-pass filter: against filters that are known, and the path against timm's own."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import ROTARY, shake

from msvit import MSViT
from msvit.studies.smoothing import amplitudes, mean_cosine, measure_smoothing


@pytest.mark.parametrize(("down", "across"), [(0, 0), (1, 0), (0, 3), (2, 2)])
def test_a_wave_has_its_frequency_alone(down, across):
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    wave = torch.cos(2 * math.pi * (down * y + across * x) / 8)[None, ..., None]
    found = amplitudes(wave)
    assert len(found) == 5
    assert found.argmax() == round(math.hypot(down, across))
    assert found.sum() == pytest.approx(found.max().item(), abs=1e-4)


def test_mean_cosine_is_that_of_all_pairs():
    x = torch.randn(2, 5, 7)
    pairs = [F.cosine_similarity(p[i], p[j], dim=0) for p in x for i in range(5) for j in range(5) if i != j]
    torch.testing.assert_close(mean_cosine(x), torch.stack(pairs).mean())
    assert mean_cosine(torch.ones(1, 4, 3)) == pytest.approx(1)


def test_uniform_attention_lets_the_mean_pass_and_nothing_else(tiny_vit):
    model = MSViT(shake(tiny_vit)).eval()
    for block in model.vit.blocks:
        for part in (block.attn.qkv.weight, block.attn.qkv.bias):
            part.data[: 2 * model.vit.embed_dim] = 0  # queries and keys: all scores are equal
    found = measure_smoothing(model, torch.randn(2, 3, 64, 64))
    assert found.response.shape == (3, 5)
    assert (found.response[:, 1:] < 1e-5).all()
    torch.testing.assert_close(found.singular[:, 0], torch.ones(3))
    assert (found.singular[:, 1:] < 1e-5).all()


@pytest.mark.parametrize("settings", [{}, {"class_token": False, "global_pool": "avg"}, {"reg_tokens": 3}])
def test_the_tokens_are_those_of_the_backbone(make_vit, settings):
    assert_followed(make_vit(**settings))


@pytest.mark.parametrize("settings", [ROTARY[3], ROTARY[4]], ids=str)
def test_the_tokens_are_those_of_a_rotary_backbone(make_eva, settings):
    assert_followed(make_eva(**settings))


def assert_followed(vit):
    """Block by block, as timm's own hooks see them."""
    model, images = MSViT(shake(vit)).eval(), torch.randn(2, 3, 64, 64)
    found, hidden = measure_smoothing(model, images), []
    for block in model.vit.blocks:
        block.register_forward_hook(lambda module, seen, out: hidden.append((seen[0], out)))
    with torch.no_grad():
        model.vit(images)
    for (before, after), cosines in zip(hidden, found.similarity, strict=True):
        prefix = model.vit.num_prefix_tokens
        torch.testing.assert_close(mean_cosine(before[:, prefix:]), cosines[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(mean_cosine(after[:, prefix:]), cosines[2], rtol=1e-4, atol=1e-5)
    assert (found.singular.diff(dim=1) <= 1e-6).all()
