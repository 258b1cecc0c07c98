"""Studies: sets of runs that answer a question. Every run is trained once and found again by its name.

The dense model of a seed is trained once, and every other row of a study starts from it.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from ..checks import one_of
from ..models.fit_reducer import fit_reducer
from ..reducers.registry import REDUCERS
from ..training import runs
from ..training.build import build, scales_of
from ..training.names import mask_label
from ..training.recipe import GATINGS, LEARNED, MEAN_LOSSES, Recipe, RecipeError, parse
from .jobs import train_all

# What each part of the method is replaced by when it is switched off.
PARTS: dict[str, dict[str, Any]] = {
    "gbas": {"loss": "l0"},
    "trim": {"trim": "none"},
    "learned_gate": {"gating": "random"},
    "pretrained_dense": {},  # the row trains from scratch, for as many epochs in all
    "share_embedding": {"coarse_embed": "own"},
    "warm_start": {"gate_start": "none"},
    "calibrate": {"calibrate": False},
}
MASKS = tuple(name for name in GATINGS if name not in (*LEARNED, "fine"))
FULL = "MSViT"
SUMMARY_COLUMNS = {  # of runs, and their titles with the units
    "accuracy": "accuracy (%)",
    "miou": "mIoU (%)",
    "macs": "MACs (% of dense)",
    "tokens": "tokens",
    "coarse": "coarse regions (%)",
    "decided": "decided gates (%)",
    "fine_object": "fine where the object is (%)",
    "fine_rest": "fine elsewhere (%)",
    "pictures_per_s": "pictures/s",
    "seconds": "training (s)",
}
# Reducers alone, and after the gate. How many tokens some leave is not known beforehand: no gate can budget for them.
REDUCER_METHODS = (*REDUCERS, *(f"gate+{name}" for name, reducer in REDUCERS.items() if not reducer.adaptive))


class StudyRow(NamedTuple):
    """A line of a study's table: its name and the settings that make it."""

    label: str
    changes: dict[str, Any]
    dense: bool = True  # starts from the seed's dense model


def ablation(
    switches: Mapping[str, bool],
    losses: Iterable[str],
    masks: Iterable[str],
    one_by_one: bool = False,
    reducers: Iterable[StudyRow] = (),
    controllers: Iterable[str] = (),
) -> list[StudyRow]:
    """Return the rows of the ablation: the full method, the method without what is switched off, other losses, masks.

    With `gbas` off no row is trained with GBaS: L0 stands in its place, and nothing else differs.

    Args:
        switches: Which parts are on, by the names of PARTS.
        losses: Gate losses; GBaS is the full method's own.
        masks: Decisions that are not learned, at the same MACs.
        one_by_one: Add a row for each part left out alone.
        reducers: The rows of `reducer_rows`.
        controllers: "bias" and "projection": a row for each alone, and beside each loss that is another method with it.
    """
    off = [name for name in PARTS if not switches[name]]
    rows = [StudyRow(FULL, {})] if switches["gbas"] else []
    if off:
        rows.append(without(off))
    if one_by_one:
        never = [] if switches["gbas"] else ["gbas"]
        rows += [without([*never, name]) for name in PARTS if name not in never]
    rows += [StudyRow(f"{FULL}, {loss}", {"loss": loss}) for loss in losses if loss != "gbas"]
    for control in controllers:
        rows.append(StudyRow(f"{FULL}, controller only ({control})", {"loss": "none", "control": control}))
        rows += [
            StudyRow(f"{FULL}, {loss} + {control}", {"loss": loss, "control": control})
            for loss in losses
            if loss != "none"
            and not (control == "projection" and loss in MEAN_LOSSES)
            and (loss != "gbas" or switches["gbas"])
        ]
    rows += [StudyRow(mask_label(name), {"gating": name}) for name in masks]
    rows += reducers
    different: dict[str, StudyRow] = {}
    for row in rows:
        different.setdefault(repr((sorted(row.changes.items()), row.dense)), row)
    return list(different.values())


def reducer_rows(names: Iterable[str], base: Recipe) -> list[StudyRow]:
    """Return a row for each reducer, with the setting whose MACs are nearest to the recipe's target.

    Args:
        names: Of REDUCER_METHODS. After a gate, "gate+tome", the reducer saves half of what is to be saved and the
            gate, whose budget counts the reducer, the rest.
    """
    names = [one_of("method", name, REDUCER_METHODS) for name in names]
    vit, rows = build(base, Path()).vit if names else None, []
    for name in names:
        gate, _, reducer = name.rpartition("+")
        own = fit_reducer(reducer, vit, (1 + base.gating.target) / 2 if gate else base.gating.target)
        changes = ({} if gate else {"gating": "fine"}) | {"reducer": reducer, "reducer_settings": own}
        rows.append(StudyRow(name.replace("gate+", f"{FULL} + "), changes))
    return rows


def typed_rows(texts: Iterable[str]) -> list[StudyRow]:
    """Return a row for each text of settings, as in "control=bias gate_lr=1e-2", which is its name too.

    Another name stands before a colon: "own name: control=bias".
    """
    found = []
    for text in texts:
        name, _, settings = text.rpartition(": ")
        pairs = [part.partition("=") for part in settings.split()]
        found.append(StudyRow(name or text, {key: parse(key, value) for key, _, value in pairs}))
    return found


