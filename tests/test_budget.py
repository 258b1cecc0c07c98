"""The budget controller: a toy gate with noise, a task that pulls it towards fine, and a target that must be met."""

import json

import pytest
import torch
from torch import nn

from msvit.budget import BudgetController
from msvit.gbas import make_loss

TARGET = 0.6
STEPS = 300


def share(coarse):
    """The share of dense MACs of a picture of 64 regions, convex in the rate of coarse ones."""
    tokens, dense = 1 + 64 * (4 - 3 * coarse), 1 + 64 * 4
    return (12 * 64**2 * tokens + 2 * 64 * tokens**2) / (12 * 64**2 * dense + 2 * 64 * dense**2)


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
            total = total + controller.penalty(soft)
        optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(gate.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if controller:
            rate = (scores > 0).float().mean().item()
            controller.update(rate if controller.kind == "coarse" else share(rate))
    with torch.no_grad():
        return (gate(pictures(1024)) > 0).float().mean().item()


# Each loss at a tenth and at ten times its weight, the task's pull over two decades.
CASES = [
    ("gbas", 3, 5), ("gbas", 30, 0.5), ("gbas", 300, 0.05), ("bas", 3, 5), ("bas", 300, 0.05), ("l0", 3, 5),
    ("l0", 300, 0.5), ("ratio", 3, 5), ("ratio", 300, 0.05), ("none", 0, 0.05), ("none", 0, 5),
]  # fmt: skip


@pytest.mark.parametrize(("loss", "weight", "pull"), CASES)
def test_the_target_is_met_whatever_the_weight(loss, weight, pull):
    rate = train(loss, weight, pull, BudgetController(TARGET))
    assert rate == pytest.approx(TARGET, rel=0.02)


@pytest.mark.parametrize(
    ("loss", "weight", "pull"), [("gbas", 3, 5), ("l0", 30, 0.05), ("ratio", 3, 5), ("none", 0, 0.05)]
)
def test_without_it_the_budget_is_lost(loss, weight, pull):
    assert abs(train(loss, weight, pull, None) / TARGET - 1) > 0.1


def test_macs_are_met_too():
    target = share(0.55)
    rate = train("gbas", 3, 1, BudgetController(target, kind="macs"), target=0.55)
    assert share(rate) == pytest.approx(target, rel=0.02)


@pytest.mark.parametrize(
    ("kind", "measured", "sign"), [("coarse", 0.5, 1), ("coarse", 0.7, -1), ("macs", 0.5, -1), ("macs", 0.7, 1)]
)
def test_the_force_points_to_the_target(kind, measured, sign):
    controller = BudgetController(0.6, kind)
    gates = torch.rand(2, 4, 4, requires_grad=True)
    assert controller.penalty(gates).item() == 0
    controller.update(measured)
    controller.penalty(gates).backward()
    assert torch.equal(gates.grad, torch.full_like(gates, -controller.force / gates.numel()))
    assert controller.force * sign > 0  # a positive force lowers the loss of coarser gates


def test_half_precision_gates_have_a_float32_penalty():
    controller = BudgetController()
    controller.update(0.0)
    gates = torch.ones(64, 64, 64, dtype=torch.bfloat16)  # whose sum bfloat16 cannot hold
    assert controller.penalty(gates).dtype == torch.float32
    assert controller.penalty(gates).item() == pytest.approx(-controller.force)


def test_it_goes_on_exactly_where_it_stopped():
    first, second = BudgetController(), BudgetController()
    for step in range(20):
        first.update(0.3 + step / 37)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for rate in (0.31, 0.77, 0.6):
        assert first.force == second.force
        first.update(rate)
        second.update(rate)
    assert first.state_dict() == second.state_dict()


def test_a_lost_gate_does_not_wind_it_up_for_ever():
    controller = BudgetController()
    for _ in range(10_000):
        controller.update(0.0)
    assert controller.integral == 8
    assert controller.force < 1e6


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: BudgetController(1.0), "target=1; expected a share"),
        (lambda: BudgetController(0.5, "flops"), "kind='flops'; expected 'coarse'"),
        (lambda: BudgetController().update(float("nan")), "measured=nan; expected the share"),
        (lambda: BudgetController().update(-0.1), "measured=-0.1"),
    ],
)
def test_bad_input(call, match):
    with pytest.raises(ValueError, match=match):
        call()
