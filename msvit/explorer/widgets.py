"""One model's row on the explorer's page: its figures, the canvas to paint on, and a picture for each other panel."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from .drawing import png
from .export import PANELS_IN_LINE, figures_html
from .panels import PANELS, TOKEN_MAP_TITLE, grid_panel, panels_of
from .state import LAST_LAYER, UNPAINTED, GatedPicture, State, run_backbone

WRAP = {"flex_flow": "row wrap"}


class Painter(anywidget.AnyWidget):
    """A canvas on which regions are painted; lists hold a value per region, row by row."""

    _esm = Path(__file__).with_name("painter.js")
    picture = traitlets.Bytes().tag(sync=True)
    grid = traitlets.List([1, 1]).tag(sync=True)
    scale = traitlets.Int(2).tag(sync=True)
    scores = traitlets.List([0.0]).tag(sync=True)  # empty where a rule replaces the gate
    soft = traitlets.List([0.0]).tag(sync=True)
    coarse = traitlets.List([0]).tag(sync=True)
    painted = traitlets.List([UNPAINTED]).tag(sync=True)
    brush = traitlets.Int(1).tag(sync=True)

    def reset(self, gated: GatedPicture):
        """Show another picture or model, unpainted."""
        with self.hold_sync():
            self.painted = [UNPAINTED] * gated.soft.size
            self.coarse = [0] * gated.soft.size
            self.scores = [] if gated.scores is None else gated.scores.ravel().tolist()
            self.soft = gated.soft.ravel().tolist()
            self.grid, self.scale = list(gated.soft.shape), gated.loaded.model.scale
            self.picture = png(gated.picture.image)

    def painting(self) -> np.ndarray:
        """Return what is painted, `[h, w]`; what a browser sends counts only if it fits."""
        painted = np.array(self.painted, dtype=int).ravel()
        if painted.size != self.grid[0] * self.grid[1] or not np.isin(painted, (UNPAINTED, 0, 1)).all():
            return np.full(self.grid, UNPAINTED)
        return painted.reshape(self.grid)


class ModelRow:
    """The figures and panels of one model; what its brush asks for is done by `act`."""

    def __init__(self, act: Callable[[Callable[[], None]], None]):
        self.gated: GatedPicture | None = None
        self.state: State | None = None
        self.layer = LAST_LAYER
        self.figures, self.painter = widgets.HTML(), Painter()
        self.painter.observe(lambda _: act(lambda: self.run(self.state.threshold)), "painted")
        # On the screen the painter replaces the panel that draws the grid.
        self.images = {title: widgets.Image() for title, panel in PANELS.items() if panel.draw is not grid_panel}
        self.boxes = {
            title: widgets.VBox(
                [widgets.HTML(f'<div class="msvit-title">{title}</div>'), self.images.get(title, self.painter)],
                layout={"max_width": "300px", "margin": "0 12px 0 0"},
            )
            for title in PANELS
        }
        self.box = widgets.VBox([self.figures, widgets.HBox(list(self.boxes.values()), layout=WRAP)])

    def show(self, gated: GatedPicture | None):
        """Show another picture or model; None hides the row."""
        self.gated, self.state = gated, None
        self.box.layout.display = "none" if gated is None else None
        if gated is not None:
            shown = panels_of(gated.loaded)
            # Many panels stand in lines of four, as in a file.
            flex = "1 1 170px" if len(shown) <= PANELS_IN_LINE else "0 1 22%"
            for title, box in self.boxes.items():
                box.layout.display = None if title in shown else "none"
                box.layout.flex = flex
            self.painter.reset(gated)

    def run(self, threshold: float):
        """Run the model under the threshold and the painting, and show what changed."""
        new, last = run_backbone(self.gated, threshold, self.painter.painting(), self.layer), self.state
        self.painter.coarse = self.gated.decisions(threshold).astype(int).ravel().tolist()
        for title, panel in panels_of(self.gated.loaded).items():
            if title in self.images and (last is None or not panel.fixed):
                self.images[title].value = png(panel.draw(new))
        self.figures.value = figures_html(new)
        self.state = new

    def show_layer(self, layer: int):
        """Show where the tokens were at another block; nothing is run."""
        self.layer = layer
        if self.state is not None and self.state.token_maps:
            self.state = replace(self.state, layer=layer)
            self.images[TOKEN_MAP_TITLE].value = png(PANELS[TOKEN_MAP_TITLE].draw(self.state))
