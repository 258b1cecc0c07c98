"""The explorer's panels of a segmentation: what the model says of each pixel, what is true, and where they differ."""

from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageDraw

from ..data import IGNORE
from ..evaluation.segmentation import near_edges
from .drawing import WRONG, Colour, enlarged, font, hatched, ink_on, legend, notice, stacked
from .state import State, shares_of

# Paul Tol's muted scheme: a pale grey, and nine colours that differ in lightness too, for colour-blind eyes.
MUTED = ((221, 221, 221), (51, 34, 136), (221, 204, 119), (17, 119, 51), (136, 204, 238), (204, 102, 119))
MUTED += ((68, 170, 153), (136, 34, 85), (153, 153, 51), (170, 68, 153))
PLAIN, HATCH = (250, 250, 250), (190, 190, 190)  # of pixels to ignore
NEAR = (143, 190, 216)  # of right pixels near a boundary
NAMED = 12  # classes in a legend


def prediction_panel(state: State) -> Image.Image:
    """The class that the model gives to each pixel; each area bears the number that its class has in the legend."""
    return label_panel(state.labels, state.look.subject.classes)


def truth_panel(state: State) -> Image.Image:
    """The true class of each pixel, in the same colours; or why nobody knows it."""
    if state.look.truth is None:
        return _unknown(state)
    return label_panel(state.look.truth, state.look.subject.classes)


def error_panel(state: State) -> Image.Image:
    """Wrong pixels on the pale picture, and a band of `segmetrics.BAND` px on both sides of the true boundaries."""
    truth = state.look.truth
    if truth is None:
        return _unknown(state)
    known, band = truth != IGNORE, near_edges(torch.from_numpy(truth)[None])[0].numpy()
    wrong = (state.labels != truth) & known
    grey = np.asarray(state.look.shot.image.convert("L"), np.float32)[..., None].repeat(3, 2)
    pale = 150 + grey * 0.41
    pale[band], pale[wrong] = NEAR, WRONG
    panel = hatched(enlarged(Image.fromarray(pale.round().astype(np.uint8))), ~known, PLAIN, HATCH)
    entries = [
        (WRONG, "", f"wrong: {_percent(wrong[known])} of the pixels"),
        (NEAR, "", f"near a boundary: {_percent(wrong[band])} wrong"),
        (PLAIN, "//", "ignored"),
    ]
    return stacked([panel, legend(entries if not known.all() else entries[:2])])


def label_panel(labels: np.ndarray, names: tuple[str, ...]) -> Image.Image:
    """A label map in the classes' colours, and the names of the classes on it."""
    table = np.array([colour_of(k) for k in range(len(names))], np.uint8)
    ignored = labels == IGNORE
    panel = hatched(enlarged(Image.fromarray(table[np.where(ignored, 0, labels)])), ignored, PLAIN, HATCH)
    shares = shares_of(labels, len(names))
    seen = np.argsort(-shares, kind="stable")[: int((shares > 0).sum())].tolist()
    _number_areas(panel, labels, seen)
    entries = [(colour_of(k), str(k), names[k]) for k in sorted(seen[:NAMED])]
    entries += [(PLAIN, "…", f"{len(seen) - NAMED} more")] if len(seen) > NAMED else []
    entries += [(PLAIN, "//", "ignored")] if ignored.any() else []
    return stacked([panel, legend(entries)])


def colour_of(k: int) -> Colour:
    """The colour of class k: after the first ten paler ones, then darker ones; the numbers tell equal ones apart."""
    turn, base = (0, k) if k < len(MUTED) else divmod(k - 1, len(MUTED) - 1)
    red, green, blue = MUTED[base if k < len(MUTED) else base + 1]
    towards, share = (255, 0.45) if turn % 3 == 1 else (0, 0.35 if turn % 3 else 0.0)
    return tuple(round((1 - share) * x + share * towards) for x in (red, green, blue))


def _number_areas(panel: Image.Image, labels: np.ndarray, seen: Iterable[int]):
    """Writes each class's number into the thickest place of its area, if there is room."""
    step = max(1, max(labels.shape) // 64)
    small, canvas = labels[::step, ::step], ImageDraw.Draw(panel)
    scale = panel.width / small.shape[1]
    for k in seen:
        inside, depth = np.pad(small == k, 1), 0
        while (smaller := _eroded(inside)).any():
            inside, depth = smaller, depth + 1
        if (2 * depth + 1) * scale < 26:
            continue
        places = np.argwhere(inside) - 1
        y, x = places[np.abs(places - places.mean(0)).sum(1).argmin()]
        at = (x + 0.5) * scale, (y + 0.5) * scale
        canvas.text(at, str(k), ink_on(colour_of(k)), font(20), anchor="mm")


def _eroded(inside: np.ndarray) -> np.ndarray:
    """What is inside with its four neighbours."""
    out = inside.copy()
    out[1:] &= inside[:-1]
    out[:-1] &= inside[1:]
    out[:, 1:] &= inside[:, :-1]
    out[:, :-1] &= inside[:, 1:]
    return out


def _unknown(state: State) -> Image.Image:
    shot = state.look.shot
    why = "no label map belongs to this picture" if shot.labels is None else "its labels are of other classes"
    return notice(["unknown:", why], shot.image.size)


def _percent(wrong: np.ndarray) -> str:
    return f"{wrong.mean():.1%}" if wrong.size else "none"
