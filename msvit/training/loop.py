"""Training: epochs on accelerate, each a function of the state before it.

All random numbers of a step are seeded by (seed, epoch, step) and those of the data by (seed, epoch). So a run that was
stopped and is continued from the state after an epoch ends, on a CPU and on the same number of threads, with bitwise
the same weights, and several processes draw for a batch what one process would draw.
"""

import contextlib
import itertools
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import safetensors.torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DataLoaderConfiguration,
    broadcast_object_list,
    gather_object,
    is_tensorboard_available,
)
from tqdm import tqdm

from ..checks import first_line
from ..data import IGNORE
from ..data.loaders import set_epoch
from ..data.seeds import hashed
from ..evaluation.evaluate import evaluate
from ..progress import bar, duration, say
from .build import path_of, takes_over_gate
from .environment import environment
from .files import RunError
from .objectives import Gated, Objective
from .preflight import prepare
from .recipe import Recipe
from .runs import Run, RunFolder, read
from .stage import Stage
from .taught import teach_once
from .teach_gate import STEPS, teach_gate

SPLITS = {"train": "training", "val": "validation"}
CURVE = 50  # points of an epoch's loss curve that are kept
Watch = Callable[[dict[str, Any]], None] | None  # what is called with a line of metrics


def train(
    recipe: Recipe,
    folder: str | Path,
    progress: bool = True,
    tensorboard: bool = False,
    watch: Watch = None,
) -> Run:
    """Train a recipe in a folder, continue the run that was stopped there, or return the one that is finished.

    Under `accelerate launch` or `torchrun` every process calls this with the same arguments.

    Args:
        recipe: All settings.
        folder: For the records, see `msvit.training.runs`.
        progress: Show a bar, on standard error or in the notebook, and a line for each epoch.
        tensorboard: Write the metrics for TensorBoard too, into the folder.
        watch: Called by the main process with the line of metrics of each epoch, once it is on the disk. What it
            raises ends the run, which can still be continued.
    """
    records = RunFolder(folder)
    if records.check(recipe):
        records.clean_up()
        return read(folder)
    accelerator = _accelerator(recipe, records.path, tensorboard)
    trainer = Trainer(recipe, records, accelerator, progress, watch)
    try:
        finished = [accelerator.is_main_process and records.open(recipe)]  # by another, in the meantime
        if not broadcast_object_list(finished)[0]:
            if accelerator.is_main_process:
                records.note(environment(accelerator.device, accelerator.num_processes))
            if tensorboard:
                accelerator.init_trackers("tensorboard")
            trainer.run()
        accelerator.wait_for_everyone()
    finally:
        records.close()
        for tracker in accelerator.trackers:
            tracker.finish()
    return read(folder)


