"""One look for each method: display name, colour and marker, the same in every static and interactive figure.

A method is found by what tables call it: "MSViT", "MSViT, l0", "random mask", "tome", "MSViT + tome", with " at 0.5" or
", vit_tiny" behind it. What is in no registry (rows of one's own, models) takes the colours that are left, in order.
"""

import itertools
import re
import textwrap
from collections.abc import Iterable
from typing import NamedTuple

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .style import BLACK, BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION

INDIGO, WINE, OLIVE, TEAL, SAND, ROSE = "#332288", "#882255", "#999933", "#44AA99", "#B08D2C", "#CC6677"  # Paul Tol's


class Look(NamedTuple):
    """How a method appears."""

    name: str
    color: str
    marker: str

    @property
    def line(self) -> dict[str, str]:
        """Colour and marker, as matplotlib's `plot` takes them."""
        return {"color": self.color, "marker": self.marker}


# Gates are diamonds and triangles, masks squares and crosses, what acts inside the network round or many-sided.
LOOKS = {
    "dense": Look("dense", BLACK, "o"),
    "dense, trained on": Look("dense, trained on", GREY, "o"),
    "dense, smaller pictures": Look("dense, smaller pictures", BLACK, "s"),
    "all fine": Look("all fine", BLACK, "o"),
    "coarse": Look("all coarse", GREY, "s"),
    "MSViT": Look("MSViT", VERMILION, "D"),
    "gbas": Look("GBaS", VERMILION, "D"),
    "bas": Look("BaS", PURPLE, "^"),
    "l0": Look("L0", ORANGE, "v"),
    "ratio": Look("ratio loss", WINE, "<"),
    "none": Look("no gate loss", ROSE, ">"),
    "controller": Look("controller only", OLIVE, "d"),
    "fixed": Look("gate held fixed", INDIGO, "D"),
    "without gbas": Look("without GBaS", ORANGE, "v"),  # L0 stands in its place
    "without trim": Look("without trimming", BLUE, "v"),
    "without learned gate": Look("random, no learned gate", SKY, "X"),  # the same decisions
    "without pretrained dense": Look("from scratch", INDIGO, "^"),
    "without share embedding": Look("own embedding", TEAL, "<"),
    "without warm start": Look("without warm start", WINE, "v"),
    "without calibrate": Look("without calibration", OLIVE, "^"),
    "quota": Look("quota", TEAL, "D"),
    "pattern": Look("learned pattern", SAND, "d"),
    "random": Look("random", SKY, "X"),
    "centre": Look("fixed centre", TEAL, "P"),
    "border": Look("border", SAND, "P"),
    "checkerboard": Look("checkerboard", OLIVE, "P"),
    "entropy": Look("entropy rule", GREEN, "h"),
    "apt": Look("APT", GREEN, "H"),
    "psnr": Look("PSNR rule", BLUE, "h"),
    "equality": Look("equality rule", WINE, "h"),
    "oracle": Look("oracle", SAND, "*"),
    "dynamicvit": Look("DynamicViT", BLUE, "s"),
    "token_pooling": Look("Token Pooling", INDIGO, "p"),
    "power_bert": Look("PoWER-BERT", TEAL, "8"),
    "grid": Look("grid pooling", OLIVE, "8"),
    "strided_convolution": Look("strided convolution", SAND, "8"),
    "random_pruning": Look("random pruning", SKY, "8"),
    "importance_sampling": Look("importance sampling", ROSE, "8"),
    "evit": Look("EViT", GREEN, "p"),
    "tome": Look("ToMe", PURPLE, "o"),
    "diffrate": Look("DiffRate", ORANGE, "o"),
    "algm": Look("ALGM", WINE, "p"),
    "pitome": Look("PiToMe", ROSE, "o"),
}
_CODES = re.compile(rf"\b({'|'.join(k for k, v in LOOKS.items() if '_' in k or v.name != v.name.lower())})\b")
# What stands for a method in the names of rows, and the registry's name for it.
_WORDS = (
    (r"(\w+) mask$", r"\1"),
    (r"^gate$", "MSViT"),
    (r"^(dense, )?all coarse$", "coarse"),
)
_SETTINGS = re.compile(r"(, [\w.]+=\S*)+$")  # by which the runs of a method are told apart
_TAIL = re.compile(r" (at|on) \S+( px)?$|, \w*vit_\S+$|, tiny$")  # budget, backbone
_GATE = re.compile(
    r"(MSViT|pattern)(?:,? (?P<loss>gbas|bas|l0|ratio|none|controller|fixed)\b[^+]*)?(?:.* \+ (?P<reducer>\w+))?$"
)
_REST = ((BLUE, "o"), (VERMILION, "s"), (GREEN, "D"), (PURPLE, "^"), (ORANGE, "v"), (SKY, "P"), (BLACK, "*"))
_REST += ((OLIVE, "X"), (WINE, "p"), (TEAL, "h"), (INDIGO, "d"), (SAND, "<"))
_MARKERS = "oDs^vPX*dp"


