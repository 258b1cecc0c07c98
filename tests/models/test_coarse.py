"""How coarse patches are embedded: APT's path against its publication's own numbers, loops, and itself."""

import json

import peers
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import shake
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import msvit
from msvit.bench.timing import counted_macs
from msvit.core import backbone
from msvit.gating.rules import make_rule
from msvit.models.coarse import FullResolution
from msvit.models.msvit import EXECUTIONS

SIDES = {-1: 0, 1: 1, 2: 2, 3: 4}  # of the publication's sizes, in fine patches; -1 is the class token


def published(case, dtype):
    """The publication's model around its weights, and its pictures."""
    s = case["settings"]
    sizes = {"img_size": s["image_size"], "patch_size": s["base_patch_size"], "num_classes": s["num_classes"]}
    vit = VisionTransformer(embed_dim=s["embed_dim"], depth=s["depth"], num_heads=s["num_heads"], **sizes)
    gate = make_rule("entropy", thresholds=s["thresholds"], bins=s["entropy"], mean=s["mean"], std=s["std"])
    model = msvit.MSViT(vit, gate=gate, coarse_embed="apt")
    state = peers.state(case["weights"])
    path = {k.removeprefix("mixed_patch."): state.pop(k) for k in list(state) if k.startswith("mixed_patch.")}
    model.vit.load_state_dict(state)
    model.coarse_embed.load_state_dict(path)
    mean, std = (torch.tensor(s[name], dtype=dtype)[:, None, None] for name in ("mean", "std"))
    pictures = peers.tensor("apt/pictures", dtype)[..., : s["image_size"]]
    return model.to(dtype).eval(), (pictures / 255 - mean) / std


def in_their_order(tokens):
    """Rows of packed tokens as the publication has them: the class token, then fine to large, each size row by row."""
    rows = [torch.arange(len(tokens.x))[tokens.layout.picture == b] for b in range(len(tokens.layout.lengths))]
    return torch.cat([r[tokens.area[r].sort(stable=True).indices] for r in rows])


@pytest.fixture(params=["as it is", "timm's float32 positions"])
def resizing(request, monkeypatch):
    """How positions are resized, and what the publication's tensors are called then."""
    if request.param == "as it is":
        return ""
    theirs = lambda x, old, new: resample_abs_pos_embed(x[None], new, old, num_prefix_tokens=0)[0]  # noqa: E731
    monkeypatch.setattr(backbone, "resized", theirs)
    return "_timm"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", peers.names("apt/embed"))
@torch.no_grad()
def test_published_tokens_and_logits(name, dtype, resizing):
    case = peers.case(name)
    model, images = published(case, dtype)
    tokens, most = model.tokenize(images, model.decide(images), "packed"), peers.TOLERANCE[dtype]
    order = in_their_order(tokens)
    assert tokens.layout.lengths == case["lengths"]
    scale = peers.output(case, "scale").tolist()
    assert tokens.area[order].tolist() == [SIDES[i] ** 2 for i in scale]
    assert (tokens.x[order] - peers.output(case, f"embeddings{resizing}")).abs().max() <= most
    for execution in EXECUTIONS:
        logits = model.run(images, execution=execution).logits
        assert logits.dtype == dtype
        assert (logits - peers.output(case, f"logits{resizing}")).abs().max() <= most
    if not resizing:
        model.coarse_embed.zero_conv.weight.zero_()
        model.coarse_embed.zero_conv.bias.zero_()
        zero = model.tokenize(images, model.decide(images), "packed").x[order]
        assert (zero - peers.output(case, "embeddings_zero")).abs().max() <= most


# ---- against loops


def with_path(vit, **settings):
    """A model whose path adds something."""
    model = msvit.MSViT(vit, coarse_embed="apt", **settings).eval()
    for parameter in model.coarse_embed.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def three_sizes():
    """A rule of three scales, and pictures on which it chooses all of them."""
    flat = torch.rand(4, 3, 2, 3).repeat_interleave(32, 2).repeat_interleave(32, 3)
    noisy = (torch.rand(4, 1, 8, 12) < 0.3).float().repeat_interleave(8, 2).repeat_interleave(8, 3)
    return make_rule("entropy", thresholds=[4.0, 3.0]), flat + noisy * torch.randn(4, 3, 64, 96)