class Trainer:
    """The loop of one run. Whatever is wrong with its recipe comes out before anything is written."""

    def __init__(self, recipe: Recipe, records: RunFolder, accelerator: Accelerator, progress: bool, watch: Watch):
        self.recipe, self.records, self.accelerator, self.watch = recipe, records, accelerator, watch
        self.progress = progress and accelerator.is_main_process
        parts = prepare(recipe, records.path.parent, accelerator.device, accelerator.num_processes)
        self.model, self.loaders, self.budget, self.objects, self.mixup = parts
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.train_loader, self.val_loader = accelerator.prepare(self.loaders.train, self.loaders.val)
        self.history: list[dict[str, Any]] = []

    def run(self):
        """Go through the epochs that are still to come, and write the summary."""
        training, accelerator, state = self.recipe.training, self.accelerator, self.records.load_state()
        if state is not None:
            with self._taking_up():
                self.history = [dict(line) for line in state["history"]]
                self.model.load_state_dict(state["model"])
        if len(set(gather_object([len(self.history)]))) > 1:
            raise RunError(f"not all processes see the state in {self.records.path}; put it where all machines can")
        if accelerator.is_main_process:
            self.records.restore(self.history)
        first = 0
        for name, epochs, kind in (("dense", training.epochs_dense, Objective), ("gated", training.epochs, Gated)):
            if len(self.history) < first + epochs:
                accelerator.free_memory()
                for parameter in self.trainable:
                    parameter.requires_grad_(True)  # the stage before may have frozen some
                if name == "gated" and len(self.history) == first:
                    self._start_gate()
                objective = kind(self.model, self.recipe, self.budget, self.objects)
                stage = Stage(name, first, epochs, self.loaders.steps, objective, accelerator, self.mixup)
                if len(self.history) > first:
                    with self._taking_up():
                        stage.load_state_dict(state)
                for epoch in range(len(self.history), stage.last):
                    self._epoch(stage, epoch)
            first += epochs
        if accelerator.is_main_process:
            self.records.save_model(self.model)
            self.records.finish(self._summary())

    @contextlib.contextmanager
    def _taking_up(self) -> Iterator[None]:
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise RunError(
                f"{self.records.last_state()} is of another version ({first_line(error)}); go on with that, or delete "
                f"{self.records.path} to train again"
            ) from error

    def _start_gate(self):
        """Give a gate that is new its warm start, in twice the stage's batches at most; the same in each process."""
        gating, training, runs = self.recipe.gating, self.recipe.training, self.records.path.parent
        if gating.start == "none" or gating.by != "learned" or takes_over_gate(self.recipe.model, runs):
            return
        steps = min(STEPS, 2 * training.epochs * self.loaders.steps)
        lesson = (self.budget.rates, gating.start, training.seed, steps)
        teach = partial(teach_gate, self.model, self.loaders, *lesson, self.progress)
        if self.recipe.model.name.startswith("run:"):
            kept = path_of(self.recipe.model.name, runs) / "taught"
            teach_once(teach, self.model, kept, (self.recipe.data, *lesson))
        else:
            teach()

    def _epoch(self, stage: Stage, epoch: int):
        """Train and evaluate for an epoch, and make both durable."""
        start = time.perf_counter()
        means = self._train(stage, epoch)
        speed = self.loaders.steps * self.train_loader.total_batch_size / (time.perf_counter() - start)
        last = epoch + 1 == stage.last
        if last:
            stage.finish()
            if self.recipe.gating.calibrate and stage.name == "gated" and self.recipe.gating.learned:
                with self.accelerator.autocast():
                    self.model.calibrate(self.loaders.first_pictures(), macs=self.budget.macs)
        model = self.model if last else stage.model
        found = evaluate(model, self.val_loader, partial(stage.objective.predict, model), self.accelerator)
        line = {"epoch": epoch + 1, "stage": stage.name, **means}
        line |= {f"val_{name}": value for name, value in found.items()}
        line |= {"pictures_per_s": speed, "seconds": time.perf_counter() - start}
        self.history.append(line)
        self._save(stage, line, last)

    def _save(self, stage: Stage, line: dict[str, Any], last: bool):
        """Write the state first: should all end between it and the line of metrics, the state has the line too."""
        found = [(split, *bad) for split in ("train", "val") for bad in self.loaders.unreadable(split)]
        unreadable = sorted(set(gather_object(found)))
        if not self.accelerator.is_main_process:
            return
        if unreadable:
            self.records.write_json("unreadable.json", [bad[1:] for bad in unreadable])
            counts = [f"{sum(bad[0] == split for bad in unreadable)} {title}" for split, title in SPLITS.items()]
            where = self.records.path / "unreadable.json"
            tqdm.write(f"{' and '.join(counts)} files cannot be read: {where}", sys.stderr)
        if last and stage.name == "dense":
            self.records.save_model(self.model, "dense")
        if last and (priors := stage.objective.priors()):
            self.records.write("gate_loss.safetensors", safetensors.torch.save(priors))
        state = {"history": self.history, "model": self.model.state_dict(), **stage.state_dict()}
        self.records.save_state(len(self.history), state)
        self.records.append(line)
        if self.progress:
            say(self._told(stage, line))
        if self.watch:
            self.watch(line)
        self.accelerator.log({k: v for k, v in line.items() if isinstance(v, float)}, step=line["epoch"])

    def _title(self, stage: Stage, epoch: int) -> str:
        training = self.recipe.training
        return f"epoch {epoch}/{training.epochs_dense + training.epochs} ({stage.name})"

    def _told(self, stage: Stage, line: dict[str, Any]) -> str:
        """Return an epoch's line of metrics in words, as validation pictures have them."""
        titles = {"accuracy": "accuracy", "miou": "mIoU", "macs": "MACs"}
        found = [f"{t} {100 * line[f'val_{name}']:.1f} %" for name, t in titles.items() if f"val_{name}" in line]
        words = ", ".join([f"loss {line['train_loss']:.3f}", *found, duration(line["seconds"])])
        return f"{self._title(stage, line['epoch'])}: {words}"

    def _train(self, stage: Stage, epoch: int) -> dict[str, Any]:
        """Do the steps of an epoch; return the means of what they showed, and the loss curve."""
        word = int(hashed(self.recipe.training.seed, 4, epoch)[0])
        random.seed(word)
        np.random.seed(word & 0xFFFFFFFF)  # noqa: NPY002 (timm's Mixup draws from it)
        stage.wrapped.train()
        set_epoch(self.train_loader, epoch)
        seen: list[dict[str, float]] = []
        title, pictures = self._title(stage, epoch + 1), self.train_loader.total_batch_size
        total = self.loaders.steps * pictures
        with bar(title=title, total=total, unit="pictures", shown=self.progress) as steps:
            for step, batch in enumerate(self.train_loader):
                try:
                    seen.append(stage.step(epoch, step, *batch))
                except ValueError as error:  # of gates or masks that are no numbers
                    raise self._failure(stage, epoch, step, first_line(error), batch) from error
                if wrong := [f"{name} is {value}" for name, value in seen[-1].items() if not math.isfinite(value)]:
                    raise self._failure(stage, epoch, step, ", ".join(wrong), batch)
                now = {name: _mean(seen[-20:], name) for name in ("loss", "accuracy", "macs")}
                shown = "loss {loss:.3f}, accuracy {accuracy:.2f}, MACs {macs:.2f}"
                steps.set_postfix_str(shown.format_map(now), refresh=False)
                steps.update(pictures)
        lr = max(group["lr"] for group in stage.optimizer.param_groups)
        means = {f"train_{name}": _mean(seen, name) for name in seen[-1]}
        count = min(CURVE, len(seen))  # runs of steps, of nearly equal length
        edges = itertools.pairwise(round(i * len(seen) / count) for i in range(count + 1))
        return {"lr": lr, **means, "curve": [_mean(seen[a:b], "loss") for a, b in edges]}

    def _failure(self, stage: Stage, epoch: int, step: int, what: str, batch) -> RunError:
        """Return the error of a run in which something, as its loss or gradient, is no number any more."""
        names = self.loaders.names("train", batch.indices)
        bad = list(itertools.compress(names, (~batch.images.flatten(1).isfinite().all(1)).tolist()))
        where = f"step {step + 1} of epoch {epoch + 1} ({stage.name})"
        if bool((batch.targets == IGNORE).all()) and batch.targets.dim() > 1:
            where += f", whose label maps hold {IGNORE} (ignored) alone"
        if self.accelerator.is_main_process:
            failure = {"where": where, "what": what, "pictures": names, "not_finite": bad}
            self.records.write_json("failure.json", failure)
        some = f"pictures{' with pixels that are no numbers' if bad else ''}: {', '.join((bad or names)[:8])}"
        return RunError(
            f"{what} at {where}; {some} (all {len(names)} of the batch are in {self.records.path}/failure.json). The "
            f"last good state is {self.records.last_state()}. Mend the pictures and give the same command again, or "
            "train with other settings (a smaller lr or clip) in another folder"
        )

    def _summary(self) -> dict[str, Any]:
        last = self.history[-1]
        dense = next((line for line in reversed(self.history) if line["stage"] == "dense"), {})
        summary = {name.removeprefix("val_"): value for name, value in last.items() if name.startswith("val_")}
        summary |= {f"dense_{name}": dense[f"val_{name}"] for name in ("accuracy", "miou") if f"val_{name}" in dense}
        summary |= {"dense_macs": self.budget.dense, "threshold": self.model.threshold, "classes": self.loaders.classes}
        summary["parameters"] = sum(p.numel() for p in self.model.parameters())
        return summary | {"trained_epochs": len(self.history), "seconds": sum(line["seconds"] for line in self.history)}


def _accelerator(recipe: Recipe, folder: Path, tensorboard: bool) -> Accelerator:
    if tensorboard and not is_tensorboard_available():
        raise RunError("TensorBoard is not installed; install the package tensorboard, or train without it")
    AcceleratorState._reset_state()  # a second run of this process may have another precision
    return Accelerator(
        cpu=recipe.training.device == "cpu",
        mixed_precision={"fp32": "no", "bf16": "bf16"}[recipe.training.precision],
        gradient_accumulation_steps=recipe.training.accumulate,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        log_with="tensorboard" if tensorboard else None,
        project_dir=folder if tensorboard else None,
    )


def _mean(seen: list[dict[str, float]], name: str) -> float:
    return fmean(scalars[name] for scalars in seen if name in scalars)
