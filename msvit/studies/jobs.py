"""The training of a study's runs: in turn, or several at a time, each in a process with its share of the cores.

A run is the same as one that is trained alone on so many threads. Its process ends with the one that started it; what
it has written by then is taken up by the same command.
"""

import multiprocessing
import os
import signal
import threading
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd
import torch
from tqdm import tqdm

from ..checks import first_line
from ..progress import bar, in_notebook, time_left, visible
from ..training.files import RunError, RunWarning
from ..training.loop import train
from ..training.preflight import prepare_all
from ..training.recipe import Recipe
from ..training.runs import Run, read_metrics

if TYPE_CHECKING:
    from .watch import Watch

MOST_JOBS, GIB = 4, 2**30  # runs at a time; bytes, of which each should find two
POLL = 1.0  # seconds between two looks at what has been done
CURVES_APART = 10.0  # seconds between two drawings of the run that trains


def train_all(plan: list[tuple[str, Recipe]], folder: str | Path, jobs: int = 1) -> pd.DataFrame:
    """Train labelled recipes, each in the folder of its name, and return their summaries as a table.

    All of them are prepared first, so that nothing is trained if one of them could not be.

    Args:
        jobs: Runs at a time; 0: as many as suit this machine.
    """
    folder, titled, todo, table, curves = Path(folder), {}, {}, [], None
    prepare_all([recipe for _, recipe in plan], folder)
    for number, (label, recipe) in enumerate(plan, 1):
        title = f"{number}/{len(plan)}: {label}, seed {recipe.training.seed}"
        titled[title] = label, recipe
        if not (folder / recipe.run_name / "summary.json").exists() and recipe not in todo.values():
            todo[title] = recipe
    if in_notebook():
        from .watch import Watch

        curves = Watch(CURVES_APART)
    left, jobs = sum(epochs_left(recipe, folder) for recipe in todo.values()), min(jobs or suitable_jobs(), len(todo))
    with bar(title="all runs", total=left, unit="epochs", shown=visible() and left > 0, leave=True) as whole:
        if jobs > 1:
            _train_together(todo, folder, jobs, whole, curves)
        for title, (label, recipe) in titled.items():
            if jobs <= 1:
                _announce(title, whole)
            run = _train_here(recipe, folder, title, whole, curves)
            table.append({"method": label, "seed": recipe.training.seed, "run": recipe.run_name} | run.summary)
    if curves:
        curves.draw()
    return pd.DataFrame(table)


def epochs_left(recipe: Recipe, folder: Path) -> int:
    """Return how many epochs there are to train until a run is finished."""
    path, epochs = folder / recipe.run_name, recipe.training.epochs_dense + recipe.training.epochs
    if (path / "summary.json").exists():
        return 0
    done = (path / "metrics.jsonl").read_bytes().count(b"\n") if (path / "metrics.jsonl").exists() else 0
    return max(epochs - done, 0)


def suitable_jobs() -> int:
    """Return how many runs to train at a time: as many as PyTorch has threads, four at most; with a GPU, one."""
    if torch.cuda.is_available():
        return 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(min(torch.get_num_threads(), MOST_JOBS, memory // (2 * GIB)), 1)


def _announce(title: str, whole: tqdm):
    print(", ".join(filter(None, (title, time_left(whole)))), flush=True)


def _train_here(recipe: Recipe, folder: Path, title: str, whole: tqdm, curves: "Watch | None") -> Run:
    """Train a run in this process, and show in the bar of all how far they are."""

    def watch(line: dict[str, Any]):
        whole.update()
        if curves:
            curves(line)

    whole.set_description(f"run {title}", refresh=False)
    if curves:
        curves.begin(title)
    return train(recipe, folder / recipe.run_name, progress=visible(), watch=watch)


class Job(NamedTuple):
    """A run that is being trained, and where its process says how it went."""

    title: str
    process: multiprocessing.process.BaseProcess
    answer: Connection

    def finish(self):
        """Repeat the warnings of a process that has ended, and raise a RunError unless its run is finished."""
        self.process.join()
        try:
            said = self.answer.recv()
        except EOFError:
            code = self.process.exitcode
            said = {"warnings": [], "error": f"its process was killed ({code}); was there memory enough?"}
        for text in said["warnings"]:
            warnings.warn(f"{self.title}: {text}", RunWarning, stacklevel=2)
        if said["error"]:
            raise RunError(f"{self.title}: {said['error']}. The same command goes on from here.")


def _train_together(todo: dict[str, Recipe], folder: Path, jobs: int, whole: tqdm, curves: "Watch | None"):
    """Train recipes by their titles, several at a time, each once what it starts from is finished."""
    waiting, running, threads = dict(todo), {}, max(torch.get_num_threads() // jobs, 1)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imports once what every process has
    whole.set_description(f"{jobs} runs at a time", refresh=False)
    try:
        while waiting or running:
            unfinished = {todo[title].run_name for title in (*waiting, *running)}
            ready = [title for title, recipe in waiting.items() if not needs(recipe) & unfinished]
            for title in ready[: jobs - len(running)]:
                _announce(title, whole)
                running[title] = _start(context, title, waiting.pop(title), folder, threads)
            wait([job.process.sentinel for job in running.values()], POLL)
            whole.update(whole.total - whole.n - sum(epochs_left(recipe, folder) for recipe in todo.values()))
            if curves:
                _draw(curves, (first := next(iter(running))), folder / todo[first].run_name)
            for title in [title for title, job in running.items() if not job.process.is_alive()]:
                running.pop(title).finish()
    finally:
        for job in running.values():
            job.process.kill()
            job.process.join()


def _draw(curves: "Watch", title: str, path: Path):
    """Draw what another process has trained of a run by now."""
    if curves.title != title:
        curves.begin(title)
    for line in read_metrics(path)[len(curves.lines) :]:
        curves(line)


def needs(recipe: Recipe) -> set[str]:
    """Return the names of the runs beside it that a run starts from."""
    given = (recipe.model.name, recipe.model.gate)
    return {name.removeprefix("run:").removesuffix("/dense") for name in given if name.startswith("run:")}


def _start(context: Any, title: str, recipe: Recipe, folder: Path, threads: int) -> Job:
    answer, there = context.Pipe(duplex=False)
    process = context.Process(target=_train, args=(recipe.to_dict(), folder / recipe.run_name, threads, there))
    process.start()
    there.close()
    return Job(title, process, answer)


def _train(settings: dict[str, Any], folder: Path, threads: int, answer: Connection):
    """Train in a process of its own, and say how it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one that started it ends it
    threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()
    torch.set_num_threads(threads)
    error = ""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            train(Recipe.from_dict(settings), folder, progress=False)
        except Exception as raised:  # whatever it is, the other process says it
            error = f"{type(raised).__name__}: {first_line(raised)}"
    answer.send({"warnings": [str(w.message) for w in caught if issubclass(w.category, RunWarning)], "error": error})


def _end_with(parent: multiprocessing.process.BaseProcess):
    wait([parent.sentinel])
    os._exit(1)
