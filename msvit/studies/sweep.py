"""Sweeps of the gate's training with Optuna: one study, any number of workers, in a notebook or from a shell.

Trials are scored on pictures that are held out from training, never on the validation split. The score is

    value = accuracy - price * MACs share

so that one number can prune a trial while it trains; accuracy and MACs of every trial are recorded, and the Pareto
front is drawn from these.
"""

import contextlib
import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import optuna
import pandas as pd
from optuna.exceptions import ExperimentalWarning, OptunaError
from optuna.storages import RDBStorage, fail_stale_trials
from optuna.trial import FixedTrial, TrialState
from sqlalchemy import make_url
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError

from ..checks import first_line, in_interval, one_of
from ..progress import bar, time_left, visible
from ..training.files import RunBusy, RunError
from ..training.loop import train
from ..training.preflight import prepare
from ..training.recipe import HARMLESS, Recipe


class Range(NamedTuple):
    """The range in which a setting is searched; log: evenly in its logarithm."""

    low: float
    high: float
    log: bool = False


# Settings of the recipe, and under "loss_settings." those of the gate loss.
SPACE = {
    "target": Range(0.45, 0.8),
    "loss_weight": Range(1.0, 100.0, log=True),
    "gate_lr": Range(1e-4, 1e-2, log=True),
    "loss_settings.sigma": Range(0.02, 0.3, log=True),
    "loss_settings.temperature": Range(0.1, 1.0, log=True),
    "loss_settings.hyper_weight": Range(0.1, 10.0, log=True),
}
LONGEST = 200  # letters of a study's name, which its trials' folders bear
SETTINGS, ERROR = "settings", "error"  # what is stored of a study, and of a trial that failed
PRUNERS = {
    "asha": lambda: optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2),
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=1),
    "none": optuna.pruners.NopPruner,
}


def open_study(name: str, storage: str, pruner: str = "asha", seed: int = 0) -> optuna.Study:
    """Return the study of that name in a storage, new or as other workers have left it.

    Args:
        storage: An RDB URL such as postgresql+psycopg://user@host/base, or a path, which becomes an SQLite file.
            SQLite serves one machine; many workers on many machines want a server.
        seed: Of the sampler; workers that run at the same time take different ones.
    """
    one_of("pruner", pruner, PRUNERS)
    if not name or Path(name).name != name or len(name.encode()) > LONGEST:
        raise ValueError(f"study={name!r} is to name folders too; use 1 to {LONGEST} letters, and no /")
    with _reached(_without_password(storage), ImportError, OSError):
        if "://" not in storage:
            Path(storage).parent.mkdir(parents=True, exist_ok=True)
            storage = f"sqlite:///{Path(storage).absolute()}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # heartbeats and the two options of the sampler
            backend = _connect(storage, heartbeat_interval=30)  # by which a worker that dies is found out
            sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
        return optuna.create_study(
            study_name=name,
            storage=backend,
            sampler=sampler,
            pruner=PRUNERS[pruner](),
            direction="maximize",
            load_if_exists=True,
        )


@contextlib.contextmanager
def _reached(storage: str, *other: type[Exception]) -> Iterator[None]:
    """Say in a line what is wrong with a storage, at its opening (where `other` errors mean that too) or later."""
    try:
        yield
    except (RunError, ValueError):
        raise
    except Exception as error:
        cause: BaseException | None = error  # Optuna may fail at telling a failure
        while cause is not None and not isinstance(cause, (SQLAlchemyError, OptunaError, *other)):
            cause = cause.__context__
        if cause is None:
            raise
        raise RunError(
            f"the storage {storage} cannot be used ({first_line(cause)}); is the database up, and is this its name?"
        ) from error


def _without_password(storage: str) -> str:
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except SQLAlchemyError:
        return storage.partition("://")[0] + "://…" if "://" in storage else storage


