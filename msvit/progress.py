"""Signs of life of what takes long: bars, and lines that stay.

A terminal gets bars of at most 80 columns. A notebook gets one output for each cell, in which every open bar is a line;
it is drawn anew in its place, so that the file does not grow with it. A log, which is anything else, gets lines alone.
What is still to come is told from the mean pace so far.
"""

import html
import io
import shutil
import sys
import time
from collections.abc import Iterable
from typing import Any, ClassVar

from tqdm import tqdm

TERMINAL_WIDTH = 80
REDRAW = 0.5  # seconds between two drawings in a notebook
LINES_APART = 60.0  # seconds between two lines in a notebook, which the bars say all of but to papermill's log


def in_notebook() -> bool:
    """Return whether a notebook's kernel runs this."""
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def visible() -> bool:
    """Return whether somebody looks on, at a terminal or in a notebook."""
    return in_notebook() or sys.stderr.isatty()


def bar(items: Iterable | None = None, title: str = "", total: float | None = None, **options: Any) -> tqdm:
    """Return a bar, to go through items with or to `update`, and to close as a context.

    Args:
        options: `shown` (True), `unit`, `initial`, and whether it stays when it is done: `leave` (False).
    """
    return (NotebookBar if in_notebook() else TerminalBar)(items, title, total, **options)


def say(line: str):
    """Write a line above the bars of a terminal, or into a log; in a notebook, where bars say it too, once a minute."""
    if not in_notebook():
        tqdm.write(line, sys.stderr)
    elif time.monotonic() - NotebookBar.last_line > LINES_APART:
        NotebookBar.last_line = time.monotonic()
        print(line, flush=True)


def duration(seconds: float) -> str:
    """Return a time in one number: 40 s, 3 min, 2 h, 5 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


class TerminalBar(tqdm):
    """A line of a terminal, as wide as this but for 80 columns at most; of a log, nothing."""

    def __init__(self, items: Iterable | None, title: str, total: float | None, shown: bool = True, **options: Any):
        columns = min(TERMINAL_WIDTH, shutil.get_terminal_size((TERMINAL_WIDTH, 24)).columns)
        style = {"ncols": columns, "smoothing": 0, "bar_format": "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"}
        hidden = not shown or not sys.stderr.isatty()
        super().__init__(items, title, total, file=sys.stderr, disable=hidden, **style, **{"leave": False} | options)


class NotebookBar(tqdm):
    """A line of the one output for the bars of a cell."""

    monitor_interval = 0  # no other thread draws
    last_line: ClassVar[float] = float("-inf")
    _open: ClassVar[list[tqdm]] = []
    _done: ClassVar[list[str]] = []  # what those that stay have said at last
    _output: ClassVar[Any] = None
    _cell: ClassVar[int] = -1

    def __init__(self, items: Iterable | None, title: str, total: float | None, shown: bool = True, **options: Any):
        settings = {"file": io.StringIO(), "gui": True, "mininterval": REDRAW, "smoothing": 0, "leave": False}
        super().__init__(items, title, total, disable=not shown, **settings | options)
        if shown:
            if (cell := _cell()) != NotebookBar._cell:  # what an error has left open elsewhere is not of this one
                NotebookBar._cell, NotebookBar._output = cell, None
                self._open.clear()
                self._done.clear()
            self._open.append(self)
            self.display()

    def display(self, *_: Any, **__: Any):
        """Draw all open bars."""
        lines = [*self._done, *(b.text() for b in self._open)]
        marks = [f"<progress value='{b.n}' max='{b.total}'></progress> " if b.total else "" for b in self._open]
        marks = [""] * len(self._done) + marks
        rows = (f"<div>{mark}{html.escape(line)}</div>" for mark, line in zip(marks, lines, strict=True))
        _show({"text/plain": "\n".join(lines), "text/html": "".join(rows)})

    def close(self):
        """Draw the bars that are left, and what this one says if it was to stay."""
        others = [b for b in self._open if b is not self]  # bars are equal where their places are
        if len(others) < len(self._open):
            self._open[:] = others
            if self.leave:
                self._done.append(self.text())
            self.display()
        super().close()

    def text(self) -> str:
        """Return the bar in words."""
        parts = [f"{self.n:,}" + (f" of {self.total:,}" if self.total else "") + (f" {self.unit}" if self.unit else "")]
        parts += [self.postfix] if self.postfix else []
        parts += [duration(self.format_dict["elapsed"]), time_left(self)]
        return f"{self.desc.removesuffix(': ')}: " + ", ".join(filter(None, parts))


def time_left(bar: tqdm) -> str:
    """Return in words how long a bar still takes, at its mean pace; empty if nothing is known yet."""
    if bar.disable or not bar.total or not bar.initial < bar.n < bar.total:
        return ""
    pace = bar.format_dict["elapsed"] / (bar.n - bar.initial)
    return f"about {duration(pace * (bar.total - bar.n))} left"


def _cell() -> int:
    """Return the number of the cell that runs."""
    from IPython import get_ipython

    return get_ipython().execution_count


def _show(data: dict[str, str]):
    """Put this in place of the cell's bars."""
    from IPython.display import display

    if NotebookBar._output is None:
        NotebookBar._output = display(data, raw=True, display_id=True)
    else:
        NotebookBar._output.update(data, raw=True)
