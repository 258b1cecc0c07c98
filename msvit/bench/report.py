"""What `msvit bench` found, as JSON, CSV, a page of Markdown and figures."""

import csv
import io
import json
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from ..training.files import write_whole

Record = dict[str, Any]  # a row of the table
COLUMNS = (
    *("model", "size", "batch", "dtype", "coarse", "axis", "row", "label", "kind", "tokens", "macs"),
    *("ms", "ms_low", "ms_high", "pictures_per_s", "memory_mb", "promised"),
    *("vs_dense", "vs_dense_low", "vs_dense_high", "efficiency_dense"),
    *("vs_dense_linear", "vs_dense_linear_low", "vs_dense_linear_high", "efficiency_dense_linear"),
    *("vs_dense_compiled", "vs_dense_compiled_low", "vs_dense_compiled_high", "efficiency_dense_compiled"),
    *("of", "share", "settings", "note"),
)
HEAD = ("row", "GMACs", "ms (quartiles)", "pictures/s", "MACs promise", "x dense", "x same linear", "x compiled")
ABOUT = """\
Median and quartiles of {turns} turns; in each turn every row is called once, in a new order. Ratios (x) are medians
over turns, and in brackets the share of what MACs promise. GMACs are per picture, as torch counts them while the
function runs; for inference the closed form agrees. `n % of` instead of a ratio: what part of another row's time it is.
Training steps are forward and backward, without the optimiser's step and the gate loss, at 60 % coarse regions.
Memory is what PyTorch's tensors take beyond weights and pictures.
"""


def stem(report: dict[str, Any]) -> str:
    return "scaling" if report["settings"]["scaling"] else "bench"


def write(report: dict[str, Any], folder: str | Path):
    """Data and page, each a whole file or none; an empty report writes nothing."""
    if not report["rows"]:
        return
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / stem(report)
    write_whole(path.with_suffix(".json"), (json.dumps(report, indent=2) + "\n").encode())
    write_whole(path.with_suffix(".csv"), _csv(report["rows"]).encode())
    write_whole(path.with_suffix(".md"), page(report).encode())


def draw(report: dict[str, Any], folder: str | Path, tell: Callable[[str], object]):
    """The figure, PNG and SVG, if there is matplotlib."""
    if not any("ms" in row for row in report["rows"]):
        return
    try:
        from ..plots import runs as figures
    except ModuleNotFoundError as error:
        tell(f"no figure: {error.name} is not installed; pip install 'msvit[notebooks]'")
        return
    name = stem(report)
    with tempfile.TemporaryDirectory() as scratch:
        figures.plt.close(figures.save(getattr(figures, name)(report["rows"]), scratch, name))
        for path in Path(scratch).iterdir():
            write_whole(Path(folder) / path.name, path.read_bytes())


def _csv(rows: list[Record]) -> str:
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"settings": json.dumps(row["settings"]) if row.get("settings") else ""})
    return out.getvalue()


def page(report: dict[str, Any]) -> str:
    """Where and with what it was measured, and a table for each batch."""
    found, settings = report["environment"], report["settings"]
    on = found["device"] if found["cuda"] else f"{found['cpu'] or found['device']}, {found['threads']} threads"
    turns = max((len(row["seconds"]) for row in report["rows"] if "seconds" in row), default=0)
    lines = [
        f"# {'Cost against size, batch and share of coarse regions' if settings['scaling'] else 'On the clock'}",
        "",
        f"{on}; {found['dtype']}; torch {found['torch']}, timm {found['timm']}, msvit {found['msvit']} "
        f"({found['commit']}); {found['started']}.",
        *(["It was interrupted."] if report["interrupted"] else []),
        *(f"**Not to be trusted**: {problem}." for problem in report["problems"]),
        "",
        ABOUT.format(turns=turns),
    ]
    for title, rows in batches(report["rows"]):
        lines += [f"## {title}", "", *table(rows), ""]
    return "\n".join(lines)


def batches(rows: list[Record]) -> list[tuple[str, list[Record]]]:
    """The rows of each batch, and what the batch is."""

    def title(row: Record) -> str:
        varied = f" (by {row['axis']})" if row["axis"] else ""
        return f"{row['model']}, {row['size']} px, batch {row['batch']}, {row['coarse']:.0%} coarse{varied}"

    return [(name, list(part)) for name, part in groupby(rows, title)]


def table(rows: list[Record]) -> list[str]:
    """Lines of Markdown; columns that nothing is in are left out."""
    cells = [_cells(row) for row in rows]
    memory = any("memory_mb" in row for row in rows)
    head = [*HEAD, "memory"] if memory else list(HEAD)
    kept = [i for i in range(len(head)) if i < 4 or any(line[i] for line in cells)]
    widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
    lines = [[text.ljust(width) for text, width in zip(line, widths, strict=False)] for line in [head, *cells]]
    lines.insert(1, ["-" * width for width in widths])
    notes = [f"\n{row['label']}: {row['note']}." for row in rows if row["note"]]
    return ["| " + " | ".join(line[i] for i in kept) + " |" for line in lines] + notes


def _cells(row: Record) -> list[str]:
    if "ms" not in row:
        return [row["label"], *[""] * 8]
    ratios = [_ratio(row, base) for base in ("dense", "dense_linear", "dense_compiled")]
    if row["kind"] == "part":
        ratios[0] = f"{row['share']:.1%} of {row['of']}" if "share" in row else ""
    return [
        row["label"],
        f"{row['macs'] / 1e9:.3g}" if row.get("macs") else "",
        f"{row['ms']:.4g} ({row['ms_low']:.4g} to {row['ms_high']:.4g})",
        f"{row['pictures_per_s']:.4g}" if "pictures_per_s" in row else "",
        f"{row['promised']:.2f}" if row.get("promised") else "",
        *ratios,
        f"{row['memory_mb']:.1f} MiB" if "memory_mb" in row else "",
    ]


def _ratio(row: Record, base: str) -> str:
    if f"vs_{base}" not in row:
        return ""
    efficiency = row[f"efficiency_{base}"]
    return f"{row[f'vs_{base}']:.2f}" + (f" ({efficiency:.0%})" if efficiency else "")


def summary(report: dict[str, Any]) -> str:
    """The tables for a terminal."""
    return "\n\n".join("\n".join([title, *table(rows)]) for title, rows in batches(report["rows"]))
