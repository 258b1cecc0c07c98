"""Runs on disk: what a run leaves in its folder, written so that no crash can spoil it, and all runs as one table.

settings.json      the recipe
environment.json   versions, device and commit, once for each start
metrics.jsonl      a line per epoch
state/             what the next epoch needs, until the run is finished; a file's name holds the hash of its bytes
dense/             the backbone after stage one, a folder for MSViT.from_pretrained
gate_loss.safetensors      what the gate loss has learned: the priors of GBaS
summary.json       the result; its presence says that the run is finished
config.json, model.safetensors      the trained model, so that the folder itself is one for from_pretrained
"""

import contextlib
import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from ..checks import first_line
from ..models.check_config import ModelFolderError
from ..models.hub import model_files
from ..models.msvit import MSViT
from .files import RunError, RunWarning, check_file, digest, locked, read_json, write_whole
from .names import short_name
from .recipe import Recipe, RecipeError

MEASURED = ("accuracy", "miou", "loss", "macs", "macs_sd", "tokens", "tokens_sd", "coarse", "seconds")
TIMINGS = ("seconds", "pictures_per_s")  # of a line of metrics: all that two equal runs may differ in


@dataclass(frozen=True)
class Run:
    """A run as it stands on disk: `summary` is None until it is finished."""

    folder: Path
    recipe: Recipe
    metrics: list[dict[str, Any]]
    summary: dict[str, Any] | None


class RunFolder:
    """The one writer of a run's folder."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._lock = None
        self._good: Path | None = None  # the last state that was written or read well

    def check(self, recipe: Recipe) -> bool:
        """Return whether the run is there and finished; raise if the folder is something else. Nothing is written.

        A run that never made an epoch gives its folder up to one of other settings.
        """
        if os.path.exists(self.path / "settings.json"):
            other = read_recipe(self.path).difference(recipe)
            if other and self._begun():
                changes = ", ".join(f"{name} is {there!r}, not {here!r}" for name, (there, here) in other.items())
                raise RunError(
                    f"{self.path} holds a run of other settings ({changes}); nothing was changed. "
                    "Choose another folder, or delete this one"
                )
            return not other and (self.path / "summary.json").exists()
        names = sorted(os.listdir(self.path)) if os.path.isdir(self.path) else []
        if unexpected := [name for name in names if name != ".lock" and not name.endswith(".tmp")]:
            raise RunError(f"{self.path} is no run but has {unexpected[0]!r} in it; choose a new or an empty folder")
        return False

    def open(self, recipe: Recipe) -> bool:
        """Make the folder, or take up the run that is in it, for this process alone; return whether it is finished.

        Another process may have begun or finished the run since `check`, so it is asked again behind the lock.
        """
        self.check(recipe)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = locked(self.path / ".lock")
        except OSError as error:
            raise RunError(f"{self.path} cannot be written ({error.strerror}); choose another folder") from error
        finished = self.check(recipe)
        if not (self.path / "settings.json").exists() or read_recipe(self.path).difference(recipe):
            for name in ("environment.json", "failure.json"):  # of a run that never made an epoch
                (self.path / name).unlink(missing_ok=True)
            self.write_json("settings.json", recipe.to_dict())
        return finished

    def _begun(self) -> bool:
        """Return whether there is an epoch on record, in any form."""
        metrics, summary = self.path / "metrics.jsonl", self.path / "summary.json"
        return bool(_states(self.path)) or summary.exists() or (metrics.exists() and metrics.stat().st_size > 0)

    def note(self, environment: dict[str, Any]):
        """Add a start to environment.json."""
        starts = read_json(self.path / "environment.json", list) if (self.path / "environment.json").exists() else []
        self.write_json("environment.json", [*starts, environment])

    def close(self):
        if self._lock is not None:
            self._lock.close()

    def write(self, name: str, data: bytes):
        """Write a whole file or none."""
        with self._writing(name):
            write_whole(self.path / name, data)

    def write_json(self, name: str, value: Any):
        self.write(name, (json.dumps(value, indent=2) + "\n").encode())

    def append(self, line: dict[str, Any]):
        """Add a line of metrics, on the disk when this returns."""
        with self._writing("metrics.jsonl"), open(self.path / "metrics.jsonl", "ab") as file:
            file.write((json.dumps(line) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def restore(self, history: list[dict[str, Any]]):
        """Make the metrics those of the state, should a crash have torn them or have come between the two."""
        path, whole = self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history)
        read_metrics(self.path)  # names a damaged line
        if (path.read_bytes() if path.exists() else b"") != whole.encode():
            self.write(path.name, whole.encode())

    def save_state(self, epoch: int, state: dict[str, Any]):
        """Write the state after so many epochs; the last good one before it is kept, all others go."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        path = self.path / "state" / f"{epoch:05d}-{digest(data)}.pt"
        self.write(f"state/{path.name}", data)
        for other in set(_states(self.path)) - {path, self._good}:
            other.unlink(missing_ok=True)
        self._good = path

    def finish(self, summary: dict[str, Any]):
        """Write the result. No epoch follows, and the states go: what is left is small enough to travel."""
        self.write_json("summary.json", summary)
        self.clean_up()

    def clean_up(self):
        """Remove the states of a finished run, should a crash have left them."""
        shutil.rmtree(self.path / "state", ignore_errors=True)

    def load_state(self) -> dict[str, Any] | None:
        """Return the last state whose bytes are those that were written, or None. No pickled code is run.

        What could not be read is named, with what is used in its place.
        """
        lost, state = [], None
        for path in _states(self.path):
            try:
                data = path.read_bytes()
                if digest(data) != path.stem[6:]:
                    raise RunError("its bytes are not those that were written")
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                lost.append(f"{path} is damaged ({first_line(error)})")
            else:
                self._good = path
                break
        instead = "the run starts from zero" if state is None else "the state before it is used"
        if state is None and not lost and (epochs := len(read_metrics(self.path))):
            lost.append(f"{self.path} has {epochs} epochs on record, but no state to go on from")
        for what in lost:
            warnings.warn(f"{what}; {instead}", RunWarning, stacklevel=2)
        return state

    def last_state(self) -> str:
        """Return the last good state's file, for messages."""
        return str(self._good or "none yet")

    def save_model(self, model: MSViT, name: str = "."):
        """Save a model, each of its files whole or not there."""
        for file, data in model_files(model).items():
            self.write(str(Path(name) / file), data)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(
                f"{self.path / name} could not be written ({error.strerror}). The last good state is "
                f"{self.last_state()}: make room (or the folder writable) and give the same command again"
            ) from error