def _connect(storage: str, **options: Any) -> RDBStorage:
    """Return the database; where several workers come first at once, one makes the tables and the others come again."""
    for pause in (0.5, 1, 2, 4):
        try:
            return RDBStorage(storage, **options)
        except (IntegrityError, ProgrammingError):
            time.sleep(pause)
    return RDBStorage(storage, **options)


def sweep(
    study: optuna.Study,
    base: Recipe,
    folder: str | Path,
    trials: int,
    space: dict[str, Range] = SPACE,
    price: float = 0.1,
    message: Callable[[str], None] = print,
):
    """Work on a study until it has `trials` finished trials, whoever ran them.

    A trial that fails is recorded with its error and does not stop the rest; interrupted sweeps go on where they were,
    and another trial stands in for one whose worker was killed. A study is of one recipe, space and price.

    Args:
        base: Settings of every trial but for those in `space`; `holdout` says what share of training pictures scores.
        folder: Where the trials' runs are kept.
        price: Accuracy that is given up for a MACs share of one.
    """
    if base.data.holdout <= 0:
        raise ValueError("holdout=0 would tune on the validation split; set it to a share of training pictures")
    in_interval("price", price, "[0, inf)")
    in_interval("trials", trials, "[1, inf)")
    for name, span in space.items():
        if not span.low <= span.high:
            raise ValueError(f"{name} is searched from {span.low:g} to {span.high:g}; the first must not be the larger")
    if not base.training.epochs:
        raise ValueError("epochs=0 trains no gate whose settings could be searched; give some epochs")
    with _reached(f"of the study {study.study_name!r}"), _quiet(message):
        _sweep(study, base, Path(folder), trials, space, price, message)


def _sweep(study: optuna.Study, base: Recipe, folder: Path, trials: int, space: dict, price: float, message: Callable):
    settings = _settings(study, base, space, price)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        fail_stale_trials(study)
    if finished_trials(study) >= trials:
        return
    prepare(base.replace(**suggest(FixedTrial(middle(space)), space, base)), folder)
    study.set_user_attr(SETTINGS, settings)
    base = from_dense(base, folder)

    def objective(trial: optuna.Trial) -> float:
        recipe = base.replace(**suggest(trial, space, base))

        def watch(line: dict[str, Any]):
            trial.report(line["val_accuracy"] - price * line["val_macs"], line["epoch"])
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            run = train(recipe, folder / f"{study.study_name}-{trial.number:04d}", progress=visible(), watch=watch)
        except Exception as error:
            if not isinstance(error, optuna.TrialPruned):
                trial.set_user_attr(ERROR, first_line(error))
            raise
        for name in ("accuracy", "macs", "coarse"):
            trial.set_user_attr(name, run.summary[name])
        return run.summary["accuracy"] - price * run.summary["macs"]

    def after(study: optuna.Study, trial: optuna.trial.FrozenTrial):
        found = trial.user_attrs
        result = found.get(ERROR, trial.state.name.lower())
        if "macs" in found:
            result = f"accuracy {found['accuracy']:.3f}, MACs {found['macs']:.1%}"
        finished = finished_trials(study)
        whole.update(finished - whole.n)  # those of other workers too
        message(", ".join(filter(None, (f"trial {trial.number}: {result}", time_left(whole)))))
        if finished >= trials:
            study.stop()

    with bar(title="trials", total=trials, initial=finished_trials(study), shown=visible(), leave=True) as whole:
        study.optimize(objective, callbacks=[after], catch=(Exception,))
    _check_successes(study)


def _check_successes(study: optuna.Study):
    """Raise a RunError if all trials failed."""
    done = study.get_trials(deepcopy=False)
    if not {trial.state for trial in done} & {TrialState.COMPLETE, TrialState.PRUNED}:
        why = next(filter(None, (trial.user_attrs.get(ERROR) for trial in done)), "a dead worker")
        raise RunError(f"all trials of the study failed, the first by: {why}")


