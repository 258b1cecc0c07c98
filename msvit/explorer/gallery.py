"""The gallery: a survey's pictures to sort, to filter and to choose from. The browser draws those that are in sight."""

from pathlib import Path

import anywidget
import numpy as np
import traitlets

from .models import LoadedModel
from .survey import SHEET, THUMB, Survey


class Gallery(anywidget.AnyWidget):
    """Thumbnails in a list of any length. Sheets of them are sent when they come into sight, by message."""

    _esm = Path(__file__).with_name("gallery.js")
    names = traitlets.List([]).tag(sync=True)
    classes = traitlets.List([]).tag(sync=True)
    truth = traitlets.List([]).tag(sync=True)
    predicted = traitlets.List([]).tag(sync=True)
    dense = traitlets.List([]).tag(sync=True)
    loss = traitlets.List([]).tag(sync=True)  # -1 where it is unknown
    tokens = traitlets.List([]).tag(sync=True)
    thumb = traitlets.Int(THUMB).tag(sync=True)
    sheet = traitlets.Int(SHEET).tag(sync=True)
    version = traitlets.Int(0).tag(sync=True)  # of what is shown: all lists belong together
    chosen = traitlets.Unicode("").tag(sync=True)

    def __init__(self):
        super().__init__()
        self._survey: Survey | None = None
        self.on_msg(lambda _, asked, __: self._send_sheet(asked.get("sheet")))

    def show(self, survey: Survey, loaded: LoadedModel):
        """Show another survey."""
        self._survey = survey
        with self.hold_sync():
            self.names, self.classes = survey.names, list(loaded.classes)
            for name in ("truth", "predicted", "dense", "tokens"):
                setattr(self, name, getattr(survey, name).tolist())
            self.loss = np.nan_to_num(survey.loss, nan=-1).round(4).tolist()
            self.chosen, self.version = "", self.version + 1

    def _send_sheet(self, number: object):
        """Answer the browser; whatever else it asks for is not answered."""
        last = (len(self.names) - 1) // SHEET**2
        if self._survey is not None and isinstance(number, int) and 0 <= number <= last:
            self.send({"sheet": number, "version": self.version}, [self._survey.sheet(number)])
