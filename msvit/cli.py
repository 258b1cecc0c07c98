"""The command line: `msvit train`, `eval`, `runs`, `sweep`, `methods` and `bench`.

Exit codes: 0 done, 1 failed, 2 a setting that does not exist or cannot be, 130 interrupted. What is typed is parsed
before torch or timm are imported, so that help and mistakes come at once.
"""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .bench.settings import add_options, from_options
from .checks import closest
from .training.files import RunError, RunWarning
from .training.recipe import FIELDS, GROUPS, Recipe, RecipeError, parse

if TYPE_CHECKING:
    import pandas as pd

    from .training.runs import Run

RUN_COLUMNS = (
    *("run", "status", "epoch", "accuracy", "dense_accuracy", "miou", "dense_miou"),
    *("macs", "tokens", "coarse", "fine_object", "fine_rest"),
)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = _parser().parse_known_args(words)
    if unknown:
        near = closest(unknown[0], ["--" + _dash(name) for name in vars(arguments)])
        remedy = f"the nearest is {near[0]}" if near else "--help lists what there is"
        return _print_error(f"{unknown[0]} is unknown here; {remedy}", 2)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, category, *where: (
        _print_error(message) if category is RunWarning else shown(message, category, *where)
    )
    try:
        arguments.command(arguments)
    except RecipeError as error:
        return _print_error(error, 2)
    except RunError as error:
        return _print_error(error, 1)
    except KeyboardInterrupt as stopped:
        return _print_error(str(stopped) or "interrupted; the same command continues after the last whole epoch", 130)
    finally:
        warnings.showwarning = shown
    return 0


def _train(arguments: argparse.Namespace):
    import torch

    from .training.loop import train
    from .training.runs import RunFolder

    recipe = Recipe.from_dict(_settings(arguments))
    folder = Path(arguments.folder or Path(arguments.runs) / recipe.run_name)
    if finished := RunFolder(folder).check(recipe):
        _print_error(f"{folder} is finished already; delete it to train it again")
    run = train(recipe, folder, progress=not arguments.quiet, tensorboard=arguments.tensorboard)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if os.environ.get("RANK", "0") == "0":  # of several processes, one prints
        _put({"folder": str(folder), "finished_before": finished, **run.summary}, _report(run), arguments.json)


def _eval(arguments: argparse.Namespace):
    from .training.evaluate_run import evaluate_run

    found = evaluate_run(arguments.run, arguments.macs, arguments.threshold, **_settings(arguments))
    width = max(map(len, found))
    lines = [f"{k:{width}} {f'{v:.4f}' if isinstance(v, float) else v}" for k, v in found.items()]
    _put(found, "\n".join(lines), arguments.json)


def _runs(arguments: argparse.Namespace):
    from .training import runs

    table = runs.load(arguments.folder)
    if table.empty and not arguments.json:
        print(f"no runs in {arguments.folder}")
    else:
        _put_table(table, RUN_COLUMNS, arguments.json)


def _sweep(arguments: argparse.Namespace):
    try:
        from .studies import sweep
    except ModuleNotFoundError as error:
        raise RunError(f"{error.name} is not installed; pip install 'msvit[sweeps]'") from None
    base = Recipe.from_dict(_settings(arguments))
    try:
        study = sweep.open_study(arguments.study, arguments.storage, arguments.pruner, arguments.sampler_seed)
        sweep.sweep(study, base, arguments.runs, arguments.trials, price=arguments.price, message=_print_error)
    except ValueError as error:
        raise RecipeError(str(error)) from error
    _put_table(sweep.table(study), ("trial", "state", "value", "accuracy", "macs", "front"), arguments.json)


def _methods(arguments: argparse.Namespace):
    from .reducers.registry import METHODS

    rows = [{"method": name, **method._asdict()} for name, method in METHODS.items()]
    columns = [[key, *(row[key] for row in rows)] for key in rows[0]]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    _put(rows, "\n".join("  ".join(line).rstrip() for line in zip(*padded, strict=True)), arguments.json)


def _bench(arguments: argparse.Namespace):
    from .bench.report import stem, summary
    from .bench.run import bench

    report = bench(from_options(vars(arguments)), tell=lambda line: print(line, file=sys.stderr, flush=True))
    _put(report, f"{summary(report)}\nWrote {stem(report)}.* in {arguments.out}", arguments.json)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "msvit",
        description="Vision transformers that spend tokens where the picture has something to show.",
        epilog="Exit codes: 0 done, 1 failed, 2 a setting that does not exist or cannot be, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"msvit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_eval, _add_sweep):
        add(commands)
    _command(
        commands, _methods, "methods", "list the methods on this bench",
        "Every method with its paper, what of it is learned, what it costs, and the tasks that it can serve.",
    )  # fmt: skip
    clock = _command(
        commands, _bench, "bench", "time MSViT and reducers against dense timm",
        "Times every row in turns, and sets its gain on the clock beside the one that its MACs promise.",
    )  # fmt: skip
    add_options(clock)
    listing = _command(
        commands, _runs, "runs", "list runs and their results",
        "All runs in a folder as a table; with --json every setting and result of each.",
    )  # fmt: skip
    listing.add_argument("folder", nargs="?", default="runs", help="where runs are kept (default: runs)")
    return parser


