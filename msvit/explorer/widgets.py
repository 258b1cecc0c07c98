"""One model's row on the explorer's page: its figures, the canvas to paint on, and a picture for each other panel."""

from collections.abc import Callable, Hashable
from dataclasses import replace
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import traitlets

from .drawing import png
from .export import PANELS_IN_LINE, figures_html
from .inside import INSIDE, WAITING, Inside, looks_inside
from .painting import UNPAINTED, Painting, blank
from .panels import PANELS, TOKEN_MAP_TITLE, grid_panel, panels_of
from .state import LAST_LAYER, GatedPicture, State, run_backbone, with_times

LARGEST = 3  # size of token that can be painted: of four scales, the last
WRAP = {"flex_flow": "row wrap"}


class Painter(anywidget.AnyWidget):
    """A canvas on which regions are painted; lists hold a value per region, row by row.

    Undo and redo are asked for by messages, {"do": "undo"}; all else is a trait.
    """

    _esm = Path(__file__).with_name("painter.js")
    picture = traitlets.Bytes().tag(sync=True)
    grid = traitlets.List([1, 1]).tag(sync=True)
    scale = traitlets.Int(2).tag(sync=True)
    sizes = traitlets.Int(1).tag(sync=True)  # of regions; a token of size n is 2 ** (n - 1) regions wide
    scores = traitlets.List([0.0]).tag(sync=True)  # empty where a rule replaces the gate
    soft = traitlets.List([0.0]).tag(sync=True)
    coarse = traitlets.List([0]).tag(sync=True)
    painted = traitlets.List([UNPAINTED]).tag(sync=True)
    stroke = traitlets.Int(0).tag(sync=True)  # the browser counts them: what comes under one number is one stroke
    brush = traitlets.Int(1).tag(sync=True)
    width = traitlets.Int(1).tag(sync=True)  # of the brush, in regions
    tool = traitlets.Unicode("stroke").tag(sync=True)  # or "rectangle", or "pick"
    picked = traitlets.Int(-1).tag(sync=True)  # the fine patch whose token is picked; -1: the class token

    def reset(self, gated: GatedPicture, painted: list[int]):
        """Show another picture or model, and what is painted on it."""
        with self.hold_sync():
            self.painted = painted
            self.coarse = [0] * gated.soft.size
            self.scores = [] if gated.scores is None else gated.scores.ravel().tolist()
            self.soft = gated.soft.ravel().tolist()
            self.grid, self.scale = list(gated.soft.shape), gated.loaded.model.scale
            self.sizes = len(gated.larger) + 1
            self.picture = png(gated.picture.image)

    def valid(self) -> bool:
        """Return whether what is painted fits the grid: a browser may send it late."""
        return len(self.painted) == self.grid[0] * self.grid[1] and set(self.painted) <= {
            UNPAINTED,
            *range(LARGEST + 1),
        }


def _panel_box(title: str, panel: widgets.Widget) -> widgets.VBox:
    heading = widgets.HTML(f'<div class="msvit-title">{title}</div>')
    return widgets.VBox([heading, panel], layout={"max_width": "360px", "margin": "0 12px 0 0", "flex": "1 1 150px"})


