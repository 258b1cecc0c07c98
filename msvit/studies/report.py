"""The report: all finished runs of a folder as tables, figures and one self-contained page.

Nothing here is measured: every number is read from the runs' summaries, and only gate maps ask the models. Run twice,
it writes the same bytes but for the date on the page.
"""

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from .. import plots
from ..checks import cut, first_line, plain
from ..training.files import RunWarning, write_csv
from ..training.names import method_name
from ..training.recipe import FIELDS, HARMLESS
from .inspect import best_gates, draw_gate_maps, inspect_runs
from .page import write_page
from .study import SUMMARY_COLUMNS, finished, summarise


def groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return title -> the runs that may be compared, on the same pictures at the same size, with their methods.

    Runs of one label differ in the seed alone.
    """
    table = table.assign(method=[method_name(run) for _, run in table.iterrows()])
    budget = table["target"].map("{:.2f}".format).where(table["epochs"] > 0, "")
    table = table.assign(budget=budget, label=table["method"] + budget.map(lambda b: f" at {b}" if b else ""))
    table["label"] = told_apart(table)
    order = table.sort_values(["data", "size", "method", "budget", "label", "seed"])
    return {plain(f"{data}, {size} px"): part for (data, size), part in order.groupby(["data", "size"], sort=True)}


def told_apart(table: pd.DataFrame) -> list[str]:
    """Return the labels of runs, with the settings behind them in which runs of one label differ."""
    made = experiments(table)
    together = defaultdict(list)
    for place, row in enumerate(table.to_dict("records")):
        together[row["data"], row["size"], row["label"]].append(place)
    labels = table["label"].tolist()
    for places in together.values():
        names = dict.fromkeys(name for place in places for name in made[place])
        varied = [name for name in names if len({repr(made[place].get(name)) for place in places}) > 1]
        for place in places:
            values = [(name, made[place].get(name)) for name in varied]
            labels[place] += "".join(f", {k}={f'{v:g}' if isinstance(v, float) else v}" for k, v in values)
    return [plain(label) for label in labels]


def experiments(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return what was set for each run, but for the seed and what changes no result.

    In place of the name of a run that it starts from, which holds a seed, stand that one's settings (`start.lr`), or
    those of the run whose gate it took over (`gate.lr`), if it is in the table.
    """
    rows = {row["run"]: row for row in table.to_dict("records")}

    def settings(row: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
        found = {k: v for k, v in row.items() if k.partition(".")[0] in FIELDS and k not in ("seed", *HARMLESS)}
        found = {k: None if v != v else v for k, v in found.items()}  # NaN, where others have such a setting
        for name, title in (("model", "start"), ("gate", "gate")):
            other = PurePosixPath(str(found[name]).removeprefix("run:"))
            stage = "dense" if other.name == "dense" else "whole"
            other = str(PurePosixPath(row["run"]).parent / (other.parent if stage == "dense" else other))
            if str(found[name]).startswith("run:") and other in rows and other not in above:
                before = settings(rows[other], (*above, other))
                found[name] = before[name]
                found |= {f"{title}.{k}": v for k, v in before.items()} | {f"{title}.stage": stage}
        return found

    return [settings(row) for row in rows.values()]


def file_names(titles: Iterable[str]) -> dict[str, str]:
    """Return a file's name for each title; two that would share one are told apart."""
    names = {title: cut("".join(c if c.isalnum() else "-" for c in title).strip("-")[:80], 240) for title in titles}
    count = Counter(name.lower() for name in names.values())
    return {
        title: name if count[name.lower()] == 1 else f"{name}-{hashlib.sha256(title.encode()).hexdigest()[:6]}"
        for title, name in names.items()
    }


def readable(summary: pd.DataFrame) -> pd.DataFrame:
    """Return means ± spread as text, columns named with their units."""
    out = pd.DataFrame({"runs": summary["seeds"].astype(int)})
    for name, title in SUMMARY_COLUMNS.items():
        if name in summary:
            values = summary.filter([name, f"{name} ±"]) * (100 if "%" in title else 1)
            out[title] = [" ± ".join(f"{v:.1f}" for v in pair if not pd.isna(v)) for pair in values.to_numpy()]
    return out


def write_tables(table: pd.DataFrame, folder: Path, name: str, by: str = "method") -> pd.DataFrame:
    """Write CSV with full precision, Markdown and LaTeX (with booktabs) for reading; return the readable table."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = summarise(table, by).rename_axis("label")
    write_csv(summary, folder / f"{name}.csv", index=True)
    shown = readable(summary)
    named = shown.rename_axis("method").reset_index()
    (folder / f"{name}.md").write_text(named.to_markdown(index=False, disable_numparse=True) + "\n")
    latex = named.to_latex(index=False, escape=True, column_format="l" + "r" * len(shown.columns))
    (folder / f"{name}.tex").write_text(latex.replace("±", r"$\pm$"))
    return shown


def report(runs: str | Path, out: str | Path) -> Path:
    """Write tables, figures and index.html of all finished runs under `runs` into `out`, and return the page."""
    out, table = Path(out), finished(runs)
    if table.empty:
        raise ValueError(f"there is no finished run under {runs}; train something first: `make ablation`")
    shown, maps, found = {}, {}, groups(table)
    names = file_names(found)
    for title, group in found.items():
        name = names[title]
        shown[title] = write_tables(group, out / "tables", name, by="label")
        note = f"{title}, {len(group)} runs"
        figure = plots.with_note(plots.tradeoff(group, "label"), note)
        plt.close(plots.save(figure, out / "figures", f"tradeoff-{name}", ("png", "svg", "pdf")))  # the page shows it
        if figure := gate_maps(Path(runs), group):
            plt.close(plots.save(plots.with_note(figure, note), out / "figures", f"gate_maps-{name}", ("png",)))
            maps[title] = out / "figures" / f"gate_maps-{name}.png"
    write_page(out / "index.html", found, shown, Path(runs), maps)
    return out / "index.html"


def gate_maps(runs: Path, group: pd.DataFrame, methods: int = 3, pictures: int = 6) -> Figure | None:
    """Draw the tokens of the group's most accurate learned gates, one run of each label.

    None if there are no such, or if their models or pictures are not here any more.
    """
    best = best_gates(group, methods)
    there = best[[(runs / name / "config.json").exists() for name in best["run"]]]
    if there.empty:
        return None
    try:
        return draw_gate_maps(inspect_runs(runs, there.assign(method=there["label"]), pictures), pictures)
    except (OSError, ValueError, RuntimeError) as error:
        warnings.warn(f"no gate maps of {', '.join(there['run'])}: {first_line(error)}", RunWarning, stacklevel=2)
        return None
