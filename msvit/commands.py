"""What each command of `msvit` does with what was typed, and what it prints. Torch is imported where it is needed."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench.settings import from_options
from .checks import plain
from .training.files import RunError
from .training.recipe import FIELDS, Recipe, RecipeError

if TYPE_CHECKING:
    import pandas as pd

    from .training.runs import Run


def train(arguments: argparse.Namespace):
    import torch

    from .training.loop import train
    from .training.runs import RunFolder

    recipe = Recipe.from_dict(typed_settings(arguments))
    folder = Path(arguments.folder or Path(arguments.runs) / recipe.run_name)
    if finished := RunFolder(folder).check(recipe):
        print_error(f"{folder} is finished already; delete it to train it again")
    run = train(recipe, folder, progress=not arguments.quiet, tensorboard=arguments.tensorboard)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
        _put({"folder": str(folder), "finished_before": finished, **run.summary}, _report(run), arguments.json)


def fit_gate(arguments: argparse.Namespace):
    from .training.fit_gate import fit_gate

    recipe = Recipe.from_dict(typed_settings(arguments))
    table = fit_gate(recipe, arguments.folder, arguments.by, arguments.steps, not arguments.quiet)
    _put_table(table, tuple(table), arguments.json)


def eval(arguments: argparse.Namespace):
    from .training.evaluate_run import evaluate_run

    settings = arguments.macs, arguments.threshold, arguments.aspect
    found = evaluate_run(arguments.run, *settings, **typed_settings(arguments))
    width = max(map(len, found))
    lines = [f"{k:{width}} {f'{v:.4f}' if isinstance(v, float) else v}" for k, v in found.items()]
    _put(found, "\n".join(lines), arguments.json)


def export(arguments: argparse.Namespace):
    try:
        from .training.export_run import export_run

        found = export_run(arguments.run, arguments.format, arguments.out)
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed; pip install onnx onnxscript onnxruntime") from None
    lines = []
    for line in found:
        if line["file"] is None:
            lines.append(f"{line['part']:7} not exported: {line['why']}")
            continue
        off = line["difference"]
        held = "not compared: onnxruntime is not installed" if off is None else f"differs by {off:.1e} at most"
        lines.append(f"{line['part']:7} {line['file']}  {line['megabytes']:.1f} MB, {held}")
    _put(found, "\n".join(lines), arguments.json)


def runs(arguments: argparse.Namespace):
    from .training import listing

    table = listing.table(arguments.folder, arguments.where, arguments.sort)
    if arguments.json:
        print(_json(table))
    elif table.empty:
        some = " of that kind" if arguments.where else ""
        print(f"no runs{some} in {arguments.folder}")
    else:
        print(listing.text(table, arguments.wide))


def diff(arguments: argparse.Namespace):
    from .training import listing

    table = listing.differences(arguments.first, arguments.second)
    if table.empty and not arguments.json:
        print("the same settings and results")
    else:
        _put_table(table, tuple(table), arguments.json)


def sweep(arguments: argparse.Namespace):
    try:
        from .studies import sweep
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed; pip install 'msvit[sweeps]'") from None
    base = Recipe.from_dict(typed_settings(arguments))
    try:
        study = sweep.open_study(arguments.study, arguments.storage, arguments.pruner, arguments.sampler_seed)
        sweep.sweep(study, base, arguments.runs, arguments.trials, price=arguments.price, message=print_error)
        table = sweep.table(study)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    _put_table(table, ("trial", "state", "value", "accuracy", "macs", "front"), arguments.json)


def methods(arguments: argparse.Namespace):
    from .reducers.registry import METHODS

    rows = [{"method": name, **method._asdict()} for name, method in METHODS.items()]
    _put(rows, "\n".join(_lines(rows)), arguments.json)


def models(arguments: argparse.Namespace):
    from .models.names import list_backbones

    try:
        found = list_backbones(arguments.pattern)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    works = [backbone._asdict() for backbone in found if not backbone.refused]
    lines = _lines([{key: str(value) for key, value in row.items() if key != "refused"} for row in works])
    lines += [f"{backbone.name}  does not work: {backbone.refused}" for backbone in found if backbone.refused]
    lines.append(f"{len(works)} of {len(found)} names work")
    _put([backbone._asdict() for backbone in found], "\n".join(lines), arguments.json)


def bench(arguments: argparse.Namespace):
    from .bench.report import stem, summary
    from .bench.run import bench

    report = bench(from_options(vars(arguments)), tell=lambda line: print(line, file=sys.stderr, flush=True))
    _put(report, f"{summary(report)}\nWrote {stem(report)}.* in {arguments.out}", arguments.json)


def typed_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings among what was typed; pairs that were typed one by one become one dictionary."""
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS and value is not None}
    return {k: _joined(v) if FIELDS[k].field.type is dict else v for k, v in given.items()}


def _joined(pairs: Any) -> Any:
    """Return the mapping of all that was typed for a setting; what was not typed as it is."""
    return {name: value for pair in pairs for name, value in pair.items()} if isinstance(pairs, list) else pairs


def _report(run: "Run") -> str:
    """Return a finished run in a few lines."""
    found = run.summary
    score, title = ("miou", "mIoU") if "miou" in found else ("accuracy", "accuracy")
    lines = [f"{run.folder}: {found['trained_epochs']} epochs in {found['seconds']:.0f} s of training and evaluation"]
    if f"dense_{score}" in found:
        lines.append(f"  dense   {title} {found[f'dense_{score}']:.4f} at {found['dense_macs'] / 1e6:.1f} M MACs")
    if run.recipe.training.epochs:
        macs = f"{found['macs']:.3f} ± {found['macs_sd']:.3f} of its MACs"
        tokens = f"{found['tokens']:.1f} ± {found['tokens_sd']:.1f} tokens, {found['coarse']:.3f} of the regions coarse"
        lines.append(f"  {run.recipe.method:7} {title} {found[score]:.4f} at {macs}, {tokens}")
    if "fine_object" in found:
        shares = f"{found['fine_object']:.3f} of the object's regions, {found['fine_rest']:.3f} of the others"
        lines.append(f"  fine: {shares}")
    return "\n".join(lines)


def _lines(rows: list[dict[str, str]]) -> list[str]:
    """Return rows of text as the lines of a table, their keys above; nothing of no rows."""
    columns = [[key, *(row[key] for row in rows)] for key in (rows[0] if rows else ())]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _put(result: Any, text: str, as_json: bool):
    print(json.dumps(result, indent=2) if as_json else text)


def _json(table: "pd.DataFrame") -> str:
    """Return a table's rows as JSON; of names that are no text, what cannot be written is spelt out."""

    def spelt(cell: Any) -> Any:
        return cell.encode(errors="backslashreplace").decode() if isinstance(cell, str) else cell

    return table.map(spelt).rename(columns=spelt).to_json(orient="records", indent=2)


def _put_table(table: "pd.DataFrame", columns: tuple[str, ...], as_json: bool):
    """Print some columns of a table for people, or all of it as JSON."""
    if as_json:
        print(_json(table))
    else:
        shown = table[[name for name in columns if name in table]]
        shown = shown.map(lambda cell: plain(cell) if isinstance(cell, str) else cell)
        print(shown.to_string(index=False, float_format="{:.4g}".format, na_rep=""))


def print_error(message: Any, code: int = 0) -> int:
    """Print a message for people, on one line; return the exit code."""
    print(f"msvit: {plain(message)}", file=sys.stderr)
    return code