def display(label: str) -> str:
    """Return a method as people read it: "MSViT, l0 + tome at 0.5" is "MSViT, L0 + ToMe at 0.5"."""
    base, tail = _split(label)
    if base in LOOKS:
        return LOOKS[base].name + tail
    return _CODES.sub(lambda code: LOOKS[code[1]].name, label)


def looks(labels: Iterable[str]) -> dict[str, Look]:
    """Return the look of each label; methods that differ look different, at all their budgets and backbones alike."""
    found: dict[str, Look] = {}
    by_base: dict[str, tuple[str, str]] = {}
    rest = iter(itertools.cycle(_REST))
    for label in dict.fromkeys(labels):
        base, _ = _split(label)
        if base not in by_base:
            known = _registered(base)
            color, marker = next(rest) if known is None else (known.color, known.marker)
            free = (m for m in (marker, *_MARKERS) if (color, m) not in by_base.values())
            by_base[base] = (color, next(free, marker))
        found[label] = Look(display(label), *by_base[base])
    return found


def _split(label: str) -> tuple[str, str]:
    """Return a label's method by the registry's name, and the budget or backbone behind it."""
    base = label
    while tail := _TAIL.search(base):
        base = base[: tail.start()]
    tail = label[len(base) :]
    for pattern, replacement in _WORDS:
        base = re.sub(pattern, replacement, base)
    return base, tail


def _registered(base: str) -> Look | None:
    """Return the look of a method: of "MSViT, l0" that of L0, of "MSViT + tome" ToMe's with the gate's marker."""
    base = _SETTINGS.sub("", base)
    for name in (base, base.lower()):
        if name in LOOKS:
            return LOOKS[name]
    gate = _GATE.match(base)
    if gate is None:  # "dense timm", "MSViT packed": as the family, with a marker of its own
        family = re.match(r"(dense|MSViT)\b", base)
        return LOOKS[family[0]] if family else None
    if gate["reducer"] in LOOKS:
        return LOOKS[gate["reducer"]]._replace(marker="D")
    return LOOKS[gate["loss"] or "MSViT"]


def legend_beside(figure: Figure):
    """Put the legend on the right of a figure, long names in several lines, so that the plot keeps its width."""
    labels = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [textwrap.fill(label, 24) for label in labels]
    figure.legend(labels.values(), names, loc="outside right upper", fontsize=8, frameon=False)


def draw_means(axes: Axes, x: pd.Series, y: pd.Series, methods: pd.Series, markersize: int):
    """Draw a point per method: mean over seeds, bars of one standard deviation."""
    for method, look in looks(methods).items():
        across, up = x[methods == method], y[methods == method]
        spread = {"xerr": across.std(), "yerr": up.std()} if len(up) > 1 else {}
        marks = look.line | {"markersize": markersize, "capsize": 3, "linestyle": ""}
        axes.errorbar(across.mean(), up.mean(), **spread, **marks, label=look.name)
