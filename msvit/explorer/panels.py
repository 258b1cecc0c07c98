"""The panels: each a function from a `State` to a picture `drawing.PANEL_WIDTH` wide. A new one is a line in PANELS."""

from collections.abc import Callable
from operator import attrgetter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageDraw

from ..data import IGNORE
from ..evaluation.segmentation import near_edges
from .drawing import INK, Colour, colours, enlarged, font, frame, hatched, ink_on, legend, shortened, stacked, strip
from .models import LoadedModel
from .painting import UNPAINTED
from .state import State, layer_name, pixels_of_tokens, shares_of

TOKEN_MAP_TITLE = "Where each pixel's token ended"
# Okabe and Ito's sky blue and orange, which readers with any colour vision tell apart.
FINE_RGB, COARSE_RGB = (86, 180, 233), (230, 159, 0)
WRONG = (213, 94, 0)  # their vermilion
DROPPED_FILL, DROPPED_HATCH = (40, 40, 40), (95, 95, 95)  # of patches without a token
IGNORED_FILL, IGNORED_HATCH = (250, 250, 250), (190, 190, 190)  # of pixels to ignore
NEAR_EDGE = (143, 190, 216)  # of right pixels near a boundary
LEGEND_CLASSES = 12  # as many are named
# Paul Tol's muted scheme: a pale grey, and nine colours that differ in lightness too, for colour-blind eyes.
MUTED = ((221, 221, 221), (51, 34, 136), (221, 204, 119), (17, 119, 51), (136, 204, 238), (204, 102, 119))
MUTED += ((68, 170, 153), (136, 34, 85), (153, 153, 51), (170, 68, 153))


def picture_panel(state: State) -> Image.Image:
    """Draw the picture, at the resolution that the model has it in."""
    return enlarged(state.gated.picture.image)


def gate_panel(state: State) -> Image.Image:
    """Draw m of each region, from blue (fine) to yellow (coarse), with its scale and the threshold below."""
    soft = state.gated.soft
    panel = enlarged(Image.fromarray(colours(soft)), state.gated.picture.image.size)
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
    canvas.polygon([(x, 20), (x - 8, 4), (x + 8, 4)], COARSE_RGB, INK)
    canvas.line([(x, 12), (x, 30)], INK, 3)
    ends, cut = ("0 fine", "1 coarse"), threshold_text(state.threshold)
    left, right, half = (canvas.textlength(text, font(18)) for text in (*ends, cut))
    middle = min(max(x, 32 + left + half / 2), width - 32 - right - half / 2)  # beside the ends, not over them
    for at, text, anchor in ((20, ends[0], "lt"), (middle, cut, "mt"), (width - 20, ends[1], "rt")):
        canvas.text((at, 36), text, INK, font(18), anchor=anchor)
    return stacked(panel, scale)


