"""Signs of life: bars in a terminal and in a notebook, lines in a log, and what is still to come."""

import io
import sys
from types import SimpleNamespace

import IPython
import pytest

from msvit import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Output:
    """What a cell shows, in place of IPython's display."""

    def __init__(self):
        self.shown, self.updates = [], []

    def __call__(self, data, raw, display_id):
        self.shown.append(data)
        return SimpleNamespace(update=lambda data, raw: self.updates.append(data))


@pytest.fixture
def terminal(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream, modules=sys.modules))
    monkeypatch.setattr(progress.shutil, "get_terminal_size", lambda fallback: SimpleNamespace(columns=200))
    return stream


@pytest.fixture
def notebook(monkeypatch):
    """A notebook's cell number 1; `notebook.shell.execution_count` goes on to the next."""
    output = Output()
    output.shell = SimpleNamespace(kernel=object(), execution_count=1)
    monkeypatch.setattr(IPython, "get_ipython", lambda: output.shell)
    monkeypatch.setattr("IPython.display.display", output)
    monkeypatch.setattr(progress.NotebookBar, "_output", None)
    monkeypatch.setattr(progress.NotebookBar, "_cell", -1)
    monkeypatch.setattr(progress.NotebookBar, "last_line", float("-inf"))
    monkeypatch.setattr(progress, "REDRAW", 0.0)
    return output


def test_a_terminals_bar_has_80_columns_however_much_it_says(terminal):
    with progress.bar(title="epoch 2/4 (dense)", total=8192, unit="pictures") as steps:
        for _ in range(4):
            steps.set_postfix_str("loss 1.234, accuracy 0.91, MACs 0.58", refresh=False)
            steps.n += 2048
            steps.refresh()
    lines = terminal.getvalue().split("\r")
    assert max(map(len, lines)) == progress.TERMINAL_WIDTH
    whole = next(line for line in lines if "100%" in line)
    assert whole.startswith("epoch 2/4 (dense): 100%|#")
    assert whole.rstrip().endswith("loss 1.234, accuracy 0.91, MACs 0.58")
    assert not lines[-1].strip(), "nothing of it stays"


def test_a_log_gets_lines_and_no_bars(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    assert not progress.visible()
    for _ in progress.bar(range(3), "counting"):
        pass
    progress.say("epoch 1/2 (dense): loss 1.0")
    assert stream.getvalue() == "epoch 1/2 (dense): loss 1.0\n"


def test_a_cell_has_one_output_for_all_its_bars(notebook):
    with progress.bar(title="run 1/2", total=4, unit="epochs", leave=True) as runs:
        for _ in range(4):
            for _ in progress.bar(range(3), "epoch", unit="steps"):
                pass
            runs.update()
    (first,) = notebook.shown
    assert first["text/plain"].startswith("run 1/2: 0 of 4 epochs, 0 s")
    assert any("epoch: 0 of 3 steps" in data["text/plain"] for data in notebook.updates)
    assert notebook.updates[-1]["text/plain"].startswith("run 1/2: 4 of 4 epochs")
    assert any("<progress value='3' max='4'>" in data["text/html"] for data in notebook.updates)
    with progress.bar(title="timing", total=1):
        assert notebook.updates[-1]["text/plain"].splitlines()[0].startswith("run 1/2: 4 of 4"), "it was to stay"
    assert len(notebook.shown) == 1
    notebook.shell.execution_count = 2
    with progress.bar(title="<b>", total=1):
        pass
    assert "&lt;b&gt;" in notebook.shown[1]["text/html"]
    assert notebook.updates[-1] == {"text/plain": "", "text/html": ""}, "it was not to stay"


def test_a_bar_that_is_not_shown_closes_no_other(notebook):
    hidden = progress.bar(title="hidden", total=1, shown=False)
    shown = progress.bar(title="shown", total=1)
    hidden.close()
    assert progress.NotebookBar._open == [shown]
    notebook.shell.execution_count = 2  # as after an error in the loop
    with progress.bar(title="next", total=1):
        assert notebook.shown[-1]["text/plain"].startswith("next")
    shown.close()


def test_lines_in_a_notebook_are_a_minute_apart(notebook, monkeypatch, capsys):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for now in (0.0, 30.0, 61.0):
        progress.say(f"at {now:g}")
    assert capsys.readouterr().out == "at 0\nat 61\n"


def test_the_time_left_is_that_of_the_mean_pace(terminal, monkeypatch):
    now = 100.0
    steps = progress.bar(title="x", total=10, initial=2)
    monkeypatch.setattr(steps, "_time", lambda: now)
    steps.start_t = 100.0
    assert progress.time_left(steps) == "", "nothing is known yet"
    now, steps.n = 160.0, 4  # two of eight in a minute: what was there before took no time
    assert progress.time_left(steps) == "about 3 min left"
    steps.n = 10
    assert progress.time_left(steps) == ""
    steps.close()


def test_times_in_words():
    assert [progress.duration(s) for s in (0, 59, 60, 5400, 200000)] == ["0 s", "59 s", "1 min", "2 h", "2 d"]
