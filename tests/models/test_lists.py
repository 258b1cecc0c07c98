"""Pictures of any size: padding that nothing sees, and batches of different sizes."""

import pytest
import torch
import torch.nn.functional as F
from helpers import ROTARY, shake

import msvit
from msvit.bench.timing import counted_macs
from msvit.gating.entropy import Entropy
from msvit.gating.rules import make_rule
from msvit.models.msvit import EXECUTIONS
from msvit.reducers.registry import make_reducer

SIZES = [(64, 64), (40, 96), (41, 71), (15, 17), (64, 64), (100, 36)]
ROOMY = [(64, 64), (40, 96), (41, 71), (64, 64), (100, 36)]  # for tokens of 32 px


def pictures(sizes=SIZES):
    return [torch.randn(3, *size) for size in sizes]


def masks_of(model, images):
    return [torch.rand(model.grid(image.shape[1:])) < 0.5 for image in images]


def masks_of_levels(model, images):
    return [[torch.rand(grid) < 0.4 for grid in model.grids(image.shape[1:])] for image in images]


def backbones(make_vit, make_eva):
    flexible = {"dynamic_img_size": True, "dynamic_img_pad": True}
    return [make_vit(**flexible), make_vit(class_token=False, global_pool="avg", **flexible)] + [
        make_eva(**flexible, **settings) for settings in (ROTARY[1], ROTARY[3], ROTARY[4], {"global_pool": "map"})
    ]


@pytest.mark.parametrize("size", [(40, 96), (41, 71), (15, 17), (8, 8)])
@pytest.mark.parametrize("scale", [2, 3, 4])
@torch.no_grad()
def test_all_fine_is_timm_with_padding(make_vit, make_eva, size, scale):
    """timm pads to whole fine patches; what we pad beyond them is in no token and no count."""
    images = torch.randn(2, 3, *size)
    for vit in backbones(make_vit, make_eva):
        model = msvit.MSViT(shake(vit), scale=scale).eval()
        expected, fine = vit(images), torch.zeros(model.grid(size), dtype=torch.bool)
        for execution in EXECUTIONS:
            result = model.run(images, fine, execution)
            assert (result.logits - expected).abs().max() <= 1e-5
            assert result.tokens.tolist() == [vit.num_prefix_tokens + -(-size[0] // 8) * -(-size[1] // 8)] * 2
            assert result.macs.tolist() == [model.dense_macs(size)] * 2


@pytest.mark.parametrize("size", [(40, 96), (41, 71)])
@pytest.mark.parametrize("settings", ROTARY[:5], ids=str)
@torch.no_grad()
def test_executions_agree_on_odd_sizes(make_eva, size, settings):
    model = msvit.MSViT(shake(make_eva(**settings))).eval()
    images = torch.randn(3, 3, *size)
    mask = torch.rand(3, *model.grid(size)) < 0.5
    masked, *others = (model.run(images, mask, e) for e in EXECUTIONS)
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.macs, other.macs)


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4)])
@torch.no_grad()
def test_macs_of_odd_sizes_are_counted(make_eva, scales):
    model = msvit.MSViT(make_eva(**ROTARY[3]), scales=scales).eval().requires_grad_(False)
    images, results = torch.randn(3, 3, 41, 71), []
    model.threshold = model.run(images).gates.median().item()
    assert counted_macs(lambda: results.append(model.run(images))) == results[0].macs.sum().item()
    whole = [u > 0.5 for u in results[0].gating.undivided]
    assert all(0 < u.sum() < u.numel() for u in whole)
    assert torch.equal(model.macs_of(whole, (41, 71)), results[0].macs)
    # Of a number of regions it is not known which; all or none leave no choice.
    all_or_none = [torch.tensor([False, True])[:, None, None].expand(2, *grid) for grid in model.grids((41, 71))]
    counts = [u.sum((1, 2)) for u in all_or_none]
    assert torch.equal(model.macs_of(counts, (41, 71)), model.macs_of(all_or_none, (41, 71)))
    loader = [torch.randn(8, 3, 41, 71) for _ in range(2)]
    share = model.calibrate(loader, 0.6)
    measured = torch.cat([model.run(x).macs for x in loader]).mean().item() / model.dense_macs((41, 71))
    assert share == pytest.approx(measured, abs=1e-9)


