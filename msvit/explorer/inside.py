"""Panels that can be switched on: what a token sees, and what each region is worth. They are computed at rest."""

from functools import cached_property

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from .attention import Attention, Worth, attention_of, worth_of
from .drawing import INK, PANEL_WIDTH, Colour, colours, enlarged, font, frame, png, stacked, strip
from .models import LoadedModel
from .state import State

PICKED: Colour = (213, 94, 0)
_RED, _BLUE = np.array((178, 24, 43)), np.array((33, 102, 172))


class Inside:
    """What is computed of a state for these panels, each once and when it is asked for.

    Args:
        picked: The fine patch whose token is meant, row by row; -1: the class token.
        block, head: Which attention is shown; head None: the mean over heads.
    """

    def __init__(self, state: State):
        self.state = state
        self.picked, self.block, self.head = -1, len(state.gated.loaded.model.vit.blocks) - 1, None

    @cached_property
    def attention(self) -> Attention:
        return attention_of(self.state)

    @cached_property
    def worth(self) -> Worth:
        return worth_of(self.state)


def attention_panel(inside: Inside) -> Image.Image:
    """Draw what the picked token takes from each token, in the chosen block and head."""
    matrix = inside.attention.layer(inside.block, inside.head)
    head = "mean over heads" if inside.head is None else f"head {inside.head}"
    return _seen(inside, matrix, f"block {inside.block}, {head}")


def rollout_panel(inside: Inside) -> Image.Image:
    """Draw what the picked token takes from each token through all blocks."""
    return _seen(inside, inside.attention.rollout(), "rollout through all blocks")


def cost_panel(inside: Inside) -> Image.Image:
    """Draw how much the loss rises where a region is coarse rather than fine: the true difference."""
    return _signed(inside, "cost", "true difference, each region run both ways")


def gradient_panel(inside: Inside) -> Image.Image:
    """Draw dL/dm of each region."""
    return _signed(inside, "gradient", "dL/dm, which trains the gate")


def _seen(inside: Inside, matrix: Tensor, what: str) -> Image.Image:
    """Draw a row of a matrix over the pale picture, the largest share brightest, and a frame round the token."""
    attention, picked = inside.attention, inside.picked
    values = attention.seen(matrix, picked)
    most = max(float(values.max()), 1e-12)
    panel = _over(inside, colours(values / most), 0.75)
    token = "class token" if attention.prefix else "mean over tokens"
    if picked >= 0:
        token, number = "picked token", attention.where.flatten()[picked]
        rows, columns = np.nonzero((attention.where == number).numpy())
        sy, sx = panel.height / values.shape[0], panel.width / values.shape[1]
        box = columns.min() * sx, rows.min() * sy, (np.ptp(columns) + 1) * sx, (np.ptp(rows) + 1) * sy
        frame(ImageDraw.Draw(panel), box, PICKED)
    return stacked(panel, strip(f"{token}: {what}", f"brightest {most:.2g} of 1"))


def _signed(inside: Inside, name: str, what: str) -> Image.Image:
    """Draw what regions are worth, signed: red where coarse costs, blue where it helps, paler towards zero.

    Of a quadtree it is said why there is none.
    """
    if len(inside.state.gated.loaded.model.scales) > 2:
        return strip("not of a quadtree: there are several", "other decisions about each region")
    values = getattr(inside.worth, name)
    most = max(float(np.abs(values).max()), 1e-12)
    share = (np.abs(values) / most)[..., None]
    hue = np.where(values[..., None] > 0, _RED, _BLUE)
    panel = _over(inside, (255 + share * (hue - 255)).round().astype(np.uint8), 0.7)
    if max(values.shape) <= 10:
        sy, sx = panel.height / values.shape[0], panel.width / values.shape[1]
        for (r, c), value in np.ndenumerate(values):
            at = ((c + 0.5) * sx, (r + 0.5) * sy)
            ImageDraw.Draw(panel).text(at, f"{value:+.2f}" if abs(value) >= 0.005 else "0", INK, font(18), anchor="mm")
    return stacked(panel, strip(what, "loss more (red) or less (blue) if coarse"))


def _over(inside: Inside, pixels: np.ndarray, share: float) -> Image.Image:
    """Return colours of cells over the grey picture, enlarged."""
    picture = enlarged(inside.state.gated.picture.image)
    cells = Image.fromarray(pixels).resize(picture.size, Image.Resampling.NEAREST)
    return Image.blend(picture.convert("L").convert("RGB"), cells, share)


WAITING = png(Image.new("RGB", (PANEL_WIDTH, PANEL_WIDTH), (245, 245, 245)))  # until there is something to show
INSIDE = {
    "Attention": attention_panel,
    "Rollout": rollout_panel,
    "Cost if coarse": cost_panel,
    "Gate's gradient": gradient_panel,
}


def looks_inside(loaded: LoadedModel) -> bool:
    """Return whether a model can be looked into: what a reducer moves about has no place on the grid."""
    return loaded.model.reducer is None