def read_recipe(folder: Path) -> Recipe:
    path = Path(folder) / "settings.json"
    if not os.path.exists(path):
        raise RunError(f"{folder} is no run: it has no settings.json")
    try:
        return Recipe.from_dict({"gate_network": "pixels"} | read_json(path))  # which it was until version 0.1
    except RecipeError as error:
        raise RunError(f"{path} is no recipe of this version of msvit: {error}") from error


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics. A torn last line, all that a crash can leave, is dropped and named."""
    path = Path(folder) / "metrics.jsonl"
    if not path.exists():
        return []
    good = []
    try:
        check_file(path)
        lines = path.read_bytes().splitlines()
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged ({first_line(error)}); delete the run, and train again") from error
    for number, line in enumerate(lines, 1):
        try:
            good.append(_measured(dict(json.loads(line)), "val_"))
        except (ValueError, TypeError, OverflowError, RecursionError):
            warnings.warn(f"{path}: line {number} is damaged and left out", RunWarning, stacklevel=2)
            break
    return good


def read(folder: str | Path) -> Run:
    """Return a run from its folder, finished or not."""
    folder = Path(folder)
    recipe, metrics, summary = read_recipe(folder), read_metrics(folder), folder / "summary.json"
    if not os.path.lexists(summary):
        return Run(folder, recipe, metrics, None)
    try:
        return Run(folder, recipe, metrics, _measured(read_json(summary)))
    except (ValueError, TypeError, OverflowError) as error:
        raise RunError(f"{summary} is damaged ({first_line(error)}); delete the run, and train again") from error


def _measured(found: dict[str, Any], before: str = "") -> dict[str, Any]:
    """Return results, or raise an error if one that is a number in every run is none here."""
    for name in (f"{before}{name}" for name in MEASURED):
        if not isinstance(value := found.get(name), int | float | None):
            raise ValueError(f"{name} is {str(value)[:40]!r}, no number")
        float(value or 0)  # an int may be too large for one
    return found


def read_finished(folder: str | Path) -> Run:
    """Return a run that has its model, or raise a `RunError` that says how to go on."""
    run = read(folder)
    if run.summary is None:
        raise RunError(f"{folder} is not finished and has no model yet; train on with the command that began it")
    return run


def load_model(folder: str | Path, **options: Any) -> MSViT:
    """Return the model in a run's folder, or raise a `RunError`; options are those of `MSViT.from_pretrained`."""
    try:
        return MSViT.from_pretrained(folder, **options)
    except (OSError, ModelFolderError) as error:
        raise RunError(f"{error}; train again, or name another run") from error


def load(folder: str | Path = "runs") -> pd.DataFrame:
    """Return all runs under a folder as a table, one row each: name, status, settings, and the results.

    An unfinished run has the results of its last epoch. A result that is called like a setting, as the loss on the
    validation pictures, has "val_" before its name. A run that cannot be read has the status "damaged" and the
    reason.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise RunError(f"there is no folder {folder}; train something into it, or name another")
    rows = []
    for path in sorted(folder.rglob("settings.json")):
        row: dict[str, Any] = {"run": str(path.parent.relative_to(folder)), "status": "damaged"}
        try:
            run = read(path.parent)
            row |= {"status": "unfinished" if run.summary is None else "finished", "epoch": len(run.metrics)}
            row |= {"name": short_name(run.recipe)} | dict(_flat(run.recipe.to_dict(), lists=True))
            results = dict(_flat((run.metrics[-1] if run.metrics else {}) if run.summary is None else run.summary))
            row |= {f"val_{name}" if name in row else name: value for name, value in results.items()}
        except RunError as error:
            row["reason"] = str(error)
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["run", "status"])


def _states(folder: Path) -> list[Path]:
    """Return the states' files, the newest first."""
    return sorted((folder / "state").glob("[0-9]*.pt"), reverse=True)


def _flat(values: dict[str, Any], lists: bool = False) -> Iterator[tuple[str, Any]]:
    """Yield scalars as they are, dictionaries as `name.key`, lists as text or not at all."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat({f"{name}.{key}": v for key, v in value.items()}, lists)
        elif not isinstance(value, list):
            yield name, value
        elif lists:
            yield name, json.dumps(value)
