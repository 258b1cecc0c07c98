"""Published results beside one's own: what they say, when they are drawn, and where."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex

from msvit import plots
from msvit.plots import interactive, style
from msvit.plots.anchors import PUBLISHED, anchors, is_imagenet, published

RUNS = pd.DataFrame(
    {
        "method": ["dense", "dense", "tome"],
        "run": ["a", "b", "c"],
        "seed": [0, 1, 0],
        "accuracy": [0.80, 0.82, 0.75],
        "macs": [1.0, 1.0, 0.6],
    }
)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_every_published_number_has_its_source():
    stated = published()
    assert list(stated) == ["method", "setting", "backbone", "accuracy", "gmacs", "data", "source"]
    assert not stated.isna().any(axis=None)
    assert all(re.search(r"arXiv \d{4}\.\d{5}", source) for source in stated["source"])
    assert not stated.duplicated(["method", "setting", "backbone"]).any()
    assert set(stated["backbone"]) == set(stated.loc[stated["setting"] == "dense", "backbone"])
    assert stated["accuracy"].between(50, 100).all()
    assert stated["gmacs"].between(1, 20).all()


def test_the_table_is_part_of_the_package():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    globs = project["tool"]["setuptools"]["package-data"]["msvit"]
    package = Path(plots.__file__).parents[1]
    assert any(PUBLISHED in package.glob(pattern) for pattern in globs)


def test_anchors_keep_the_difference_and_the_ratio_to_dense():
    marks = anchors(0.5).set_index("label")
    assert "DeiT-S, dense" not in marks.index
    for row in published().query("setting != 'dense'").itertuples():
        mark = marks.loc[f"{row.method}, {row.setting}"]
        assert mark["macs"] == pytest.approx(row.gmacs / 4.6)
        assert mark["accuracy"] == pytest.approx(0.5 + (row.accuracy - 79.8) / 100)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("folder:/data/imagenet", True),
        ("folder:/data/ImageNet-1k/", True),
        ("tfds/imagenet2012", True),
        ("hfds/ILSVRC/imagenet-1k", True),
        ("folder:/data/ILSVRC2012", True),
        ("folder:imagenette_128", False),
        ("folder:/data/tiny-imagenet", False),
        ("folder:/data/imagenet100", False),
        ("folder:/data/imagenet-v2", False),
        ("scenes:easy", False),
    ],
)
def test_imagenet_and_its_small_relatives(data, expected):
    assert is_imagenet(data) == expected


def test_when_anchors_are_drawn():
    assert plots.anchors_beside(RUNS, "scenes:easy") is None
    assert plots.anchors_beside(RUNS, "folder:imagenet", "never") is None
    for data, wanted in (("folder:imagenet", "auto"), ("scenes:easy", "always")):
        pd.testing.assert_frame_equal(plots.anchors_beside(RUNS, data, wanted), anchors(0.81))
    alone = RUNS[RUNS["method"] != "dense"]
    assert plots.anchors_beside(alone, "folder:imagenet") is None
    with pytest.raises(ValueError, match="anchors='always'.*no run here is dense"):
        plots.anchors_beside(alone, "folder:imagenet", "always")
    with pytest.raises(ValueError, match="anchors='yes' is not known. There are: auto, always, never"):
        plots.anchors_beside(RUNS, "folder:imagenet", "yes")


def test_the_static_layer():
    marks = anchors(0.81)
    figure = plots.tradeoff(RUNS, anchors=marks)
    hollow = [line for line in figure.axes[0].lines if line.get_markerfacecolor() == "none"]
    np.testing.assert_allclose([line.get_xydata()[0] for line in hollow], 100 * marks[["macs", "accuracy"]])
    assert {to_hex(line.get_color()) for line in hollow} == {style.GREY}
    own, others = figure.legends
    assert [text.get_text() for text in own.get_texts()] == ["dense", "ToMe"]
    assert [text.get_text() for text in others.get_texts()] == marks["label"].tolist()
    assert others.get_title().get_text().startswith("published, ImageNet")
    assert len(plots.tradeoff(RUNS).legends) == 1


def test_the_layer_to_hover_over():
    marks = anchors(0.81)
    traces = interactive.tradeoff(RUNS, anchors=marks).data[-len(marks) :]
    assert [trace.name for trace in traces] == marks["label"].tolist()
    np.testing.assert_allclose([(trace.x[0], trace.y[0]) for trace in traces], 100 * marks[["macs", "accuracy"]])
    assert {trace.legendgrouptitle.text for trace in traces} == {"published, ImageNet"}
    assert all(trace.marker.symbol.endswith("-open") for trace in traces)
    assert len(interactive.tradeoff(RUNS).data) == 4


def test_both_kinds_of_figure_have_the_same_markers():
    expected = {"o": "circle", "s": "square", "D": "diamond", "^": "triangle-up", "v": "triangle-down", "*": "star"}
    assert expected.items() <= interactive.SYMBOLS.items()