def expected_token(model, image, y, x, side):
    """From the formulas, one fine patch at a time; the patch of `side` fine ones that has (y, x) in it."""
    vit, path, p = model.vit, model.coarse_embed, backbone.patch_size(model.vit)
    y, x = y // side, x // side
    rows, columns = (-(-n // (p * side)) for n in image.shape[1:])
    positions = vit.pos_embed[0, vit.num_prefix_tokens :].view(*vit.patch_embed.grid_size, -1).permute(2, 0, 1)[None]
    if (rows, columns) != vit.patch_embed.grid_size:
        positions = F.interpolate(positions, (rows, columns), mode="bicubic", antialias=True)

    def embed(pixels):
        return (vit.patch_embed.proj.weight * pixels).sum((1, 2, 3)) + vit.patch_embed.proj.bias

    whole = image[:, p * side * y : p * side * (y + 1), p * side * x : p * side * (x + 1)]
    small = whole if side == 1 else F.interpolate(whole[None], (p, p), mode="bilinear")[0]
    token = embed(small) + positions[0, :, y, x]
    if side > 1:
        parts = [[embed(whole[:, p * r : p * (r + 1), p * c : p * (c + 1)]) for c in range(side)] for r in range(side)]
        weight, bias = path.patch_attn.weight, path.patch_attn.bias
        while len(parts) > 1:
            half = range(len(parts) // 2)
            parts = [
                [
                    bias + sum(weight[:, :, i, j] @ parts[2 * r + i][2 * c + j] for i in (0, 1) for j in (0, 1))
                    for c in half
                ]
                for r in half
            ]
        token = token + path.zero_conv.weight @ parts[0][0] + path.zero_conv.bias
    return token


@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
def test_three_sizes_against_loops(make_vit, execution):
    rule, images = three_sizes()
    model = with_path(shake(make_vit(dynamic_img_size=True)), gate=rule).double()
    images = images.double()
    tokens, seen = model.tokenize(images, model.decide(images), execution), set()
    for b in range(4):
        for y in range(8):
            for x in range(12):
                row = tokens.where[b, y, x]
                side = int(tokens.area[row].sqrt())
                seen.add(side)
                assert (tokens.x[row] - expected_token(model, images[b], y, x, side)).abs().max() <= 1e-9
    assert seen == {1, 2, 4}


@pytest.mark.parametrize("scale", [2, 4, 8])
@torch.no_grad()
def test_two_sizes_against_loops(make_vit, scale):
    model = with_path(shake(make_vit(reg_tokens=2, class_token=False, global_pool="avg")), scale=scale).double()
    images = torch.randn(2, 3, 64, 64).double()
    mask = torch.rand(2, *model.grid((64, 64))) < 0.5
    mask[0, 0, 0] = True
    tokens = model.tokenize(images, model.decide(images, mask), "packed")
    for b in range(2):
        for y in range(8):
            for x in range(8):
                side = scale if mask[b, y // scale, x // scale] else 1
                assert (
                    tokens.x[tokens.where[b, y, x]] - expected_token(model, images[b], y, x, side)
                ).abs().max() <= 1e-9


# ---- against itself


@torch.no_grad()
def test_the_path_begins_with_nothing(make_vit):
    """It is E(small) + pos: at two scales what the shared embedding makes, but for how positions are resized."""
    vit, images, mask = shake(make_vit(pos_embed="none")), torch.randn(3, 3, 64, 64), torch.rand(3, 4, 4) < 0.5
    shared, apt = msvit.MSViT(vit).eval(), msvit.MSViT(vit, coarse_embed="apt").eval()
    assert (shared.run(images, mask).logits - apt.run(images, mask).logits).abs().max() <= 1e-5
    fine = torch.zeros(4, 4, dtype=torch.bool)
    assert (apt.run(images, fine).logits - vit(images)).abs().max() <= 1e-5
    for parameter in apt.coarse_embed.parameters():
        parameter.add_(torch.randn_like(parameter))
    assert (shared.run(images, mask).logits - apt.run(images, mask).logits).abs().max() > 1e-3
    assert (apt.run(images, fine).logits - vit(images)).abs().max() <= 1e-5


@pytest.mark.parametrize("variant", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}], ids=str)
@pytest.mark.parametrize("scales", [2, 3])
@torch.no_grad()
def test_all_executions_agree(make_vit, variant, scales):
    rule, images = three_sizes()
    model = with_path(shake(make_vit(dynamic_img_size=True, **variant)), gate=rule if scales == 3 else None)
    model.threshold = 0.5 if scales == 3 else model.decide(images).soft.median().item()
    masked, *others, packed = (model.run(images, execution=e) for e in EXECUTIONS)
    assert packed.tokens.unique().numel() > 1
    for other in (*others, packed):
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
        assert torch.equal(masked.macs, other.macs)


@torch.no_grad()
def test_other_tokens_stay_what_they_are(make_vit):
    """The path reaches the coarse token of its own region alone."""
    model, mask = with_path(make_vit()), torch.rand(1, 4, 4) < 0.5
    images = torch.randn(1, 3, 64, 64)
    before = model.tokenize(images, model.decide(images, mask))
    r, c = mask[0].nonzero()[0].tolist()
    # Pixels in another order within 2 x 2 have the same mean: only the path at full resolution tells them apart.
    images[:, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] = (
        images[:, :, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16].unflatten(3, (8, 2)).flip(4).flatten(3)
    )
    after = model.tokenize(images, model.decide(images, mask))
    moved = (before.x - after.x).abs().amax(1) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == [before.where[0, 2 * r, 2 * c].item()]


def test_it_trains_with_a_learned_gate(tiny_vit):
    """zero_conv first, patch_attn as soon as zero_conv is no longer zero; and the gate all along."""
    model, images = msvit.MSViT(tiny_vit, coarse_embed="apt").train(), torch.randn(4, 3, 64, 64)
    model.run(images).logits.square().sum().backward()
    assert model.coarse_embed.zero_conv.weight.grad.abs().sum() > 0
    assert model.coarse_embed.patch_attn.weight.grad.abs().sum() == 0
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    model.zero_grad()
    model.run(images).logits.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []


@pytest.mark.parametrize("coarse", [True, False])
def test_extreme_decisions(tiny_vit, coarse):
    """A level without any token has gradients too, zeros."""
    model = with_path(tiny_vit)
    model.run(torch.randn(2, 3, 64, 64), torch.full((4, 4), coarse)).logits.sum().backward()
    found = [p.grad.abs().sum() > 0 for p in model.coarse_embed.parameters()]
    assert all(found) if coarse else not any(found)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_under_autocast(tiny_vit, execution):
    model, images, mask = with_path(tiny_vit), torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.5
    expected = model.run(images, mask, execution).logits
    with torch.autocast("cpu", torch.bfloat16):
        logits = model.run(images, mask, execution).logits
    logits.float().sum().backward()
    assert (logits - expected).abs().max() <= 0.05 * expected.abs().max().clamp(min=1)


@pytest.mark.parametrize("scales", [2, 3])
@torch.no_grad()
def test_macs_are_what_is_counted(make_vit, scales):
    rule, images = three_sizes()
    model = with_path(make_vit(dynamic_img_size=True), gate=rule if scales == 3 else None)
    model.threshold = 0.5 if scales == 3 else model.decide(images).soft.median().item()
    results, size = [], images.shape[-2:]
    assert counted_macs(lambda: results.append(model.run(images))) == results[0].macs.sum().item()
    counts = [u.sum((1, 2)) for u in model.decide(images).undivided]
    assert len(counts) == scales - 1
    assert counts[0].unique().numel() > 1
    assert torch.equal(model.macs_of(counts, size), results[0].macs)
    # A coarse token: four embeddings of its patches, a convolution of four C x C, and a linear layer.
    width, pixels = 64, 3 * 8 * 8
    assert model.path_macs(1) == 4 * pixels * width + 4 * width**2 + width**2
    if scales == 3:
        assert model.path_macs(4, 1) == 16 * pixels * width + (4 + 1) * 4 * width**2 + width**2


def test_a_budget_includes_the_path(make_vit):
    rule, images = three_sizes()
    model = with_path(make_vit(dynamic_img_size=True), gate=rule)
    share = model.calibrate([images], 0.8)
    with torch.no_grad():
        assert model.run(images).macs.mean().item() / model.dense_macs((64, 96)) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("coarse_embed", ["shared", "own", "apt"])
def test_saves_and_loads(tmp_path, coarse_embed):
    torch.manual_seed(1)
    rule, images = three_sizes()
    vit = timm.create_model("vit_mini_patch8_64", dynamic_img_size=True)
    model = msvit.MSViT(shake(vit), gate=rule, coarse_embed=coarse_embed).eval()
    if coarse_embed != "shared":
        for parameter in model.coarse_embed.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    assert type(again.coarse_embed) is type(model.coarse_embed)
    with torch.no_grad():
        assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(("shares", "kind"), [(True, type(None)), (False, torch.nn.Sequential)])
def test_folders_that_say_share_embedding_load(tmp_path, shares, kind):
    """Until version 0.1 a folder's config had this in place of coarse_embed."""
    msvit.MSViT(timm.create_model("vit_mini_patch8_64"), coarse_embed="shared" if shares else "own").save_pretrained(
        tmp_path
    )
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["coarse_embed"]
    path.write_text(json.dumps(config | {"share_embedding": shares}))
    assert type(msvit.MSViT.from_pretrained(tmp_path).coarse_embed) is kind


def test_bad_input(tiny_vit):
    with pytest.raises(ValueError, match="scale=3 with coarse_embed='apt'.*use 2, 4, 8"):
        msvit.MSViT(tiny_vit, scale=3, coarse_embed="apt")
    with pytest.raises(ValueError, match="coarse_embed='atp' is not known; the nearest is 'apt'"):
        msvit.MSViT(tiny_vit, coarse_embed="atp")
    assert isinstance(msvit.MSViT(tiny_vit, coarse_embed="apt").coarse_embed, FullResolution)
