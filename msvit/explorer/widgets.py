"""One model's row on the explorer's page: its figures, the canvas to paint on, and a picture for each other panel."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from . import export as sheet
from . import panels
from . import state as view
from .drawing import png

WRAP = {"flex_flow": "row wrap"}


class Painter(anywidget.AnyWidget):
    """A canvas on which regions are painted; lists hold a value per region, row by row."""

    _esm = Path(__file__).with_name("painter.js")
    picture = traitlets.Bytes().tag(sync=True)
    grid = traitlets.List([1, 1]).tag(sync=True)
    scale = traitlets.Int(2).tag(sync=True)
    scores = traitlets.List([0.0]).tag(sync=True)  # empty where a rule stands in the gate's place
    soft = traitlets.List([0.0]).tag(sync=True)
    coarse = traitlets.List([0]).tag(sync=True)
    painted = traitlets.List([view.FREE]).tag(sync=True)
    brush = traitlets.Int(1).tag(sync=True)

    def set_look(self, look: view.Look):
        """Another picture or model: the painting is gone."""
        with self.hold_sync():
            self.painted = [view.FREE] * look.soft.size
            self.coarse = [0] * look.soft.size
            self.scores = [] if look.scores is None else look.scores.ravel().tolist()
            self.soft = look.soft.ravel().tolist()
            self.grid, self.scale = list(look.soft.shape), look.subject.model.scale
            self.picture = png(look.shot.image)

    def painting(self) -> np.ndarray:
        """What is painted, `[h, w]`; what a browser sends counts only if it fits."""
        painted = np.array(self.painted, dtype=int).ravel()
        if painted.size != self.grid[0] * self.grid[1] or not np.isin(painted, (view.FREE, 0, 1)).all():
            return np.full(self.grid, view.FREE)
        return painted.reshape(self.grid)


class Row:
    """One model's row; `act` is what does the work that a brush asks for."""

    def __init__(self, act: Callable[[Callable[[], None]], None]):
        self.look: view.Look | None = None
        self.state: view.State | None = None
        self.layer = view.LAST
        self.figures, self.painter = widgets.HTML(), Painter()
        self.painter.observe(lambda _: act(lambda: self.see(self.state.threshold)), "painted")
        # On the screen the painter stands in place of the panel that draws the grid.
        draws = {title: panel.draw for title, panel in panels.PANELS.items()}
        self.images = {title: widgets.Image() for title, draw in draws.items() if draw is not panels.grid_panel}
        self.boxes = {
            title: widgets.VBox(
                [widgets.HTML(f'<div class="msvit-title">{title}</div>'), self.images.get(title, self.painter)],
                layout={"max_width": "300px", "margin": "0 12px 0 0"},
            )
            for title in panels.PANELS
        }
        self.box = widgets.VBox([self.figures, widgets.HBox(list(self.boxes.values()), layout=WRAP)])

    def set_look(self, look: view.Look | None):
        """Another picture or model; None hides the row."""
        self.look, self.state = look, None
        self.box.layout.display = "none" if look is None else None
        if look is not None:
            shown = panels.shown(look.subject)
            # Many panels stand in lines of four, as in a file.
            flex = "1 1 170px" if len(shown) <= sheet.LINE else "0 1 22%"
            for title, box in self.boxes.items():
                box.layout.display = None if title in shown else "none"
                box.layout.flex = flex
            self.painter.set_look(look)

    def see(self, threshold: float):
        """Runs the model under the threshold and the painting, and shows what changed."""
        new, last = view.see(self.look, threshold, self.painter.painting(), self.layer), self.state
        self.painter.coarse = self.look.decisions(threshold).astype(int).ravel().tolist()
        for title, panel in panels.shown(self.look.subject).items():
            if title in self.images and (last is None or not panel.fixed):
                self.images[title].value = png(panel.draw(new))
        self.figures.value = sheet.figures_html(new)
        self.state = new

    def show_stage(self, layer: int):
        """Shows where the tokens were at another block; nothing is run."""
        self.layer = layer
        if self.state is not None and self.state.parts:
            self.state = replace(self.state, layer=layer)
            self.images[panels.ENDED].value = png(panels.ended_panel(self.state))
