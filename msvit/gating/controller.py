"""Holding a gate at its budget while it trains, whatever its losses pull: a method of its own, beside any loss."""

import torch
from torch import Tensor, nn

from ..core.gather import global_batch

CONTROLS = ("none", "bias", "projection")


class BudgetController:
    """The constraint "so many regions are coarse" on a gate that trains: a step back onto it, and gradients along it.

    * **Back onto it** ("bias"). After each step the gate's bias moves by a part of the score at which decisions
      *without* noise, which are what evaluation takes, would meet the rate.
    * **Along it** ("projection" does both). With soft gates m and their slopes d = m (1 − m), by which a change of the
      scores moves the rate, a loss moves the scores by −η d g, where g = ∂L/∂m, and with them the rate by −η Σ d² g.
      The controller takes the common force u = Σ d² g / Σ d² out of the gradient, so that to first order the rate
      stays: what is left of the task's pull towards fine says only *which* regions want to be fine more than others. u
      is the Lagrangian multiplier of the constraint, in closed form for each batch.

    A common force is all that a loss of the mean gate has (L0, ratio): under the projection they are the controller
    alone.

    Args:
        rate: Share of regions that are to be coarse.
        projects: Whether gradients go along the constraint.
    """

    STEP = 0.3  # of the way back; one batch says only roughly how far it is

    def __init__(self, rate: float, projects: bool = True):
        if not 0 < rate < 1:
            raise ValueError(f"rate={rate:g}; expected a share in (0, 1)")
        self.rate, self.projects = float(rate), projects

    def hold(self, gates: Tensor):
        """Take the common force out of the gradient that will come to these soft gates."""
        if self.projects and gates.requires_grad:
            m = gates.detach().double()
            slopes = (m * (1 - m)).square()
            total = _summed(slopes).clamp(min=1e-12)
            gates.register_hook(lambda grad: grad - (_summed(grad * slopes) / total).to(grad))

    def error(self, scores: Tensor) -> Tensor:
        """Return how far the scores of a batch, of all processes together, lie above those that meet the rate."""
        return global_batch(scores.detach().float()).flatten().quantile(1 - self.rate)

    @torch.no_grad()
    def correct(self, bias: nn.Parameter, error: float):
        """Move the bias of the scores towards the rate."""
        bias -= self.STEP * error


def _summed(values: Tensor) -> Tensor:
    """Return the sum over all processes."""
    return global_batch(values.double().sum()[None]).sum()
