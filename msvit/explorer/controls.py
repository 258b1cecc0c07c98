"""The controls of the explorer's page: what there is to choose, to slide, to press, and how it is laid out."""

import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ipywidgets as widgets

from . import export
from .inside import INSIDE
from .models import LoadedModel
from .painting import UNPAINTED
from .state import AFTER_TOKENIZER, layer_name
from .widgets import LARGEST, WRAP

# Of the slider: sums of 0.01 are not exact, and a browser sends back what it rounds as if a user had moved it.
THRESHOLD_STEPS = 256
ALL_HEADS = -1  # None would be no choice at all
BRUSHES = {"coarse": 1, "largest": LARGEST, "fine": 0, "as the gate": UNPAINTED}
TOOLS = {"strokes": "stroke", "rectangles": "rectangle", "pick a token": "pick"}
_LONG = {"style": {"description_width": "84px"}, "layout": {"flex": "1 1 240px", "min_width": "220px", "width": "auto"}}


class Controls:
    """All controls, and messages; what the controls do is the page's.

    Models are titles for people -> what `load_model` calls them.
    """

    def __init__(self, models: dict[str, str], shown: tuple[str, str], sources: list[str], source: str, budget: float):
        self._quiet = False
        models = list(models.items())
        beside = [("nothing", ""), *models]
        self.model = widgets.Dropdown(options=models, value=shown[0], description="Model", **_LONG)
        self.second = widgets.Dropdown(options=beside, value=shown[1], description="Beside it", **_LONG)
        self.source = widgets.Dropdown(options=sources, value=source, description="Pictures", **_LONG)
        self.picture = widgets.Dropdown(description="Picture", **_LONG)
        self.threshold = widgets.FloatSlider(0.5, max=1, step=1 / THRESHOLD_STEPS, description="Threshold", **_LONG)
        self.threshold.tooltip = "a region is coarse where its m lies above"
        self.budget = widgets.IntSlider(round(100 * budget), description="Budget (%)", **_LONG)
        self.budget.tooltip = "share of the dense model's MACs that the threshold is set for"
        self.layer = widgets.SelectionSlider(options=[AFTER_TOKENIZER], description="Layer", **_LONG)
        self.layer.tooltip = "the block at which to show where each pixel's token is"
        self.folder = widgets.Text(description="Folder", continuous_update=False, **_LONG)
        self.folder.placeholder = "a folder of pictures, then Enter"
        self.upload = _upload("Upload pictures", "image/*", multiple=True)
        self.brush, self.tool = (
            widgets.ToggleButtons(options=options, style={"button_width": "100px"}, layout={"width": "max-content"})
            for options in (BRUSHES, TOOLS)
        )
        self.width = widgets.BoundedIntText(1, 1, 16, description="Brush", layout={"width": "110px"})
        self.width.tooltip = "regions that the brush is wide"
        self.width.style.description_width = "44px"
        self.undo, self.redo, self.clear = map(_button, ("Undo", "Redo", "Clear"), ("60px",) * 3)
        self.save_mask, self.load_mask = _button("Save mask"), _upload("Load mask", ".png,.npy", multiple=False)
        self.save_png, self.save_svg = _button("Save PNG"), _button("Save SVG")
        self.inside = {
            title: widgets.ToggleButton(description=title, layout={"width": "max-content"}) for title in INSIDE
        }
        self.block = widgets.BoundedIntText(99, 0, 99, description="Block", layout={"width": "110px"})
        self.head = widgets.Dropdown(options=[("mean", ALL_HEADS)], description="Head", layout={"width": "140px"})
        for control in (self.block, self.head):
            control.style.description_width = "44px"
        self.survey = _button("Gallery of all", "120px")
        self.survey.tooltip = "every picture of the source, to sort and filter by what the model makes of it"
        self.message = widgets.HTML()
        lines = (
            (self.model, self.second, self.source, self.picture),
            (self.threshold, self.budget, self.layer, self.folder, self.upload),
            (widgets.Label("Paint"), self.brush, self.tool, self.width, self.undo, self.redo, self.clear),
            (self.save_mask, self.load_mask, self.save_png, self.save_svg, self.survey),
        )
        tools = widgets.HBox([widgets.HBox(line, layout=WRAP) for line in lines[2:]], layout=WRAP)
        inside = widgets.HBox([widgets.Label("Look inside"), *self.inside.values(), self.block, self.head], layout=WRAP)
        boxes = [*(widgets.HBox(line, layout=WRAP) for line in lines[:2]), tools, inside]
        self.box = widgets.VBox([widgets.HTML(export.CSS), *boxes, self.message])

    def _act(self, action: Callable[[], None]):
        """Do what a control asks, unless the page itself moved it; show what goes wrong as a message."""
        if self._quiet:
            return
        self.message.value = ""
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            self._show_message(str(error), good=False)

    def _show_message(self, text: str, good: bool, more: str = ""):
        kind = "msvit-message msvit-good" if good else "msvit-message"
        self.message.value = f'<div class="{kind}" role="status">{html.escape(text)}{more}</div>'

    def _show_progress(self, text: str, done: int = 0, of: int = 0):
        bar = f' value="{done}" max="{of}"' if of else ""
        self._show_message(text, good=True, more=f" <progress{bar}></progress>")

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Move controls, inside, without calling anything."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def set_layers(self, models: list[LoadedModel]):
        """Let the layer slider choose from the layers of all reducers shown; it begins with the last."""
        reducers = [loaded.model.reducer for loaded in models if loaded.model.reducer is not None]
        self.layer.layout.display = None if reducers else "none"
        blocks = sorted({block for reducer in reducers for block in reducer.layers})
        layers = [(layer_name(layer), layer) for layer in (AFTER_TOKENIZER, *blocks)]
        if list(self.layer.options) != layers:
            self.layer.options, self.layer.value = layers, layers[-1][1]

    def set_heads(self, models: list[LoadedModel]):
        """Let block and head be chosen among those that a model shown has."""
        blocks = [block for loaded in models for block in loaded.model.vit.blocks]
        last = max(len(loaded.model.vit.blocks) for loaded in models) - 1
        self.block.value, self.block.max = min(self.block.value, last), last
        heads = [("mean", ALL_HEADS), *((str(k), k) for k in range(max(block.attn.num_heads for block in blocks)))]
        if list(self.head.options) != heads:
            self.head.options, self.head.value = heads, ALL_HEADS


def _button(name: str, width: str = "96px") -> widgets.Button:
    return widgets.Button(description=name, layout={"width": width})


def _upload(name: str, accept: str, multiple: bool) -> widgets.FileUpload:
    return widgets.FileUpload(accept=accept, multiple=multiple, description=name, layout={"width": "auto"})