def _add_train(commands):
    train = _command(
        commands, _train, "train", "train a model, or continue a run that was stopped",
        "Trains the backbone, then the gate with it, and leaves all that is worth knowing in a folder. The same "
        "command continues a run that was stopped. On several devices: accelerate launch -m msvit.cli train ...",
    )  # fmt: skip
    train.add_argument("--folder", help="the run's folder (default: RUNS/a name made of the settings)")
    train.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    _add_settings(train)


def _add_eval(commands):
    evaluate = _command(
        commands, _eval, "eval", "evaluate a run's model",
        "Evaluates the model of a finished run on its validation pictures, or on others.",
    )  # fmt: skip
    evaluate.add_argument("run", help="the run's folder")
    budget = evaluate.add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, help="share of dense MACs to set the threshold by, on training pictures")
    budget.add_argument("--threshold", type=float, help="a region is coarse where its m exceeds this")
    for name in ("gating", "data", "val_n", "workers", "device"):
        _add_setting(evaluate, name, default=None)


def _add_sweep(commands):
    sweep = _command(
        commands, _sweep, "sweep", "search settings of the gate and its loss, alone or as one of many workers",
        "Works on an Optuna study until it has so many finished trials. Start it as often as there are machines, with "
        "the same --study and --storage. Trials are scored on pictures held out of the training split.",
    )  # fmt: skip
    sweep.add_argument("--study", default="gbas", help="a study of that name goes on where it was (default: gbas)")
    sweep.add_argument(
        "--storage", default="runs/sweep/study.db", help="SQLite file, or URL of a database (default: %(default)s)"
    )
    sweep.add_argument("--trials", type=int, default=20, help="finished trials, of all workers (default: 20)")
    sweep.add_argument("--pruner", default="asha", help="ends trials that fall behind: asha, median, none")
    sweep.add_argument("--price", type=float, default=0.1, help="accuracy that a MACs share of one is worth")
    sweep.add_argument("--sampler-seed", type=int, default=0, help="another for each worker")
    sweep.add_argument("--runs", default="runs/sweep", help="where the trials' runs are kept (default: %(default)s)")
    _add_settings(sweep, holdout=0.2)


def _command(commands, run: Callable, name: str, about: str, description: str) -> argparse.ArgumentParser:
    usage = f"msvit {name} [OPTIONS]" + {"eval": " RUN", "runs": " [FOLDER]"}.get(name, "")
    parser = commands.add_parser(name, help=about, description=description, usage=usage, allow_abbrev=False)
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_settings(parser: argparse.ArgumentParser, **defaults: Any):
    """Add all settings of the recipe, with its defaults or others."""
    groups = {name: parser.add_argument_group(kind.__doc__.partition(":")[0].lower()) for name, kind in GROUPS.items()}
    for name, (group, field) in FIELDS.items():
        default = {} if field.type is dict else field.default
        _add_setting(groups[group], name, defaults.get(name, default))


def _add_setting(parser: Any, name: str, default: Any):
    """Add an option for a field: its comment is the help, and its type reads what is typed."""
    field = FIELDS[name].field
    within, choices = field.metadata["within"], field.metadata["choices"]
    letters = {bool: "true|false", int: "N", dict: "NAME=VALUE", str: "TEXT"}
    option: dict[str, Any] = {"metavar": "|".join(choices) or letters.get(field.type, "X")}
    if field.type is bool:
        option |= {"nargs": "?", "const": True}
    if field.type is dict:
        option["nargs"] = "+"

    def read(typed: str) -> Any:
        try:
            return parse(name, typed)
        except RecipeError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    text = field.metadata["about"] + (f"; in {within}" if within and not within.endswith("inf)") else "")
    shown = "" if default in (None, "", {}) else f" (default: {str(default).lower()})"
    text = (text + shown).replace("%", "%%")
    parser.add_argument("--" + _dash(name), dest=name, type=read, default=default, help=text, **option)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the settings among what was typed; pairs that were typed one by one become one dictionary."""
    given = {name: value for name, value in vars(arguments).items() if name in FIELDS and value is not None}
    return {k: {n: x for pair in v for n, x in pair.items()} if isinstance(v, list) else v for k, v in given.items()}


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


def _put(result: Any, text: str, as_json: bool):
    print(json.dumps(result, indent=2) if as_json else text)


def _put_table(table: "pd.DataFrame", columns: tuple[str, ...], as_json: bool):
    """Print some columns of a table for people, or all of it as JSON."""
    if as_json:
        print(table.to_json(orient="records", indent=2))
    else:
        shown = table[[name for name in columns if name in table]]
        print(shown.to_string(index=False, float_format="{:.4g}".format, na_rep=""))


def _print_error(message: Any, code: int = 0) -> int:
    """Print a message for people; return the exit code."""
    print(f"msvit: {message}", file=sys.stderr)
    return code


def _dash(name: str) -> str:
    return name.replace("_", "-")


def _dashed(word: str) -> str:
    """Return --epochs-dense for --epochs_dense."""
    name, equals, value = word.partition("=")
    return _dash(name) + equals + value if word.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
