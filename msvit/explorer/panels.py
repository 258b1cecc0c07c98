"""The panels of the explorer: each a function from a `view.State` to a picture `drawing.SIDE` pixels wide.

A new one is a line in PANELS.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from .drawing import COARSE, FINE, INK, colours, enlarged, font, frame, hatched, shortened, stacked, strip
from .models import Subject
from .segpanels import error_panel, prediction_panel, truth_panel
from .state import FREE, State, as_the_model_sees

ENDED = "Where each pixel's token ended"
DROPPED, HATCH = (40, 40, 40), (95, 95, 95)  # of patches without a token


def picture_panel(state: State) -> Image.Image:
    """The picture, at the resolution that the model has it in."""
    return enlarged(state.look.shot.image)


def gate_panel(state: State) -> Image.Image:
    """m of each region, from blue (fine) to yellow (coarse), with its scale and the threshold below."""
    soft = state.look.soft
    panel = enlarged(Image.fromarray(colours(soft)), state.look.shot.image.size)
    (width, height), (h, w) = panel.size, soft.shape
    canvas = ImageDraw.Draw(panel)
    if max(h, w) <= 10:
        for r, c in np.ndindex(h, w):
            at = ((c + 0.5) * width / w, (r + 0.5) * height / h)
            ink = "black" if soft[r, c] > 0.55 else "white"
            canvas.text(at, f"{soft[r, c]:.2f}", ink, font(20), anchor="mm")
    scale = Image.new("RGB", (width, 56), "white")
    bar = Image.fromarray(colours(np.linspace(0, 1, width - 40)[None])).resize((width - 40, 16))
    scale.paste(bar, (20, 12))
    canvas, x = ImageDraw.Draw(scale), 20 + state.threshold * (width - 40)
    canvas.polygon([(x, 20), (x - 8, 4), (x + 8, 4)], COARSE, INK)
    canvas.line([(x, 12), (x, 30)], INK, 3)
    ends, cut = ("0 fine", "1 coarse"), cut_text(state.threshold)
    left, right, half = (canvas.textlength(text, font(18)) for text in (*ends, cut))
    middle = min(max(x, 32 + left + half / 2), width - 32 - right - half / 2)  # beside the ends, not over them
    for at, text, anchor in ((20, ends[0], "lt"), (middle, cut, "mt"), (width - 20, ends[1], "rt")):
        canvas.text((at, 36), text, INK, font(18), anchor=anchor)
    return stacked([panel, scale])


def grid_panel(state: State) -> Image.Image:
    """The tokens on the picture: an orange, hatched frame is one coarse token, a blue cross fine ones."""
    panel = enlarged(state.look.shot.image)
    veil = Image.new("RGBA", panel.size)
    canvas, k, (h, w) = ImageDraw.Draw(veil), state.look.subject.model.scale, state.coarse.shape
    sy, sx = panel.height / h, panel.width / w
    for r, c in sorted(np.ndindex(h, w), key=lambda at: state.coarse[at]):
        y, x = r * sy, c * sx
        if state.coarse[r, c]:
            for t in np.arange(0.25, 2, 0.25):  # diagonals, cut at the region's borders
                a, b = max(0, t - 1), min(1, t)
                canvas.line([(x + a * sx, y + (t - a) * sy), (x + b * sx, y + (t - b) * sy)], (*COARSE, 110), 2)
            frame(canvas, (x, y, sx, sy), COARSE)
        else:
            for i in range(k * k):
                frame(canvas, (x + i % k * sx / k, y + i // k * sy / k, sx / k, sy / k), FINE)
        if state.painted[r, c] != FREE:
            canvas.ellipse([x + 8, y + 8, x + 22, y + 22], "white", "black", 2)
    return Image.alpha_composite(panel.convert("RGBA"), veil).convert("RGB")


def pixels_panel(state: State) -> Image.Image:
    """What the tokens hold: coarse regions at 1 / k of the resolution, as the average that the tokenizer takes."""
    return enlarged(Image.fromarray(as_the_model_sees(state)))


def ended_panel(state: State) -> Image.Image:
    """The tokens at the chosen stage of a reducer: each the mean colour of its pixels, with borders between them.

    Patches of a token may lie apart; those that were dropped are dark and hatched.
    """
    part, image = state.part, np.asarray(state.look.shot.image, np.float32)
    rows, columns = part.where.shape
    patches = image.reshape(rows, image.shape[0] // rows, columns, -1, 3).mean((1, 3))
    number = np.unique(part.where, return_inverse=True)[1].reshape(part.where.shape)
    count = np.bincount(number.ravel())
    sums = [np.bincount(number.ravel(), channel.ravel()) for channel in np.moveaxis(patches, 2, 0)]
    means = (np.stack(sums, 1) / count[:, None]).round().astype(np.uint8)
    panel = enlarged(Image.fromarray(means[number]), state.look.shot.image.size)
    panel = hatched(panel, part.where < 0, DROPPED, HATCH)
    draw_borders(panel, part.where)
    lost = [f"{part.dropped} of {part.where.size} patches dropped"] if part.dropped else []
    return stacked([panel, strip(f"{part.name}: {part.tokens} patch tokens", *lost)])


def draw_borders(panel: Image.Image, where: np.ndarray):
    """Draws the borders between cells `[h, w]` with different numbers, white on black to be seen on any colour."""
    canvas, (h, w) = ImageDraw.Draw(panel), where.shape
    sy, sx = panel.height / h, panel.width / w
    lines = [(c * sx, r * sy, c * sx, (r + 1) * sy) for r, c in np.argwhere(where[:, 1:] != where[:, :-1]) + (0, 1)]
    lines += [(c * sx, r * sy, (c + 1) * sx, r * sy) for r, c in np.argwhere(where[1:] != where[:-1]) + (1, 0)]
    for colour, width in ((0, 0, 0), 4), ((255, 255, 255), 2):
        for line in lines:
            canvas.line(line, colour, width)


def classes_panel(state: State) -> Image.Image:
    """The most probable classes; the true one, where it is known, is underlined."""
    look, top = state.look, np.argsort(-state.probabilities, kind="stable")[:6]
    width, height = enlarged(look.shot.image).size
    panel = Image.new("RGB", (width, max(height, 330)), "white")
    canvas, step = ImageDraw.Draw(panel), max(height, 330) / 6
    for row, i in enumerate(top):
        y, p, name = row * step + step / 2, float(state.probabilities[i]), look.subject.classes[i]
        name = shortened(name, width - 110, 24)
        canvas.text((4, y - 4), name, INK, font(24), anchor="ls")
        canvas.text((width - 4, y - 4), f"{p:.1%}", INK, font(24), anchor="rs")
        if look.subject.classes[i] == look.shot.truth:
            canvas.line([(4, y + 1), (4 + canvas.textlength(name, font(24)), y + 1)], INK, 2)
        canvas.rectangle([4, y + 6, width - 4, y + 20], (235, 235, 235))
        canvas.rectangle([4, y + 6, 4 + p * (width - 8), y + 20], (0, 114, 178) if row == 0 else (130, 170, 200))
    return panel


class Panel(NamedTuple):
    """What draws it, for which models, and whether it changes with the picture only."""

    draw: Callable[[State], Image.Image]
    serves: Callable[[Subject], bool] = lambda subject: True
    fixed: bool = False


def _labels(subject: Subject) -> bool:
    return subject.segments


def _names(subject: Subject) -> bool:
    return not subject.segments


def _reduces(subject: Subject) -> bool:
    return subject.model.reducer is not None


PANELS = {
    "Picture": Panel(picture_panel, fixed=True),
    "Gate: probability of coarse": Panel(gate_panel),
    "Mixed-scale tokens": Panel(grid_panel),
    "Pixels in the tokens": Panel(pixels_panel),
    ENDED: Panel(ended_panel, _reduces),
    "Class probabilities": Panel(classes_panel, _names),
    "Prediction": Panel(prediction_panel, _labels),
    "Ground truth": Panel(truth_panel, _labels, fixed=True),
    "Error": Panel(error_panel, _labels),
}


def shown(subject: Subject) -> dict[str, Panel]:
    """The panels that a model has."""
    return {title: panel for title, panel in PANELS.items() if panel.serves(subject)}


def cut_text(threshold: float) -> str:
    """A threshold, in words."""
    return f"coarse where m > {threshold:.2f}" if 0.01 <= threshold <= 0.99 else f"coarse where m > {threshold:.3g}"
