"""A stage of a run: an objective with its optimizer, schedule and moving average, and what one step of it does."""

import math
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ..data.seeds import hashed
from .objectives import Objective
from .recipe import Recipe


class Stage:
    """Trains an objective.

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
        recipe: Recipe,
        accelerator: Accelerator,
        mixup: Mixup | None = None,
    ):
        self.name, self.first, self.last, self.objective = name, first, first + epochs, objective
        self.recipe, self.accelerator, self.mixup = recipe, accelerator, mixup
        self.updates = math.ceil(steps / recipe.accumulate)  # in an epoch
        optimizer = create_optimizer_v2(objective.groups(), recipe.optimizer, lr=recipe.lr)
        self.schedule, _ = create_scheduler_v2(
            optimizer,
            recipe.schedule,
            num_epochs=epochs,
            warmup_epochs=min(recipe.warmup, epochs / 2),
            warmup_lr=recipe.lr / 100,
            step_on_epochs=False,
            updates_per_epoch=self.updates,
        )
        self.ema = ModelEmaV3(objective.model, recipe.ema, use_warmup=True) if recipe.ema else None
        self.wrapped, self.optimizer = accelerator.prepare(objective, optimizer)

    @property
    def model(self) -> nn.Module:
        """What is evaluated."""
        return self.ema.module if self.ema else self.objective.model

    def finish(self):
        """Leaves the moving average in the model."""
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
        """Forward, backward, and an update where it is time for one.

        Returns:
            The objective's scalars, averaged over the processes, and the norm of the gradient if there was an update.
        """
        done = (epoch - self.first) * self.updates + step // self.recipe.accumulate
        self.objective.begin(done / ((self.last - self.first) * self.updates))
        self._seed(epoch, step, len(images))
        if self.mixup:
            images, targets = self.mixup(images, targets)
        with self.accelerator.accumulate(self.wrapped):
            out = self.wrapped(images, targets, indices)
            self.accelerator.backward(out["loss"])
            if self.accelerator.sync_gradients:
                limit = self.recipe.clip or math.inf
                out["gradient"] = self.accelerator.clip_grad_norm_(self.objective.parameters(), limit)
            self.optimizer.step()
            self.optimizer.zero_grad()
        if "gradient" in out:
            self.schedule.step_update(done + 1)
            if self.ema:
                self.ema.update(self.objective.model, step=done + 1)
        seen = self._averaged(out)
        if all(map(math.isfinite, seen.values())):
            self.objective.update(seen)
        return seen

    def _seed(self, epoch: int, step: int, pictures: int):
        """One stream of noise for the whole batch, in which each process begins where its pictures do."""
        torch.manual_seed(int(hashed(self.recipe.seed, 5, epoch, step)[0]) >> 1)
        place = self.accelerator.process_index * pictures * math.prod(self.objective.budget.grid)
        torch.rand(place, device=self.accelerator.device)

    def _averaged(self, out: dict[str, Tensor]) -> dict[str, float]:
        """One wait for the device, and one message to the other processes, for all scalars."""
        values = torch.stack([value.detach().to(self.accelerator.device, torch.float32) for value in out.values()])
        return dict(zip(out, self.accelerator.reduce(values, "mean").tolist(), strict=True))
