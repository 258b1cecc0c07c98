"""A stage of a run: an objective with its optimizer, schedule and moving average, and what one step of it does."""

import math
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.optim import create_optimizer_v2, muon
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from ..data.seeds import hashed
from .objectives import Objective

# timm's Muon orthogonalizes in bfloat16, in which most CPUs are some 25 times slower than in float32.
ORTHOGONALIZE = partial(muon.zeropower_via_newtonschulz, dtype=torch.float32)


def make_descent(objective: Objective, epochs: int, updates: int) -> tuple[Optimizer, Scheduler]:
    """Return the optimizer of an objective and its schedule for so many epochs of so many updates."""
    settings, groups = objective.recipe.training, objective.groups()
    if "muon" in settings.optimizer.lower() and next(objective.parameters()).device.type == "cpu":
        muon.zeropower_via_newtonschulz = ORTHOGONALIZE
    optimizer = create_optimizer_v2(groups, settings.optimizer, lr=settings.lr)
    schedule, _ = create_scheduler_v2(
        optimizer,
        settings.schedule,
        num_epochs=epochs,
        warmup_epochs=min(settings.warmup, epochs / 2),
        warmup_lr=min(settings.lr, *(group["lr"] for group in groups)) / 100,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    return optimizer, schedule


class Stage:
    """Train an objective.

    Args:
        name: For the records.
        first: Epochs of the run that come before it.
        epochs: Its own.
        steps: Batches in an epoch.
        mixup: Mixes pictures and labels, or None.
    """

    def __init__(
        self,
        name: str,
        first: int,
        epochs: int,
        steps: int,
        objective: Objective,
        accelerator: Accelerator,
        mixup: Mixup | None = None,
    ):
        self.name, self.first, self.last, self.objective = name, first, first + epochs, objective
        settings = objective.recipe.training
        self.settings, self.accelerator, self.mixup = settings, accelerator, mixup
        self.updates = math.ceil(steps / settings.accumulate)  # in an epoch
        optimizer, self.schedule = make_descent(objective, epochs, self.updates)
        self.ema = ModelEmaV3(objective.model, settings.ema, use_warmup=True) if settings.ema else None
        self.wrapped, self.optimizer = accelerator.prepare(objective, optimizer)

    @property
    def model(self) -> nn.Module:
        """What is evaluated."""
        return self.ema.module if self.ema else self.objective.model

    def finish(self):
        """Leave the moving average in the model."""
        if self.ema:
            self.objective.model.load_state_dict(self.ema.module.state_dict())

    def state_dict(self) -> dict[str, Any]:
        ema = self.ema.module.state_dict() if self.ema else {}
        return {"objective": self.objective.state_dict(), "optimizer": self.optimizer.state_dict(), "ema": ema}

    def load_state_dict(self, state: dict[str, Any]):
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])

    def step(self, epoch: int, step: int, images: Tensor, targets: Tensor, indices: Tensor) -> dict[str, float]:
        """Go forward and backward, and update where it is time for it.

        Returns:
            The scalars of the objective's `StepOutput`, averaged over the processes, and the norm of the gradient if
            there was an update.
        """
        done = (epoch - self.first) * self.updates + step // self.settings.accumulate
        self.objective.begin(done / ((self.last - self.first) * self.updates))
        self._seed(epoch, step, len(images))
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with self.accelerator.accumulate(self.wrapped):
            out = self.wrapped(images, targets, indices)
            scalars = dict(out.scalars)
            self.accelerator.backward(out.loss)
            if self.accelerator.sync_gradients:
                limit = self.settings.clip or math.inf
                scalars["gradient"] = self.accelerator.clip_grad_norm_(self.objective.parameters(), limit)
            for group in self.optimizer.param_groups:
                if epoch - self.first < group.get("freeze", 0):  # states of earlier versions have none
                    group["lr"] = 0.0  # no update and no decay; the schedule sets it anew afterwards
            self.optimizer.step()
            self.optimizer.zero_grad()
        if "gradient" in scalars:
            self.schedule.step_update(done + 1)
            if self.ema:
                self.ema.update(self.objective.model, step=done + 1)
        seen, gate_error = self._averaged(scalars, out.gate_error)
        if gate_error and all(map(math.isfinite, (*seen.values(), *gate_error))):
            self.objective.update(gate_error)
        return seen

    def _seed(self, epoch: int, step: int, pictures: int):
        """Seed one stream of noise for the whole batch, in which each process begins where its pictures do."""
        torch.manual_seed(int(hashed(self.settings.seed, 5, epoch, step)[0]) >> 1)
        place = self.accelerator.process_index * pictures * math.prod(self.objective.budget.grid)
        torch.rand(place, device=self.accelerator.device)

    def _averaged(self, scalars: dict[str, Tensor], gate_error: Tensor | None) -> tuple[dict[str, float], list[float]]:
        """Return the means over the processes: one wait for the device, and one message, for all of them."""
        every = [*scalars.values(), *([] if gate_error is None else gate_error)]
        values = torch.stack([value.detach().to(self.accelerator.device, torch.float32) for value in every])
        means = self.accelerator.reduce(values, "mean").tolist()
        return dict(zip(scalars, means, strict=False)), means[len(scalars) :]
