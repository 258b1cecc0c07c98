"""A quota in every picture, and a pattern for all of them: what they promise, and that they learn where to look."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from msvit.core.sampling import add_logistic_noise
from msvit.data import IGNORE
from msvit.gating.controller import BudgetController
from msvit.gating.learned import Pattern, Quota, between, highest, one_class, relaxed_quota, sharing_loss
from msvit.gating.losses import make_loss

HALF = torch.tensor(0.5)


def quota_of(rate, patch=4, channels=1, **settings):
    return Quota(patch, channels, width=32, rate=rate, **settings)


class TestQuota:
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("supervised", [True, False])
    @pytest.mark.parametrize("rate", [0.0, 0.13, 0.4, 0.5, 0.99, 1.0])
    @pytest.mark.parametrize("grid", [(3, 5), (4, 4), (1, 1), (14, 14)])
    def test_every_picture_has_its_count(self, training, supervised, rate, grid):
        gate = quota_of(rate, supervised=supervised).train(training)
        n = grid[0] * grid[1]
        for scores in (torch.randn(6, *grid), torch.zeros(6, *grid), torch.randn(6, *grid).round()):
            soft, hard = gate.decide(scores, HALF)
            assert soft.shape == hard.shape == scores.shape
            assert hard.flatten(1).sum(1).tolist() == [int(rate * n + 0.5)] * 6
            assert set(hard.unique().tolist()) <= {0.0, 1.0}
            assert ((soft >= 0) & (soft <= 1)).all()

    def test_evaluation_takes_the_highest_and_of_equals_the_first(self):
        gate = quota_of(0.5).eval()
        scores = torch.tensor([[[3.0, 1.0, 1.0], [1.0, 2.0, 0.0]]])
        assert gate.decide(scores, HALF)[1].tolist() == [[[1, 1, 0], [0, 1, 0]]]
        assert gate.decide(torch.zeros(1, 2, 3), HALF)[1].tolist() == [[[1, 1, 1], [0, 0, 0]]]

    def test_soft_values_say_in_evaluation_who_is_coarse(self):
        gate, scores = quota_of(0.3).eval(), torch.randn(8, 4, 5)
        soft, hard = gate.decide(scores, torch.tensor(0.9))  # a threshold means nothing
        assert torch.equal(soft > 0.5, hard > 0.5)
        middle = between(scores.flatten(1), gate.count(20))[:, :, None]
        torch.testing.assert_close(soft, torch.sigmoid((scores - middle) / gate.tau))

    def test_training_takes_the_highest_noisy_scores(self):
        gate, scores = quota_of(0.4), torch.randn(8, 4, 5)
        torch.manual_seed(3)
        soft, hard = gate.decide(scores, HALF)
        torch.manual_seed(3)
        noisy = add_logistic_noise(scores.flatten(1))
        for row, coarse in zip(noisy.tolist(), hard.flatten(1).tolist(), strict=True):
            assert [i for i, m in enumerate(coarse) if m] == sorted(sorted(range(20), key=lambda i: -row[i])[:8])
        torch.testing.assert_close(soft.flatten(1).sum(1), torch.full((8,), 8.0))
        assert not torch.equal(gate.decide(scores, HALF)[1], hard)

    @pytest.mark.parametrize("count", [1, 4, 6])
    def test_the_relaxed_quota_has_its_own_derivative(self, count):
        """By finite differences, the threshold's move along with the scores included."""
        scores = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
        count = torch.tensor(count)
        assert torch.autograd.gradcheck(lambda s: relaxed_quota(s, count, 0.3), (scores,), atol=1e-7)
        sums = relaxed_quota(scores, count, 0.3).sum(1)
        torch.testing.assert_close(sums, count.double().expand(3), rtol=0, atol=1e-12)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_the_gradient_by_the_scores_is_that_of_the_relaxed_ones(self, dtype):
        gate, scores = quota_of(0.4), torch.randn(5, 2, 5, dtype=dtype, requires_grad=True)
        pull = torch.randn(5, 2, 5, dtype=dtype)
        torch.manual_seed(3)
        soft, hard = gate.decide(scores, HALF)
        assert hard.dtype == soft.dtype == dtype
        (found,) = torch.autograd.grad((hard * pull).sum(), scores)
        torch.manual_seed(3)
        noisy = add_logistic_noise(scores.detach().flatten(1)).requires_grad_()
        relaxed = relaxed_quota(noisy, gate.count(10), gate.tau)
        (expected,) = torch.autograd.grad((relaxed * pull.flatten(1)).sum(), noisy)
        torch.testing.assert_close(found.flatten(1), expected)
        d = (relaxed * (1 - relaxed)).detach()
        mean = (d * pull.flatten(1)).sum(1, keepdim=True) / d.sum(1, keepdim=True)
        torch.testing.assert_close(expected, d * (pull.flatten(1) - mean) / gate.tau)

    def test_a_pull_on_all_regions_alike_moves_nothing(self):
        gate, scores = quota_of(0.4).double(), torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
        (1e3 * gate.decide(scores, HALF)[1]).sum().backward()
        assert scores.grad.abs().max() < 1e-9

    def test_saturated_scores_do_not_divide_by_zero(self):
        for spread in (0.0, 1e4):
            scores = (spread * torch.linspace(-1, 1, 16)).expand(2, -1).clone().requires_grad_()
            relaxed_quota(scores, torch.tensor(5), 0.3).square().sum().backward()
            assert scores.grad.isfinite().all()

    def test_supervised_decisions_have_neither_noise_nor_gradient(self):
        gate, scores = quota_of(0.4, supervised=True).train(), torch.randn(5, 4, 4, requires_grad=True)
        soft, hard = gate.decide(scores, HALF)
        assert not soft.requires_grad
        assert not hard.requires_grad
        assert torch.equal(hard, gate.eval().decide(scores, HALF)[1])

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_a_cast_leaves_the_rate_as_it_is(self, dtype):
        gate = quota_of(101 / 196)
        assert gate.to(dtype).count(196) == 101
        images = torch.randn(2, 1, 56, 56).to(dtype)
        assert gate.eval().decide(gate(images), HALF)[1].sum((1, 2)).tolist() == [101, 101]

    @pytest.mark.parametrize("n", [1, 16, 49, 196, 1024])
    def test_every_count_can_be_set(self, n):
        gate = quota_of(0.5)
        found = []
        for parts in gate.parts_of(n):
            gate.parts.copy_(parts)
            found.append(gate.count(n).item())
        assert found == list(range(n, -1, -1))

    def test_rates_that_cannot_be(self):
        for rate in (-0.1, 1.1, float("nan")):
            with pytest.raises(ValueError, match=r"rate=.* lies outside \[0, 1\]"):
                quota_of(rate)

    def test_saves_and_loads_alone(self, tmp_path):
        gate = quota_of(0.3, supervised=True).eval()
        gate.rate = 0.7
        gate.save_pretrained(tmp_path)
        again = Quota.from_pretrained(tmp_path).eval()
        assert (again.rate, again.supervised, again.patch) == (0.7, True, 4)
        images = torch.randn(2, 1, 16, 16)
        assert torch.equal(again(images), gate(images))


