"""Objectives: what a training step of each stage computes.

The loop (`msvit.training.loop`) knows nothing of gates. A method is a subclass of `Objective`: its forward makes the
loss and the scalars that are recorded, its parameters are what trains, and its state is what a resumed run needs.
"""

import copy
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ..core.fast_linear import fast_linear
from ..core.scales import nested
from ..evaluation.predictions import Objects, oracle_masks
from ..gating.controller import BudgetController
from ..gating.learned import sharing_loss
from ..gating.losses import make_losses
from ..models.msvit import MSViT, Result
from ..models.sliding import slide
from ..reducers.base import Teacher
from .budget import Budget
from .recipe import Recipe

TRIMS = {"margin": "trimmed", "batch": "levelled", "none": "masked"}  # the execution of a training step


class StepOutput(NamedTuple):
    """What a training step computes.

    Attributes:
        loss: Carries the gradient.
        scalars: What is recorded of a step.
        gate_error: The controllers', `[sizes]`: how far the scores of a batch lie above those that meet the budget.
    """

    loss: Tensor
    scalars: dict[str, Tensor]
    gate_error: Tensor | None = None


class Objective(nn.Module):
    """A model and the loss that trains it; this one is stage one, the backbone alone with all tokens fine.

    Args:
        objects: By split ("train", "val"), where the objects are: from indices and the side of a patch, bool
            `[B, h, w]`. Only built-in pictures know.
    """

    def __init__(self, model: MSViT, recipe: Recipe, budget: Budget, objects: dict[str, Objects] | None = None):
        super().__init__()
        self.model, self.recipe, self.budget, self.objects = model, recipe, budget, objects or {}

    def parts(self) -> list[tuple[nn.Module, float, float]]:
        """Return what trains: module, learning rate (0 = frozen) and weight decay. What is not named is frozen."""
        training = self.recipe.training
        networks = [part for part in (self.model.vit, self.model.head) if any(True for _ in part.parameters())]
        return [(network, training.lr, training.weight_decay) for network in networks]

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups for the optimizer: decay for matrices alone, smaller rates for lower blocks."""
        parts, groups = [part for part in self.parts() if part[1] > 0], []
        kept = {id(p) for part, _, _ in parts for p in part.parameters() if p.requires_grad}
        for parameter in self.parameters():
            parameter.requires_grad_(id(parameter) in kept)
        for part, rate, decay in parts:
            settings = {"weight_decay": decay, "no_weight_decay_list": getattr(part, "no_weight_decay", tuple)()}
            if part is self.model.vit and self.recipe.training.layer_decay < 1:
                made = param_groups_layer_decay(part, layer_decay=self.recipe.training.layer_decay, **settings)
            else:
                made = param_groups_weight_decay(part, **settings)
            groups += [group | {"lr": rate, "freeze": self.frozen(part)} for group in made]
        return groups

    def frozen(self, part: nn.Module) -> int:
        """Return for how many epochs of the stage a part that trains stays as it is at first."""
        return 0

    def priors(self) -> dict[str, Tensor]:
        """Return what the gate loss has learned, for the records."""
        return {}

    def begin(self, progress: float):
        """Prepare a step; `progress` is the share of the stage that is over."""

    def update(self, gate_error: list[float]):
        """Correct the gate after a step, by the means of its errors over all processes."""

    def forward(self, images: Tensor, targets: Tensor, indices: Tensor) -> StepOutput:
        return self.scored(self.predict(self.model, images, indices), targets)

    def predict(self, model: MSViT, images: Tensor, indices: Tensor) -> Result:
        """Return what a model (this one's, or its moving average) makes of pictures, in training and evaluation.

        In evaluation they may be a list of pictures of different sizes.
        """
        if isinstance(images, list):
            return model.run(images, [model.all_fine(image.shape[-2:]) for image in images], "packed")
        b, (h, w) = len(images), model.grid(images.shape[-2:])
        fine = torch.zeros(b, h, w, device=images.device)
        if model.head.dense:
            return self._run(model, images, model.all_fine(images.shape[-2:]), "packed")
        patches = math.prod(model.patches(images.shape[-2:]))
        tokens = torch.full((b,), model.vit.num_prefix_tokens + patches, device=images.device)
        macs = torch.full((b,), self.budget.dense, dtype=torch.float64, device=images.device)
        with fast_linear(model.fast_cpu):
            logits = model.vit(images)
        return Result(logits=logits, gates=fine, scores=None, coarse=fine.bool(), tokens=tokens, macs=macs)

    def _run(self, model: MSViT, images: Tensor, mask: list[Tensor] | None, execution: str | None) -> Result:
        """Run on whole pictures; in evaluation, on request, on windows of the training size that overlap by a third."""
        if model.training or not self.recipe.model.sliding:
            return model.run(images, mask, execution)
        patch, side = model.coarse_patch * model.scales[-1] // model.scale, self.recipe.data.size
        return slide(model, images, side, max(1, 2 * side // (3 * patch)) * patch, mask)

    def scored(self, result: Result, targets: Tensor) -> StepOutput:
        """Return the task's loss, and what is shown of a step.

        The rate of coarse regions is that of the decisions without noise, since these are what evaluation takes.
        """
        head = self.model.head
        task = head.loss(result.logits, targets, self.recipe.training.smoothing)
        coarse, macs = result.coarse, result.macs / self.budget.dense
        if result.scores is not None and self.recipe.gating.shaped:
            whole = [scores > 0 for scores in nested([level.scores for level in result.gating.levels])]
            coarse, macs = whole[0], self.model.macs_of(whole, self.budget.size) / self.budget.dense
        scalars = {
            "loss": task.detach(),
            "task": task.detach(),
            "accuracy": head.accuracy(result.logits, targets),
            "coarse": coarse.float().mean(),
            "macs": macs.mean(),
        }
        return StepOutput(task, scalars)


class Gated(Objective):
    """Stage two: a gate, a rule or a reducer saves tokens, and the backbone learns to live with it.

        L = L_task + weight L_gate(m) + L_reducer + distill KL(dense || this)

    A picture's label hangs on each of its regions, a pixel's on its own alone: in dense tasks, whose loss is a mean
    over pixels, the task pulls at a gate less by as much as there are regions, and so does the gate loss unless
    `loss_weight` says otherwise. The threshold meets the budget afterwards, or a controller holds it meanwhile.

    A quota holds its own: it has neither controller nor gate loss but, in dense tasks, that of the label maps.

    A frozen gate decides without noise. The dense teacher, of distillation and of reducers that need one, is the
    backbone as it enters this stage.
    """

    def __init__(self, model: MSViT, recipe: Recipe, budget: Budget, objects: dict[str, Objects] | None = None):
        super().__init__(model, recipe, budget, objects)
        gating = recipe.gating
        self.learned = gating.learned and not recipe.held_fixed
        taught = recipe.training.distill or (model.reducer is not None and model.reducer.needs_teacher)
        self.teacher = copy.deepcopy(model.vit) if taught else None
        self.loss, self.controllers = None, []
        if self.learned and not gating.shaped:
            self.weight = 1.0 if gating.loss_weight is None else gating.loss_weight
        elif self.learned:
            self.loss = make_losses(gating.loss, budget.grids, budget.rates, **gating.loss_settings)
            pull = 1 / math.prod(budget.grid) if model.head.dense else 1.0
            self.weight = self.loss.weight * pull if gating.loss_weight is None else gating.loss_weight
            if gating.control != "none":
                self.controllers = [BudgetController(rate, gating.control == "projection") for rate in budget.rates]

    def parts(self) -> list[tuple[nn.Module, float, float]]:
        training = self.recipe.training
        parts = [(part, rate * training.lr_scale, decay) for part, rate, decay in super().parts()]
        if self.model.coarse_embed is not None:
            rate = training.lr * training.lr_scale if training.coarse_lr is None else training.coarse_lr
            parts.append((self.model.coarse_embed, rate, training.weight_decay))
        if self.learned:
            parts.append((self.model.gate, training.gate_lr, training.weight_decay))
        if self.loss is not None:
            parts.append((self.loss, training.prior_lr, 0.0))
        if self.model.reducer is not None:
            parts.append((self.model.reducer, training.reducer_lr, training.weight_decay))
        return parts

    def frozen(self, part: nn.Module) -> int:
        return self.recipe.training.freeze if part in (self.model.vit, self.model.head) else 0

    def train(self, mode: bool = True) -> "Gated":
        super().train(mode)
        if not self.learned and self.recipe.gating.learned:
            self.model.gate.eval()
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def priors(self) -> dict[str, Tensor]:
        return {} if self.loss is None else {k: v.detach().cpu() for k, v in self.loss.state_dict().items()}

    def begin(self, progress: float):
        if self.learned:
            first, last = self.recipe.gating.temperature, self.recipe.gating.temperature_end
            self.model.gate.temperature = first * (last / first) ** progress
        if self.model.reducer is not None:
            self.model.reducer.begin(progress)

    def update(self, gate_error: list[float]):
        for controller, gate, error in zip(self.controllers, self.model.gate.levels, gate_error, strict=True):
            controller.correct(gate.bias, error)

    def forward(self, images: Tensor, targets: Tensor, indices: Tensor) -> StepOutput:
        result = self.predict(self.model, images, indices)
        task, scalars, _ = self.scored(result, targets)
        extra, gate_error = {}, None
        if self.loss is not None:
            extra["gate"] = self.weight * self.loss(*result.gating.nested)
        elif self.learned and self.model.head.dense:
            extra["gate"] = self.weight * sharing_loss(result.scores, targets)
        if self.controllers:
            levels = result.gating.levels
            for controller, level in zip(self.controllers, levels, strict=True):
                controller.hold(level.soft)
            scores = nested([level.scores for level in levels])
            errors = [controller.error(s) for controller, s in zip(self.controllers, scores, strict=True)]
            gate_error = torch.stack(errors)
        teacher = self._teach(images) if self.teacher is not None else None
        if self.model.reducer is not None:
            extra |= self.model.reducer.loss(result, teacher)
        if self.recipe.training.distill:
            student, dense = (x.float().log_softmax(1) for x in (result.logits, teacher.logits))
            distance = F.kl_div(student, dense, reduction="batchmean", log_target=True)
            extra["distill"] = self.recipe.training.distill * distance
        loss = task + sum(extra.values())
        scalars |= {name: term.detach() for name, term in extra.items()} | {"loss": loss.detach()}
        return StepOutput(loss, scalars, gate_error)

    def predict(self, model: MSViT, images: Tensor, indices: Tensor) -> Result:
        execution = TRIMS[self.recipe.gating.trim] if model.training else None
        mask = None
        if self.recipe.gating.by == "oracle":
            where = self.objects["train" if model.training else "val"]
            mask = oracle_masks(model, where, indices, images.shape[-2:])
        return self._run(model, images, mask, execution)

    @torch.no_grad()
    def _teach(self, images: Tensor) -> Teacher:
        """Return what the dense backbone says, its patch tokens on the fine grid."""
        h, w = (side * self.model.scale for side in self.budget.grid)
        with fast_linear(self.model.fast_cpu):
            tokens = self.teacher.forward_features(images)
        patches = tokens[:, self.teacher.num_prefix_tokens :].unflatten(1, (h, w))
        return Teacher(self.teacher.forward_head(tokens), patches)
