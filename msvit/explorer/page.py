"""The page: its controls, and a row of panels for each of one or two models."""

import base64
import html
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import zip_longest
from pathlib import Path

import ipywidgets as widgets

from . import export as sheet
from . import models as gallery
from . import sources
from . import state as view
from .models import ModelError, Subject
from .sources import Source
from .uploads import PictureError, sort_out
from .widgets import WRAP, Row

# Of the threshold: sums of 0.01 are not exact, and a browser sends back what it rounds as if a hand had moved.
STEPS = 256
BRUSHES = {"paint coarse": 1, "paint fine": 0, "as the gate says": view.FREE}


class Explorer:
    """The page: its controls, and a row of panels for each of one or two models.

    Args:
        model: "demo" (a small model of the built-in scenes, trained when first asked for), a run under `runs`, a folder
            that `save_pretrained` wrote, a timm name (random weights), or a `gallery.Subject`.
        second: A model to put beside it; empty: none.
        source: Where pictures come from: "scenes: easy", "scenes: middle", "scenes: hard", "photographs", or a folder.
        runs: The folder whose runs and checkpoints can be chosen.
        budget: Share of dense MACs to begin with; 0: the model's own threshold.
        out: Folder for what is saved.
    """

    def __init__(
        self,
        model: str | Subject = gallery.DEMO,
        second: str | Subject = "",
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
        self._subjects = {given.name: given for given in (model, second) if isinstance(given, Subject)}
        self._shown = tuple(given.name if isinstance(given, Subject) else given for given in (model, second))
        self.sources = sources.sources()
        if source not in self.sources:
            self.sources[source] = sources.folder_source(source)
        self.rows = [Row(self._act) for _ in range(2)]
        self._build(*self._shown, source)
        self.budget.value = round(100 * budget)
        self._wire()
        self._choose_models()

    def _build(self, first: str, second: str, source: str):
        """The controls and the page."""
        names = list(dict.fromkeys([*self._subjects, *gallery.find_models(self.runs), first, *filter(None, [second])]))
        look = {"style": {"description_width": "76px"}, "layout": {"width": "420px"}}

        def choice(name: str, options: list, value: str) -> widgets.Dropdown:
            return widgets.Dropdown(options=options, value=value, description=name, **look)

        self.model = choice("Model", names, first)
        self.second = choice("Beside it", [("nothing", ""), *((name, name) for name in names)], second)
        self.source = choice("Pictures", list(self.sources), source)
        self.picture = choice("Picture", self.sources[source].names(), self.sources[source].names()[0])
        self.folder = widgets.Text(description="Folder", continuous_update=False, **look)
        self.folder.placeholder = "or a folder of pictures: type it, then Enter"
        self.upload = widgets.FileUpload(multiple=True, description="Upload pictures", layout={"width": "160px"})
        self.threshold = widgets.FloatSlider(0.5, min=0, max=1, step=1 / STEPS, description="Threshold", **look)
        self.threshold.tooltip = "a region is coarse where its m lies above"
        self.budget = widgets.IntSlider(50, min=0, max=100, description="Budget (%)", **look)
        self.budget.tooltip = "share of the dense model's MACs that the threshold is set for"
        self.layer = widgets.SelectionSlider(
            options=[("after the tokenizer", view.TOKENIZER)], description="Layer", **look
        )
        self.layer.tooltip = "the block at which to show where each pixel's token is"
        self.brush = widgets.ToggleButtons(options=BRUSHES, style={"button_width": "126px"})
        self.clear, self.save_png, self.save_svg = (
            widgets.Button(description=name, layout={"width": "120px"})
            for name in ("Clear painting", "Save PNG", "Save SVG")
        )
        self.message = widgets.HTML()
        pairs = (self.model, self.second), (self.source, self.picture), (self.folder, self.upload)
        lines = (
            *pairs,
            (self.threshold, self.budget),
            (self.layer,),
            (self.brush, self.clear, self.save_png, self.save_svg),
        )
        controls = [widgets.HBox(line, layout=WRAP) for line in lines]
        self.page = widgets.VBox([widgets.HTML(sheet.STYLE), *controls, self.message, *(row.box for row in self.rows)])
        self.page.add_class("msvit")

    def _wire(self):
        """Which control calls what."""
        changes = {
            self.model: self._choose_models,
            self.second: self._choose_models,
            self.source: self._choose_source,
            self.picture: self._choose_picture,
            self.folder: self._open_folder,
            self.upload: self._take_uploads,
            self.threshold: partial(self._step, "threshold"),
            self.budget: partial(self._step, "budget"),
            self.layer: self._choose_layer,
            self.brush: self._take_brush,
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
        """The page, and its picture for copies in which no kernel lives."""
        still = base64.b64encode(sheet.as_png(self.states)).decode()
        return self.page._repr_mimebundle_(**options) | {"image/png": still}

    @property
    def states(self) -> list[view.State]:
        """What is shown, a state for each model."""
        return [row.state for row in self.rows if row.look is not None]

    def save(self, name: str = "", kinds: tuple[str, ...] = ("png", "svg")) -> list[Path]:
        """Writes the view as it is, and its figures as JSON beside it, into the folder `out`."""
        return sheet.save(self.states, self.out, name, kinds)

    # ---- what the controls do

    def _act(self, action: Callable[[], None]):
        """Does what a control asks, unless the page itself moved it; what goes wrong is said, and the page lives on."""
        if self._quiet:
            return
        self.message.value = ""
        try:
            action()
        except (ValueError, OSError, RuntimeError) as error:
            self._say(str(error), good=False)

    def _say(self, text: str, good: bool, link: str = ""):
        kind = "msvit-message msvit-good" if good else "msvit-message"
        self.message.value = f'<div class="{kind}" role="status">{html.escape(text)}{link}</div>'

    @contextmanager
    def _silently(self) -> Iterator[None]:
        """Inside, controls move without calling anything."""
        self._quiet = True
        try:
            yield
        finally:
            self._quiet = False

    def _choose_models(self):
        names = [name for name in (self.model.value, self.second.value) if name]
        try:
            for name in set(names) - self._subjects.keys():
                self._subjects[name] = gallery.load_model(name, self.runs)
        except ModelError:
            with self._silently():
                self.model.value, self.second.value = self._shown
            raise
        self._shown = self.model.value, self.second.value
        if self.knob == "threshold":
            self.knob = "own"  # another model, another gate
        self._show([self._subjects[name] for name in names])

    def _choose_source(self):
        names = self.sources[self.source.value].names()
        with self._silently():
            self.picture.options, self.picture.value = names, names[0]
        self._choose_picture()

    def _choose_picture(self):
        self._show([state.look.subject for state in self.states])

    def _show(self, subjects: list[Subject]):
        """Puts the picture before the models. Nothing changes on the page before all of them have it."""
        source, name = self.sources[self.source.value], self.picture.value
        looks = [view.look(subject, source.shot(name, subject.size)) for subject in subjects]
        with self._silently():
            for row, look in zip_longest(self.rows, looks):
                row.set_look(look)
            self._set_layers(subjects)
        self._step()

    def _set_layers(self, subjects: list[Subject]):
        """The stages that the layer slider can choose: those of all reducers shown; it begins with the last."""
        reducers = [subject.model.reducer for subject in subjects if subject.model.reducer is not None]
        self.layer.layout.display = None if reducers else "none"
        blocks = sorted({layer for reducer in reducers for layer in reducer.layers})
        layers = {"after the tokenizer": view.TOKENIZER} | {f"at block {n}": n for n in blocks}
        chosen = self.layer.value
        if dict(self.layer.options) != layers:
            self.layer.options = list(layers.items())
            chosen = list(layers.values())[-1]
        self.layer.value = chosen
        for row in self.rows:
            row.layer = chosen

    def _step(self, knob: str = ""):
        """Runs the models under the knob and the painting, and moves the other slider to where that leads."""
        self.knob = knob or self.knob
        for row in self.rows:
            if row.look is not None:
                row.see(self._threshold(row.look))
        look, threshold = self.rows[0].look, self.rows[0].state.threshold
        with self._silently():
            if self.knob != "threshold":
                self.threshold.value = round(threshold * STEPS) / STEPS
            if self.knob != "budget":
                self.budget.value = round(100 * look.share(threshold))

    def _threshold(self, look: view.Look) -> float:
        if self.knob == "budget":
            return look.cut(self.budget.value / 100)
        return self.threshold.value if self.knob == "threshold" else look.subject.model.threshold

    def _open_folder(self):
        if self.folder.value:
            self._add_source(self.folder.value, sources.folder_source(self.folder.value))

    def _take_uploads(self):
        """Shows the last good one of the files; each bad one is named, with what is wrong with it."""
        new = {file["name"]: bytes(file["content"]) for file in self.upload.value}
        with self._silently():
            self.upload.value = ()
        good, wrong = sort_out(new)
        if good:
            before = self.sources["uploads"].files if "uploads" in self.sources else {}
            self._add_source("uploads", Source(before | good), list(good)[-1])
        if wrong:
            raise PictureError("; ".join(wrong))

    def _add_source(self, name: str, source: Source, picture: str = ""):
        self.sources[name] = source
        with self._silently():
            self.source.options, self.source.value = list(self.sources), name
            self.picture.options, self.picture.value = source.names(), picture or source.names()[0]
        self._choose_picture()

    def _choose_layer(self):
        for row in self.rows:
            row.show_stage(self.layer.value)

    def _take_brush(self):
        for row in self.rows:
            row.painter.brush = self.brush.value

    def _clear(self):
        with self._silently():
            for row in self.rows:
                row.painter.painted = [view.FREE] * len(row.painter.painted)
        self._step()

    def _save(self, kind: str):
        path, _ = self.save(kinds=(kind,))
        data, mime = base64.b64encode(path.read_bytes()).decode(), {"png": "image/png", "svg": "image/svg+xml"}[kind]
        link = f' · <a download="{html.escape(path.name)}" href="data:{mime};base64,{data}">download</a>'
        self._say(f"Saved {path} and its figures as JSON beside it", good=True, link=link)
