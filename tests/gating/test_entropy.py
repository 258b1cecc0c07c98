"""APT's rule: entropies and decisions against its publication's own numbers, and against counting pixel by pixel."""

import json
import math
from pathlib import Path

import peers
import pytest
import timm
import torch
import torchvision.transforms.functional as TF

import msvit
from msvit.core.candidates import Candidates
from msvit.core.scales import grids_of, undivided
from msvit.data.scenes import Scenes
from msvit.gating.entropy import BINS, Entropy, grey_bins, patch_entropy
from msvit.gating.rules import make_rule
from msvit.models.msvit import EXECUTIONS

PLAIN = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
KEPT = json.loads((Path(__file__).parent / "data" / "apt.json").read_text())
FUNCTIONS = {"compute_patch_entropy_vectorized": "loader", "compute_patch_entropy_batched": "batched"}


def levels(images, bins):
    """The bin of every pixel, by the publication's formula; `rounded` as it was here before."""
    places = torch.zeros(len(images), *images.shape[-2:], dtype=torch.long)
    for b, y, x in (places == 0).nonzero().tolist():
        r, g, blue = (255 * images[b, :, y, x].double()).tolist()
        if bins == "rounded":
            places[b, y, x] = round(0.299 * r + 0.587 * g + 0.114 * blue)
            continue
        grey = sum(w * v for w, v in zip((0.2989, 0.5870, 0.1140), (r, g, blue), strict=True))
        places[b, y, x] = min(math.floor(512 * grey / 255 if bins == "loader" else 2 * grey), 511)
    return places


def entropy_of(patch):
    """Of a patch of bins, by counting."""
    values = patch.flatten().tolist()
    shares = [values.count(v) / len(values) for v in set(values)]
    return -sum(p * math.log2(p + 1e-10) for p in shares)


