"""One look per method, whatever table or figure it is in."""

import nbconvert
import nbformat
import pandas as pd
import pytest
import torch
from helpers import NOTEBOOKS, cells_of
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from msvit import plots
from msvit.gating.losses import GBaS
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
    twice = {"gbas", "all fine", "without gbas", "without learned gate"}  # MSViT, dense, L0 and random decisions
    assert len({(look.color, look.marker) for look in LOOKS.values()}) == len(LOOKS) - len(twice)


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
        ("dense, train_n=64, lr=0.1", "dense", "dense, train_n=64, lr=0.1"),
        ("without learned gate", "random mask", "random, no learned gate"),
        ("MSViT fixed at 0.58", "MSViT fixed", "MSViT fixed at 0.58"),
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


def test_axes_leave_out_what_lies_far_below_and_say_so():
    table = pd.DataFrame(
        {
            "method": ["dense", "MSViT", "random mask", "coarse mask"],
            "accuracy": [1.0, 1.0, 0.86, 0.13],
            "macs": [1.0, 0.58, 0.6, 0.23],
            "seed": 0,
        }
    )
    assert plots.runs.near_end(pd.Series([100, 100, 86, 13])) == pytest.approx(86 - 0.15 * 14)
    assert plots.runs.near_end(RUNS["accuracy"]) is None
    assert plots.runs.near_end(pd.Series([90.0, 10.0])) is None, "half of them are no exception"
    (axes,) = plots.tradeoff(table).axes
    assert axes.get_ylim()[0] == pytest.approx(83.9)
    assert [text.get_text() for text in axes.texts] == ["↓ 13.0 %"]
    (axes,) = plots.ranking(table).axes
    assert axes.get_xlim()[0] == pytest.approx(83.9)
    assert "◂ 13.0 %" in [text.get_text() for text in axes.texts]


def test_long_names_leave_the_plot_its_width():
    long = RUNS.replace("mine", "dense, train_n=2048, val_n=512, epochs_dense=3, lr=0.001, batch=64")
    figure = plots.tradeoff(long)
    assert max(len(part) for text in figure.legends[0].get_texts() for part in text.get_text().split("\n")) <= 24
    figure.canvas.draw()
    assert figure.axes[0].get_position().width > 0.6


def test_notes_and_numbers_are_readable():
    figure = plots.with_note(plots.ranking(RUNS), "scenes:easy, seeds: 1")
    assert figure.axes[0].get_title() == "scenes:easy, seeds: 1"
    figure = plots.prior_map(GBaS((4, 4), target=0.626312))
    assert figure.get_suptitle().endswith("asked for 0.626 ± 0.100")


def test_a_sweep_in_parallel_coordinates():
    trials = pd.DataFrame({"lr": [0.1, 0.2, 0.4], "macs": [0.5, 0.6, 0.7], "accuracy": [0.8, None, 0.9]})
    (axes,) = plots.parallel(trials, ["lr"]).axes
    lines = [line.get_ydata().tolist() for line in axes.lines if len(line.get_ydata()) == 3]
    assert lines == [[0, 0, 0], [1, 1, 1]]
    assert {"0.1", "0.4", "0.5", "0.7", "0.8", "0.9"} == {text.get_text() for text in axes.texts}


def test_pages_of_notebooks_show_interactive_figures():
    shown = interactive.Beside(interactive.tradeoff(RUNS), plots.tradeoff(RUNS))
    assert not plt.get_fignums(), "it is drawn once"
    bundle = shown._repr_mimebundle_()
    assert bundle["application/vnd.plotly.v1+json"]["data"]
    cell = nbformat.v4.new_code_cell("x", outputs=[nbformat.v4.new_output("display_data", bundle)])
    page, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.v4.new_notebook(cells=[cell]))
    assert f"data:image/png;base64,{bundle['image/png']}" in page.replace("\n", "")


def test_notebooks_show_no_interactive_figure_without_its_twin():
    found = [s for path in NOTEBOOKS.glob("*.ipynb") for s, _ in cells_of(path.stem) if "interactive." in s]
    assert len(found) == 4
    assert all("\ninteractive.Beside(" in source for source in found)
