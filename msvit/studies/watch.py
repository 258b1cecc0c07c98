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
    """Learning curves in a notebook's output; lines of metrics that it is called with redraw them.

    Args:
        every: Seconds between two drawings at least.
    """

    def __init__(self, every: float = 0.0):
        self.every, self.title = every, ""
        self.lines: list[dict[str, Any]] = []
        self._output, self._drawn = None, -every

    def begin(self, title: str):
        """Start anew with another run, in the same output."""
        self.lines, self.title = [], title

    def __call__(self, line: dict[str, Any]):
        self.lines.append(line)
        if time.monotonic() - self._drawn >= self.every:
            self.draw()

    def draw(self):
        """Draw what there is of the run."""
        self._drawn = time.monotonic()
        if not self.lines:
            return
        figure = plots.learning_curves(self.lines)
        if self.title:
            figure.suptitle(self.title, fontsize=9)
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