def pictures(n=6, side=64):
    """Pictures of 0 to 1 whose regions hold from one to many grey values."""
    steps = torch.randint(1, 40, (n, 1, side // 16, side // 16)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    return (torch.rand(n, 1, side, side) * steps).floor().expand(-1, 3, -1, -1) / 51  # every fifth of 256 levels


# ---- the publication's numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", peers.names("apt/maps"))
def test_published_entropies_and_choices(name, dtype):
    case = peers.case(name)
    bins = grey_bins(peers.tensor(case["pictures"], dtype) / 255, FUNCTIONS[case["settings"]["function"]])
    bits = {}
    for size in (16, 32, 64)[: case["settings"]["num_scales"]]:
        bits[size], expected = patch_entropy(bins, size, 512), peers.output(case, f"entropy_{size}")
        assert bits[size].dtype == torch.float64
        assert bits[size].shape == expected.shape
        assert (bits[size] - expected).abs().max() <= peers.TOLERANCE[dtype]
    h, w = bits[32].shape[1:]
    for choice in case["masks"]:
        sides = (1, 2, 4)[: len(choice["thresholds"]) + 1]
        pairs = zip((32, 64), grids_of((h, w), sides), choice["thresholds"], strict=False)
        chosen = [(bits[size][:, : grid[0], : grid[1]] < t).float() for size, grid, t in pairs]
        candidates = Candidates((h, w), sides, 0)
        active = candidates.activity(undivided(chosen))
        assert active.sum(1).tolist() == choice["tokens"]
        for level, size in zip(reversed(candidates.levels), (16, 32, 64), strict=False):
            label = f"mask_{'_'.join(map(str, choice['thresholds']))}/{size}"
            chosen = active[:, level.first : level.first + level.count].view(-1, *level.grid)
            expected = peers.output(case, label)
            assert torch.equal(chosen.byte(), expected[:, : level.grid[0], : level.grid[1]])
            assert chosen.sum() == expected.sum()


@pytest.mark.parametrize("thresholds", [[5.5], [6.0, 4.0], [6.0, 6.0]])
@pytest.mark.parametrize("name", [n for n in peers.names("apt/maps_") if "odd" not in str(n)])
def test_a_model_decides_as_published(make_vit, name, thresholds):
    case = peers.case(name)
    images = peers.tensor(case["pictures"], torch.float32) / 255
    rule = Entropy(thresholds, FUNCTIONS[case["settings"]["function"]], mean=(0.5,) * 3, std=(0.5,) * 3)
    vit = make_vit(img_size=(128, 192), patch_size=16)
    gating = msvit.MSViT(vit, gate=rule).decide((images - 0.5) / 0.5)
    label = f"mask_{'_'.join(map(str, thresholds))}"
    coarse = peers.output(case, f"{label}/32").bool()
    regions, *blocks = (u.bool() for u in gating.undivided)
    assert torch.equal(regions.repeat_interleave(2, 1).repeat_interleave(2, 2), ~fine(case, label))
    if len(thresholds) == 2:
        assert torch.equal(blocks[0], peers.output(case, f"{label}/64").bool())
        assert torch.equal(regions & ~blocks[0].repeat_interleave(2, 1).repeat_interleave(2, 2), coarse)
    else:
        assert torch.equal(gating.decisions.bool(), coarse)


def fine(case, label):
    return peers.output(case, f"{label}/16").bool()


@pytest.mark.parametrize("name", peers.names("apt/eval_transform"))
def test_published_evaluation_picture(name):
    """Shorter side to 128 / .875, centre crop; then the entropies."""
    case = peers.case(name)
    raw = TF.to_pil_image(peers.output(case, "raw"))
    side = int(case["settings"]["img_size"] / case["settings"]["eval_crop_ratio"])
    whole = TF.resize(raw, side, TF.InterpolationMode.BICUBIC)
    picture = TF.pil_to_tensor(TF.center_crop(whole, case["settings"]["img_size"]))
    assert torch.equal(picture, peers.output(case, "resized"))
    bins = grey_bins(picture[None].double() / 255, "loader")
    for size in (16, 32):
        assert (patch_entropy(bins, size, 512)[0] - peers.output(case, f"entropy_{size}")).abs().max() <= 1e-9


@pytest.mark.parametrize("bins", ["loader", "batched"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_published_numbers_kept_here(bins, dtype):
    """A corner of one of its pictures, with the publication's entropies, where the reference file is not at hand."""
    picture = torch.tensor(list(bytes.fromhex(KEPT["picture"])), dtype=dtype).view(1, 3, 32, 32) / 255
    found = grey_bins(picture, bins)
    assert torch.equal(found, levels(picture, bins))
    for size in (16, 32):
        expected = torch.tensor(KEPT[bins][str(size)], dtype=torch.float64)
        assert (patch_entropy(found, size, 512)[0] - expected).abs().max() <= 1e-9


# ---- against counting


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("threshold", [3.0, 4.5])
def test_two_scales_against_counting(tiny_vit, bins, threshold):
    images = pictures(3)
    coarse = msvit.MSViT(tiny_vit, gate=Entropy([threshold], bins, **PLAIN)).eval().run(images).coarse
    grey = levels(images, bins)
    for b in range(len(images)):
        for r in range(4):
            for c in range(4):
                h = entropy_of(grey[b, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16])
                assert coarse[b, r, c] == (h < threshold)
    assert 0 < coarse.float().mean() < 1


def test_what_sticks_out_is_black_and_never_coarse():
    bins = torch.randint(0, 512, (2, 40, 24))
    bits = patch_entropy(bins, 16, 512)
    assert bits.shape == (2, 3, 2)
    assert (bits[:, -1] == 1e6).all()
    assert (bits[:, :, -1] == 1e6).all()
    assert bits[1, 1, 0].item() == pytest.approx(entropy_of(bins[1, 16:32, :16]), abs=1e-12)
    below = patch_entropy(bins[:, :, :16], 16, 512)
    assert torch.equal(below[:, :2], bits[:, :2, :1])
    assert torch.equal(below[:, 2], bits[:, 2, :1])


def test_normalised_pictures_are_the_same_pictures():
    images, mean, std = pictures(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    normalised = (images - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    plain = Entropy([5.0, 4.0], **PLAIN).score(images, [(4, 4), (2, 2)])
    again = Entropy([5.0, 4.0], mean=mean, std=std).score(normalised, [(4, 4), (2, 2)])
    assert [score.shape[1:] for score in plain] == [(4, 4), (2, 2)]
    assert all(map(torch.equal, plain, again))


@pytest.mark.parametrize("bins", ["loader", "batched"])
def test_pixels_are_clamped_each_for_itself(bins):
    images = 3 * torch.rand(2, 3, 8, 8) - 1
    assert torch.equal(grey_bins(images, bins), grey_bins(images.clamp(0, 1), bins))
    assert not torch.equal(grey_bins(images, "rounded"), grey_bins(images.clamp(0, 1), "rounded"))


def test_scores_keep_double_precision():
    images = pictures().double()
    assert Entropy(**PLAIN).score(images, [(4, 4)])[0].dtype == torch.float64
    assert Entropy(**PLAIN).score(images.bfloat16(), [(4, 4)])[0].dtype == torch.float32


@pytest.mark.parametrize("size", [(64, 64), (80, 112)])
@pytest.mark.parametrize("execution", EXECUTIONS)
@torch.no_grad()
@pytest.mark.long
def test_three_scales_against_loops(make_vit, size, execution):
    """Blocks from the largest patch down; a token is the embedding of its averaged pixels at its mean position."""
    vit = make_vit(dynamic_img_size=True)
    images = torch.nn.functional.interpolate(pictures(4), size)
    model = msvit.MSViT(vit, gate=Entropy([4.5, 4.5], **PLAIN)).eval()
    tokens = model.tokenize(images, model.decide(images), execution)
    grey = levels(images, "loader")
    rows, columns = size[0] // 8, size[1] // 8
    position = vit.pos_embed[0, 1:].view(8, 8, -1).permute(2, 0, 1)[None]
    if (rows, columns) != (8, 8):
        position = torch.nn.functional.interpolate(position, (rows, columns), mode="bicubic", antialias=True)
    h, w = size[0] // 16, size[1] // 16
    seen = set()
    for b in range(4):
        count = 1
        for y in range(rows):
            for x in range(columns):
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
def test_three_scales_in_all_executions(tiny_vit):
    model = msvit.MSViT(tiny_vit, gate=Entropy([4.6, 4.4], **PLAIN)).eval()
    images = pictures()
    masked, *others, packed = (model.run(images, execution=e) for e in EXECUTIONS)
    assert packed.tokens.unique().numel() > 1
    for other in (*others, packed):
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.tokens, other.tokens)
    counts = [u.sum((1, 2)) for u in packed.gating.undivided]
    assert torch.equal(model.macs_of(counts, (64, 64)), packed.macs)
    assert packed.final.layout.sum((packed.final.area == 16).float()).tolist() == counts[1].tolist()


@pytest.mark.parametrize("thresholds", [[8.0], [8.0, 7.0]])
@torch.no_grad()
def test_all_fine_is_plain_timm(tiny_vit, thresholds):
    images = pictures()
    for given, threshold in (([0.0] * len(thresholds), 0.5), (thresholds, 1.0)):
        model = msvit.MSViT(tiny_vit, gate=Entropy(given)).eval()
        model.threshold = threshold
        assert (model(images) - tiny_vit(images)).abs().max() <= 1e-5


def test_the_models_threshold_moves_all_thresholds_alike(tiny_vit):
    """Half a bit less for every size is the threshold 1 / (1 + exp(-.5))."""
    images = pictures()
    fewer, moved = (msvit.MSViT(tiny_vit, gate=Entropy(t, **PLAIN)) for t in ([4.5, 4.1], [5.0, 4.6]))
    moved.threshold = 1 / (1 + math.exp(-0.5))
    ours, theirs = fewer.decide(images), moved.decide(images)
    for one, other in zip(ours.levels, theirs.levels, strict=True):
        assert torch.equal(one.decisions, other.decisions)
        assert 0 < one.decisions.mean() < 1


@pytest.mark.parametrize("thresholds", [[5.5], [5.5, 4.5]])
@torch.no_grad()
def test_a_budget_is_calibrated(tiny_vit, thresholds):
    images = Scenes(64, difficulty="middle").batch(range(64))[0]
    rule = Entropy(thresholds, mean=(128 / 255,) * 3, std=(64 / 255,) * 3)
    model = msvit.MSViT(tiny_vit, gate=rule).eval()
    share = model.calibrate([images], 0.6)
    assert share == pytest.approx(0.6, abs=0.02)
    assert model.run(images).macs.mean().item() / model.dense_macs((64, 64)) == pytest.approx(share, abs=1e-9)


# ---- rules that were saved before


@pytest.mark.parametrize(
    ("earlier", "thresholds"),
    [
        ({}, [5.0]),
        ({"bits": 4.5}, [4.5]),
        ({"bits": 4.6, "scales": 3, "gap": 0.2}, [4.6, 4.4]),
        ({"scales": 3}, [5, 4]),
    ],
)
def test_an_earlier_rule_decides_as_it_did(tmp_path, earlier, thresholds):
    """In bits and a gap, on 256 whole grey values; its config did not name what was default."""
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"), gate=make_rule("entropy", **PLAIN)).eval()
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    config["gate"] = {"name": "entropy", **earlier, **{k: list(v) for k, v in PLAIN.items()}}
    config["share_embedding"] = config.pop("coarse_embed") == "shared"
    config["scale"] = config.pop("scales")[1]
    path.write_text(json.dumps(config))
    again, images = msvit.MSViT.from_pretrained(tmp_path), pictures(3)
    gating, grey = again.decide(images), levels(images, "rounded")
    for b in range(len(images)):
        for r in range(4):
            for c in range(4):
                coarse = entropy_of(grey[b, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16]) < thresholds[0]
                if len(thresholds) == 2:
                    top, left = r // 2 * 32, c // 2 * 32
                    block = entropy_of(grey[b, top : top + 32, left : left + 32]) < thresholds[1]
                    assert gating.larger[0].decisions[b, r // 2, c // 2] == block
                    coarse = coarse or block
                assert gating.undivided[0][b, r, c] == coarse
    assert again.gate.settings["thresholds"] == pytest.approx(thresholds)
    again.save_pretrained(tmp_path / "anew")
    assert torch.equal(msvit.MSViT.from_pretrained(tmp_path / "anew").decide(images).decisions, gating.decisions)
