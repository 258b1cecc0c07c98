"""The budget controller: a toy gate with noise, a task that pulls it towards fine, and a rate that must be met."""

import pytest
import torch
from torch import nn

from msvit.gating.controller import BudgetController
from msvit.gating.losses import make_loss

TARGET = 0.6
STEPS = 300


def train(loss: str, weight: float, pull: float, controller: BudgetController | None, target: float = TARGET) -> float:
    """The rate of coarse decisions on new pictures, after a gate was trained against a task of strength `pull`.

    64 regions of 8 features, an MLP, Gumbel-sigmoid with straight-through, Adam. A coarse region costs the task what
    its features say, between nearly nothing and many times the mean.
    """
    random = torch.Generator().manual_seed(33)
    torch.manual_seed(33)
    gate = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 1))
    direction = torch.randn(8, generator=random) / 8**0.5
    gate_loss = make_loss(loss, (8, 8), target)
    groups = [{"params": gate.parameters()}, {"params": gate_loss.parameters(), "lr": 1e-2}]
    optimizer = torch.optim.Adam(groups[: 1 + bool(list(gate_loss.parameters()))], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)

    def pictures(n: int) -> torch.Tensor:
        return torch.randn(n, 8, 8, 8, generator=random) + torch.linspace(-1, 1, 8)[:, None]

    for _ in range(STEPS):
        x = pictures(32)
        scores = gate(x).squeeze(-1)
        u = torch.rand(scores.shape, generator=random).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid(scores + torch.logit(u))
        coarse = (soft > 0.5).float() + soft - soft.detach()
        cost = (x @ direction).exp()
        total = pull * (coarse * cost / cost.mean()).mean() + weight * gate_loss(soft)
        if controller:
            controller.hold(soft)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if controller:
            controller.correct(gate[-1].bias, controller.error(scores).item())
    with torch.no_grad():
        return (gate(pictures(1024)) > 0).float().mean().item()


# Each loss at a tenth and at ten times its weight, the task's pull over two decades.
CASES = [
    ("gbas", 3, 5), ("gbas", 30, 0.5), ("gbas", 300, 0.05), ("bas", 3, 5), ("bas", 300, 0.05), ("l0", 3, 5),
    ("l0", 300, 0.5), ("ratio", 3, 5), ("ratio", 300, 0.05), ("none", 0, 0.05), ("none", 0, 5),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "weight", "pull"), CASES)
@pytest.mark.long
def test_the_target_is_met_whatever_the_weight(loss, weight, pull):
    rate = train(loss, weight, pull, BudgetController(TARGET))
    assert rate == pytest.approx(TARGET, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "weight", "pull"), [("gbas", 3, 5), ("l0", 30, 0.05), ("ratio", 3, 5), ("none", 0, 0.05)]
)
@pytest.mark.long
def test_without_it_the_budget_is_lost(loss, weight, pull):
    assert abs(train(loss, weight, pull, None) / TARGET - 1) > 0.1


def test_to_first_order_the_rate_stays_and_only_differences_count():
    gates = torch.rand(4, 3, 3, dtype=torch.float64, requires_grad=True)
    pull = torch.randn(4, 3, 3, dtype=torch.float64)
    held = gates * 1
    BudgetController(TARGET).hold(held)
    (held * pull).sum().backward()
    slope = (gates * (1 - gates)).detach()
    assert (slope * slope * gates.grad).sum().abs() < 1e-12
    torch.testing.assert_close(gates.grad - gates.grad[0, 0, 0], pull - pull[0, 0, 0])


def test_a_common_force_leaves_nothing_behind():
    gates = torch.rand(8, 4, 4, requires_grad=True)
    held = gates * 1
    BudgetController(TARGET).hold(held)
    (1e6 * held.mean()).backward()
    assert gates.grad.abs().max() < 1e-6 * 1e6 / gates.numel()


def test_saturated_gates_do_not_divide_by_zero():
    gates = torch.ones(2, 4, 4, requires_grad=True)
    held = gates * 1
    BudgetController(TARGET).hold(held)
    held.sum().backward()
    assert gates.grad.isfinite().all()


def test_the_step_of_the_bias_leaves_gradients_alone():
    gates = torch.rand(4, 3, 3, requires_grad=True)
    held = gates * 1
    BudgetController(TARGET, projects=False).hold(held)
    (held * 3).sum().backward()
    assert torch.equal(gates.grad, torch.full_like(gates, 3.0))


@pytest.mark.parametrize("loss", ["l0", "ratio"])
def test_under_the_projection_a_loss_of_the_mean_gate_is_no_loss(loss):
    """What the recipe refuses under this name: its gradient is the same for all gates, and is taken away."""
    gates = torch.rand(8, 4, 4, dtype=torch.float64, requires_grad=True)
    held = gates * 1
    BudgetController(0.9).hold(held)
    make_loss(loss, (4, 4), 0.9)(held).backward()
    assert gates.grad.abs().max() < 1e-15


def test_the_error_is_the_shift_that_meets_the_rate():
    controller, scores, bias = BudgetController(0.7), torch.randn(64, 8, 8), nn.Parameter(torch.zeros(1))
    controller.correct(bias, controller.error(scores).item() / controller.STEP)
    assert ((scores + bias) > 0).float().mean().item() == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize("rate", [0.0, 1.0, 1.5])
def test_bad_input(rate):
    with pytest.raises(ValueError, match=f"rate={rate:g}; expected a share"):
        BudgetController(rate)