@contextlib.contextmanager
def _quiet(message: Callable[[str], None]) -> Iterator[None]:
    """Tell of failures in a line each: Optuna logs tracebacks, and its heartbeat is a thread of its own."""
    level, hook = optuna.logging.get_verbosity(), threading.excepthook
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    threading.excepthook = lambda failed: message(f"no heartbeat: {first_line(failed.exc_value)}")
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
        threading.excepthook = hook


def middle(space: dict[str, Range]) -> dict[str, float]:
    """Return the settings in the middle of their ranges."""
    return {k: math.sqrt(span.low * span.high) if span.log else (span.low + span.high) / 2 for k, span in space.items()}


def _settings(study: optuna.Study, base: Recipe, space: dict[str, Range], price: float) -> dict[str, Any]:
    """Return what a study is about, as it is stored with it; raise if it is about something else."""
    asked = {k: v for k, v in base.to_dict().items() if k not in HARMLESS} | {"price": price}
    asked |= {f"space of {name}": list(span) for name, span in space.items()}
    stored = study.user_attrs.get(SETTINGS, asked)
    if other := [k for k in asked | stored if stored.get(k) != asked.get(k)]:
        changes = ", ".join(f"{k} is {stored.get(k)!r}, not {asked.get(k)!r}" for k in other)
        raise ValueError(f"the study {study.study_name!r} is of other settings ({changes}); name another study")
    return asked


def finished_trials(study: optuna.Study) -> int:
    """Return how many trials of a study are done, well or not; what was cut short by a killed worker has no error."""
    return sum(
        trial.state.is_finished() and (trial.state != TrialState.FAIL or ERROR in trial.user_attrs)
        for trial in study.get_trials(deepcopy=False)
    )


def from_dense(base: Recipe, folder: Path) -> Recipe:
    """Return the same settings from a dense model on; it is trained by whichever worker comes first."""
    if not base.training.epochs_dense:
        return base
    dense = base.replace(epochs=0)
    while True:
        try:
            train(dense, folder / dense.run_name, progress=visible())
            return base.replace(epochs_dense=0, model=f"run:{dense.run_name}")
        except RunBusy:
            time.sleep(1)


def suggest(trial: optuna.Trial, space: dict[str, Range], base: Recipe) -> dict[str, Any]:
    """Return a trial's settings, those of the gate loss gathered in one."""
    changes: dict[str, Any] = {}
    for name, span in space.items():
        value = trial.suggest_float(name, span.low, span.high, log=span.log)
        head, _, tail = name.partition(".")
        if tail:
            changes.setdefault(head, dict(base.to_dict()[head]))[tail] = value
        else:
            changes[name] = value
    return changes


def table(study: optuna.Study) -> pd.DataFrame:
    """Return the trials, a row each: state, value, settings, accuracy, MACs, and whether it is on the Pareto front."""
    blank = {"accuracy": float("nan"), "macs": float("nan")}
    rows = [
        {"trial": t.number, "state": t.state.name.lower(), "value": t.value, **t.params, **blank, **t.user_attrs}
        for t in study.get_trials(deepcopy=False)
    ]
    out = pd.DataFrame(rows, columns=None if rows else ["trial", "state", "value", *blank])
    return out.assign(front=pareto(out["accuracy"], out["macs"]))


def pareto(accuracy: pd.Series, macs: pd.Series) -> pd.Series:
    """Return True where no other trial is at least as good in both and better in one."""
    better = [
        ((accuracy >= a) & (macs <= m) & ((accuracy > a) | (macs < m))).any()
        for a, m in zip(accuracy, macs, strict=True)
    ]
    return accuracy.notna() & ~pd.Series(better, index=accuracy.index, dtype=bool)


def importance(study: optuna.Study) -> dict[str, float]:
    """Return the share of the score's variance that each setting explains (fANOVA); empty while trials are too few."""
    scores = {t.value for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))}
    return dict(optuna.importance.get_param_importances(study)) if len(scores) > 3 else {}
