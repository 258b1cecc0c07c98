"""Rules in the gate's place: which regions they make coarse, against loops; and three scales."""

import math

import pytest
import timm
import torch

import msvit
from msvit.data.scenes import Scenes
from msvit.gating.rules import RULES, Entropy, Rule, Static, make_rule
from msvit.models.msvit import EXECUTIONS


def entropy_of(grey):
    """Of a patch of grey values in 0 ... 255, by counting."""
    values = grey.flatten().tolist()
    shares = [values.count(v) / len(values) for v in set(values)]
    return -sum(p * math.log2(p) for p in shares)


def levels(images, mean, std):
    values = images * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    grey = sum(c * v for c, v in zip((0.299, 0.587, 0.114), values.unbind(1), strict=True))
    return (grey * 255).round().clamp(0, 255).long()


def pictures(n=6, side=64):
    """Pictures of 0 to 1 whose regions hold from one to many grey values."""
    steps = torch.randint(1, 40, (n, 1, side // 16, side // 16)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return (torch.rand(n, 1, side, side) * steps).floor().expand(-1, 3, -1, -1) / 51  # every fifth of 256 levels


class TestStatic:
    @pytest.mark.parametrize("rate", [0.0, 0.25, 0.5, 0.75, 1.0])
    @pytest.mark.parametrize("kind", ["centre", "border", "random"])
    @pytest.mark.parametrize("grid", [(4, 4), (7, 7), (3, 6)])
    def test_every_picture_has_its_rate(self, kind, rate, grid):
        masks = Static(kind, rate).eval().score(torch.rand(5, 3, 48, 96), grid).regions
        assert masks.shape == (5, *grid)
        assert masks.flatten(1).sum(1).tolist() == [math.floor(rate * grid[0] * grid[1] + 0.5)] * 5
        assert set(masks.unique().tolist()) <= {0.0, 1.0}

    def test_centre_and_border_are_ranked_by_distance(self):
        images = torch.rand(1, 3, 48, 96)
        for kind, sign in (("centre", 1), ("border", -1)):
            mask = Static(kind, 0.5).score(images, (3, 6)).regions[0]
            distance = {(r, c): (r - 1) ** 2 + (c - 2.5) ** 2 for r in range(3) for c in range(6)}
            coarse = [sign * distance[r, c] for r, c in mask.nonzero().tolist()]
            fine = [sign * distance[r, c] for r, c in (1 - mask).nonzero().tolist()]
            assert min(coarse) >= max(fine)

    def test_checkerboard_fine_and_coarse(self):
        images = torch.rand(2, 3, 64, 64)
        board = Static("checkerboard").score(images, (4, 4)).regions
        assert all(board[0, r, c] == 1 - (r + c) % 2 for r in range(4) for c in range(4))
        assert (Static("fine").score(images, (4, 4)).regions == 0).all()
        assert (Static("coarse").score(images, (4, 4)).regions == 1).all()

    def test_random_places_belong_to_the_picture(self):
        images = torch.randn(64, 3, 32, 32)
        rule = Static("random", 0.5).eval()
        masks = rule.score(images, (4, 4)).regions
        order = torch.randperm(64)
        assert torch.equal(rule.score(images[order], (4, 4)).regions, masks[order])
        assert torch.equal(rule.score(images[5:6], (4, 4)).regions[0], masks[5])
        assert masks.flatten(1).unique(dim=0).shape[0] > 60
        assert ((masks.mean(0) > 0.25) & (masks.mean(0) < 0.75)).all()
        assert not torch.equal(Static("random", 0.5, seed=1).eval().score(images, (4, 4)).regions, masks)
        similar = images.clone()
        similar[:, 2, 17, 9] += 1e-3
        assert (rule.score(similar, (4, 4)).regions != masks).flatten(1).any(1).float().mean() > 0.9

    def test_random_places_change_while_training(self):
        images, rule = torch.randn(4, 3, 32, 32), Static("random", 0.5).train()
        first, second = (rule.score(images, (4, 4)).regions for _ in range(2))
        assert not torch.equal(first, second)
        assert first.flatten(1).sum(1).tolist() == [8] * 4


class TestEntropy:
    @pytest.mark.parametrize("bits", [3.0, 4.5])
    def test_two_scales_against_counting(self, tiny_vit, bits):
        images = pictures()
        rule = Entropy(bits, mean=(0.0,) * 3, std=(1.0,) * 3)
        coarse = msvit.MSViT(tiny_vit, gate=rule).eval().run(images).coarse
        grey = levels(images, (0.0,) * 3, (1.0,) * 3)
        for b in range(len(images)):
            for r in range(4):
                for c in range(4):
                    h = entropy_of(grey[b, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16])
                    assert coarse[b, r, c] == (h < bits)
        assert 0 < coarse.float().mean() < 1

    def test_normalised_pictures_are_the_same_pictures(self):
        images, mean, std = pictures(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
        normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        plain = Entropy(mean=(0.0,) * 3, std=(1.0,) * 3).histograms(images, (4, 4))
        again = Entropy(mean=mean, std=std).histograms(normalised, (4, 4))
        assert torch.equal(plain, again)

    @pytest.mark.parametrize("size", [(64, 64), (80, 112)])
    @pytest.mark.parametrize("execution", EXECUTIONS)
    @torch.no_grad()
    @pytest.mark.long
    def test_three_scales_against_loops(self, make_vit, size, execution):
        """Blocks from the largest patch down; a token is the embedding of its averaged pixels at its mean position."""
        vit = make_vit(dynamic_img_size=True)
        images = torch.nn.functional.interpolate(pictures(4), size)
        rule = Entropy(4.5, scales=3, gap=0.0, mean=(0.0,) * 3, std=(1.0,) * 3)
        model = msvit.MSViT(vit, gate=rule).eval()
        tokens = model.tokenize(images, model.decide(images), execution)
        grey = levels(images, (0.0,) * 3, (1.0,) * 3)
        fine = (size[0] // 8, size[1] // 8)
        position = vit.pos_embed[0, 1:].view(8, 8, -1).permute(2, 0, 1)[None]
        if fine != (8, 8):
            position = torch.nn.functional.interpolate(position, fine, mode="bicubic", antialias=True)
        h, w = size[0] // 16, size[1] // 16
        seen = set()
        for b in range(4):
            count = 1
            for y in range(fine[0]):
                for x in range(fine[1]):
                    side, (r, c) = 1, (y // 2, x // 2)
                    if entropy_of(grey[b, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]) < 4.5:
                        side = 2
                    if r // 2 < h // 2 and c // 2 < w // 2:
                        top, left = r // 2 * 32, c // 2 * 32
                        if entropy_of(grey[b, top : top + 32, left : left + 32]) < 4.5:
                            side = 4
                    seen.add(side)
                    top, left = y // side * side, x // side * side
                    count += (y, x) == (top, left)
                    pixels = images[b, :, 8 * top : 8 * (top + side), 8 * left : 8 * (left + side)]
                    small = torch.nn.functional.avg_pool2d(pixels[None], side)[0]
                    expected = (vit.patch_embed.proj.weight * small).sum((1, 2, 3)) + vit.patch_embed.proj.bias
                    expected = expected + position[0, :, top : top + side, left : left + side].mean((1, 2))
                    row = tokens.where[b, y, x]
                    torch.testing.assert_close(tokens.x[row], expected, rtol=1e-4, atol=1e-5)
                    assert tokens.area[row] == side**2
            assert tokens.active_counts()[b] == count
        assert seen == {1, 2, 4}

    @torch.no_grad()
    def test_three_scales_in_all_executions(self, tiny_vit):
        model = msvit.MSViT(tiny_vit, gate=Entropy(4.6, 3, 0.2, (0.0,) * 3, (1.0,) * 3)).eval()
        images = pictures()
        masked, *others, packed = (model.run(images, execution=e) for e in EXECUTIONS)
        assert packed.tokens.unique().numel() > 1
        for other in (*others, packed):
            assert (masked.logits - other.logits).abs().max() <= 1e-4
            assert torch.equal(masked.tokens, other.tokens)
        closed = model.macs_of(packed.coarse.sum((1, 2)), (64, 64), (packed.final.area == 16).sum() / 6)
        assert closed.mean() == pytest.approx(packed.macs.mean().item(), rel=0.05)

    @pytest.mark.parametrize("scales", [2, 3])
    @torch.no_grad()
    def test_all_fine_is_plain_timm(self, tiny_vit, scales):
        images = pictures()
        for rule, threshold in ((Entropy(0.0, scales, 0.0), 0.5), (Entropy(8.0, scales), 1.0)):
            model = msvit.MSViT(tiny_vit, gate=rule).eval()
            model.threshold = threshold
            assert (model(images) - tiny_vit(images)).abs().max() <= 1e-5

    @pytest.mark.parametrize("scales", [2, 3])
    @torch.no_grad()
    def test_a_budget_is_calibrated(self, tiny_vit, scales):
        images = Scenes(64, difficulty="middle").batch(range(64))[0]
        rule = Entropy(scales=scales, mean=(128 / 255,) * 3, std=(64 / 255,) * 3)
        model = msvit.MSViT(tiny_vit, gate=rule).eval()
        share = model.calibrate([images], 0.6)
        assert share == pytest.approx(0.6, abs=0.02)
        assert model.run(images).macs.mean().item() / model.dense_macs((64, 64)) == pytest.approx(share, abs=1e-9)


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
        with pytest.raises(ValueError, match="rule='center'.*the nearest is 'centre'. There are: entropy, fine"):
            make_rule("center")
        with pytest.raises(ValueError, match="static mask='middle' is not known. There are: fine, coarse"):
            Static("middle")

    @pytest.mark.parametrize(
        ("name", "settings", "match"),
        [
            ("centre", {"rate": 1.5}, r"rate=1\.5"),
            ("fine", {"rate": 0.5}, "a fine mask has the rate 0"),
            ("checkerboard", {"rate": 0.3}, "has the rate 0.5"),
            ("entropy", {"bits": 9}, "bits=9"),
            ("entropy", {"scales": 4}, "scales=4"),
            ("entropy", {"bit": 3}, "nearest is 'bits'"),
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