def check_two_scales(recipe: Recipe, what: str):
    """Raise a RecipeError unless a recipe's model decides about regions of one size alone."""
    if len(scales := scales_of(recipe)) > 2:
        raise RecipeError(
            f"scales={list(scales)}: {what} is for one decision about each region; use scales={list(scales[:2])}"
        )


def without(parts: list[str]) -> StudyRow:
    """Return the full method less some parts."""
    changes = {k: v for name in parts for k, v in PARTS[name].items()}
    names = ", ".join(name.replace("_", " ") for name in parts)
    return StudyRow(f"without {names}", changes, "pretrained_dense" not in parts)


def run_rows(
    base: Recipe, rows: Iterable[StudyRow], seeds: Iterable[int], folder: str | Path, jobs: int = 1
) -> pd.DataFrame:
    """Train what is not there yet and return a table with one line per row and seed, the dense model's first.

    Args:
        base: Settings of the full method; `epochs_dense` are those of the dense model that the rows start from.
        folder: Where the runs are; running again, after an interruption too, only trains what is missing.
        jobs: Runs at a time, each with its share of the cores; 0: as many as suit this machine.
    """
    plan = []
    for seed in seeds:
        dense = base.replace(seed=seed, epochs=0)
        plan += [("dense", dense)] + [(row.label, recipe_of(base, row, dense, seed)) for row in rows]
    return train_all(plan, folder, jobs)


def recipe_of(base: Recipe, row: StudyRow, dense: Recipe, seed: int) -> Recipe:
    """Return the settings of a row: from the seed's dense model, or from scratch in one stage as long as both."""
    epochs = base.training.epochs_dense + base.training.epochs
    start = {"model": f"run:{dense.run_name}"} if row.dense else {"epochs": epochs}
    recipe = base.replace(seed=seed, epochs_dense=0, **start, **row.changes)
    given_up = not recipe.gating.shaped and "control" not in row.changes
    return recipe.replace(control="none") if given_up else recipe  # a controller is the learned gates' alone


def transfer(base: Recipe, second: Mapping[str, Any], seeds: Iterable[int], folder: str | Path) -> pd.DataFrame:
    """Train a second model with its own gate, with the gate of the recipe's, frozen or trained on, and with a mask.

    Args:
        second: What is different there: the backbone (`model`), the pictures (`data`), the `task`.
    """
    plan, source = [], []
    for seed in seeds:
        teacher = base.replace(seed=seed, epochs=0)
        taught = base.replace(model=f"run:{teacher.run_name}", seed=seed, epochs_dense=0)
        dense = base.replace(**second, seed=seed, epochs=0)
        own = dense.replace(model=f"run:{dense.run_name}", epochs_dense=0, epochs=base.training.epochs)
        source += [("first, dense", teacher), ("first", taught)]
        plan += [
            ("dense", dense),
            ("own gate", own),
            ("gate of the first, frozen", own.replace(gate=f"run:{taught.run_name}", gate_lr=0.0)),
            ("gate of the first, trained on", own.replace(gate=f"run:{taught.run_name}")),
            ("random mask", own.replace(gating="random")),
        ]
    return train_all(source + plan, folder)[len(source) :].reset_index(drop=True)


def first_seed(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the first seed, but for the dense model that they start from."""
    return table[(table["seed"] == table["seed"].min()) & (table["method"] != "dense")]


def who_decides(methods: Iterable[str]) -> list[str]:
    """Return the first method and those that decide in another way: not those in which another part alone is off."""
    names = list(methods)
    random = without(["learned_gate"]).label
    return [name for name in names if name in (names[0], random) or not name.startswith("without ")]


def summarise(table: pd.DataFrame, by: str = "method", columns: Iterable[str] = SUMMARY_COLUMNS) -> pd.DataFrame:
    """Return mean and spread over seeds, in the order in which the methods came."""
    columns = [column for column in columns if column in table]
    grouped = table.groupby(by, sort=False)[columns]
    mean, spread = grouped.mean(), grouped.std(ddof=1)
    out = pd.DataFrame({"seeds": grouped.size()})
    for column in columns:
        out[column], out[f"{column} ±"] = mean[column], spread[column]
    return out.dropna(axis=1, how="all")


def finished(folder: str | Path) -> pd.DataFrame:
    """Return the finished runs of a folder; a run that was killed leaves no summary and is not among them."""
    table = runs.load(folder)
    return table[table["status"] == "finished"].reset_index(drop=True)


def choose(found: Mapping[str, pd.DataFrame], data: str = "") -> str:
    """Return the title of the group of comparable runs that is on `data`, or of the largest."""
    fits = {title: len(runs) for title, runs in found.items() if not data or runs["data"].iloc[0] == data}
    if not fits:
        raise ValueError(f"data={data!r}: no finished run is on these pictures; there are {', '.join(found)}")
    return max(fits, key=fits.get)
