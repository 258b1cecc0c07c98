"""Rotary positions at the centres of tokens, against loops and timm's own tables."""

import math

import pytest
import timm.layers
import torch
from helpers import ROTARY

import msvit
from msvit.core.rotary import make_rotary, rotate
from msvit.models.msvit import EXECUTIONS


def tokens_of(vit, size=(64, 96), scales=(1, 2), execution="masked"):
    model = msvit.MSViT(vit, scales=scales).eval()
    masks = [torch.rand(2, *grid) < 0.5 for grid in model.grids(size)]
    with torch.no_grad():
        images = torch.randn(2, 3, *size)
        return model, model.tokenize(images, model.decide(images, masks), execution), masks


def side_of(masks, scales, b, y, x):
    """Of the token over a fine patch: the largest region around it that is one, where a whole one fits."""
    for mask, side in zip(reversed(masks), reversed(scales[1:]), strict=True):
        row, column = y // side, x // side
        if row < mask.shape[1] and column < mask.shape[2] and mask[b, row, column]:
            return side
    return 1


def coordinate(vit, place, sides, axis):
    """What timm gives a fine patch in the row or column number `place`, which may lie between two."""
    rope = vit.rope
    name, n = type(rope).__name__, sides[axis]
    if name == "RotaryEmbeddingDinoV3":
        return 2 * (place + 0.5 + rope.grid_offset) / n - 1
    place = place + getattr(rope, "grid_offset", 0.0)
    reference = getattr(rope, "ref_feat_shape", None)
    return place if reference is None else place / n * reference[axis]


def angle(vit, layer, head, i, row, column):
    """Of plane i, in plain numbers."""
    rope, axes = vit.rope, (row, column)
    x, y = axes[::-1] if rope.grid_indexing == "xy" else axes
    name = type(rope).__name__
    if name == "RotaryEmbeddingMixed":
        fx, fy = rope.freqs[:, layer, head, i].tolist()
        return x * fx + y * fy
    if name == "RotaryEmbeddingMRope":
        return (0, row, column)[int(rope.axis[i])] * rope.temperature ** (-2 * i / rope.dim)
    quarter = vit.blocks[0].attn.head_dim // 4
    along, j = (x, i) if i < quarter else (y, i - quarter)
    period = rope.temperature ** (j / quarter)
    return along / period * (2 * math.pi if name == "RotaryEmbeddingDinoV3" else 1)


@pytest.mark.parametrize("settings", ROTARY, ids=str)
@torch.no_grad()
def test_angles_against_loops(make_eva, settings):
    """Every candidate of a picture that is no square: the angles of its centre, in all planes."""
    vit = make_eva(depth=2, img_size=(32, 48), **settings)
    _, tokens, _ = tokens_of(vit, size=(40, 48))
    rotary, sides = make_rotary(vit), (5, 6)
    for layer in range(2):
        turn = rotary.turn(layer, tokens)
        heads = turn.cos.shape[1]
        for t in range(0, len(tokens.x), 3):
            top, left, bottom, right = tokens.box[t].tolist()
            places = [(a + b) / 2 - 0.5 for a, b in ((top, bottom), (left, right))]
            row, column = (coordinate(vit, place, sides, axis) for axis, place in enumerate(places))
            for head in range(heads):
                for i in range(turn.cos.shape[2]):
                    expected = angle(vit, layer, head, i, row, column) if bottom > top else 0.0
                    assert turn.cos[t, head, i].item() == pytest.approx(math.cos(expected), abs=2e-5)
                    assert turn.sin[t, head, i].item() == pytest.approx(math.sin(expected), abs=2e-5)


@pytest.mark.parametrize("settings", ROTARY, ids=str)
@torch.no_grad()
def test_fine_tokens_are_rotated_as_by_timm(make_eva, settings):
    vit = make_eva(dynamic_img_size=True, **settings)
    _, tokens, _ = tokens_of(vit)
    rotary, embedding = make_rotary(vit), vit.rope.get_embed(shape=(8, 12))
    q = torch.randn(len(tokens.x), 4, 16)
    for layer in range(3):
        ours = rotate(q, rotary.turn(layer, tokens))
        table = embedding[layer] if embedding.dim() == 4 else embedding
        for t in (tokens.area == 1).nonzero()[:, 0].tolist():
            place = int(tokens.box[t, 0]) * 12 + int(tokens.box[t, 1])
            half = vit.blocks[0].attn.rotate_half
            expected = timm.layers.apply_rot_embed_cat(q[t], table[..., place, :], half=half)
            torch.testing.assert_close(ours[t], expected, rtol=0, atol=1e-5)
        lead = (tokens.area == 0).nonzero()[:, 0]
        assert torch.equal(ours[lead], q[lead])
    assert not make_eva(use_rot_pos_emb=False).rope
    assert make_rotary(make_eva(use_rot_pos_emb=False)) is None


