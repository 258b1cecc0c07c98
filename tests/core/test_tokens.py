"""The map between tokens and pixels, against loops over pixels."""

import pytest
import torch

import msvit
from msvit.core import backbone
from msvit.core.candidates import choose_levelled, choose_trimmed
from msvit.models.msvit import EXECUTIONS


def built(make_vit, size=(64, 96), scale=2, execution="packed", **settings):
    """Tokens of random decisions, straight from the tokenizer."""
    model = msvit.MSViT(make_vit(**settings), scale=scale).eval()
    grid = model.grid(size)
    mask = torch.rand(3, *grid) < 0.5
    images = torch.randn(3, 3, *size)
    with torch.no_grad():
        tokens = model.tokenize(images, model.decide(images, mask), execution)
    return model, images, mask, tokens


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_every_token_is_the_embedding_of_its_pixels(make_vit, execution, scale):
    model, images, mask, tokens = built(make_vit, scale=scale, execution=execution)
    vit, patch = model.vit, 8
    position = vit.pos_embed[0, 1:].view(8, 8, -1).permute(2, 0, 1)[None]
    position = torch.nn.functional.interpolate(position, (8, 12), mode="bicubic", antialias=True)[0]
    for b in range(3):
        for y in range(8):
            for x in range(12):
                coarse = mask[b, y // scale, x // scale]
                k = scale if coarse else 1
                top, left = y // k * k, x // k * k
                pixels = images[b, :, top * patch : (top + k) * patch, left * patch : (left + k) * patch]
                small = pixels.unflatten(2, (patch, k)).unflatten(1, (patch, k)).mean((2, 4))
                expected = (vit.patch_embed.proj.weight * small).sum((1, 2, 3)) + vit.patch_embed.proj.bias
                expected = expected + position[:, top : top + k, left : left + k].mean((1, 2))
                row = tokens.where[b, y, x]
                torch.testing.assert_close(tokens.x[row], expected, rtol=1e-4, atol=1e-5)
                assert tokens.area[row] == k * k
                assert tokens.layout.picture[row] == b


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_paint_and_scatter_against_loops(make_vit, execution):
    model, _, mask, tokens = built(make_vit, execution=execution)
    values = torch.randn(len(tokens.x))
    painted, scattered = tokens.paint(values, (64, 96)), tokens.scatter()
    assert scattered.shape == (3, 8, 12, 64)
    for b in range(3):
        for y in range(64):
            for x in range(96):
                row = tokens.where[b, y // 8, x // 8]
                assert painted[b, y, x] == values[row]
        for y in range(8):
            for x in range(12):
                assert torch.equal(scattered[b, y, x], tokens.x[tokens.where[b, y, x]])
    # A coarse region shows one value, a fine one four.
    for b, r, c in mask.nonzero().tolist():
        assert painted[b, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].unique().numel() == 1
    assert tokens.active_counts().tolist() == [1 + 24 + 3 * 24 - 3 * int(m.sum()) for m in mask]


def test_the_area_of_the_active_tokens_is_the_picture(make_vit):
    _, _, _, tokens = built(make_vit, execution="masked")
    covered = tokens.layout.sum(tokens.area * tokens.activity)
    assert covered.tolist() == [96.0] * 3


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_average_pooling_is_the_mean_of_the_fine_grid(make_vit, execution):
    model, _, _, tokens = built(make_vit, execution=execution, class_token=False, global_pool="avg")
    pooled = backbone._pool(model.vit, tokens)
    torch.testing.assert_close(pooled, tokens.scatter().mean((1, 2)), rtol=0, atol=1e-6)


def test_selecting_rows_keeps_the_map_and_drops_the_rest(make_vit):
    _, _, _, tokens = built(make_vit)
    keep = torch.rand(len(tokens.x)) < 0.7
    rows = keep.nonzero()[:, 0]
    fewer = tokens.select(rows, [int(k.sum()) for k in keep.split(tokens.layout.lengths)])
    lost = ~keep[tokens.where]
    assert torch.equal(fewer.where < 0, lost)
    assert torch.equal(fewer.scatter()[~lost], tokens.scatter()[~lost])
    assert (fewer.scatter()[lost] == 0).all()
    assert fewer.paint(fewer.area, (64, 96)).isnan().any(dim=0).any()


def test_trimming_keeps_the_active_and_those_next_to_the_boundary():
    soft = torch.tensor([[1.0, 0.9, 0.8, 0.1, 0.4, 0.3], [1.0, 0.7, 0.2, 0.45, 0.1, 0.0]])
    active = soft > 0.5
    rows, lengths = choose_trimmed(active, soft, margin=0.5)
    assert lengths == [3, 2]
    assert rows.tolist() == [0, 1, 2, 6, 7]
    rows, lengths = choose_trimmed(active, soft, margin=0.25)
    assert lengths == [5, 3]
    assert rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 9]
    rows, lengths = choose_trimmed(active, soft, margin=0.0)
    assert rows.tolist() == list(range(12))


def test_levelled_fills_the_batch_with_what_is_nearest_to_the_decision():
    """Every picture has as many rows as the one with most active tokens: its own active ones, then the softest."""
    soft = torch.rand(5, 30)
    active = soft > torch.tensor([0.5, 0.2, 0.9, 0.7, 1.0])[:, None]
    rows, lengths = choose_levelled(active, soft)
    most = int(active.sum(1).max())
    assert lengths == [most] * 5
    for b in range(5):
        chosen = set((rows[rows // 30 == b] % 30).tolist())
        here = active[b].nonzero()[:, 0].tolist()
        rest = sorted((i for i in range(30) if i not in here), key=lambda i: -soft[b, i])
        assert chosen == {*here, *rest[: most - len(here)]}
    assert (rows.diff() > 0).all()
