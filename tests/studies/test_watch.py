"""Curves of a run, while it trains and afterwards."""

import json
import threading

import numpy as np
import pytest
from matplotlib import pyplot as plt

from msvit import plots
from msvit.studies import watch
from msvit.training.recipe import Recipe


def line(epoch, stage="gated", **more):
    found = {"train_loss": 1 / epoch, "train_accuracy": 0.5, "train_coarse": 0.3, "train_macs": 0.7}
    found |= {f"val_{name}": 0.1 * epoch for name in ("loss", "accuracy", "coarse", "macs")}
    return {"epoch": epoch, "stage": stage, "curve": [2.0, 1.0], **found, **more}


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def test_curves_show_what_the_lines_say():
    figure = plots.learning_curves([line(1, "dense"), line(2), line(3)])
    assert [axes.get_title() for axes in figure.axes] == [
        "loss", "accuracy (%)", "coarse regions (%)", "MACs (% of dense)",
    ]  # fmt: skip
    training, validation, start = figure.axes[0].lines
    np.testing.assert_allclose(training.get_xdata(), [0.5, 1, 1.5, 2, 2.5, 3])
    np.testing.assert_allclose(validation.get_ydata(), [0.1, 0.2, 0.3])
    assert list(start.get_xdata()) == [1, 1], "where the gate begins"
    np.testing.assert_allclose(figure.axes[1].lines[1].get_ydata(), [10, 20, 30])


def test_each_line_redraws_one_output(monkeypatch):
    shown, updates = [], []

    class Output:
        def update(self, figure):
            updates.append(figure)

    monkeypatch.setattr(watch, "display", lambda figure, display_id: shown.append(figure) or Output())
    curves = watch.Watch()
    for epoch in (1, 2, 3):
        curves(line(epoch))
    assert (len(shown), len(updates)) == (1, 2)
    assert not plt.get_fignums(), "figures are closed"


def test_runs_of_a_study_share_one_output_that_is_not_drawn_too_often(monkeypatch):
    drawn, now = [], 0.0
    monkeypatch.setattr(watch.Watch, "_show", lambda self, figure: drawn.append(figure.get_suptitle()))
    monkeypatch.setattr(watch.time, "monotonic", lambda: now)
    curves = watch.Watch(every=10.0)
    for title, times in (("a", (0.0, 4.0, 9.0)), ("b", (11.0, 12.0))):
        curves.begin(title)
        for epoch, now in enumerate(times, 1):  # noqa: B007 (read by the clock above)
            curves(line(epoch))
    assert drawn == ["a", "b"]
    curves.draw()
    assert len(drawn) == 3
    assert len(curves.lines) == 2


def test_a_run_that_another_trains_is_followed_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(watch.Watch, "_show", lambda self, figure: None)
    (tmp_path / "settings.json").write_text(json.dumps(Recipe().to_dict()))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(json.dumps(line(1)) + "\n")

    def train_on():
        metrics.write_text(metrics.read_text() + json.dumps(line(2)) + "\n")
        (tmp_path / "summary.json").write_text('{"accuracy": 1.0}')

    threading.Timer(0.2, train_on).start()
    assert [found["epoch"] for found in watch.follow(tmp_path, seconds=0.05).lines] == [1, 2]
