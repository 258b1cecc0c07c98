"""Curves of a run in a notebook, drawn anew after each epoch, while it trains here or elsewhere.

train(recipe, "runs/mine", progress=False, watch=Watch())
follow("runs/mine")     # that another process trains
"""

import time
from pathlib import Path
from typing import Any

from IPython.display import display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .. import plots
from ..training import runs


class Watch:
    """Learning curves in a notebook's output; each line of metrics that it is called with redraws them."""

    def __init__(self):
        self.lines: list[dict[str, Any]] = []
        self._output = None

    def __call__(self, line: dict[str, Any]):
        self.lines.append(line)
        figure = plots.learning_curves(self.lines)
        self._show(figure)
        plt.close(figure)

    def _show(self, figure: Figure):
        if self._output is None:
            self._output = display(figure, display_id=True)
        else:
            self._output.update(figure)


def follow(folder: str | Path, seconds: float = 2.0) -> Watch:
    """Draw a run's curves until it is finished, looking for new epochs every so many seconds."""
    watch = Watch()
    while True:
        finished = runs.read(folder).summary is not None  # before the lines: none comes after it
        for line in runs.read_metrics(folder)[len(watch.lines) :]:
            watch(line)
        if finished:
            return watch
        time.sleep(seconds)
