"""Attention among rows: three ways of computing it, one function; and its gradient by the weights."""

import pytest
import torch

from msvit.core import attention as layouts
from msvit.core.attention import Layout, WeightedAttention, attend, attention_of_first, by_rows


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