class ModelRow:
    """The figures and panels of one model; what its brush asks for is done by `act`."""

    def __init__(self, act: Callable[[Callable[[], None]], None], silently: Callable):
        self.gated: GatedPicture | None = None
        self.state: State | None = None
        self.layer = LAST_LAYER
        self.painting = Painting([UNPAINTED])
        self._paintings: dict[Hashable, Painting] = {}  # by picture and grid
        self._silently = silently
        self.figures, self.painter = widgets.HTML(), Painter()
        self.painter.observe(lambda _: act(self._take_painting), "painted")
        self.painter.on_msg(lambda _, asked, __: act(lambda: self.step_painting(asked.get("do", ""))))
        # On the screen the painter replaces the panel that draws the grid.
        self.images = {title: widgets.Image() for title, panel in PANELS.items() if panel.draw is not grid_panel}
        self.boxes = {title: _panel_box(title, self.images.get(title, self.painter)) for title in PANELS}
        self.inside: Inside | None = None
        self.switched: tuple[str, ...] = ()  # of INSIDE
        self.inside_images = {title: widgets.Image() for title in INSIDE}
        self.inside_boxes = {title: _panel_box(title, image) for title, image in self.inside_images.items()}
        lines = [widgets.HBox(list(boxes.values()), layout=WRAP) for boxes in (self.boxes, self.inside_boxes)]
        self.box = widgets.VBox([self.figures, *lines])
        self.switch(())

    def show(self, gated: GatedPicture | None, picture: Hashable = None):
        """Show another picture or model, with what was painted on that picture before; None hides the row."""
        self.gated, self.state = gated, None
        self.box.layout.display = "none" if gated is None else None
        if gated is not None:
            shown = panels_of(gated.loaded)
            # Many panels stand in lines of four, as in a file.
            flex = "1 1 150px" if len(shown) <= PANELS_IN_LINE else "0 1 22%"
            for title, box in self.boxes.items():
                box.layout.display = None if title in shown else "none"
                box.layout.flex = flex
            grid = gated.soft.shape
            self.painting = self._paintings.setdefault((picture, grid), Painting(blank(grid)))
            self.painter.reset(gated, self.painting.now)

    def run(self, threshold: float):
        """Run the model under the threshold and the painting, and show what changed."""
        painted = np.array(self.painting.now).reshape(self.gated.soft.shape)
        new, last = run_backbone(self.gated, threshold, painted, self.layer), self.state
        self.painter.coarse = self.gated.decisions(threshold).ravel().tolist()
        for title, panel in panels_of(self.gated.loaded).items():
            if title in self.images and (last is None or not panel.fixed):
                self.images[title].value = png(panel.draw(new))
        self.figures.value = figures_html(new)
        self.state, self.inside = new, None
        for image in self.inside_images.values():
            image.value = WAITING  # not what was before

    def switch(self, titles: tuple[str, ...]):
        """Show these panels of INSIDE, where the model can be looked into."""
        self.switched = titles if self.gated is None or looks_inside(self.gated.loaded) else ()
        for title, box in self.inside_boxes.items():
            box.layout.display = None if title in self.switched else "none"

    def look_inside(self, block: int, head: int | None):
        """Compute the panels that are switched on, and show them."""
        if not self.switched or self.state is None:
            return
        self.inside = self.inside or Inside(self.state)
        vit = self.gated.loaded.model.vit
        self.inside.picked = self.painter.picked if self.painter.picked < self.gated.fine_patches else -1
        self.inside.block = min(block, len(vit.blocks) - 1)
        self.inside.head = head if head is None or head < vit.blocks[0].attn.num_heads else None
        for title in self.switched:
            self.inside_images[title].value = png(INSIDE[title](self.inside))

    def paint(self, values: list[int]):
        """Paint all at once, as one stroke."""
        self.painting.paint(values)
        self._show_painting()

    def step_painting(self, step: str):
        """Undo or redo a stroke."""
        if step in ("undo", "redo"):
            getattr(self.painting, step)()
            self._show_painting()

    def _take_painting(self):
        if self.painter.valid():
            self.painting.paint(self.painter.painted, self.painter.stroke)
            self.run(self.state.threshold)

    def _show_painting(self):
        with self._silently():
            self.painter.painted = self.painting.now
        self.run(self.state.threshold)

    def show_layer(self, layer: int):
        """Show where the tokens were at another block; nothing is run."""
        self.layer = layer
        if self.state is not None and self.state.token_maps:
            self.state = replace(self.state, layer=layer)
            self.images[TOKEN_MAP_TITLE].value = png(PANELS[TOKEN_MAP_TITLE].draw(self.state))

    def measure(self):
        """Measure the times of what is shown, unless they are known, and show them."""
        if self.state is not None and self.state.times is None:
            self.state = with_times(self.state)
            self.figures.value = figures_html(self.state)