@torch.no_grad()
def test_a_coarse_token_at_the_border_has_the_mean_position_of_what_is_inside(make_vit):
    model = msvit.MSViT(shake(make_vit())).eval()
    images = torch.zeros(1, 3, 64, 88)
    tokens = model.tokenize(images, model.decide(images, torch.ones(4, 6, dtype=torch.bool)))
    grid = model.vit.pos_embed[0, 1:].T.view(1, 64, 8, 8)
    grid = F.interpolate(grid, (8, 11), mode="bicubic", antialias=True)[0]
    bias = model.vit.patch_embed.proj.bias
    for row, column in ((0, 0), (1, 5), (3, 5)):
        expected = grid[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean((1, 2)) + bias
        found = tokens.x[tokens.where[0, 2 * row, 2 * column]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def check_alone(together, i, alone):
    """Assert that picture i of a batch came out as it does alone."""
    assert (together.logits[i] - alone.logits[0]).abs().max() <= 1e-5
    assert torch.equal(together.coarse[i], alone.coarse[0])
    assert torch.equal(together.gates[i], alone.gates[0])
    assert together.tokens[i] == alone.tokens[0]
    assert together.macs[i] == alone.macs[0]


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_a_batch_of_different_sizes_is_as_many_single_calls(make_vit, make_eva, execution):
    for vit in backbones(make_vit, make_eva):
        model = msvit.MSViT(shake(vit)).eval()
        images = pictures()
        model.threshold = model.run(images[0][None]).gates.median().item()
        masks = masks_of(model, images)
        for given in (None, masks):
            together = model.run(images, given, execution)
            for i, image in enumerate(images):
                alone = model.run(image[None], None if given is None else given[i], execution)
                check_alone(together, i, alone)
                if execution != "levelled":  # which keeps more of a picture beside a longer one of its size
                    assert torch.equal(together.final.picture(i).where, alone.final.where)
        assert together.scores is None
        assert torch.equal(model(images), model.run(images).logits)


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_a_list_at_three_scales_is_as_many_single_calls(make_vit, make_eva, execution):
    for vit in (make_vit(), make_eva(**ROTARY[3]), make_eva(**ROTARY[4])):
        model, images = msvit.MSViT(shake(vit), scales=(1, 2, 4)).eval(), pictures(ROOMY)
        model.threshold = model.run(images[0][None]).gating.larger[0].soft.median().item()
        masks = masks_of_levels(model, images)
        for given in (None, masks):
            together = model.run(images, given, execution)
            for i, image in enumerate(images):
                alone = model.run(image[None], None if given is None else given[i], execution)
                check_alone(together, i, alone)
                for one, other in zip(together.gating[i].undivided, alone.gating.undivided, strict=True):
                    assert torch.equal(one, other)
        assert {1.0, 4.0, 16.0} <= set(together.final.area.tolist())


@pytest.mark.parametrize("name", ["tome", "token_pooling", "grid", "evit", "algm", "dynamicvit", "diffrate"])
@torch.no_grad()
def test_reducers_see_each_picture_at_its_own_size(make_eva, name):
    vit = shake(make_eva(**ROTARY[3]))
    model = msvit.MSViT(vit, reducer=make_reducer(name, vit)).eval()
    images = pictures()
    masks = masks_of(model, images)
    together = model.run(images, masks)
    for i, image in enumerate(images):
        alone = model.run(image[None], masks[i])
        assert (together.logits[i] - alone.logits[0]).abs().max() <= 1e-5
        assert together.macs[i] == alone.macs[0]
        for stage, own in zip(together.stages, alone.stages, strict=True):
            h, w = own.where.shape[1:]
            assert (stage.where[i] >= 0).sum() == (own.where[0] >= 0).sum()
            assert torch.equal(stage.where[i, :h, :w] < 0, own.where[0] < 0)


@pytest.mark.parametrize("rule", ["entropy", "random", "checkerboard"])
@torch.no_grad()
def test_rules_decide_about_lists(make_vit, rule):
    gate = Entropy(thresholds=[4.0], mean=(0.5,) * 3, std=(0.5,) * 3) if rule == "entropy" else make_rule(rule)
    model = msvit.MSViT(shake(make_vit()), gate=gate).eval()
    images = [image.mul(0.1) for image in pictures()]
    together = model.run(images)
    for i, image in enumerate(images):
        alone = model.run(image[None])
        assert torch.equal(together.coarse[i], alone.coarse[0])
        assert (together.logits[i] - alone.logits[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("scatter", ["after", "before"])
@torch.no_grad()
def test_segmentation_of_lists(make_vit, scatter):
    vit = shake(make_vit())
    model = msvit.MSViT(vit, head=msvit.SegmentationHead(vit, 5, "mask", scatter)).eval()
    images = pictures()
    masks = masks_of(model, images)
    together = model.run(images, masks)
    for i, image in enumerate(images):
        alone = model.run(image[None], masks[i])
        assert together.logits[i].shape == (5, *image.shape[1:])
        assert (together.logits[i] - alone.logits[0]).abs().max() <= 1e-5
        assert together.macs[i] == alone.macs[0]


def test_lists_train(make_eva):
    """The gradient of a list's mean loss is the mean of those of its pictures, the gate's too."""
    model = msvit.MSViT(shake(make_eva(depth=2)), margin=0.0).train()
    model.gate.eval()  # without noise
    images, labels = pictures(SIZES[:4]), torch.arange(4)
    F.cross_entropy(model.run(images, execution="masked").logits, labels).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    for image, label in zip(images, labels.split(1), strict=True):
        (F.cross_entropy(model.run(image[None], execution="masked").logits, label) / 4).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(together[name], p.grad, rtol=1e-3, atol=1e-6)


def test_lists_teach_a_quadtree_through_a_decoder(make_vit):
    """The gradient of a list is the sum of those of its pictures, by which token each patch should have been in too."""
    vit = shake(make_vit(depth=2))
    model = msvit.MSViT(vit, margin=0.0, scales=(1, 2, 4), head=msvit.SegmentationHead(vit, 5, "linear")).train()
    model.gate.eval()  # without noise
    images = pictures(ROOMY[:3])
    labels = [torch.randint(5, image.shape[1:]) for image in images]
    each = zip(model.run(images, execution="trimmed").logits, labels, strict=True)
    sum(F.cross_entropy(logits[None], label[None]) for logits, label in each).backward()
    together = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for image, label in zip(images, labels, strict=True):
        F.cross_entropy(model.run(image[None], execution="trimmed").logits, label[None]).backward()
    assert all(together[f"gate.levels.{level}.mlp.0.weight"].abs().sum() > 0 for level in range(2))
    for name, gradient in together.items():
        torch.testing.assert_close(gradient, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


class TestBadInput:
    @pytest.mark.parametrize(
        ("images", "match"),
        [
            ([], "empty list"),
            ([torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8)], r"picture 1 of the list is \[1, 3, 8, 8\].*\[c, H, W\]"),
            ([torch.zeros(3, 8, 8), "cat.jpg"], "picture 1 of the list is str"),
            ([torch.zeros(1, 8, 8)], "1 channels, the backbone takes 3"),
            ([torch.zeros(3, 8, 0)], "8 x 0 px"),
        ],
    )
    def test_pictures(self, tiny_vit, images, match):
        with pytest.raises(ValueError, match=match):
            msvit.MSViT(tiny_vit)(images)

    @pytest.mark.parametrize("masks", [torch.zeros(4, 4, dtype=torch.bool), [torch.zeros(4, 4, dtype=torch.bool)]])
    def test_masks(self, tiny_vit, masks):
        with pytest.raises(ValueError, match=r"for a list of 2 pictures; give a list with a mask \[h, w\] for each"):
            msvit.MSViT(tiny_vit).run(pictures()[:2], masks)

    def test_a_mask_of_another_size(self, tiny_vit):
        with pytest.raises(ValueError, match=r"expected \[3, 6\]"):
            msvit.MSViT(tiny_vit).run([torch.zeros(3, 40, 96)], [torch.zeros(4, 4, dtype=torch.bool)])

    def test_one_mask_of_two(self, tiny_vit):
        model = msvit.MSViT(tiny_vit, scales=(1, 2, 4))
        with pytest.raises(ValueError, match=r"1 mask for 2 sizes of regions; give a list .* \[4, 4\] and \[2, 2\]"):
            model.run([torch.zeros(3, 64, 64)], [torch.zeros(4, 4, dtype=torch.bool)])
