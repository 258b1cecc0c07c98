"""The style of all figures: colours, pictures and their tokens, and files of the same bytes."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from ..checks import plain
from ..core.tokens import shrink

# Okabe and Ito's colours, which readers with any colour vision tell apart. Those of methods are in `looks`.
BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"
BLACK = "#000000"
COLOURS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, "#999933", "#882255", "#44AA99")
GREY = "#666666"  # of what is there for comparison

# How `plt.subplots` lays out pictures.
PICTURE_GRID = {"squeeze": False, "layout": "constrained", "subplot_kw": {"xticks": [], "yticks": []}}

# What a method costs: column of a table of runs -> factor and axis label.
COSTS = {
    "macs": (100, "MACs per picture, gate included (% of the dense model's)"),
    "pictures_per_s": (1, "pictures per second on this machine"),
}


def save(figure: Figure, folder: str | Path, name: str, kinds: tuple[str, ...] = ("png", "svg")) -> Figure:
    """Write the figure under a folder, without dates inside, so that the same figure gives the same bytes."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for text in figure.findobj(Text):
        if (said := "\n".join(map(plain, text.get_text().split("\n")))) != text.get_text():
            text.set_text(said)  # control characters make an SVG file that no program reads
    dates = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
    with plt.rc_context({"svg.hashsalt": "msvit"}):
        for kind in kinds:
            figure.savefig(Path(folder) / f"{name}.{kind}", dpi=150, bbox_inches="tight", metadata=dates.get(kind, {}))
    return figure


def with_note(figure: Figure, note: str, title: str = "") -> Figure:
    """Put a note below the figure's title, and `title` before it; over the axes where there is one pair."""
    titles = ": ".join(text for text in (title, figure.get_suptitle()) if text)
    text = f"{titles}\n{note}".strip()
    if len(figure.axes) == 1 and not titles:
        figure.axes[0].set_title(text, fontsize=9)  # beside an outer legend, which a figure's title would run into
    else:
        figure.suptitle(text, fontsize=9)
    return figure


def as_the_model_sees(image: Tensor, coarse: Tensor, scale: int) -> Tensor:
    """Return the picture `[c, H, W]` with the regions `[h, w]` that are coarse at 1 / scale of the resolution.

    Of a quadtree, `coarse` has the size of token over each region (`core.scales.token_sizes`); each size above the
    first has half of the resolution of the one before.
    """
    rows, columns, seen = image.shape[1] // coarse.shape[0], image.shape[2] // coarse.shape[1], image
    pixels = coarse.long().repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    for size in range(1, int(coarse.max()) + 1):
        k = scale * 2 ** (size - 1)
        seen = torch.where(
            pixels >= size, F.interpolate(shrink(image[None], k), scale_factor=k, mode="nearest")[0], seen
        )
    return seen


class PictureStyle(NamedTuple):
    """How a model's pictures are drawn, and the tokens in them."""

    patch: int  # side of a coarse patch in pixels
    scale: int  # fine patches along that side
    mean: tuple[float, ...]  # what the pictures were normalised with
    std: tuple[float, ...]

    def pixels(self, image: Tensor) -> np.ndarray:
        """Return a normalised picture `[3, H, W]` as floats in [0, 1], `[H, W, 3]`."""
        mean, std = (torch.tensor(v, dtype=image.dtype).view(-1, 1, 1) for v in (self.mean, self.std))
        return (image.detach().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()

    def draw(self, axes: Axes, image: Tensor, coarse: Tensor | None = None):
        """Draw a picture; with decisions, the borders of its tokens: frames round coarse ones, crosses in fine ones.

        Decisions are as in `as_the_model_sees`.
        """
        axes.imshow(self.pixels(image), interpolation="nearest")
        if coarse is None:
            return
        lines = {True: [], False: []}
        for r, c in np.ndindex(*coarse.shape):
            top, left = r * self.patch - 0.5, c * self.patch - 0.5  # a pixel's centre is its integer coordinate
            kind, n = bool(coarse[r, c]), 2 ** max(int(coarse[r, c]) - 1, 0)  # n regions along the side of the token
            if r % n or c % n:
                continue
            side = n * self.patch
            steps = np.linspace(0, side, 2 if kind else self.scale + 1)
            lines[kind] += [[(left + s, top), (left + s, top + side)] for s in steps]
            lines[kind] += [[(left, top + s), (left + side, top + s)] for s in steps]
        for kind, colour, width in ((True, ORANGE, 1.2), (False, SKY, 0.9)):
            axes.add_collection(LineCollection(lines[kind], colors=colour, linewidths=width))
