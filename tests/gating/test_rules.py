"""Rules in the gate's place: which regions they make coarse, against loops."""

import json
import math

import pytest
import timm
import torch

import msvit
from msvit.gating.base import Rule
from msvit.gating.entropy import Entropy
from msvit.gating.rules import RULES, Static, make_rule


class TestStatic:
    @pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.75, 1.0])
    @pytest.mark.parametrize("kind", ["centre", "border", "random"])
    @pytest.mark.parametrize("grid", [(4, 4), (7, 7), (3, 6)])
    def test_every_picture_has_its_rate(self, kind, rate, grid):
        masks = Static(kind, rate).eval().score(torch.rand(5, 3, 48, 96), [grid])[0]
        assert masks.shape == (5, *grid)
        assert masks.flatten(1).sum(1).tolist() == [math.floor(rate * grid[0] * grid[1] + 0.5)] * 5
        assert set(masks.unique().tolist()) <= {0.0, 1.0}

    def test_centre_and_border_are_ranked_by_distance(self):
        images = torch.rand(1, 3, 48, 96)
        for kind, sign in (("centre", 1), ("border", -1)):
            mask = Static(kind, 0.5).score(images, [(3, 6)])[0][0]
            distance = {(r, c): (r - 1) ** 2 + (c - 2.5) ** 2 for r in range(3) for c in range(6)}
            coarse = [sign * distance[r, c] for r, c in mask.nonzero().tolist()]
            fine = [sign * distance[r, c] for r, c in (1 - mask).nonzero().tolist()]
            assert min(coarse) >= max(fine)

    def test_checkerboard_fine_and_coarse(self):
        images = torch.rand(2, 3, 64, 64)
        board = Static("checkerboard").score(images, [(4, 4)])[0]
        assert all(board[0, r, c] == 1 - (r + c) % 2 for r in range(4) for c in range(4))
        assert (Static("fine").score(images, [(4, 4)])[0] == 0).all()
        assert (Static("coarse").score(images, [(4, 4)])[0] == 1).all()

    def test_random_places_belong_to_the_picture(self):
        images = torch.randn(64, 3, 32, 32)
        rule = Static("random", 0.5).eval()
        masks = rule.score(images, [(4, 4)])[0]
        order = torch.randperm(64)
        assert torch.equal(rule.score(images[order], [(4, 4)])[0], masks[order])
        assert torch.equal(rule.score(images[5:6], [(4, 4)])[0][0], masks[5])
        assert masks.flatten(1).unique(dim=0).shape[0] > 60
        assert ((masks.mean(0) > 0.25) & (masks.mean(0) < 0.75)).all()
        assert not torch.equal(Static("random", 0.5, seed=1).eval().score(images, [(4, 4)])[0], masks)
        similar = images.clone()
        similar[:, 2, 17, 9] += 1e-3
        assert (rule.score(similar, [(4, 4)])[0] != masks).flatten(1).any(1).float().mean() > 0.9

    def test_random_places_change_while_training(self):
        images, rule = torch.randn(4, 3, 32, 32), Static("random", 0.5).train()
        first, second = (rule.score(images, [(4, 4)])[0] for _ in range(2))
        assert not torch.equal(first, second)
        assert first.flatten(1).sum(1).tolist() == [8] * 4


@pytest.mark.parametrize("name", RULES)
@pytest.mark.long
def test_every_rule_runs_trains_and_is_saved(tmp_path, name):
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"), gate=make_rule(name)).train()
    images = torch.randn(3, 3, 64, 64)
    result = model.run(images)
    result.logits.sum().backward()
    assert result.scores is None
    assert result.macs.dtype == torch.float64
    model.eval().save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    assert isinstance(again.gate, Rule)
    assert again.gate.settings == json.loads(json.dumps(model.gate.settings))
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


def test_a_rule_costs_no_macs_and_a_mask_overrides_it(tiny_vit):
    model = msvit.MSViT(tiny_vit, gate=make_rule("coarse")).eval()
    images, fine = torch.randn(2, 3, 64, 64), torch.zeros(4, 4, dtype=torch.bool)
    with torch.no_grad():
        assert model.run(images).tokens.tolist() == [17, 17]
        assert model.run(images, fine).macs.tolist() == [model.dense_macs((64, 64))] * 2
        assert model.macs_of(torch.tensor([0]), (64, 64)).item() == model.dense_macs((64, 64))


class TestBadInput:
    def test_names(self):
        with pytest.raises(
            ValueError, match="rule='center'.*the nearest is 'centre'. There are: entropy, psnr, equality, fine"
        ):
            make_rule("center")
        with pytest.raises(ValueError, match="static mask='middle' is not known. There are: fine, coarse"):
            Static("middle")

    @pytest.mark.parametrize(
        ("name", "settings", "match"),
        [
            ("centre", {"rate": 1.5}, r"rate=1\.5"),
            ("fine", {"rate": 0.5}, "a fine mask has the rate 0"),
            ("checkerboard", {"rate": 0.3}, "has the rate 0.5"),
            ("entropy", {"thresholds": [5.5, 9.5]}, r"threshold=9\.5 lies outside"),
            ("entropy", {"thresholds": [6, 5, 4, 3]}, r"thresholds=\[6, 5, 4, 3\]: give a list of one"),
            ("entropy", {"thresholds": 5.5}, r"thresholds=5\.5: give a list"),
            ("entropy", {"threshold": [3]}, "nearest is 'thresholds'"),
            ("entropy", {"bins": "batch"}, "nearest is 'batched'. There are: loader, batched, rounded"),
        ],
    )
    def test_settings(self, name, settings, match):
        with pytest.raises(ValueError, match=match):
            make_rule(name, **settings)

    def test_channels(self, make_vit):
        with pytest.raises(ValueError, match="pictures of 1 channels"):
            msvit.MSViT(make_vit(in_chans=1), gate=Entropy())(torch.rand(1, 1, 64, 64))

    def test_calibrating_what_has_no_threshold(self, tiny_vit):
        with pytest.raises(ValueError, match="no threshold to calibrate"):
            msvit.MSViT(tiny_vit, gate=make_rule("border")).calibrate([torch.rand(2, 3, 64, 64)])
