"""The report: all finished runs of a folder as tables, figures and one self-contained page.

Nothing here is measured: every number is read from the runs' summaries. Run twice, it writes the same bytes but for the
date on the page.
"""

import base64
import datetime
import html
import json
from pathlib import Path

import pandas as pd

from .. import plots
from ..training.names import method_name
from ..training.recipe import FIELDS
from .study import SUMMARY_COLUMNS, finished, summarise


def groups(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return title -> the runs that may be compared, on the same pictures at the same size, with their methods."""
    table = table.assign(method=[method_name(run) for _, run in table.iterrows()])
    budget = table["target"].map("{:.2f}".format).where(table["epochs"] > 0, "")
    table = table.assign(budget=budget, label=table["method"] + budget.map(lambda b: f" at {b}" if b else ""))
    order = table.sort_values(["data", "size", "method", "budget", "seed"])
    return {f"{data}, {size} px": part for (data, size), part in order.groupby(["data", "size"], sort=True)}


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
    summary.to_csv(folder / f"{name}.csv")
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
    parts = []
    for title, group in groups(table).items():
        name = "".join(c if c.isalnum() else "-" for c in title).strip("-")
        shown = write_tables(group, out / "tables", name, by="label")
        plots.save(plots.tradeoff(group, "label"), out / "figures", f"tradeoff-{name}", ("png", "svg", "pdf"))
        parts.append(_section(title, shown, out / "figures" / f"tradeoff-{name}.png", group))
    page = PAGE.format(date=datetime.date.today().isoformat(), parts="\n".join(parts), runs=len(table))
    path = out / "index.html"
    path.write_text(page)
    return path


def _section(title: str, shown: pd.DataFrame, picture: Path, group: pd.DataFrame) -> str:
    image = base64.b64encode(picture.read_bytes()).decode()
    same = {k: group[k].iloc[0] for k in FIELDS if k in group and k not in ("data", "size") and group[k].nunique() == 1}
    settings = html.escape(json.dumps(same, default=str))
    return (
        f"<h2>{html.escape(title)}</h2>{shown.to_html(border=0)}"
        f"<img alt='accuracy against MACs, {html.escape(title)}' src='data:image/png;base64,{image}'>"
        f"<details><summary>settings that all of these runs share</summary><code>{settings}</code></details>"
    )


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>msvit report</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }}
th, td {{ padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd }}
th:first-child {{ text-align: left }}
img {{ max-width: 100%; display: block; margin: 1rem 0 }}
code {{ overflow-wrap: anywhere }}
</style>
<h1>msvit report</h1>
<p>{runs} finished runs; made on {date}. Figures are means ± one standard deviation over seeds.
MACs include the gate.</p>
{parts}
</html>
"""
