"""The page: its controls, and a row of panels for each of one or two models."""

import base64
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path

import ipywidgets as widgets
from traitlets import dlink

from . import export
from .models import DEMO, LoadedModel, ModelError, find_models, load_model
from .sources import PictureSource, built_in_sources, folder_source
from .state import AFTER_TOKENIZER, UNPAINTED, GatedPicture, State, layer_name, run_gate
from .uploads import PictureError, read_picture
from .widgets import WRAP, ModelRow

# Of the slider: sums of 0.01 are not exact, and a browser sends back what it rounds as if a user had moved it.
THRESHOLD_STEPS = 256
BRUSHES = {"paint coarse": 1, "paint fine": 0, "as the gate says": UNPAINTED}


class Explorer:
    """The page: its controls, and a row of panels for each of one or two models.

    Args:
        model: "demo" (a small model of the built-in scenes, trained when first asked for), a run under `runs`, a folder
            that `save_pretrained` wrote, a timm name (random weights), or a `LoadedModel`.
        second: A model to put beside it; empty: none.
        source: Where pictures come from: "scenes: easy", "scenes: middle", "scenes: hard", "photographs", or a folder.
        runs: The folder whose runs and checkpoints can be chosen.
        budget: Share of dense MACs to begin with; 0: the model's own threshold.
        out: Folder for what is saved.
    """

    def __init__(
        self,
        model: str | LoadedModel = DEMO,
        second: str | LoadedModel = "",
        source: str = "scenes: easy",
        runs: str | Path = "runs",
        budget: float = 0.0,
        out: str | Path = "reports/gate_explorer",
    ):
        if not 0 <= budget <= 1:
            raise ValueError(f"budget={budget}: a share of the dense model's MACs such as 0.6, or 0")
        self.runs, self.out = Path(runs), Path(out)
        self.knob = "budget" if budget else "own"  # what sets the thresholds: the models' own, or a slider
        self._quiet = False
        self._loaded = {given.name: given for given in (model, second) if isinstance(given, LoadedModel)}
        self._shown = tuple(given.name if isinstance(given, LoadedModel) else given for given in (model, second))
        self.sources = built_in_sources()
        if source not in self.sources:
            self.sources[source] = folder_source(source)
        self.rows = [ModelRow(self._act) for _ in range(2)]
        self._build(source, budget)
        self._wire()
        self._choose_models()

    def _build(self, source: str, budget: float):
        """Build the controls and the page."""
        names = list(dict.fromkeys([*self._loaded, *find_models(self.runs), *filter(None, self._shown)]))
        beside = [("nothing", ""), *((name, name) for name in names)]
        wide = {"style": {"description_width": "76px"}, "layout": {"width": "420px"}}
        self.model = widgets.Dropdown(options=names, value=self._shown[0], description="Model", **wide)
        self.second = widgets.Dropdown(options=beside, value=self._shown[1], description="Beside it", **wide)
        self.source = widgets.Dropdown(options=list(self.sources), value=source, description="Pictures", **wide)
        self.picture = widgets.Dropdown(options=self.sources[source].names(), description="Picture", **wide)
        self.folder = widgets.Text(description="Folder", continuous_update=False, **wide)
        self.folder.placeholder = "or a folder of pictures: type it, then Enter"
        self.upload = widgets.FileUpload(multiple=True, description="Upload pictures", layout={"width": "160px"})
        self.threshold = widgets.FloatSlider(0.5, max=1, step=1 / THRESHOLD_STEPS, description="Threshold", **wide)
        self.threshold.tooltip = "a region is coarse where its m lies above"
        self.budget = widgets.IntSlider(round(100 * budget), description="Budget (%)", **wide)
        self.budget.tooltip = "share of the dense model's MACs that the threshold is set for"
        self.layer = widgets.SelectionSlider(options=[AFTER_TOKENIZER], description="Layer", **wide)
        self.layer.tooltip = "the block at which to show where each pixel's token is"
        self.brush = widgets.ToggleButtons(options=BRUSHES, style={"button_width": "126px"})
        for row in self.rows:
            dlink((self.brush, "value"), (row.painter, "brush"))
        self.clear, self.save_png, self.save_svg = (
            widgets.Button(description=name, layout={"width": "120px"})
            for name in ("Clear painting", "Save PNG", "Save SVG")
        )
        self.message = widgets.HTML()
        pairs = (self.model, self.second), (self.source, self.picture), (self.folder, self.upload)
        sliders, buttons = (self.threshold, self.budget), (self.brush, self.clear, self.save_png, self.save_svg)
        controls = [widgets.HBox(line, layout=WRAP) for line in (*pairs, sliders, (self.layer,), buttons)]
        self.page = widgets.VBox([widgets.HTML(export.CSS), *controls, self.message, *(row.box for row in self.rows)])
        self.page.add_class("msvit")

    def _wire(self):
        """Connect the controls with what they do."""
        changes = {
            self.model: self._choose_models,
            self.second: self._choose_models,
            self.source: self._choose_source,
            self.picture: self._show_picture,
            self.folder: self._open_folder,
            self.upload: self._take_uploads,
            self.threshold: partial(self._step, "threshold"),
            self.budget: partial(self._step, "budget"),
            self.layer: self._choose_layer,
        }
        clicks = {
            self.clear: self._clear,
            self.save_png: partial(self._save, "png"),
            self.save_svg: partial(self._save, "svg"),
        }
        for control, action in changes.items():
            control.observe(lambda _, action=action: self._act(action), "value")
        for control, action in clicks.items():
            control.on_click(lambda _, action=action: self._act(action))

    def _repr_mimebundle_(self, **options) -> dict:
        """Return the page, and its picture for copies in which no kernel lives."""
        still = base64.b64encode(export.as_png(self.states)).decode()
        return self.page._repr_mimebundle_(**options) | {"image/png": still}

    @property
    def states(self) -> list[State]:
        """The states shown, one for each model."""
        return [row.state for row in self.rows if row.gated is not None]

    def save(self, name: str = "", kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
        """Write the view as it is, and its figures as JSON beside it, into the folder `out`."""
        return export.save(self.states, self.out, name, kinds)

    # ---- what the controls do

    def _act(self, action: Callable[[], None]):
        """Do what a control asks, unless the page itself moved it; show what goes wrong as a message."""
        if self._quiet:
            return
        self.message.value = ""
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            self._show_message(str(error), good=False)

    def _show_message(self, text: str, good: bool, link: str = ""):
        kind = "msvit-message msvit-good" if good else "msvit-message"
        self.message.value = f'<div class="{kind}" role="status">{html.escape(text)}{link}</div>'

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Move controls, inside, without calling anything."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _choose_models(self):
        chosen = self.model.value, self.second.value
        try:
            for name in set(filter(None, chosen)) - self._loaded.keys():
                self._loaded[name] = load_model(name, self.runs)
        except ModelError:
            with self._silently():
                self.model.value, self.second.value = self._shown
            raise
        self._shown = chosen
        if self.knob == "threshold":
            self.knob = "own"  # another model, another gate
        self._show_picture()

    def _choose_source(self, picture: str = ""):
        names = self.sources[self.source.value].names()
        with self._silently():
            self.picture.options, self.picture.value = names, picture or names[0]
        self._show_picture()

    def _show_picture(self):
        """Run the models on the picture. Nothing changes on the page before all gates have run."""
        source, models = self.sources[self.source.value], [self._loaded[name] for name in self._shown if name]
        gated = [run_gate(loaded, source.picture(self.picture.value, loaded.size)) for loaded in models]
        with self._silently():
            for row, one in zip_longest(self.rows, gated):
                row.show(one)
            self._set_layers(models)
        self._step()

    def _set_layers(self, models: list[LoadedModel]):
        """Let the layer slider choose from the layers of all reducers shown; it begins with the last."""
        reducers = [loaded.model.reducer for loaded in models if loaded.model.reducer is not None]
        self.layer.layout.display = None if reducers else "none"
        blocks = sorted({block for reducer in reducers for block in reducer.layers})
        layers = [(layer_name(layer), layer) for layer in (AFTER_TOKENIZER, *blocks)]
        if list(self.layer.options) != layers:
            self.layer.options, self.layer.value = layers, layers[-1][1]
        self._choose_layer()

    def _step(self, knob: str = ""):
        """Run the models under the knob and the painting, and move the other slider to where that leads."""
        self.knob = knob or self.knob
        for row in self.rows:
            if row.gated is not None:
                row.run(self._threshold(row.gated))
        gated, threshold = self.rows[0].gated, self.rows[0].state.threshold
        with self._silently():
            if self.knob != "threshold":
                self.threshold.value = round(threshold * THRESHOLD_STEPS) / THRESHOLD_STEPS
            if self.knob != "budget":
                self.budget.value = round(100 * gated.share(threshold))

    def _threshold(self, gated: GatedPicture) -> float:
        if self.knob == "budget":
            return gated.threshold_for(self.budget.value / 100)
        return self.threshold.value if self.knob == "threshold" else gated.loaded.model.threshold

    def _open_folder(self):
        if self.folder.value:
            self._add_source(self.folder.value, folder_source(self.folder.value))

    def _take_uploads(self):
        """Show the last good one of the files; name each bad one, with what is wrong with it."""
        good, wrong = {}, []
        for file in self.upload.value:
            name, data = file["name"], bytes(file["content"])
            try:
                read_picture(data, name)
                good[name] = data
            except PictureError as error:
                wrong.append(str(error))
        with self._silently():
            self.upload.value = ()
        if good:
            before = self.sources["uploads"].files if "uploads" in self.sources else {}
            self._add_source("uploads", PictureSource(before | good), list(good)[-1])
        if wrong:
            raise PictureError("; ".join(wrong))

    def _add_source(self, name: str, source: PictureSource, picture: str = ""):
        self.sources[name] = source
        with self._silently():
            self.source.options, self.source.value = list(self.sources), name
        self._choose_source(picture)

    def _choose_layer(self):
        for row in self.rows:
            row.show_layer(self.layer.value)

    def _clear(self):
        with self._silently():
            for row in self.rows:
                row.painter.painted = [UNPAINTED] * len(row.painter.painted)
        self._step()

    def _save(self, kind: str):
        path, _ = self.save(kinds=(kind,))
        data, mime = base64.b64encode(path.read_bytes()).decode(), {"png": "image/png", "svg": "image/svg+xml"}[kind]
        link = f' · <a download="{html.escape(path.name)}" href="data:{mime};base64,{data}">download</a>'
        self._show_message(f"Saved {path} and its figures as JSON beside it", good=True, link=link)
