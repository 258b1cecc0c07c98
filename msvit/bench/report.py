"""The report of `msvit bench`: all timings with their environment, as JSON, CSV, a page of Markdown and a figure."""

import dataclasses
import json
import platform
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..training.environment import environment
from ..training.files import write_csv, write_whole
from .settings import BenchSettings
from .timing import BASES, Timing

Report = dict[str, Any]
CSV_COLUMNS = (
    *("model", "size", "batch", "dtype", "coarse", "axis", "row", "label", "kind", "tokens", "macs"),
    *("ms", "ms_low", "ms_high", "pictures_per_s", "memory_mb", "promised"),
    *("vs_dense", "vs_dense_low", "vs_dense_high", "efficiency_dense"),
    *("vs_dense_linear", "vs_dense_linear_low", "vs_dense_linear_high", "efficiency_dense_linear"),
    *("vs_dense_compiled", "vs_dense_compiled_low", "vs_dense_compiled_high", "efficiency_dense_compiled"),
    *("of", "share", "settings", "note"),
)
RATIO_HEADINGS = dict(zip(BASES, ("x dense", "x same linear", "x compiled"), strict=True))
ALWAYS_SHOWN = ("method", "GMACs", "ms (quartiles)", "pictures/s")
HEADINGS = (*ALWAYS_SHOWN, "MACs promise", *RATIO_HEADINGS.values(), "memory")
PAGE_NOTE = """\
Median and quartiles over {repeats} repeats; in each repeat every method is called once, in a new order. Ratios (x) are
medians over repeats, and in brackets the share of what MACs promise. GMACs are per picture, as torch counts them while
the function runs; for inference the closed form agrees. `n % of` instead of a ratio: its part of another method's time.
Training steps are forward and backward, without the optimiser's step and the gate loss, at 60 % coarse regions.
Memory is what PyTorch's tensors take beyond weights and pictures.
"""


def new_report(settings: BenchSettings, device: torch.device) -> Report:
    """Return a report that has no timings yet; nothing in it names a folder of this machine."""
    return {
        "environment": environment(device, 1) | {"dtype": settings.dtype, "cpu": _cpu_name()},
        "settings": dataclasses.asdict(settings) | {"run": Path(settings.run).name, "out": ""},
        "interrupted": False,
        "problems": [],
        "rows": [],
    }


def _cpu_name() -> str:
    """Return the processor's name, where the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def stem(report: Report) -> str:
    """Return the name of its files, without the suffix."""
    return "scaling" if report["settings"]["scaling"] else "bench"


def write_report(report: Report, folder: str | Path):
    """Write data and page, each a whole file or none; an empty report writes nothing."""
    if not report["rows"]:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / stem(report)
    write_whole(path.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    table = pd.DataFrame(report["rows"], dtype=object).reindex(columns=CSV_COLUMNS)
    table["settings"] = [json.dumps(timing["settings"]) if timing.get("settings") else "" for timing in report["rows"]]
    write_csv(table, path.with_suffix(".csv"))
    write_whole(path.with_suffix(".md"), _page(report).encode())


def draw_figure(report: Report, folder: str | Path, tell: Callable[[str], object]):
    """Draw the figure, PNG and SVG, if there is matplotlib."""
    if not any("ms" in timing for timing in report["rows"]):
        return
    try:
        from ..plots import bench as figures
        from ..plots.style import plt, save
    except ModuleNotFoundError as error:
        tell(f"no figure: {error.name} is not installed; pip install 'msvit[notebooks]'")
        return
    draw = figures.gains_by_axis if report["settings"]["scaling"] else figures.speeds
    with tempfile.TemporaryDirectory() as scratch:
        plt.close(save(draw(report["rows"]), scratch, stem(report)))
        for path in Path(scratch).iterdir():
            write_whole(Path(folder) / path.name, path.read_bytes())


def _page(report: Report) -> str:
    """Return where and with what it was measured, and a table for each case."""
    found, scaling = report["environment"], report["settings"]["scaling"]
    on = found["device"] if found["cuda"] else f"{found['cpu'] or found['device']}, {found['threads']} threads"
    repeats = max((len(timing["seconds"]) for timing in report["rows"] if "seconds" in timing), default=0)
    lines = [
        f"# {'Cost against size, batch and share of coarse regions' if scaling else 'On the clock'}",
        "",
        f"{on}; {found['dtype']}; torch {found['torch']}, timm {found['timm']}, msvit {found['msvit']} "
        f"({found['commit']}); {found['started']}.",
        *(["It was interrupted."] if report["interrupted"] else []),
        *(f"**Not to be trusted**: {problem}." for problem in report["problems"]),
        "",
        PAGE_NOTE.format(repeats=repeats),
        summary(report, heading="## {}\n"),
    ]
    return "\n".join(lines) + "\n"


def summary(report: Report, heading: str = "{}") -> str:
    """Return a heading and a table for each case, as Markdown that a terminal shows well too."""
    cases = groupby(report["rows"], _case_title)
    return "\n\n".join(f"{heading.format(title)}\n{_table(list(timings))}" for title, timings in cases)


def _case_title(timing: Timing) -> str:
    varied = f" (by {timing['axis']})" if timing["axis"] else ""
    return f"{timing['model']}, {timing['size']} px, batch {timing['batch']}, {timing['coarse']:.0%} coarse{varied}"


def _table(timings: list[Timing]) -> str:
    """Return the table, without the columns that nothing is in, and the notes below it."""
    cells = pd.DataFrame([_cells(timing) for timing in timings])
    kept = [name for name in HEADINGS if name in ALWAYS_SHOWN or name in cells]
    table = cells.reindex(columns=kept).fillna("").to_markdown(index=False, tablefmt="github", disable_numparse=True)
    return table + "".join(f"\n\n{timing['label']}: {timing['note']}." for timing in timings if timing["note"])


def _cells(timing: Timing) -> dict[str, str]:
    """Return what the table says of a timing, by heading."""
    cells = {"method": timing["label"]}
    if "ms" not in timing:
        return cells
    cells["ms (quartiles)"] = f"{timing['ms']:.4g} ({timing['ms_low']:.4g} to {timing['ms_high']:.4g})"
    if timing.get("macs"):
        cells["GMACs"] = f"{timing['macs'] / 1e9:.3g}"
    if "pictures_per_s" in timing:
        cells["pictures/s"] = f"{timing['pictures_per_s']:.4g}"
    if timing.get("promised"):
        cells["MACs promise"] = f"{timing['promised']:.2f}"
    if "memory_mb" in timing:
        cells["memory"] = f"{timing['memory_mb']:.1f} MiB"
    if "share" in timing:
        cells["x dense"] = f"{timing['share']:.1%} of {timing['of']}"
    for base, heading in RATIO_HEADINGS.items():
        key = base.replace("-", "_")
        if f"vs_{key}" in timing:
            efficiency = timing[f"efficiency_{key}"]
            cells[heading] = f"{timing[f'vs_{key}']:.2f}" + (f" ({efficiency:.0%})" if efficiency else "")
    return cells
