"""The command line: `msvit train`, `fit-gate`, `eval`, `export`, `runs`, `diff`, `sweep`, `methods`, `models`, `bench`.

Exit codes: 0 done, 1 failed, 2 a setting that does not exist or cannot be, 130 interrupted. What is typed is parsed
before torch or timm are imported, so that help and mistakes come at once.
"""

import argparse
import contextlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from . import __version__, commands
from .bench.settings import add_options
from .checks import DataError, closest, first_line
from .commands import print_error
from .training.files import RunError, RunWarning
from .training.recipe import FIELDS, GROUPS, RecipeError, parse

TEACHERS = FIELDS["gate_start"].field.metadata["choices"][1:]  # all but none
FITTED = ("model", "checkpoint", "pretrained", "scale", "scales", "data", "size", "batch", "val_n", "workers")
FITTED += ("gate_network", "target", "seed", "device")  # settings of a recipe that fit-gate takes


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # names of files may have letters that a terminal lacks, or be no text
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    words = [_dashed(word) for word in (sys.argv[1:] if argv is None else argv)]
    arguments, unknown = _parser().parse_known_args(words)
    if unknown:
        near = closest(unknown[0], ["--" + _dash(name) for name in vars(arguments)])
        remedy = f"the nearest is {near[0]}" if near else "--help lists what there is"
        return print_error(f"{unknown[0]} is unknown here; {remedy}", 2)
    shown = warnings.showwarning
    warnings.showwarning = lambda message, category, *where: (
        print_error(message) if category is RunWarning else shown(message, category, *where)
    )
    try:
        arguments.command(arguments)
        print(end="", flush=True)  # nothing, where standard output is closed
    except RecipeError as error:
        return print_error(error, 2)
    except (RunError, DataError) as error:
        return print_error(error, 1)
    except BrokenPipeError:  # as of `msvit runs | head`
        _mute()
        return 141
    except OSError as error:  # a disk, a folder or a terminal that does not do its part
        if error.filename is None:
            _mute()
        where = f"{error.filename}: " if error.filename else ""
        why = error.strerror or first_line(error)
        return print_error(f"{where}{why}; make room there, or name a place that can be read and written", 1)
    except KeyboardInterrupt as stopped:
        return print_error(str(stopped) or "interrupted; the same command continues after the last whole epoch", 130)
    finally:
        warnings.showwarning = shown
    return 0


def _mute():
    """Say nothing more on standard output, at the exit either."""
    with contextlib.suppress(OSError, ValueError):  # of a stream that is none
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "msvit",
        description="Vision transformers that spend tokens where the picture has something to show.",
        epilog="Exit codes: 0 done, 1 failed, 2 a setting that does not exist or cannot be, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"msvit {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_train, _add_fit_gate, _add_eval, _add_export, _add_sweep):
        add(subparsers)
    _command(
        subparsers, commands.methods, "methods", "list the methods on this bench",
        "Every method with its paper, what of it is learned, what it costs, and the tasks that it can serve.",
    )  # fmt: skip
    listed = _command(
        subparsers, commands.models, "models", "list the backbones of timm that work",
        "Builds each matching name of timm without its weights, and says whether MSViT takes it and if not, why.",
    )  # fmt: skip
    listed.add_argument("pattern", nargs="?", default="*", help="such as '*dinov3*' (default: all)")
    clock = _command(
        subparsers, commands.bench, "bench", "time MSViT and reducers against dense timm",
        "Times every row in turns, and sets its gain on the clock beside the one that its MACs promise.",
    )  # fmt: skip
    add_options(clock)
    listing = _command(
        subparsers, commands.runs, "runs", "list runs and their results",
        "All runs in a folder as a table; with --json every setting and result of each.",
    )  # fmt: skip
    listing.add_argument("folder", nargs="?", default="runs", help="where runs are kept (default: runs)")
    listing.add_argument("--sort", default="", metavar="NAME", help="a setting or result to sort by (default: age)")
    listing.add_argument(
        "--where", action="append", default=[], metavar="CONDITION",
        help="only these, as in data=scenes:easy or 'accuracy>0.9'; may be said several times",
    )  # fmt: skip
    listing.add_argument("--wide", action="store_true", help="more of each run, its folder among it")
    differing = _command(
        subparsers, commands.diff, "diff", "say what differs between two runs",
        "The settings that differ and can change a result, and the results that do.",
    )  # fmt: skip
    differing.add_argument("first", help="a run's folder")
    differing.add_argument("second", help="another")
    return parser


