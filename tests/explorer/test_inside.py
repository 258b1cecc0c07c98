"""What a token sees and what a region is worth: against the model itself, finite differences, and plain loops."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROTARY, gate_of, mini_model, open_explorer, reduced, segmenter_of, shake
from PIL import Image

from msvit import MSViT
from msvit.core.blocks import run_blocks
from msvit.explorer.attention import attention_of, worth_of
from msvit.explorer.drawing import PANEL_WIDTH
from msvit.explorer.inside import INSIDE, WAITING, Inside, looks_inside
from msvit.explorer.models import LoadedModel
from msvit.explorer.state import masks_of, run_backbone
from msvit.models.tokenizer import Gating

MIXED = np.array([[1, 0, 1, 0], [0, 0, 1, 1], [1, 1, 0, 1], [0, 1, 1, 0]])


@pytest.fixture
def state(gated):
    return run_backbone(gated, 0.5, MIXED)


def test_attention_is_that_of_the_model(state):
    assert_models_own(state)


@pytest.mark.parametrize("settings", [ROTARY[0], ROTARY[4]], ids=str)
def test_attention_is_that_of_a_rotary_model(make_eva, settings):
    model = MSViT(shake(make_eva(**settings))).eval()
    assert_models_own(run_backbone(gate_of(LoadedModel.of("rotary", model)), 0.5, MIXED))


def assert_models_own(state):
    """The rows of A sum to 1, and the class token of the first block takes what timm's own attention gives it."""
    attention = attention_of(state)
    n = 1 + MIXED.sum() + 4 * (1 - MIXED).sum()
    assert attention.shares.shape == (3, 4, n, n)
    assert torch.allclose(attention.shares.sum(-1), torch.ones(3, 4, n))
    model = state.gated.loaded.model
    seen = []
    hook = model.vit.norm.register_forward_pre_hook(lambda _, rows: seen.append(rows[0]))
    with torch.inference_mode():
        result = model.run(state.gated.pixels, torch.from_numpy(state.coarse))
    hook.remove()
    assert torch.allclose(attention.last, seen[0], atol=1e-5), "the tokens that these matrices lead to are the model's"
    assert result.tokens.item() == n


def test_a_token_sees_the_same_share_wherever_it_lies(state):
    attention = attention_of(state)
    matrix = attention.layer(1, 2)
    assert torch.equal(matrix, attention.shares[1, 2])
    seen = attention.seen(matrix, 0)
    assert seen.shape == (8, 8)
    assert np.array_equal(seen, matrix[attention.where[0, 0]][attention.where].numpy())
    blocks = seen.reshape(4, 2, 4, 2).transpose(0, 2, 1, 3)[MIXED == 1].reshape(-1, 4)
    assert (blocks == blocks[:, :1]).all(), "a coarse region has one value"
    assert np.array_equal(attention.seen(matrix, -1), matrix[0][attention.where].numpy()), "the class token"


def test_rollout_is_the_product_and_its_rows_sum_to_one(state):
    attention = attention_of(state)
    first, second, third = attention.shares.mean(1)
    one = torch.eye(len(first))
    expected = (third + one) / 2 @ ((second + one) / 2 @ ((first + one) / 2))
    assert torch.allclose(attention.rollout(), expected)
    assert torch.allclose(attention.rollout().sum(1), torch.ones(len(first)))


@pytest.mark.parametrize("kind", ["classes", "pixels"])
def test_a_regions_cost_is_the_difference_of_two_runs(kind):
    model = mini_model() if kind == "classes" else segmenter_of()
    gated = gate_of(LoadedModel.of(kind, model))
    worth = worth_of(run_backbone(gated, 0.5, MIXED))
    target = model.run(gated.pixels, torch.from_numpy(MIXED == 1)).logits.argmax(1)
    for r, c in ((0, 0), (0, 1), (3, 2)):
        losses = []
        for coarse in (0, 1):
            mask = torch.from_numpy(MIXED == 1)
            mask[r, c] = bool(coarse)
            losses.append(F.cross_entropy(model.run(gated.pixels, mask).logits, target).item())
        assert worth.cost[r, c] == pytest.approx(losses[1] - losses[0], abs=1e-5)


