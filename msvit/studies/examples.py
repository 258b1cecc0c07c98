"""A few small runs, for notebooks that show runs where nothing has been trained yet."""

import time
from pathlib import Path

from ..training.files import RunBusy
from ..training.recipe import Recipe
from .params import in_repo
from .study import FULL, StudyRow, finished, run_rows

EXAMPLES = "examples"  # folder of these runs


def examples(folder: Path):
    """Train a few small runs if there is none in the repository's own folder: a notebook then has something to show.

    Another folder has been typed, and must be there and have some. While another process trains the examples, as where
    two notebooks are begun at once, it is waited for.
    """
    own = folder == in_repo("runs")
    if own:
        folder.mkdir(parents=True, exist_ok=True)
    names = list(finished(folder)["run"])
    if not own and not names:
        raise ValueError(f"there is no finished run under {folder}; name a folder that has some")
    base = Recipe(epochs_dense=3, epochs=2, train_n=2048, val_n=512)
    rows = [StudyRow(FULL, {}), StudyRow("random mask", {"gating": "random"})]
    while own and all(name.startswith(EXAMPLES) for name in names):
        try:
            run_rows(base, rows, [0], folder / EXAMPLES)
            break
        except RunBusy:
            time.sleep(1)