def _add_train(subparsers):
    train = _command(
        subparsers, commands.train, "train", "train a model, or continue a run that was stopped",
        "Trains the backbone, then the gate with it, and leaves all that is worth knowing in a folder. The same "
        "command continues a run that was stopped. On several devices: accelerate launch -m msvit.cli train ...",
    )  # fmt: skip
    train.add_argument("--folder", help="the run's folder (default: RUNS/a name made of the settings)")
    train.add_argument("--runs", default="runs", help="where runs are kept (default: runs)")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    train.add_argument("--tensorboard", action="store_true", help="write the metrics for TensorBoard too")
    _add_settings(train)


def _add_fit_gate(subparsers):
    fit = _command(
        subparsers, commands.fit_gate, "fit-gate", "give a trained model a gate, without training the model",
        "Teaches a new gate what regions cost the model when they are coarse, sets its threshold for the budget, and "
        "compares it with rules at the same MACs. Any timm classifier, run or saved model; no labels are needed.",
    )  # fmt: skip
    fit.add_argument("--folder", required=True, help="where model and gate are saved")
    fit.add_argument("--by", choices=TEACHERS, default="utility", help="the teacher (default: utility)")
    fit.add_argument("--steps", type=int, default=300, help="batches that the gate learns from (default: 300)")
    fit.add_argument("--quiet", action="store_true", help="no progress bar")
    for name in FITTED:
        _add_setting(fit, name, default=None)


def _add_eval(subparsers):
    evaluate = _command(
        subparsers, commands.eval, "eval", "evaluate a run's model",
        "Evaluates the model of a finished run on its validation pictures, or on others.",
    )  # fmt: skip
    evaluate.add_argument("run", help="the run's folder")
    budget = evaluate.add_mutually_exclusive_group()
    budget.add_argument("--macs", type=float, help="share of dense MACs to set the threshold by, on training pictures")
    budget.add_argument("--threshold", type=float, help="a region is coarse where its m exceeds this")
    evaluate.add_argument(
        "--aspect", choices=("crop", "keep"), default="crop",
        help="keep: whole pictures, each at its own aspect ratio and about as large as in training (default: crop)",
    )  # fmt: skip
    for name in ("gating", "data", "val_n", "workers", "device"):
        _add_setting(evaluate, name, default=None)


def _add_export(subparsers):
    export = _command(
        subparsers, commands.export, "export", "write a run's model as graphs that run without this package",
        "Writes the gate, the masked model and the packed one for one picture, and compares each with the run's model.",
    )  # fmt: skip
    export.add_argument("run", help="the run's folder")
    export.add_argument(
        "--format", choices=("onnx", "torch"), default="onnx", help="torch is for torch.export.load (default: onnx)"
    )
    export.add_argument("--out", help="folder of the files (default: the run's)")


def _add_sweep(subparsers):
    sweep = _command(
        subparsers, commands.sweep, "sweep",
        "search settings of the gate and its loss, alone or as one of many workers",
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


def _command(subparsers, run: Callable, name: str, about: str, description: str) -> argparse.ArgumentParser:
    takes = {"eval": " RUN", "export": " RUN", "runs": " [FOLDER]", "diff": " RUN RUN"}
    takes["models"] = " [PATTERN]"
    usage = f"msvit {name} [OPTIONS]{takes.get(name, '')}"
    parser = subparsers.add_parser(name, help=about, description=description, usage=usage, allow_abbrev=False)
    parser.set_defaults(command=run)
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    return parser


def _add_settings(parser: argparse.ArgumentParser, **defaults: Any):
    """Add all settings of the recipe, with its defaults or others."""
    groups = {name: parser.add_argument_group(kind.__doc__.partition(":")[0].lower()) for name, kind in GROUPS.items()}
    for name, (group, field) in FIELDS.items():
        default = field.type() if field.type in (dict, list) else field.default
        _add_setting(groups[group], name, defaults.get(name, default))


def _add_setting(parser: Any, name: str, default: Any):
    """Add an option for a field: its comment is the help, and its type reads what is typed."""
    field = FIELDS[name].field
    within, choices = field.metadata["within"], field.metadata["choices"]
    letters = {bool: "true|false", int: "N", dict: "NAME=VALUE", list: "X,X", str: "TEXT"}
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
    shown = "" if default in (None, "", {}, []) else f" (default: {str(default).lower()})"
    text = (text + shown).replace("%", "%%")
    parser.add_argument("--" + _dash(name), dest=name, type=read, default=default, help=text, **option)


def _dash(name: str) -> str:
    return name.replace("_", "-")


def _dashed(word: str) -> str:
    """Return --epochs-dense for --epochs_dense."""
    name, equals, value = word.partition("=")
    return _dash(name) + equals + value if word.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