def test_the_gradient_is_that_of_the_masked_model(gated, unbounded):
    """By differences of m from where it is towards the inside of [0, 1]."""
    model = gated.loaded.model.double()
    gated = replace(gated, pixels=gated.pixels.double())
    worth = worth_of(run_backbone(gated, 0.5, MIXED))
    target = model.run(gated.pixels, torch.from_numpy(MIXED == 1)).logits.argmax(1)

    @torch.no_grad()
    def loss(m):
        tokens = model.tokenize(gated.pixels, Gating(None, m, m), "masked")
        final = run_blocks(model.vit, tokens).final
        return F.cross_entropy(model.head.logits(model.vit, final, (64, 64)), target).item()

    for r, c in ((0, 0), (0, 1), (3, 2)):
        m, h = torch.from_numpy(MIXED).double()[None], 1e-3 * (1 - 2 * MIXED[r, c])
        at = []
        for step in (0, 1, 2):
            m[0, r, c] = MIXED[r, c] + step * h
            at.append(loss(m))
        assert worth.gradient[r, c] == pytest.approx((4 * at[1] - at[2] - 3 * at[0]) / (2 * h), rel=0.01, abs=1e-5)


@pytest.mark.parametrize("title", INSIDE)
def test_panels_have_the_width_of_all(title, state):
    inside = Inside(state)
    mean = INSIDE[title](inside)
    assert mean.width == PANEL_WIDTH
    inside.picked, inside.head = 9, 1
    picked = INSIDE[title](inside)
    assert np.array_equal(np.asarray(mean), np.asarray(picked)) == (title in ("Cost if coarse", "Gate's gradient"))


def test_attention_of_a_quadtree_is_that_of_its_tokens():
    """Of a token of the largest size too; what a region is worth is not said."""
    model = MSViT(mini_model().vit, scales=(1, 2, 4)).eval()
    loaded = LoadedModel.of("quadtree", model)
    levels = np.array([[2, 2, 1, 0], [2, 2, 0, 0], [1, 0, 2, 2], [0, 1, 2, 2]])
    state = run_backbone(gate_of(loaded), 0.5, levels)
    attention, seen = attention_of(state), []
    assert attention.shares.shape[-1] == state.tokens == 1 + 2 + 3 + 4 * 5
    with model.vit.norm.register_forward_pre_hook(lambda _, rows: seen.append(rows[0])), torch.inference_mode():
        model.run(state.gated.pixels, masks_of(levels, 2))
    assert torch.allclose(attention.last, seen[0], atol=1e-5)
    shown = attention.seen(attention.layer(1, 0), 0)
    assert (shown[:4, :4] == shown[0, 0]).all()
    assert looks_inside(loaded)
    for title in ("Cost if coarse", "Gate's gradient"):  # in words, and nothing is computed
        inside = Inside(state)
        assert INSIDE[title](inside).size == (PANEL_WIDTH, 68)
        assert "worth" not in vars(inside)


def test_panels_are_switched_on_and_computed_at_rest(loaded, tmp_path):
    explorer = open_explorer(loaded, reduced("tome"), runs=tmp_path, out=tmp_path)
    row, other = explorer.rows
    assert all(box.layout.display == "none" for box in row.inside_boxes.values())
    explorer.inside["Attention"].value = explorer.inside["Cost if coarse"].value = True
    assert row.inside_boxes["Attention"].layout.display is None
    assert row.inside_boxes["Rollout"].layout.display == "none"
    assert other.inside_boxes["Attention"].layout.display == "none", "a reducer leaves no place to paint on"
    explorer._measure()
    first = row.inside_images["Attention"].value
    assert first != WAITING
    explorer.threshold.value = 1.0
    assert row.inside_images["Attention"].value == WAITING, "nothing stale"
    explorer._measure()
    explorer.block.value, explorer.head.value = 0, 3
    row.painter.picked = 20
    explorer._measure()
    assert row.inside_images["Attention"].value not in (first, WAITING)
    assert (row.inside.block, row.inside.head, row.inside.picked) == (0, 3, 20)
    with Image.open(io.BytesIO(row.inside_images["Cost if coarse"].value)) as cost:
        assert cost.width == PANEL_WIDTH
