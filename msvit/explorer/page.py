"""The page: its controls, and a row of panels for each of one or two models."""

import asyncio
import base64
import html
from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from pathlib import Path

import ipywidgets as widgets
from traitlets import dlink

from ..data.decode import PictureError
from ..models.shipped import shipped
from . import export
from .controls import ALL_HEADS, THRESHOLD_STEPS, Controls
from .gallery import Gallery
from .models import LoadedModel, ModelError, find_models, load_model, suited_to, title_of
from .painting import blank, mask_files, read_mask
from .sources import PictureSource, built_in_sources, folder_source
from .state import GatedPicture, State, run_gate
from .survey import survey
from .uploads import read_picture
from .widgets import ModelRow

REST = 0.5  # seconds without a step after which the times are measured
MIME = {"png": "image/png", "svg": "image/svg+xml", "npy": "application/octet-stream"}


class Explorer(Controls):
    """The page: its controls, and a row of panels for each of one or two models.

    Args:
        model: A model that comes with msvit ("scenes"; "photo" where its file is there), a run under `runs`, a folder
            that `save_pretrained` wrote, a timm name (random weights), or a `LoadedModel`. Empty: the shipped model for
            the pictures shown. A shipped model makes room for another when pictures come that suit that one.
        second: A model to put beside it; empty: none.
        source: Where pictures come from: "scenes: easy", "scenes: middle", "scenes: hard", "photographs", or a folder.
        runs: The folder whose runs and checkpoints can be chosen.
        budget: Share of dense MACs to begin with; 0: the model's own threshold.
        out: Folder for what is saved.
    """

    def __init__(
        self,
        model: str | LoadedModel = "",
        second: str | LoadedModel = "",
        source: str = "scenes: middle",
        runs: str | Path = "runs",
        budget: float = 0.0,
        out: str | Path = "results/explorer",
    ):
        if not 0 <= budget <= 1:
            raise ValueError(f"budget={budget}: a share of the dense model's MACs such as 0.6, or 0")
        self.runs, self.out = Path(runs), Path(out)
        self.knob = "budget" if budget else "own"  # what sets the thresholds: the models' own, or a slider
        self._timer = None
        given = model or suited_to(source), second
        self._loaded = {one.name: one for one in given if isinstance(one, LoadedModel)}
        self._shown = tuple(one.name if isinstance(one, LoadedModel) else one for one in given)
        self.sources = built_in_sources()
        if source not in self.sources:
            self.sources[source] = folder_source(source)
        models = dict.fromkeys([*self._loaded, *find_models(self.runs), *filter(None, self._shown)])
        titles = {title_of(name, self.runs / name): name for name in models}
        super().__init__(titles, self._shown, list(self.sources), source, budget)
        self.picture.options = names = self.sources[source].names()
        self.picture.value = names[0]
        self.rows = [ModelRow(self._act, self._silently) for _ in range(2)]
        self.gallery = Gallery()
        self.gallery_box = widgets.VBox([self.gallery], layout={"display": "none"})
        self.page = widgets.VBox([self.box, *(row.box for row in self.rows), self.gallery_box])
        self.page.add_class("msvit")
        self._wire()
        self._choose_models()

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
            self.load_mask: self._load_mask,
            self.block: self._measure_at_rest,
            self.head: self._measure_at_rest,
            **dict.fromkeys(self.inside.values(), self._switch),
        }
        clicks = {
            self.undo: partial(self._step_painting, "undo"),
            self.redo: partial(self._step_painting, "redo"),
            self.clear: lambda: self._paint(blank),
            self.save_png: partial(self._save, "png"),
            self.save_svg: partial(self._save, "svg"),
            self.save_mask: self._save_mask,
            self.survey: self._open_gallery,
        }
        for row in self.rows:
            for control, name in ((self.brush, "brush"), (self.tool, "tool"), (self.width, "width")):
                dlink((control, "value"), (row.painter, name))
            row.painter.observe(lambda _: self._act(self._measure_at_rest), ["painted", "picked"])
            row.painter.on_msg(lambda *_: self._act(self._measure_at_rest))
        for control, action in changes.items():
            control.observe(lambda _, action=action: self._act(action), "value")
        self.gallery.observe(lambda _: self._act(self._open_chosen), "chosen")
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
        """Write the view as it is, and its figures as JSON beside it, into the folder `out`; nothing is overwritten."""
        self._measure()
        return export.save(self.states, self.out, name, kinds)

    # ---- what the controls do

    def _choose_models(self):
        chosen = self.model.value, self.second.value
        try:
            for name in set(filter(None, chosen)) - self._loaded.keys():
                self._show_progress(f"Loading {name} …")
                self._loaded[name] = load_model(name, self.runs)
                self.message.value = ""
        except ModelError:
            with self._silently():
                self.model.value, self.second.value = self._shown
            raise
        self._shown = chosen
        if self.knob == "threshold":
            self.knob = "own"  # another model, another gate
        self._show_picture()

    def _choose_source(self, picture: str = ""):
        names, suited = self.sources[self.source.value].names(), suited_to(self.source.value)
        with self._silently():
            self.picture.options, self.picture.value = names, picture or names[0]
            if self.model.value in shipped() and self.model.value not in (suited, self.second.value):
                self.model.value = suited
        self._choose_models()

    def _show_picture(self):
        """Run the models on the picture. Nothing changes on the page before all gates have run."""
        source, models = self.sources[self.source.value], [self._loaded[name] for name in self._shown if name]
        gated = [run_gate(loaded, source.picture(self.picture.value, loaded.size)) for loaded in models]
        with self._silently():
            for row, one in zip_longest(self.rows, gated):
                row.show(one, (self.source.value, self.picture.value))
            self.set_layers(models)
            self.set_heads(models)
            self._choose_layer()
            self._switch()
        self._step()

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
        self._measure_at_rest()

    def _measure_at_rest(self):
        """Measure the times once nothing has moved for a while: no step waits for them."""
        if self._timer is not None:
            self._timer.cancel()
        try:
            self._timer = asyncio.get_running_loop().call_later(REST, self._measure)
        except RuntimeError:  # no kernel runs; `save` will measure
            self._timer = None

    def _measure(self):
        for row in self.rows:
            row.look_inside(self.block.value, None if self.head.value == ALL_HEADS else self.head.value)
            row.measure()

    def _switch(self):
        for row in self.rows:
            row.switch(tuple(title for title, button in self.inside.items() if button.value))
        self._measure_at_rest()

    def _threshold(self, gated: GatedPicture) -> float:
        if self.knob == "budget":
            return gated.threshold_for(self.budget.value / 100)
        return self.threshold.value if self.knob == "threshold" else gated.loaded.model.threshold

    def _open_folder(self):
        if not (folder := self.folder.value):
            return
        source = folder_source(
            folder, lambda found, seen: self._show_progress(f"{found:,} pictures among {seen:,} files of {folder} …")
        )
        self.message.value = ""
        self._add_source(folder, source)
        if source.note:
            self._show_message(source.note, good=True)

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

    def _open_gallery(self):
        """Run the first model on all pictures of the source and show them below."""
        loaded, source = self.rows[0].gated.loaded, self.sources[self.source.value]
        found = survey(loaded, source, lambda done, of: self._show_progress(f"{done} of {of} pictures", done, of))
        self.gallery.show(found, loaded)
        self.gallery_box.layout.display, self.message.value = None, ""
        self._surveyed = self.source.value

    def _open_chosen(self):
        """Show the picture that was chosen in the gallery."""
        if self.gallery.chosen:
            with self._silently():
                self.source.value = self._surveyed
            self._choose_source(self.gallery.chosen)

    def _choose_layer(self):
        for row in self.rows:
            row.show_layer(self.layer.value)

    def _paint(self, values: Callable[[tuple[int, int]], list[int]]):
        """Paint on the pictures shown, as one stroke, what a function makes of their grids."""
        shown = [row for row in self.rows if row.gated is not None]
        for row, painted in [(row, values(row.gated.soft.shape)) for row in shown]:
            row.paint(painted)
        self._measure_at_rest()

    def _step_painting(self, step: str):
        for row in self.rows:
            if row.gated is not None:
                row.step_painting(step)
        self._measure_at_rest()

    def _load_mask(self):
        files = self.load_mask.value
        with self._silently():
            self.load_mask.value = ()
        for file in files:
            self._paint(partial(read_mask, bytes(file["content"]), file["name"]))

    def _save_mask(self):
        state = self.states[0]
        paths = export.write_files(self.out, f"{export.name_of([state])}_mask", mask_files(state.coarse))
        self._show_saved(paths, "the decisions of the first model")

    def _save(self, kind: str):
        path, _ = self.save(kinds=(kind,))
        self._show_saved([path], "its figures as JSON beside it")

    def _show_saved(self, paths: list[Path], what: str):
        """Name the files that were written, with links for those whose browser is elsewhere."""
        links = "".join(
            f' · <a download="{html.escape(path.name)}" href="data:{MIME[path.suffix[1:]]};base64,'
            f'{base64.b64encode(path.read_bytes()).decode()}">{path.suffix[1:]}</a>'
            for path in paths
        )
        self._show_message(f"Saved {paths[0]}, {what}; download", good=True, more=links)