def test_highest_and_between_are_their_definitions():
    scores = torch.randn(4, 6).round(decimals=1)
    for count in range(7):
        chosen, middle = highest(scores, torch.tensor(count)), between(scores, torch.tensor(count))
        for row, mine, t in zip(scores.tolist(), chosen.tolist(), middle[:, 0].tolist(), strict=True):
            order = sorted(range(6), key=lambda i: (-row[i], i))
            assert {i for i in range(6) if mine[i]} == set(order[:count])
            ends = [float("inf"), *(row[i] for i in order), -float("inf")]
            assert t == pytest.approx((ends[count] + ends[count + 1]) / 2)


class TestLabels:
    def test_regions_of_one_class_by_a_plain_loop(self):
        labels = torch.randint(0, 2, (5, 8, 12))
        labels[torch.rand(5, 8, 12) < 0.6] = IGNORE
        labels[:, :4, :4] = IGNORE
        found = one_class(labels, 2)
        assert found.shape == (5, 4, 6)
        for b in range(5):
            for y in range(4):
                for x in range(6):
                    classes = set(labels[b, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].flatten().tolist())
                    assert found[b, y, x].item() == (len(classes) == 1)
        assert 0 < found.float().mean() < 1
        assert found[:, :2, :2].all(), "nothing but ignored pixels"

    def test_the_loss_is_the_binary_cross_entropy(self):
        labels, scores = torch.randint(0, 2, (3, 4, 6)), torch.randn(3, 2, 3, requires_grad=True)
        found = sharing_loss(scores, labels)
        shared = one_class(labels, 2)
        p = scores.sigmoid()
        assert found.item() == pytest.approx(-torch.where(shared, p, 1 - p).log().mean().item(), abs=1e-6)
        found.backward()
        torch.testing.assert_close(scores.grad, ((p - shared.float()) / 18).detach())


