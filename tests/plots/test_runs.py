"""Maps of a quadtree: what is drawn is what the model has as tokens."""

import torch
from matplotlib import pyplot as plt

from msvit import plots
from msvit.plots.style import PictureStyle, as_the_model_sees

SIZES = torch.tensor([[2, 2, 1, 0], [2, 2, 0, 1]])  # of the tokens over 2 x 4 regions of 16 px


def test_each_size_is_shown_at_its_own_resolution():
    image = torch.rand(3, 32, 64)
    seen = as_the_model_sees(image, SIZES, 2)
    for r in range(2):
        for c in range(4):
            k = 2 ** int(SIZES[r, c])
            part, shown = (x[:, 16 * r : 16 * r + 16, 16 * c : 16 * c + 16] for x in (image, seen))
            means = part.unflatten(2, (-1, k)).unflatten(1, (-1, k)).mean((2, 4))
            torch.testing.assert_close(shown, means.repeat_interleave(k, 1).repeat_interleave(k, 2))


def test_a_map_counts_and_frames_the_tokens():
    drawing = PictureStyle(16, 2, (0.5,) * 3, (0.25,) * 3)
    figure = plots.gate_maps(torch.zeros(1, 3, 32, 64), {"a": SIZES[None]}, drawing)
    assert [axes.get_xlabel() for axes in figure.axes][
        1
    ] == "11 patch tokens"  # one, two coarse ones and eight fine ones
    lines = figure.axes[1].collections
    assert [len(part.get_segments()) for part in lines] == [4 * 3, 6 * 2]
    longest = max(abs(a - b).max() for a, b in lines[0].get_segments())
    assert longest == 32
    shown = plots.positions({"a": SIZES[None]}).axes[0].images[0].get_array()
    assert (torch.as_tensor(shown) > 0).tolist() == (SIZES == 0).tolist()
    plt.close("all")
