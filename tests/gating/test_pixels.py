"""Rules on pixels, against loops over regions: PSNR of a lower resolution, and equality of neighbours."""

import math

import pytest
import torch

import msvit
from msvit.gating.rules import make_rule

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
GRIDS = [(4, 6), (2, 3), (1, 1)]


def normalised(pixels):
    return (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def drawn():
    """Pictures of 64 x 96 px of whole grey levels, flat in parts, noisy in parts."""
    flat = torch.randint(40, 200, (3, 1, 4, 6)).repeat_interleave(16, 2).repeat_interleave(16, 3)
    flat[:, :, :32, :64] = flat[:, :, :1, :1]
    noise = torch.randint(-3, 4, (3, 3, 64, 96)) * (torch.rand(3, 1, 8, 12) < 0.2).repeat_interleave(
        8, 2
    ).repeat_interleave(8, 3)
    return (flat + noise) / 255


@pytest.mark.parametrize("sizes", [1, 2, 3])
def test_psnr_is_that_of_the_averaged_region(sizes):
    pixels, thresholds = drawn(), [40.0, 30.0, 20.0][:sizes]
    found = make_rule("psnr", thresholds=thresholds, mean=MEAN, std=STD).score(normalised(pixels), GRIDS[:sizes])
    for i, (scores, grid, t) in enumerate(zip(found, GRIDS, thresholds, strict=False)):
        side, k = 16 * 2**i, 2 ** (i + 1)
        assert scores.shape == (3, *grid)
        for b in range(3):
            for r in range(grid[0]):
                for c in range(grid[1]):
                    part = pixels[b, :, side * r : side * r + side, side * c : side * c + side].double()
                    means = part.reshape(3, side // k, k, side // k, k).mean((2, 4))
                    lost = (part - means.repeat_interleave(k, 1).repeat_interleave(k, 2)).square().mean().item()
                    if lost < 1e-10:
                        assert scores[b, r, c] > 0.9
                        continue
                    expected = 1 / (1 + math.exp(-(-10 * math.log10(lost) - t) / 10))
                    assert scores[b, r, c].item() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("tolerance", [0.0, 3.0])
def test_equality_is_of_neighbouring_quarters(tolerance):
    pixels = drawn()
    found = make_rule("equality", thresholds=[tolerance] * 2, mean=MEAN, std=STD).score(normalised(pixels), GRIDS[:2])
    for i, (scores, grid) in enumerate(zip(found, GRIDS, strict=False)):
        half = 8 * 2**i
        for b in range(3):
            for r in range(grid[0]):
                for c in range(grid[1]):
                    y, x = 2 * half * r, 2 * half * c
                    levels = (255 * pixels[b]).round()
                    one, right, below, last = (
                        levels[:, y + dy : y + dy + half, x + dx : x + dx + half]
                        for dy, dx in ((0, 0), (0, half), (half, 0), (half, half))
                    )
                    pairs = (one, right), (below, last), (one, below), (right, last)
                    most = max((p - q).abs().max().item() for p, q in pairs)
                    assert (scores[b, r, c] > 0.5) == (most <= tolerance)
        assert 0 < (scores > 0.5).float().mean() < 1


@pytest.mark.parametrize("name", ["psnr", "equality"])
@torch.no_grad()
def test_a_page_of_text_costs_what_is_written_on_it(make_vit, name):
    """White paper is one token for each block of 4 x 4 patches; a line of letters stays fine."""
    page = torch.ones(1, 3, 64, 64)
    page[:, :, 20:24, 4:60:2] = 0.0
    rule = make_rule(name, thresholds=[30.0, 30.0] if name == "psnr" else [0.0, 0.0], mean=MEAN, std=STD)
    model = msvit.MSViT(make_vit(), gate=rule).eval()
    assert model.scales == (1, 2, 4)
    result = model.run(normalised(page))
    assert result.gating.undivided[1][0].tolist() == [[0, 0], [1, 1]]
    assert result.gating.undivided[0][0, :2].tolist() == [[1, 1, 1, 1], [0, 0, 0, 0]]
    assert result.tokens.tolist() == [1 + 2 + 4 + 4 * 4]
    share = model.calibrate([normalised(drawn())[..., :64, :64]], 0.5)
    assert 0 < share < 1


def test_bad_input():
    with pytest.raises(ValueError, match=r"thresholds=30\.0: give a list of one number \(two scales\), two"):
        make_rule("psnr", thresholds=30.0)
    with pytest.raises(ValueError, match=r"threshold=-1 lies outside \[0, 255\]"):
        make_rule("equality", thresholds=[-1])
    with pytest.raises(ValueError, match="for pictures of 1 channels"):
        make_rule("psnr").score(torch.zeros(1, 1, 32, 32), [(2, 2)])