class TestPattern:
    def test_all_pictures_have_the_same_scores_and_evaluation_the_same_decisions(self):
        gate = Pattern((2, 3), patch=4)
        gate.weight.data.normal_()
        images = torch.randn(4, 1, 8, 12)
        scores = gate(images)
        assert torch.equal(scores, (gate.GAIN * gate.weight + gate.bias).expand(4, -1, -1))
        gate.eval()
        soft, hard = gate.decide(scores, HALF)
        assert torch.equal(soft, torch.sigmoid(scores / gate.tau))
        assert torch.equal(hard, (scores > 0).float())
        gate.train()
        assert not torch.equal(*gate.decide(scores, HALF)[0][:2])

    def test_another_size_has_the_resized_scores(self):
        gate = Pattern((2, 2), patch=4)
        gate.weight.data = torch.tensor([[0.0, 1.0], [2.0, 3.0]])
        found = gate(torch.zeros(1, 1, 16, 16))[0] / gate.GAIN
        rows = torch.tensor([0, 0.25, 0.75, 1])  # bilinear between the centres of two
        torch.testing.assert_close(found, 2 * rows[:, None] + rows)

    def test_the_bias_moves_all_scores_alike(self):
        for gate in (Pattern((4, 4), patch=4), quota_of(0.5)):
            images = torch.randn(2, 1, 16, 16)
            before = gate(images)
            gate.bias.data += 1.5
            torch.testing.assert_close(gate(images), before + 1.5)


# ---- both learn a task in which it is known which regions must be fine

FINE = 6  # of 16 regions


def busy_pictures(n, where, random):
    """Pictures `[n, 1, 16, 16]` of 4 x 4 flat regions but for FINE textured ones: the same in all, or new in each."""
    order = torch.rand(n, 16, generator=random).argsort(1) if where == "anywhere" else torch.arange(0, 16).expand(n, -1)
    busy = torch.zeros(n, 16).scatter(1, order[:, :FINE], 1.0).view(n, 1, 4, 4)
    flat = F.interpolate(torch.randn(n, 1, 4, 4, generator=random), (16, 16))
    texture = torch.randn(n, 1, 16, 16, generator=random)
    return flat + F.interpolate(busy, (16, 16)) * texture, busy[:, 0] > 0.5


def learn(gate, where, steps, loss=None, controller=None, supervised=False):
    """How often a trained gate is right on new pictures. Coarse regions cost a little, textured ones much more."""
    random = torch.Generator().manual_seed(1)
    parts = nn.ModuleList([gate, *([loss] if loss else [])])
    optimizer = torch.optim.Adam(parts.parameters(), lr=3e-3)
    for _ in range(steps):
        images, busy = busy_pictures(64, where, random)
        scores = gate(images)
        soft, coarse = gate.decide(scores, HALF)
        if supervised:
            labels = F.interpolate(busy[:, None].float(), (16, 16))[:, 0] * torch.arange(16)  # many classes, or one
            total = sharing_loss(scores, labels.long())
        else:
            total = (coarse * (0.5 + busy)).mean() + (3 * loss(soft) if loss else 0)
        if controller:
            controller.hold(soft)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        if controller:
            controller.correct(gate.bias, controller.error(scores).item())
    with torch.no_grad():
        images, busy = busy_pictures(256, where, random)
        return ((gate.eval().decide(gate(images), HALF)[1] > 0.5) == ~busy).float().mean().item()


@pytest.mark.parametrize("supervised", [False, True])
def test_a_quota_finds_the_regions_of_each_picture(supervised):
    gate = quota_of(1 - FINE / 16, supervised=supervised)
    assert learn(gate, "anywhere", 150, supervised=supervised) > 0.98


def test_a_pattern_finds_the_regions_that_all_pictures_share():
    rate = 1 - FINE / 16
    gate, loss = Pattern((4, 4), patch=4), make_loss("gbas", (4, 4), rate)
    assert learn(gate, "there", 150, loss, BudgetController(rate)) == 1
    assert (gate.GAIN * gate.weight + gate.bias < 0).flatten().tolist() == [True] * FINE + [False] * (16 - FINE)


def test_a_pattern_cannot_follow_regions_that_move():
    rate = 1 - FINE / 16
    assert learn(Pattern((4, 4), patch=4), "anywhere", 50, None, BudgetController(rate)) < 0.7
