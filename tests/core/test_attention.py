"""Attention among rows: three ways of computing it, one function; and its gradient by the weights."""

import pytest
import torch

from msvit.core import attention as layouts
from msvit.core.attention import Layout, WeightedAttention, attend, attend_by_policy, attention_of_first, by_rows


def by_loops(layout, q, k, v, weight):
    """The definition, one query and one key at a time."""
    out = torch.zeros(len(q), q.shape[1], v.shape[2], dtype=q.dtype)
    single = len(q) != len(k)
    for b, length in enumerate(layout.lengths):
        rows = range(layout.ends[b], layout.ends[b] + length)
        for i in [b] if single else rows:
            for head in range(q.shape[1]):
                e = [weight[j] * (q[i, head] @ k[j, head] / q.shape[2] ** 0.5).exp() for j in rows]
                out[i, head] = sum(e_j * v[j, head] for e_j, j in zip(e, rows, strict=True)) / sum(e)
    return out


@pytest.mark.parametrize("lengths", [[4], [5, 5, 5], [1, 7, 3], [2, 1, 1]])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("single", [False, True], ids=["self", "one query"])
@pytest.mark.parametrize("learned", [False, True])
def test_attention_is_its_definition(lengths, weighted, single, learned):
    layout = Layout(lengths, torch.device("cpu"))
    q, k, v = torch.randn(3, sum(lengths), 2, 4, dtype=torch.float64)
    q = q[: len(lengths)] if single else q
    weight = torch.ones(sum(lengths), dtype=torch.float64)
    if weighted:
        weight = torch.randint(0, 3, (sum(lengths),)).double()
        weight[layout.ends[:-1]] = 2.0
    expected = by_loops(layout, q, k, v, weight)
    given = weight.requires_grad_(learned) if weighted or learned else None
    torch.testing.assert_close(attend(layout, q, k, v, given), expected, rtol=1e-10, atol=1e-12)


def test_gradients_of_weighted_attention_zero_weights_included(unbounded):
    q, k, v = torch.randn(3, 2, 2, 5, 3, dtype=torch.float64).requires_grad_().unbind(0)
    weight = torch.tensor([[1.0, 0, 1, 0, 1], [1, 1, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(WeightedAttention.apply, (q, k, v, weight))


@pytest.mark.parametrize("lengths", [[5, 5], [3, 6, 1]])
def test_gradients_of_what_the_first_gives_zero_weights_included(lengths, unbounded):
    layout = Layout(lengths, torch.device("cpu"))
    q, k = torch.randn(2, sum(lengths), 2, 3, dtype=torch.float64).requires_grad_().unbind(0)
    weight = torch.randint(0, 2, (sum(lengths),)).double().index_fill(0, layout.ends[:-1], 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda *rows: attention_of_first(layout, *rows), (q, k))
    assert torch.autograd.gradcheck(lambda *rows: attention_of_first(layout, *rows), (q, k, weight))


def test_what_the_first_gives_is_cut_as_attention_is():
    """It is attention on values that are one for a key and zero for the others, and so are its gradients."""
    q, k = torch.randn(2, 1, 1, 6, 4, dtype=torch.float64).mul(2)
    weight = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64, requires_grad=True)
    out = WeightedAttention.apply(q, k, torch.eye(6, dtype=torch.float64)[None, None], weight[None])[0, 0, 0]
    given = attention_of_first(Layout([6], q.device), q[0].transpose(0, 1), k[0].transpose(0, 1), weight)
    torch.testing.assert_close(given, out)
    assert ((q[0, 0, 0] @ k[0, 0].T / 2).exp()[1::2] > (q[0, 0, 0] @ k[0, 0, ::2].T / 2).exp().sum()).any()
    for i in range(6):
        pair = [torch.autograd.grad(x[i], weight, retain_graph=True)[0] for x in (given, out)]
        torch.testing.assert_close(*pair)


def test_a_hidden_key_counts_for_no_more_than_it_could(unbounded):
    """Where u_ij > 1 for a hidden key j, its part of the gradient is that of u_ij = 1; all else is true."""
    q, k, v = (torch.randn(1, 1, 6, 4, dtype=torch.float64).mul(2).requires_grad_() for _ in range(3))
    weight = torch.tensor([[1.0, 0, 1, 0, 1, 0]], dtype=torch.float64, requires_grad=True)
    true = torch.autograd.grad(WeightedAttention.apply(q, k, v, weight).square().sum(), (q, k, v, weight))
    unbounded.undo()
    out = WeightedAttention.apply(q, k, v, weight)
    cut = torch.autograd.grad(out.square().sum(), (q, k, v, weight))
    e = (q @ k.mT / 2).exp()
    u = e / (e * weight).sum(-1, keepdim=True)
    hidden = weight[0] == 0
    assert (u[..., hidden] > 1).any()
    grad = 2 * out
    expected = (u.where(~hidden | (u < 1), 1) * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))).sum((0, 1, 2))
    torch.testing.assert_close(cut[3][0], expected.detach())
    for a, b in zip(cut[:3], true[:3], strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(cut[3][:, ~hidden], true[3][:, ~hidden])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_key_that_scores_far_above_the_rest_leaves_finite_gradients(dtype):
    q = torch.full((1, 1, 2, 4), 30.0, dtype=dtype, requires_grad=True)
    k = torch.stack([torch.full((4,), -30.0), torch.full((4,), 30.0)])[None, None].to(dtype).requires_grad_()
    v = torch.randn(1, 1, 2, 4, dtype=dtype, requires_grad=True)
    weight = torch.tensor([[1.0, 0.0]], requires_grad=True)
    out = WeightedAttention.apply(q, k, v, weight)
    torch.testing.assert_close(out, v[:, :, :1].expand_as(out), rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, weight))


