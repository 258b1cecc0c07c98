"""One look per method, whatever table or figure it is in."""

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from msvit import plots
from msvit.plots import interactive
from msvit.plots.looks import LOOKS, display, looks
from msvit.plots.style import PictureStyle
from msvit.reducers.registry import REDUCERS
from msvit.training.recipe import GATINGS

RUNS = pd.DataFrame(
    {
        "method": ["dense", "MSViT", "MSViT", "random mask", "tome", "mine"],
        "run": list("abcdef"),
        "seed": [0, 0, 1, 0, 0, 0],
        "accuracy": [0.9, 0.85, 0.87, 0.5, 0.6, 0.7],
        "macs": [1.0, 0.6, 0.62, 0.6, 0.6, 0.58],
    }
)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def pair(label):
    look = looks([label])[label]
    return look.color, look.marker


def test_what_the_bench_has_is_registered():
    assert (REDUCERS.keys() | set(GATINGS)) - {"learned", "fine"} <= LOOKS.keys()
    assert (
        len({(look.color, look.marker) for look in LOOKS.values()}) >= len(LOOKS) - 3
    )  # MSViT is GBaS, dense all fine


@pytest.mark.parametrize(
    ("label", "like", "name"),
    [
        ("MSViT gbas at 0.58", "MSViT", "MSViT GBaS at 0.58"),
        ("gate at 60%", "MSViT", "MSViT at 60%"),
        ("MSViT, l0", "l0", "MSViT, L0"),
        ("random at 60%", "random mask", "random at 60%"),
        ("coarse mask", "all coarse", "all coarse"),
        ("dense, all coarse", "all coarse", "all coarse"),
        ("tome at 0.5, vit_tiny_patch16_224", "tome", "ToMe at 0.5, vit_tiny_patch16_224"),
        ("APT", "apt", "APT"),
        ("MSViT, controller only (bias)", "MSViT, controller only (projection)", "MSViT, controller only (bias)"),
    ],
)
def test_a_method_is_known_by_all_its_names(label, like, name):
    assert pair(label) == pair(like)
    assert display(label) == name


def test_a_reducer_after_a_gate_has_the_reducers_colour_and_the_gates_marker():
    assert pair("MSViT + tome") == (LOOKS["tome"].color, LOOKS["MSViT"].marker)
    assert display("MSViT, l0 + tome at 0.5") == "MSViT, L0 + ToMe at 0.5"


def test_methods_of_one_figure_differ_and_budgets_of_one_do_not():
    labels = ["MSViT gbas at 0.5", "MSViT gbas at 0.7", "MSViT gbas, untrimmed at 0.5", "a=1", "b=2", "tome", *REDUCERS]
    found = looks(labels)
    pairs = {label: (look.color, look.marker) for label, look in found.items()}
    assert pairs.pop("MSViT gbas at 0.7") == pairs["MSViT gbas at 0.5"]
    assert len(set(pairs.values())) == len(pairs)


def test_static_and_interactive_figures_agree():
    (axes,) = plots.tradeoff(RUNS).axes
    static = {c.get_label(): c.lines[0] for c in axes.containers}
    traces = {t.name: t for t in interactive.tradeoff(RUNS).data if t.name}
    assert static.keys() == traces.keys() == {"dense", "MSViT", "random", "ToMe", "mine"}
    for name, line in static.items():
        assert to_hex(line.get_color()).lower() == traces[name].marker.color.lower()
        assert interactive.SYMBOLS[line.get_marker()] == traces[name].marker.symbol
    assert {look.marker for look in LOOKS.values()} <= interactive.SYMBOLS.keys()


def test_a_ranking_is_sorted_and_says_what_each_costs():
    (axes,) = plots.ranking(RUNS).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == ["random", "ToMe", "mine", "MSViT", "dense"]
    assert [text.get_text() for text in axes.texts] == ["60%", "60%", "58%", "61%", "100%", "MACs"]


def test_bars_of_token_counts_stand_on_the_counts_that_there_are():
    figure = plots.token_counts({"MSViT": torch.tensor([17, 20, 20, 65])}, 17, 65, step=3)
    (axes,) = figure.axes
    bars = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in axes.patches if bar.get_height()}
    assert bars == {17: 1, 20: 2, 65: 1}


def test_gate_maps_say_class_and_prediction_and_what_frames_mean():
    coarse = torch.tensor([[[True, False], [False, False]]])
    words = {"": ["rows"], "MSViT": ["weave ✗"]}
    figure = plots.gate_maps(
        torch.rand(1, 3, 32, 32), {"MSViT": coarse}, PictureStyle(16, 2, (0.5,) * 3, (0.2,) * 3), words
    )
    assert [axes.get_xlabel() for axes in figure.axes] == ["rows", "13 patch tokens\nweave ✗", ""]
    assert [axes.get_ylabel() for axes in figure.axes][-1].replace("\n", " ") == "pixels in the tokens of MSViT"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one coarse token", "a fine token each"]