def grid_panel(state: State) -> Image.Image:
    """Draw the tokens on the picture: an orange, hatched frame is a coarse or larger token, a blue cross fine ones."""
    panel = enlarged(state.gated.picture.image)
    veil = Image.new("RGBA", panel.size)
    canvas, k, (h, w) = ImageDraw.Draw(veil), state.gated.loaded.model.scale, state.coarse.shape
    sy, sx = panel.height / h, panel.width / w
    for r, c in sorted(np.ndindex(h, w), key=lambda at: state.coarse[at]):
        y, x = r * sy, c * sx
        if state.coarse[r, c]:
            n = 2 ** (state.levels[r, c] - 1)  # regions along the side of the token, drawn once for all of them
            if r % n or c % n:
                continue
            across, down = n * sx, n * sy
            for t in np.arange(0.25, 2, 0.25):  # diagonals, cut at the region's borders
                a, b = max(0, t - 1), min(1, t)
                ends = [(x + a * across, y + (t - a) * down), (x + b * across, y + (t - b) * down)]
                canvas.line(ends, (*COARSE_RGB, 110), 2)
            frame(canvas, (x, y, across, down), COARSE_RGB)
        else:
            for i in range(k * k):
                frame(canvas, (x + i % k * sx / k, y + i // k * sy / k, sx / k, sy / k), FINE_RGB)
        if state.painted[r, c] != UNPAINTED:
            canvas.ellipse([x + 8, y + 8, x + 22, y + 22], "white", "black", 2)
    return Image.alpha_composite(panel.convert("RGBA"), veil).convert("RGB")


def token_map_panel(state: State) -> Image.Image:
    """Draw the tokens after the chosen layer: each the mean colour of its pixels, with borders between them.

    Patches of a token may lie apart; those that were dropped are dark and hatched.
    """
    token_map, image = state.token_map, np.asarray(state.gated.picture.image, np.float32)
    rows, columns = token_map.where.shape
    patches = image.reshape(rows, image.shape[0] // rows, columns, -1, 3).mean((1, 3))
    means = pd.DataFrame(patches.reshape(-1, 3), dtype=float).groupby(token_map.where.ravel()).transform("mean")
    means = means.round().to_numpy(np.uint8).reshape(patches.shape)
    panel = enlarged(Image.fromarray(means), state.gated.picture.image.size)
    panel = hatched(panel, token_map.where < 0, DROPPED_FILL, DROPPED_HATCH)
    _draw_borders(panel, token_map.where)
    lost = [f"{token_map.dropped} of {token_map.where.size} patches dropped"] if token_map.dropped else []
    return stacked(panel, strip(f"{layer_name(token_map.layer)}: {token_map.tokens} patch tokens", *lost))


def _draw_borders(panel: Image.Image, where: np.ndarray):
    """Draw the borders between cells `[h, w]` with different numbers, white on black to be seen on any colour."""
    canvas, (h, w) = ImageDraw.Draw(panel), where.shape
    sy, sx = panel.height / h, panel.width / w
    lines = [(c * sx, r * sy, c * sx, (r + 1) * sy) for r, c in np.argwhere(where[:, 1:] != where[:, :-1]) + (0, 1)]
    lines += [(c * sx, r * sy, (c + 1) * sx, r * sy) for r, c in np.argwhere(where[1:] != where[:-1]) + (1, 0)]
    for colour, width in ((0, 0, 0), 4), ((255, 255, 255), 2):
        for line in lines:
            canvas.line(line, colour, width)


def classes_panel(state: State) -> Image.Image:
    """Draw the most probable classes; the true one, where it is known, is underlined."""
    gated, top = state.gated, np.argsort(-state.probabilities, kind="stable")[:6]
    width, height = enlarged(gated.picture.image).size
    panel = Image.new("RGB", (width, max(height, 330)), "white")
    canvas, step = ImageDraw.Draw(panel), max(height, 330) / 6
    for row, i in enumerate(top):
        y, p, name = row * step + step / 2, float(state.probabilities[i]), gated.loaded.classes[i]
        name = shortened(name, width - 110, 24)
        canvas.text((4, y - 4), name, INK, font(24), anchor="ls")
        canvas.text((width - 4, y - 4), f"{p:.1%}", INK, font(24), anchor="rs")
        if gated.loaded.classes[i] == gated.picture.truth:
            canvas.line([(4, y + 1), (4 + canvas.textlength(name, font(24)), y + 1)], INK, 2)
        canvas.rectangle([4, y + 6, width - 4, y + 20], (235, 235, 235))
        canvas.rectangle([4, y + 6, 4 + p * (width - 8), y + 20], (0, 114, 178) if row == 0 else (130, 170, 200))
    return panel


def truth_panel(state: State) -> Image.Image:
    """Draw the true class of each pixel, in the same colours; or why it is unknown."""
    truth = state.gated.truth
    return _unknown(state) if truth is None else label_panel(truth, state.gated.loaded.classes)


def error_panel(state: State) -> Image.Image:
    """Draw wrong pixels on the pale picture, and the band on both sides of the true boundaries."""
    truth = state.gated.truth
    if truth is None:
        return _unknown(state)
    known, band = truth != IGNORE, near_edges(torch.from_numpy(truth)[None])[0].numpy()
    wrong = (state.labels != truth) & known
    pale = 150 + 0.41 * np.asarray(state.gated.picture.image.convert("L").convert("RGB"), np.float32)
    pale[band], pale[wrong] = NEAR_EDGE, WRONG
    of_all, of_band = (f"{part.mean():.1%}" if part.size else "none" for part in (wrong[known], wrong[band]))
    entries = [(WRONG, "", f"wrong: {of_all} of the pixels"), (NEAR_EDGE, "", f"near a boundary: {of_band} wrong")]
    return _with_legend(pale.round().astype(np.uint8), ~known, entries)


def _unknown(state: State) -> Image.Image:
    """Draw why there is no truth."""
    picture = state.gated.picture
    why = "no label map belongs to this picture" if picture.labels is None else "its labels are of other classes"
    panel = Image.new("RGB", enlarged(picture.image).size, (245, 245, 245))
    canvas, x, y = ImageDraw.Draw(panel), panel.width / 2, panel.height / 2
    canvas.text((x, y - 17), "unknown:", INK, font(22), anchor="mm")
    canvas.text((x, y + 17), why, INK, font(22), anchor="mm")
    return panel


def label_panel(labels: np.ndarray, names: tuple[str, ...]) -> Image.Image:
    """Draw a label map; each area bears the number that its class has in the legend."""
    table = np.array([colour_of(k) for k in range(len(names))], np.uint8)
    ignored, shares = labels == IGNORE, shares_of(labels, len(names))
    seen = [k for k in np.argsort(-shares, kind="stable").tolist() if shares[k]]
    entries = [(colour_of(k), str(k), names[k]) for k in sorted(seen[:LEGEND_CLASSES])]
    entries += [(IGNORED_FILL, "…", f"{len(seen) - LEGEND_CLASSES} more")] if len(seen) > LEGEND_CLASSES else []
    panel = _with_legend(table[np.where(ignored, 0, labels)], ignored, entries)
    _number_areas(panel, labels, seen)
    return panel


def _with_legend(pixels: np.ndarray, ignored: np.ndarray, entries: list[tuple[Colour, str, str]]) -> Image.Image:
    """Draw pixels `[H, W, 3]`, those to ignore hatched, above what their colours mean."""
    panel = hatched(enlarged(Image.fromarray(pixels)), ignored, IGNORED_FILL, IGNORED_HATCH)
    return stacked(panel, legend(entries + ([(IGNORED_FILL, "//", "ignored")] if ignored.any() else [])))


def colour_of(k: int) -> Colour:
    """Return the colour of class k: after the first ten paler ones, then darker ones; numbers tell equal ones apart."""
    turn, base = divmod(k - 1, len(MUTED) - 1) if k else (0, -1)  # the pale grey is of class 0 alone
    towards, share = ((0, 0.0), (255, 0.45), (0, 0.35))[turn % 3]
    return tuple(round((1 - share) * x + share * towards) for x in MUTED[base + 1])


def _number_areas(panel: Image.Image, labels: np.ndarray, seen: list[int]):
    """Write each class's number into the thickest part of its area, if there is room."""
    step = max(1, max(labels.shape) // 64)
    small, canvas = labels[::step, ::step], ImageDraw.Draw(panel)
    scale = panel.width / small.shape[1]
    for k in seen:
        inside, depth = np.pad(small == k, 1), 0
        while (smaller := _eroded(inside)).any():
            inside, depth = smaller, depth + 1
        if (2 * depth + 1) * scale < 26:
            continue
        cells = np.argwhere(inside) - 1
        y, x = cells[np.abs(cells - cells.mean(0)).sum(1).argmin()]
        canvas.text(((x + 0.5) * scale, (y + 0.5) * scale), str(k), ink_on(colour_of(k)), font(20), anchor="mm")


def _eroded(inside: np.ndarray) -> np.ndarray:
    """Return what is inside with its four neighbours; nothing may be inside on the rim."""
    return np.logical_and.reduce([inside, *(np.roll(inside, step, axis) for step in (1, -1) for axis in (0, 1))])


class Panel(NamedTuple):
    """How a panel is drawn, for which models, and whether it changes with the picture only."""

    draw: Callable[[State], Image.Image]
    serves: Callable[[LoadedModel], bool] = lambda loaded: True
    fixed: bool = False


_segments = attrgetter("segments")
PANELS = {
    "Picture": Panel(picture_panel, fixed=True),
    "Gate: m (1 = coarse)": Panel(gate_panel),
    "Mixed-scale tokens": Panel(grid_panel),
    "Pixels in the tokens": Panel(lambda state: enlarged(Image.fromarray(pixels_of_tokens(state)))),
    TOKEN_MAP_TITLE: Panel(token_map_panel, lambda loaded: loaded.model.reducer is not None),
    "Class probabilities": Panel(classes_panel, lambda loaded: not loaded.segments),
    "Prediction": Panel(lambda state: label_panel(state.labels, state.gated.loaded.classes), _segments),
    "Ground truth": Panel(truth_panel, _segments, fixed=True),
    "Error": Panel(error_panel, _segments),
}


def panels_of(loaded: LoadedModel) -> dict[str, Panel]:
    """Return the panels that a model has."""
    return {title: panel for title, panel in PANELS.items() if panel.serves(loaded)}


def threshold_text(threshold: float) -> str:
    """Return a threshold in words."""
    return f"coarse where m > {threshold:.2f}" if 0.01 <= threshold <= 0.99 else f"coarse where m > {threshold:.3g}"
