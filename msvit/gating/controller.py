"""Holding a gate at its budget while it trains, whatever its losses pull."""

import torch
from torch import Tensor, nn

from ..core.gather import global_batch


class BudgetController:
    """The constraint "so many regions are coarse" on a gate that trains: gradients along it, and a step back onto it.

    With soft gates m and their slopes d = m (1 − m), by which a change of the scores moves the rate:

    * **Along it.** A loss moves the scores by −η d g, where g = ∂L/∂m, and with them the rate by −η Σ d² g. The
      controller takes the common force u = Σ d² g / Σ d² out of the gradient, so that to first order the rate stays:
      what is left of the task's pull towards fine says only *which* regions want to be fine more than others. u is the
      Lagrangian multiplier of the constraint, in closed form for each batch: there is nothing to tune or to wait for.
    * **Back onto it.** After each step the gate's bias moves by a part of the score at which decisions *without* noise,
      which are what evaluation takes, would meet the rate.

    Args:
        rate: Share of regions that are to be coarse.
    """

    STEP = 0.3  # of the way back; one batch says only roughly how far it is

    def __init__(self, rate: float):
        if not 0 < rate < 1:
            raise ValueError(f"rate={rate:g}; expected a share in (0, 1)")
        self.rate = float(rate)

    def hold(self, gates: Tensor):
        """Take the common force out of the gradient that will come to these soft gates."""
        if gates.requires_grad:
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
