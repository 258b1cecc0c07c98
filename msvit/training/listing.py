"""The list of runs that `msvit runs` prints: chosen, sorted, and narrow enough for a terminal."""

import math
import re
import time
from pathlib import Path

import pandas as pd

from ..checks import one_of, plain
from ..progress import duration
from . import runs
from .names import method_name
from .recipe import RecipeError

CONDITION = re.compile(r"(\w[\w.]*)(<=|>=|!=|=|<|>)(.*)")
BEST_FIRST = ("accuracy", "miou", "dense_accuracy", "dense_miou")
WIDE = ("run", "status", "epoch", "size", "model", "tokens", "coarse", "fine_object", "fine_rest", "dense_accuracy")
NARROW = 14  # letters of a name in the narrow list


def table(folder: str | Path, where: list[str] = (), sort: str = "") -> pd.DataFrame:
    """Return the runs that fulfil all conditions, with their `method` and their `age` in seconds, the newest first.

    Args:
        where: Such as "data=scenes:easy", "accuracy>0.9", "method=MSViT gbas"; names are those of settings and results.
        sort: A column to sort by instead of the age; accuracies begin with the best.
    """
    found = runs.load(folder)
    if found.empty:
        return found
    whole = found["status"] != "damaged"
    found["method"] = [method_name(run) if good else "" for good, (_, run) in zip(whole, found.iterrows(), strict=True)]
    found["age"] = [_age(Path(folder) / name) for name in found["run"]]
    for condition in where:
        found = found[_fulfils(found, condition)]
    order = one_of("sort", sort or "age", found.columns, RecipeError)
    best_first, key = order in BEST_FIRST, lambda values: values.map(str) if values.dtype == object else values
    return found.sort_values(order, ascending=not best_first, kind="stable", key=key).reset_index(drop=True)


def text(found: pd.DataFrame, wide: bool = False) -> str:
    """Return the table for people: in less than 100 columns, or with more of each run."""
    found = found.reindex(
        columns=found.columns.union(["data", "epochs", "target", "seed"], sort=False)
    )  # if all damaged
    names = [plain(name) for name in found["run"]]
    shown = pd.DataFrame({"id": [name[-6:] if "-" in name[-8:] else name[-12:] for name in names]})
    shown["method"] = found["method"].where(found["status"] == "finished", found["method"] + f" ({'…'})")
    shown["method"] = [_cut(plain(name), 34) for name in shown["method"]]
    data = ["" if name != name else plain(name).rsplit("/", 1)[-1] for name in found["data"]]
    shown["data"] = [_cut(name, NARROW) for name in data]
    gated = found["epochs"] > 0
    shown["budget"] = [f"{t:.0%}" if g else "" for t, g in zip(found["target"], gated, strict=True)]
    shown["seed"] = [f"{seed:.0f}" if seed == seed else "" for seed in found["seed"]]
    for name, title in (("accuracy", "acc. %"), ("miou", "mIoU %"), ("macs", "MACs %")):
        if name in found and found[name].notna().any():
            shown[title] = ["" if pd.isna(value) else f"{100 * value:.1f}" for value in found[name]]
    shown["age"] = [duration(seconds) if seconds == seconds else "" for seconds in found["age"]]
    if wide:
        rest = found[[name for name in WIDE if name in found]].map(lambda v: plain(v) if isinstance(v, str) else v)
        shown = pd.concat([shown, rest.map(lambda v: f"{v:.4g}" if isinstance(v, float) and v == v else v)], axis=1)
    return shown.to_string(index=False, na_rep="")


def differences(first: str | Path, second: str | Path) -> pd.DataFrame:
    """Return what differs between two runs, settings before results: a row each, a column for each run."""
    pair = [runs.read(folder) for folder in (first, second)]
    settings = pair[0].recipe.difference(pair[1].recipe)
    results = [run.summary or {} for run in pair]
    numbers = {
        name: (results[0][name], results[1][name])
        for name in results[0].keys() & results[1].keys()
        if isinstance(results[0][name], int | float) and results[0][name] != results[1][name]
    }
    rows = [("setting", name, *values) for name, values in settings.items()]
    rows += [("result", name, *numbers[name]) for name in sorted(numbers)]
    names = [str(first), str(second)]
    if len({"what", "name", *names}) < 4:  # columns have names of their own
        names = ["first", "second"]
    return pd.DataFrame(rows, columns=["what", "name", *names])


def _age(folder: Path) -> float:
    """Return the seconds since something was last written into a run's folder; NaN where its files lead nowhere."""
    files = (folder / name for name in ("summary.json", "metrics.jsonl", "settings.json"))
    return time.time() - next((path.stat().st_mtime for path in files if path.exists()), math.nan)


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def _fulfils(found: pd.DataFrame, condition: str) -> pd.Series:
    parts = CONDITION.fullmatch(condition)
    if parts is None:
        raise RecipeError(f"where={condition!r}: expected NAME=VALUE, NAME>VALUE or NAME<VALUE, as in accuracy>0.9")
    name, sign, value = parts.groups()
    column = found[one_of("where", name, found.columns, RecipeError)]
    if sign in ("=", "!="):
        typed = column.astype(str).str.lower() == value.lower()
        equal = typed | (pd.to_numeric(column, errors="coerce") == pd.to_numeric(value, errors="coerce"))
        return equal if sign == "=" else ~equal
    try:
        limit = float(value)
    except ValueError:
        raise RecipeError(f"where={condition!r}: {value!r} is no number to compare with") from None
    numbers = pd.to_numeric(column, errors="coerce")
    return {"<": numbers < limit, ">": numbers > limit, "<=": numbers <= limit, ">=": numbers >= limit}[sign]
