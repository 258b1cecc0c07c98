"""Figures of the methods' papers: they show the numbers that they were given, in units that they name."""

import pandas as pd
import pytest
import torch
from matplotlib import pyplot as plt

from msvit import plots
from msvit.plots.style import PictureStyle


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_the_bars_of_a_backbone_fill_it():
    table = pd.DataFrame(
        {
            "model": ["a", "a", "b"],
            "size": [64, 128, 64],
            "macs": [2e6, 9e6, 3e9],
            "MLP": 0.7,
            "attention's products": 0.3,
        }
    )
    left, right = plots.cost_shares(table).axes
    assert [(bar.get_x(), bar.get_width()) for bar in left.patches] == [(0, 70), (0, 70), (70, 30), (70, 30)]
    assert [label.get_text() for label in left.get_yticklabels()] == ["a\n64 px, 2.0 MMACs", "b\n64 px, 3.0 GMACs"]
    assert right.lines[0].get_xydata().tolist() == [[64, 30], [128, 30]]


def test_fronts_are_means_over_seeds_from_cheap_to_dear():
    table = pd.DataFrame(
        {
            "series": ["gate"] * 3 + ["dense"],
            "point": ["75%", "50%", "50%", "tiny"],
            "accuracy": [0.9, 0.6, 0.8, 1.0],
            "macs": [3e6, 2e6, 2e6, 4e6],
        }
    )
    (axes,) = plots.fronts(table).axes
    assert axes.lines[0].get_xydata().tolist() == [[2, pytest.approx(70)], [3, 90]]
    assert [text.get_text() for text in axes.texts] == ["50%", "75%", "tiny"]
    assert axes.get_xlabel().startswith("MMACs")
    (axes,) = plots.fronts(table.assign(macs=1000 * table["macs"])).axes
    assert axes.get_xlabel().startswith("GMACs")


def test_reconstruction_by_block_and_in_all():
    table = pd.DataFrame({"method": ["a", "a", "b"], "layer": [0, 2, 1], "error": [0.1, 0.2, 0.5], "accuracy": 0.25})
    left, right = plots.reconstruction(table).axes
    assert [line.get_xydata().tolist() for line in left.lines] == [[[0, 10], [2, 20]], [[1, 50]]]
    assert [line.get_xydata()[0].tolist() for line in right.lines] == [[pytest.approx(30), 25], [50, 25]]


def test_low_pass_has_a_line_for_each_block():
    figure = plots.low_pass(torch.rand(4, 5), torch.rand(4, 9) + 1, torch.rand(4, 3))
    left, middle, right = figure.axes
    assert len(left.lines) == 4 + 1  # and that of no change
    assert len(middle.lines) == 4
    assert [len(line.get_xdata()) for line in right.lines] == [12, 4, 4, 4]


def test_what_has_no_token_is_white_and_what_shares_one_is_pale():
    images = torch.zeros(1, 3, 16, 16)
    share = torch.ones(2, 2, 2)
    share[0] = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    figure = plots.stage_maps(images, {"block 0": share}, PictureStyle(16, 2, (0.5,) * 3, (0.2,) * 3))
    shown, mean = (axes.images[0].get_array() for axes in figure.axes[:2])
    assert shown[0, 0].tolist() == [0.5] * 3  # the picture itself: grey
    assert shown[0, 8].tolist() == [1.0] * 3
    assert shown[8, 0].tolist() == [0.75] * 3
    assert mean.tolist() == [[1.0, 0.5], [0.75, 0.75]]
    assert figure.axes[0].get_xlabel() == "2 patch tokens"
    assert figure.axes[1].get_xlabel() == "mean 3.0"
