"""Holding a gate at its budget while it trains, whatever the weight of its loss."""

import math

from torch import Tensor

KINDS = {"coarse": 1, "macs": -1}  # does more of it mean more coarse regions (1) or fewer (-1)?


class BudgetController:
    """A signed force on the mean gate that brings the measured coarse rate, or MACs share, to the target.

    It adds −u · mean(m) to the training loss: the Lagrangian term of the constraint "mean rate = target", with the
    multiplier u found by a PI controller. With the relative error e = (target − measured) / target (the other way round
    for MACs), after each step

        I ← I + 0.5 [e]_0.1        u = sinh(I + 15 [e]_0.3)        [e]_c: e cut to ±c

    * **Signed**, because the task pulls towards fine, but a gate loss that holds the rate of noisy gates can be too
      coarse once the noise is gone: measure the decisions *without* noise, which are what evaluation takes.
    * **sinh**, because nobody knows beforehand how hard the task pulls and how stiff the gate loss is: near zero
      the force is linear, and further out a constant error changes it by a constant factor per step. Decades are
      crossed in tens of steps, without a weight to tune.
    * **[e]_0.1** keeps I from winding up in the first steps, when hardly trained scores flip all at once.

    The learning rate should decay: at a constant one the force and the gate can chase each other in small circles.

    Args:
        target: The coarse rate, or the share of dense MACs, to be met.
        kind: What is measured, "coarse" or "macs".
    """

    def __init__(self, target: float = 0.6, kind: str = "coarse"):
        if kind not in KINDS:
            raise ValueError(
                f"kind={kind!r}; expected 'coarse' (share of coarse regions) or 'macs' (share of dense MACs)"
            )
        if not 0 < target < 1:
            raise ValueError(f"target={target:g}; expected a share in (0, 1)")
        self.target, self.kind = float(target), kind
        self.integral = self.force = 0.0

    def penalty(self, gates: Tensor) -> Tensor:
        """−u · mean(m), to be added to the loss as it is; soft gates of any shape."""
        return -self.force * (gates.float() if gates.itemsize < 4 else gates).mean()

    def update(self, measured: float):
        """Take in what the step's decisions without noise came to, as a mean over all processes."""
        measured = float(measured)
        if not 0 <= measured < math.inf:
            raise ValueError(
                f"measured={measured:g}; expected the share of {self.kind} that the step came to, 0 or more"
            )
        error = KINDS[self.kind] * (self.target - measured) / self.target
        self.integral = _cut(self.integral + 0.5 * _cut(error, 0.1), 8)
        self.force = math.sinh(self.integral + 15 * _cut(error, 0.3))

    def state_dict(self) -> dict[str, float]:
        """What a resumed run needs."""
        return {"integral": self.integral, "force": self.force}

    def load_state_dict(self, state: dict[str, float]):
        """Go on from `state_dict()`."""
        self.integral, self.force = float(state["integral"]), float(state["force"])


def _cut(value: float, limit: float) -> float:
    return max(-limit, min(limit, value))