def policy_by_loops(layout, q, k, v, weight, size=None):
    """The definition of attention by a policy, one query and one key at a time."""
    out = []
    for first, n in zip(layout.ends.tolist(), layout.lengths, strict=False):
        for i in range(first, first + n):
            heads, keys = [], range(first, first + n)
            for h in range(q.shape[1]):
                s = torch.stack([q[i, h] @ k[j, h] for j in keys]) / q.shape[2] ** 0.5
                s = s if size is None else s + torch.stack([size[j].log() for j in keys])
                e = [(x - s.max()).exp() * (1.0 if j == i else weight[j]) for j, x in zip(keys, s, strict=True)]
                total = sum((x + 1e-6 / n) * v[j, h] for j, x in zip(keys, e, strict=True))
                heads.append(total / (sum(e) + 1e-6))
            out.append(torch.stack(heads))
    return torch.stack(out)


@pytest.mark.parametrize("lengths", [[5, 5], [1, 6, 3]])
def test_attention_by_a_policy_is_its_definition(lengths):
    """With the gradients of all, also where what is dropped scores above all others; there eps shows."""
    layout, total = Layout(lengths, torch.device("cpu")), sum(lengths)
    given = [*torch.randn(3, total, 2, 4, dtype=torch.float64).mul(2), torch.randint(0, 2, (total,)).double()]
    given = [x.clone().requires_grad_() for x in given]
    expected, out = policy_by_loops(layout, *given), attend_by_policy(layout, *given, policy=given[-1])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
    gradients = (torch.autograd.grad(x.sin().sum(), given) for x in (expected, out))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-10, atol=1e-12)


def test_a_size_counts_as_often_in_attention_by_a_policy():
    """A key of size s, dropped or not, is s equal ones; with all kept, it is proportional attention but for eps."""
    layout = Layout([4, 6], torch.device("cpu"))
    q, k, v = torch.randn(3, 10, 2, 4, dtype=torch.float64).mul(2)
    size, weight = torch.rand(10, dtype=torch.float64) * 3 + 1, torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 0, 1, 1]).double()
    expected = policy_by_loops(layout, q, k, v, weight, size)
    torch.testing.assert_close(attend_by_policy(layout, q, k, v, weight, weight, size), expected)
    ones = torch.ones_like(weight)
    torch.testing.assert_close(
        attend_by_policy(layout, q, k, v, ones, ones, size), attend(layout, q, k, v, size), rtol=0, atol=1e-5
    )


def test_what_a_gate_hides_from_a_policy_has_a_tangent_of_one_at_most():
    """Where u_ij > 1 for a key that the gate hides and the policy keeps; the policy's own tangents are true."""
    layout = Layout([6], torch.device("cpu"))
    q, k, v = torch.randn(3, 6, 1, 4, dtype=torch.float64).mul(2)
    gate = torch.tensor([1.0, 0, 1, 0, 1, 1], dtype=torch.float64, requires_grad=True)
    policy = torch.tensor([1.0, 1, 1, 1, 0, 1], dtype=torch.float64, requires_grad=True)
    out = attend_by_policy(layout, q, k, v, gate * policy, policy)
    found = torch.autograd.grad(out.sin().sum(), (gate, policy))
    weight = (gate * policy).detach()
    s = q[:, 0] @ k[:, 0].T / 2
    e = (s - s.amax(1, keepdim=True)).exp()
    own = torch.eye(6, dtype=torch.float64)
    u = e / ((e * (weight + (1 - weight) * own)).sum(1, keepdim=True) + 1e-6)
    hidden = torch.tensor([False, True, False, True, False, False])
    cut = u.clamp(max=1).where(hidden, u)
    assert ((cut < u) & (own == 0)).any()
    pull = out.cos().detach()[:, 0]
    r = (cut * (1 - own) * (pull @ v[:, 0].T - (pull * out.detach()[:, 0]).sum(1, keepdim=True))).sum(0)
    torch.testing.assert_close(found[0], r * policy.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found[1], r * gate.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("lengths", [[3, 3], [2, 5, 1]])
def test_padding_and_summing_follow_the_pictures(lengths):
    layout = Layout(lengths, torch.device("cpu"))
    rows = torch.randn(sum(lengths), 4)
    padded = layout.pad(rows, fill=7.0)
    for b, (length, part) in enumerate(zip(lengths, rows.split(lengths), strict=True)):
        assert torch.equal(padded[b, :length], part)
        assert (padded[b, length:] == 7).all()
    assert torch.equal(layout.unpad(padded), rows)
    torch.testing.assert_close(layout.sum(rows), torch.stack([part.sum(0) for part in rows.split(lengths)]))
    assert layout.picture.tolist() == [b for b, n in enumerate(lengths) for _ in range(n)]


@pytest.mark.parametrize("count", [1, 7, 8, 9, 40])
def test_rows_in_parts_are_rows_at_once(monkeypatch, count):
    monkeypatch.setattr(layouts, "PART", 8)
    seen = []

    def work(x):
        seen.append(len(x))
        return x.square().sum(1, keepdim=True)

    x = torch.randn(count, 3)
    with torch.no_grad():
        assert torch.equal(by_rows(work, x), x.square().sum(1, keepdim=True))
    assert max(seen) <= 8
    assert sum(seen) == count
    seen.clear()
    by_rows(work, x)
    assert seen == [count], "where a gradient is wanted, all rows go at once"