SCALES_AND_SIZES = [
    *(((1, scale), size) for scale in (2, 3, 4) for size in [(64, 96), (41, 71), (8, 60)]),
    *(((1, 2, 4), size) for size in [(64, 96), (41, 71)]),
    ((1, 2, 4, 8), (71, 57)),
]


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize(("scales", "size"), SCALES_AND_SIZES)
@torch.no_grad()
def test_centres_boxes_and_areas_against_loops(make_vit, execution, scales, size):
    """Of what a token covers inside of the picture, patch by patch; padding is covered by none."""
    _, tokens, masks = tokens_of(make_vit(), size, scales, execution)
    h, w = -(-size[0] // 8), -(-size[1] // 8)
    assert tokens.grids.tolist() == [[h, w]] * 2
    assert tokens.where.shape == (2, h, w)
    covered = {}
    for b in range(2):
        for y in range(h):
            for x in range(w):
                k = side_of(masks, scales, b, y, x)
                row = int(tokens.where[b, y, x])
                covered.setdefault(row, (b, y // k, x // k, []))[3].append((y + 0.5, x + 0.5))
    for row, (b, _, _, patches) in covered.items():
        ys, xs = zip(*patches, strict=True)
        n = len(patches)
        assert tokens.centre[row].tolist() == pytest.approx([sum(ys) / n, sum(xs) / n])
        assert tokens.box[row].tolist() == [min(ys) - 0.5, min(xs) - 0.5, max(ys) + 0.5, max(xs) + 0.5]
        assert tokens.extent[row].tolist() == [max(ys) - min(ys) + 1, max(xs) - min(xs) + 1]
        assert tokens.area[row] == n
        assert tokens.layout.picture[row] == b
    assert tokens.active_counts().sum() == len(covered) + 2
    lead = tokens.layout.position < 1
    assert not tokens.box[lead].any()
    assert not tokens.centre[lead].any()
    assert (tokens.extent[~lead] > 0).all()


@torch.no_grad()
def test_coordinates_are_shaken_while_training_only(make_eva):
    """One draw for a whole pass, as in timm: shifted, and stretched along each axis and along both."""
    vit = make_eva(rope_type="dinov3", rope_shift_coords=0.2, rope_jitter_coords=1.5, rope_rescale_coords=2.0)
    _, tokens, _ = tokens_of(vit)
    plain, same = make_rotary(vit), make_rotary(vit)
    assert torch.equal(plain.coordinates(tokens), same.coordinates(tokens))
    vit.train()
    patches = (tokens.area > 0).nonzero()[:, 0]
    before, found = plain.coordinates(tokens)[patches], []
    for _ in range(200):
        after = make_rotary(vit).coordinates(tokens)[patches]
        slope = (after[-1] - after[0]) / (before[-1] - before[0])
        shift = after[0] / slope - before[0]
        torch.testing.assert_close(after, (before + shift) * slope, rtol=1e-4, atol=1e-5)
        found.append(torch.cat([shift, slope.log()]))
    least, most = torch.stack(found).aminmax(dim=0)
    limit = math.log(1.5) + math.log(2.0)
    assert (least >= torch.tensor([-0.2, -0.2, -limit, -limit]) - 1e-4).all()
    assert (most <= torch.tensor([0.2, 0.2, limit, limit]) + 1e-4).all()
    assert (most - least > torch.tensor([0.3, 0.3, 1.0, 1.0])).all()


def test_an_unknown_kind_is_named_with_what_would_work(make_eva):
    vit = make_eva()
    vit.rope = timm.layers.RotaryEmbedding(16, in_pixels=False, feat_shape=(8, 8))
    with pytest.raises(ValueError, match=r"RotaryEmbedding are not known.*'cat'.*'mixed'.*'dinov3'.*'mrope'"):
        msvit.MSViT(vit)
