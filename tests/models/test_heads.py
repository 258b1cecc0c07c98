"""Segmentation: anchored in plain timm, one function in three executions, and every pixel in its place."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import decode, encode, segmenting, shake, slope_inside
from safetensors.torch import load_file, save_file
from torch import nn

import msvit
from msvit.bench.timing import counted_macs
from msvit.core.attention import Layout
from msvit.core.sampling import straight_through
from msvit.models.heads import DECODERS
from msvit.models.msvit import EXECUTIONS, Gating
from msvit.models.sliding import slide
from msvit.reducers.registry import make_reducer

K = 5
FORMS = [(decoder, scatter) for decoder in DECODERS for scatter in ("after", "before")]
BACKBONES = {
    "vit_small_patch14_reg4_dinov2": {"depth": 2, "img_size": 112},  # LayerScale, registers, patch 14
    "deit_tiny_distilled_patch16_224": {"depth": 2, "img_size": 96},
    "vit_medium_patch16_gap_256": {"depth": 2, "img_size": 96},  # no class token, its last norm is in the head
    "vit_base_patch16_siglip_224": {"depth": 1, "img_size": 64},
}


def built(vit, decoder="mask", scatter="after", **settings):
    """A decoder whose classes are far apart, as they are once trained: its LayerNorm divides by their spread."""
    model = segmenting(msvit.MSViT(shake(vit), **settings), K, decoder, scatter).eval()
    with torch.no_grad():
        for p in model.head.decoder.parameters():
            p.add_((0.2 if p.dim() == 1 else 0.05) * torch.randn_like(p))
        if decoder == "mask":
            model.head.decoder.cls_emb.mul_(40)
    return model


def on_plain_tokens(model, images):
    """The decoder on timm's own tokens, as batches of equal length; a class embedding is a token like any other."""
    vit, decoder, b = model.vit, model.head.decoder, len(images)
    x = vit.fc_norm(vit.forward_features(images))[:, vit.num_prefix_tokens :]
    if hasattr(decoder, "blocks"):
        z = torch.cat([decoder.proj_dec(x), decoder.cls_emb.expand(b, -1, -1)], 1)
        z = decoder.decoder_norm(decoder.blocks[1](decoder.blocks[0](z)))
        x, c = z[:, :-K] @ decoder.proj_patch, z[:, -K:] @ decoder.proj_classes
        products = torch.einsum("bnc,bkc->bnk", x, c) / x.norm(dim=2)[:, :, None] / c.norm(dim=2)[:, None]
        logits = decoder.mask_norm(products)
    else:
        logits = decoder.head(x)
    patch = vit.patch_embed.patch_size[0]
    grid = logits.transpose(1, 2).unflatten(2, (images.shape[2] // patch, images.shape[3] // patch))
    return F.interpolate(grid, images.shape[2:], mode="bilinear")


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
@torch.no_grad()
def test_all_fine_is_the_decoder_on_plain_timm_tokens(make_vit, decoder, scatter, size):
    model = built(make_vit(dynamic_img_size=True), decoder, scatter)
    images, fine = torch.randn(2, 3, *size), torch.zeros(model.grid(size), dtype=torch.bool)
    expected = on_plain_tokens(model, images)
    assert expected.shape == (2, K, *size)
    assert expected.std() > 0.01
    for execution in EXECUTIONS:
        assert (model.run(images, fine, execution).logits - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("name", BACKBONES)
@torch.no_grad()
@pytest.mark.long
def test_backbones(name):
    """The identity, and the three executions, wherever a backbone keeps its norms and prefix tokens.

    In wide models the mask decoder's products hardly differ, and its LayerNorm blows up the rounding errors of all
    that comes before by the inverse of their spread: its identity is shown in float64.
    """
    vit = timm.create_model(name, num_classes=0, **BACKBONES[name])
    size = vit.patch_embed.img_size
    model = built(vit, "linear")
    images, grid = torch.randn(3, 3, *size), model.grid(size)
    fine = torch.zeros(grid, dtype=torch.bool)
    assert (model.run(images, fine).logits - on_plain_tokens(model, images)).abs().max() <= 1e-5
    model = built(vit).double()
    exact = images.double()
    assert (model.run(exact, fine).logits - on_plain_tokens(model, exact)).abs().max() <= 1e-9
    model.float()
    mask = torch.rand(3, *grid) < torch.tensor([0.1, 0.5, 0.9])[:, None, None]
    masked, *others = (model.run(images, mask, e).logits for e in EXECUTIONS)
    for other in others:
        assert (masked - other).abs().max() <= 1e-4


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_all_executions_agree(make_vit, decoder, scatter, scale):
    model = built(make_vit(), decoder, scatter, scale=scale)
    images = torch.randn(5, 3, 56, 90)  # padded to 64 x 96
    mask = torch.rand(5, *model.grid((56, 90))) < 0.5
    mask[0], mask[1] = True, False
    results = [model.run(images, mask, e) for e in EXECUTIONS]
    for other in results[1:]:
        assert (results[0].logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(results[0].macs, other.macs)
        assert torch.equal(results[0].tokens, other.tokens)
    for b in range(5):  # and no picture sees another
        assert (model.run(images[b : b + 1], mask[b]).logits - results[0].logits[b]).abs().max() <= 1e-4


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
def test_closed_form_macs_equal_the_count(make_vit, decoder, scatter):
    model = built(make_vit(), decoder, scatter)
    images = torch.randn(3, 3, 56, 90)
    model.threshold = model.run(images).gates.median().item()
    with torch.no_grad():
        result = model.run(images)
        assert counted_macs(lambda: model.run(images)) == result.macs.sum().item()
    assert result.coarse.sum((1, 2)).unique().numel() > 1
    assert torch.equal(model.macs_of(result.coarse, (56, 90)), result.macs)
    fine = torch.zeros(model.grid((56, 90)), dtype=torch.bool)
    with torch.no_grad():
        assert counted_macs(lambda: model.run(images[:1], fine)) == model.dense_macs((56, 90))


class Numbered(nn.Module):
    """A decoder that tells tokens apart: logit k of token t is digit k of t in base 16."""

    def forward(self, x, weight, layout):
        return torch.arange(len(x))[:, None] // 16 ** torch.arange(K) % 16 * 1.0

    def macs(self, tokens):
        return tokens * 0


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (41, 71), (15, 17)])
@pytest.mark.parametrize("scale", [2, 4])
@torch.no_grad()
def test_a_tokens_prediction_covers_exactly_its_pixels(make_vit, execution, size, scale):
    model = built(make_vit(), scale=scale)
    model.head.decoder = Numbered()
    images = torch.randn(2, 3, *size)
    h, w = model.grid(size)
    patch = 8 * scale
    assert (h - 1) * patch < size[0] <= h * patch
    assert (w - 1) * patch < size[1] <= w * patch
    mask = torch.rand(2, h, w) < 0.5
    grid = decode(model, images, model.decide(images, mask), execution)
    number = (grid * 16 ** torch.arange(K)).sum(3).repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert number.shape[1:] == tuple(-(-side // 8) * 8 for side in size)
    owners = {}
    for b in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                side = patch if mask[b, y // patch, x // patch] else 8
                owners.setdefault(number[b, y, x].item(), set()).add((b, side, y // side, x // side))
    assert all(len(tokens) == 1 for tokens in owners.values())  # a token has one square
    assert len(owners) == len(set.union(*owners.values()))  # and a square one token
    logits = model.run(images, mask, execution).logits
    assert logits.shape == (2, K, *size)
    inner = F.interpolate(grid.permute(0, 3, 1, 2), number.shape[1:], mode="bilinear")
    torch.testing.assert_close(logits, inner[..., : size[0], : size[1]])


@torch.no_grad()
def test_padding_is_the_padded_picture_cut(make_vit):
    model = built(make_vit())
    images = torch.randn(2, 3, 41, 71)
    whole = model.run(F.pad(images, (0, 1, 0, 7)))  # to whole fine patches: beyond them there is nothing
    result = model.run(images)
    assert torch.equal(result.logits, whole.logits[..., :41, :71])
    assert result.coarse.shape == (2, *model.grid((41, 71))) == (2, 3, 5)
    assert torch.equal(result.macs, whole.macs)


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_scatter_then_gather_is_the_identity(make_vit, execution):
    model = built(make_vit())
    images = torch.randn(3, 3, 64, 96)
    gating = model.decide(images, torch.rand(3, 4, 6) < 0.5)
    tokens = encode(model, images, gating, execution)
    grid = tokens.scatter()
    seen = tokens.where.unique()
    gathered = tokens.x.new_zeros(len(tokens.x), 64).index_put((tokens.where.flatten(),), grid.flatten(0, 2))
    assert torch.equal(gathered[seen], tokens.x[seen])
    assert len(seen) == int((tokens.active_counts() - 1).sum())
    area = torch.bincount(tokens.where.flatten(), minlength=len(tokens.x))
    assert torch.equal(area[seen].float(), tokens.area[seen])


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
def test_gate_gradient_is_the_finite_difference(make_vit, decoder, scatter, unbounded):
    """The decision m itself is moved from 0 or 1 by a little; attention and what covers a patch both follow it."""
    model = built(make_vit(img_size=32, depth=2), decoder, scatter).double().train()
    images, labels = torch.randn(2, 3, 32, 32).double(), torch.randint(K, (2, 32, 32))
    soft = torch.rand(2, 2, 2).double().requires_grad_()

    def loss(m):
        gating = Gating(None, soft, m)
        grid = decode(model, images, gating, "masked").permute(0, 3, 1, 2)
        return F.cross_entropy(F.interpolate(grid, (32, 32), mode="bilinear"), labels)

    loss(straight_through(soft)).backward()
    hard = (soft.detach() > 0.5).double()
    assert 0 < hard.sum() < hard.numel()
    for index in range(8):
        slope = slope_inside(loss, hard, index)
        assert soft.grad.flatten()[index].item() == pytest.approx(slope, rel=1e-4, abs=1e-9)


def gate_gradient(model, images, labels, scores, execution):
    scores = scores.clone().requires_grad_()
    soft = torch.sigmoid(scores / 0.3)
    gating = Gating(scores, soft, straight_through(soft))
    grid = decode(model, images, gating, execution).permute(0, 3, 1, 2)
    F.cross_entropy(F.interpolate(grid, images.shape[2:]), labels).backward()
    return scores.grad


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
def test_trimming_keeps_the_gradient(make_vit, decoder, scatter):
    """The masked one where all is kept; nearly that where only tokens near the boundary are."""
    model = built(make_vit(), decoder, scatter).train()
    images, labels = torch.randn(6, 3, 64, 64), torch.randint(K, (6, 64, 64))
    scores = 2 * torch.randn(6, 4, 4) + torch.randn(6, 1, 1)
    masked = gate_gradient(model, images, labels, scores, "masked")
    near = gate_gradient(model, images, labels, scores, "trimmed")
    model.margin = 0.0
    torch.testing.assert_close(gate_gradient(model, images, labels, scores, "trimmed"), masked, rtol=1e-3, atol=1e-7)
    assert masked.abs().max() > 1e-6
    assert F.cosine_similarity(near.flatten(), masked.flatten(), 0) > 0.9


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
def test_training_reaches_every_parameter_but_the_classifier(make_vit, decoder, scatter):
    model = segmenting(msvit.MSViT(make_vit()), K, decoder, scatter).train()
    result = model.run(torch.randn(4, 3, 64, 64))
    F.cross_entropy(result.logits, torch.randint(K, (4, 64, 64))).backward()
    missing = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert missing == {"vit.head.weight", "vit.head.bias"}


@torch.no_grad()
def test_windows(make_vit):
    model = built(make_vit())
    images = torch.randn(2, 3, 60, 120)
    model.threshold = model.run(images).gates.median().item()
    whole = slide(model, images, 128, 64)  # one window, larger than the picture
    torch.testing.assert_close(whole.logits, model.run(images).logits)
    assert torch.equal(whole.coarse, model.run(images).coarse)

    halves = [model.run(images[..., x : x + 64]) for x in (0, 64)]
    two = slide(model, images, 64, 64)
    torch.testing.assert_close(two.logits, torch.cat([half.logits for half in halves], 3))
    assert torch.equal(two.macs, halves[0].macs + halves[1].macs)
    assert torch.equal(two.tokens, halves[0].tokens + halves[1].tokens)
    assert torch.equal(two.coarse, torch.cat([half.coarse for half in halves], 2))

    seen = [model.run(images[..., x : x + 64]).logits for x in (0, 48, 64)]
    three = slide(model, images, 64, 48).logits
    torch.testing.assert_close(three[..., 50], (seen[0][..., 50] + seen[1][..., 2]) / 2)
    torch.testing.assert_close(three[..., 70], (seen[1][..., 22] + seen[2][..., 6]) / 2)
    torch.testing.assert_close(three[..., 20], seen[0][..., 20])
    mask = torch.rand(2, 4, 8) < 0.5
    own = [model.run(images[..., 64 * i : 64 * i + 64], mask[:, :, 4 * i : 4 * i + 4]) for i in range(2)]
    given = slide(model, images, 64, 64, mask)
    torch.testing.assert_close(given.logits, torch.cat([half.logits for half in own], 3))
    assert torch.equal(given.macs, own[0].macs + own[1].macs)
    with pytest.raises(ValueError, match=r"window=60.*16 px"):
        slide(model, images, 60, 16)


@pytest.mark.parametrize(("decoder", "scatter"), FORMS)
@torch.no_grad()
def test_saves_and_loads(tmp_path, decoder, scatter):
    classifier = msvit.MSViT(
        timm.create_model("vit_mini_patch8_64"), coarse_embed="shared" if scatter == "after" else "own"
    )
    model = segmenting(classifier, K, decoder, scatter).eval()
    if scatter == "before":
        model.coarse_embed[0].bias.add_(1)
    model.threshold = 0.4
    model.save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    images = torch.randn(2, 3, 50, 64)
    assert torch.equal(again(images), model(images))
    assert again.threshold == pytest.approx(0.4)
    coarse = torch.ones(4, 4, dtype=torch.bool)
    expected = model.run(images[..., :48, :], coarse[:3]).logits
    assert torch.equal(again.run(images[..., :48, :], coarse[:3]).logits, expected)
    assert again.head.settings == model.head.settings


def test_a_classifiers_parts_are_taken_over(tmp_path):
    classifier = msvit.MSViT(timm.create_model("vit_mini_patch8_64"))
    classifier.threshold = 0.3
    model = segmenting(classifier, K)
    assert model.gate is classifier.gate
    assert model.vit is classifier.vit
    assert model.threshold == pytest.approx(0.3)
    classifier.save_pretrained(tmp_path / "classifier")
    model.save_pretrained(tmp_path / "segmenter")
    assert not msvit.MSViT.from_pretrained(tmp_path / "classifier").head.dense
    assert msvit.MSViT.from_pretrained(tmp_path / "segmenter").head.dense
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        msvit.MSViT.from_pretrained(tmp_path)


def test_folders_of_earlier_versions_load(tmp_path):
    """Their config calls the head a segmenter, and their weights have the decoder beside the backbone."""
    model = segmenting(msvit.MSViT(timm.create_model("vit_mini_patch8_64")), K, "mask").eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["segmenter"] = config.pop("head")
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "model.safetensors")
    renamed = {key.removeprefix("head."): value.clone() for key, value in weights.items()}  # the file is overwritten
    assert renamed.keys() != weights.keys()
    save_file(renamed, tmp_path / "model.safetensors")
    again = msvit.MSViT.from_pretrained(tmp_path)
    wrapped = torch.nn.ModuleDict(
        {"model": segmenting(msvit.MSViT(timm.create_model("vit_mini_patch8_64")), K, "mask")}
    )
    wrapped.load_state_dict({f"model.{key}": value for key, value in renamed.items()})  # as in a run's state
    images = torch.randn(2, 3, 64, 64)
    for loaded in (again, wrapped["model"].eval()):
        assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
        assert (loaded(images) - model(images)).abs().max() <= 1e-6


def decoder_of_version_0_1(vit):
    """Its weights by their old names, and what it computes from tokens [N, C] of one picture, in float64."""
    width, mlp = vit.embed_dim, 4 * vit.embed_dim
    blocks = [timm.models.vision_transformer.Block(width, vit.blocks[0].attn.num_heads, qkv_bias=True) for _ in "ab"]
    blocks = nn.ModuleList(blocks).double()
    assert blocks[0].norm1.eps == 1e-6
    norm, mask_norm = nn.LayerNorm(width).double(), nn.LayerNorm(K).double()
    classes = torch.randn(K, width).double()
    assert blocks[0].mlp.fc1.out_features == mlp
    for p in (*norm.parameters(), *mask_norm.parameters(), *blocks.parameters()):
        p.data.add_(0.1 * torch.randn_like(p))
    parts = {"blocks": blocks, "norm": norm, "mask_norm": mask_norm}
    state = {f"{part}.{key}": v for part, module in parts.items() for key, v in module.state_dict().items()}

    def logits(x):
        z = norm(blocks[1](blocks[0](torch.cat([x, classes])[None])))[0]
        return mask_norm(F.normalize(z[:-K], dim=-1) @ F.normalize(z[-K:], dim=-1).T)

    return state | {"classes": classes}, logits


def test_a_decoder_of_version_0_1_keeps_its_results(tmp_path):
    """It had no projections and another epsilon; once loaded, it is saved as what it is now."""
    vit = timm.create_model("vit_mini_patch8_64")
    old, expected = decoder_of_version_0_1(vit)
    model = segmenting(msvit.MSViT(vit), K, "mask").eval()
    state = {key: value for key, value in model.state_dict().items() if ".decoder." not in key}
    state |= {f"decoder.{key}": value for key, value in old.items()}  # beside the backbone, as it stood then
    model.double().load_state_dict(state)
    x = torch.randn(20, vit.embed_dim).double() * 1e-3  # so small that the epsilon is seen
    layout = Layout([20], x.device)
    with torch.no_grad():
        assert (model.head.decoder(x, None, layout) - expected(x)).abs().max() <= 1e-12
        assert model.head.settings["eps"] == 1e-6
        model.save_pretrained(tmp_path)
        again = msvit.MSViT.from_pretrained(tmp_path)
        assert (again.head.decoder(x, None, layout) - expected(x)).abs().max() <= 1e-12
        assert segmenting(model, K, "mask").head.decoder.blocks[0].norm1.eps == 1e-5


def test_a_folder_of_version_0_1_loads(tmp_path):
    """As its config says nothing of projections or an epsilon."""
    model = segmenting(msvit.MSViT(timm.create_model("vit_mini_patch8_64")), K, "mask").eval()
    model.save_pretrained(tmp_path)
    old, expected = decoder_of_version_0_1(model.vit)
    weights = {key: value.clone() for key, value in load_file(tmp_path / "model.safetensors").items()}
    weights = {key: value for key, value in weights.items() if ".decoder." not in key}
    save_file(weights | {f"head.decoder.{k}": v.float() for k, v in old.items()}, tmp_path / "model.safetensors")
    again, x = msvit.MSViT.from_pretrained(tmp_path), torch.randn(20, model.vit.embed_dim)
    with torch.no_grad():
        assert (again.head.decoder(x, None, Layout([20], x.device)) - expected(x.double())).abs().max() <= 1e-5
    assert again.head.settings["eps"] == 1e-6


@pytest.mark.parametrize("decoder", DECODERS)
@torch.no_grad()
def test_under_bfloat16_autocast(make_vit, decoder):
    model = built(make_vit(), decoder)
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    expected = model.run(images, mask).logits
    with torch.autocast("cpu", torch.bfloat16):
        found = model.run(images, mask).logits
    assert found.isfinite().all()
    assert (found - expected).abs().mean() <= 0.1 * expected.std()


def test_calibration_meets_a_budget_that_includes_the_decoder(make_vit):
    model = built(make_vit())
    loader = [(torch.randn(16, 3, 60, 64), torch.zeros(16)) for _ in range(2)]
    share = model.calibrate(loader, 0.6)
    assert share == pytest.approx(0.6, abs=0.02)
    with torch.no_grad():
        macs = torch.cat([model.run(images).macs for images, _ in loader])
    assert macs.mean().item() / model.dense_macs((60, 64)) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(("name", "lossless"), [("tome", True), ("token_pooling", True), ("dynamicvit", False)])
@torch.no_grad()
def test_reducers_that_merge_serve_and_those_that_prune_are_refused(make_vit, name, lossless):
    vit = shake(make_vit())
    model = msvit.MSViT(vit, reducer=make_reducer(name, vit)).eval()
    if not lossless:
        with pytest.raises(ValueError, match=r"drops tokens.*a dense task must label them all"):
            segmenting(model, K)
        return
    model = segmenting(model, K, "mask").eval()
    images, mask = torch.randn(2, 3, 64, 96), torch.rand(2, 4, 6) < 0.5
    *others, packed = (model.run(images, mask, e) for e in EXECUTIONS)
    for other in others:
        assert (other.logits - packed.logits).abs().max() <= 1e-4
    assert (packed.counts[-1, 1] < packed.tokens).all()
    assert (packed.final.where >= 0).all()


class TestBadInput:
    @pytest.mark.parametrize(
        ("settings", "match"),
        [
            ({"decoder": "unet"}, "'unet' is not known. There are: linear, mask"),
            ({"scatter": "never"}, "scatter='never' is not known. There are: after, before"),
            ({"classes": 1}, "classes=1.*at least two"),
            ({"eps": 1e-6}, "eps=1e-06: the decoder 'linear' has no norms"),
        ],
    )
    def test_settings(self, tiny_vit, settings, match):
        with pytest.raises(ValueError, match=match):
            msvit.SegmentationHead(tiny_vit, **{"classes": K} | settings)

    def test_pictures(self, make_vit):
        model = built(make_vit())
        with pytest.raises(ValueError, match="1 channels, the backbone takes 3"):
            model(torch.randn(1, 1, 64, 64))
        with pytest.raises(ValueError, match="empty batch"):
            model(torch.randn(0, 3, 64, 64))
        with pytest.raises(ValueError, match=r"expected \[4, 5\]"):
            model.run(torch.randn(1, 3, 64, 70), torch.zeros(4, 4, dtype=torch.bool))
        with pytest.raises(ValueError, match="NaN"):
            model.run(torch.full((1, 3, 64, 64), torch.nan), check=True)
