"""Attention among rows: three ways of computing it, one function; and its gradient by the weights."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from msvit.core import attention as layouts
from msvit.core.attention import Layout, attend, by_rows


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


def written_out(layout, q, k, v, weight, most=1.0):
    """Attention and its gradients for G = cos(out), N x N, with the tangent of hidden keys cut."""
    out, grads = [], [torch.zeros_like(x) for x in (q, k, v, weight)]
    for rows in torch.arange(len(k)).split(layout.lengths):
        q_, k_, v_ = (x[rows].transpose(0, 1) for x in (q, k, v))
        w, scale = weight[rows], q.shape[-1] ** -0.5
        e = (q_ @ k_.mT * scale).exp()
        u = e / (e @ w)[..., None]
        out.append((u * w) @ v_)
        grad = out[-1].cos()
        cut = torch.where(w > 0, u, u.clamp(max=most))
        r = cut * (grad @ v_.mT - (grad * out[-1]).sum(-1, keepdim=True))
        found = ((r * w) @ k_ * scale, (r * w).mT @ q_ * scale, (u * w).mT @ grad, r.sum((0, 1)))
        for whole, part in zip(grads, found, strict=True):
            whole[rows] = part if part.dim() == 1 else part.transpose(0, 1)
    return torch.cat(out, 1).transpose(0, 1), grads


@pytest.fixture(params=["each", "short", "padded"])
def kernel(request, monkeypatch):
    """The kernel of a CPU for each picture or for all short ones, and that of a device that pads and tells no sums."""
    monkeypatch.setattr(layouts, "_kernel", lambda q: "padded" if request.param == "padded" else "each")
    monkeypatch.setattr(layouts, "SHORT_PICTURE", 64 if request.param == "short" else 0)


@pytest.mark.parametrize("lengths", [[9], [6, 6], [2, 11, 1, 5]])
@pytest.mark.parametrize("hidden", ["none", "some", "many"])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("columns", [3, 128])
def test_gradients_are_those_of_attention_written_out(lengths, hidden, sized, columns, kernel, monkeypatch):
    """In float64 to 1e-10, hidden keys' cut included, however many columns go at once."""
    monkeypatch.setattr(layouts, "COLUMNS", columns)
    layout, total = Layout(lengths, torch.device("cpu")), sum(lengths)
    q, k, v = torch.randn(3, total, 2, 4, dtype=torch.float64).mul(1.5)
    weight = (torch.rand(total) >= {"none": 0, "some": 0.3, "many": 0.8}[hidden]).double()
    weight[layout.ends[:-1]] = 1.0
    weight = weight * (torch.rand(total).double() * 3 + 0.5) if sized else weight
    inputs = [x.clone().requires_grad_() for x in (q, k, v, weight)]
    expected, grads = written_out(layout, q, k, v, weight)
    out = attend(layout, *inputs)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad(out.sin().sum(), inputs)
    for a, b in zip(found, grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("lengths", [[5, 5], [3, 6, 1]])
@pytest.mark.parametrize("single", [False, True], ids=["self", "one query"])
def test_gradients_by_finite_differences_zero_weights_included(lengths, single, kernel, unbounded):
    layout, total = Layout(lengths, torch.device("cpu")), sum(lengths)
    q, k, v = torch.randn(3, total, 2, 3, dtype=torch.float64).unbind(0)
    q = q[: len(lengths)] if single else q
    weight = torch.randint(0, 2, (total,)).double().index_fill(0, layout.ends[:-1], 1.0)
    q, k, v, learned = (x.clone().requires_grad_() for x in (q, k, v, weight))
    assert torch.autograd.gradcheck(lambda *rows: attend(layout, *rows, learned), (q, k, v))
    (found,) = torch.autograd.grad(attend(layout, q, k, v, learned).sin().sum(), learned)
    step = torch.eye(total, dtype=torch.float64) * 1e-6  # to above zero, since no weight is below
    at, *moved = (attend(layout, q, k, v, weight + more).sin().sum() for more in (step[0] * 0, *step))
    slopes = torch.stack([(after - at) / 1e-6 for after in moved]).detach()
    torch.testing.assert_close(found, slopes, rtol=1e-4, atol=1e-4)


def test_a_hidden_key_counts_for_no_more_than_it_could():
    """Where u_ij > 1 for a hidden key j, its part of the gradient is that of u_ij = 1; all else is true."""
    layout = Layout([6], torch.device("cpu"))
    q, k, v = torch.randn(3, 6, 1, 4, dtype=torch.float64).mul(2)
    weight = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    true, cut = (written_out(layout, q, k, v, weight, most)[1] for most in (math.inf, 1.0))
    assert not torch.allclose(true[3], cut[3])
    inputs = [x.clone().requires_grad_() for x in (q, k, v, weight)]
    found = torch.autograd.grad(attend(layout, *inputs).sin().sum(), inputs)
    for a, b in zip(found, (*true[:3], cut[3]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_hidden_key_that_scores_far_above_the_rest_leaves_finite_gradients(dtype, kernel):
    q = torch.full((2, 1, 4), 30.0, dtype=dtype, requires_grad=True)
    k = torch.stack([torch.full((1, 4), -30.0), torch.full((1, 4), 30.0)]).to(dtype).requires_grad_()
    v = torch.randn(2, 1, 4, dtype=dtype, requires_grad=True)
    weight = torch.tensor([1.0, 0.0], requires_grad=True)
    out = attend(Layout([2], q.device), q, k, v, weight)
    torch.testing.assert_close(out, v[:1].expand_as(out), rtol=1e-2, atol=1e-2)
    out.float().sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v, weight))


@pytest.mark.parametrize("lengths", [[8, 8], [3, 9, 4]])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sizes_in_a_column_are_sizes_in_a_mask(lengths, dtype, monkeypatch):
    """The counts of merged tokens, and zeros among them, by kernels that take no mask."""
    layout = Layout(lengths, torch.device("cpu"))
    q, k, v = torch.randn(3, sum(lengths), 2, 8).to(dtype)
    size = torch.randint(0, 5, (sum(lengths),)).float().index_fill(0, layout.ends[:-1], 3.0)
    expected = attend(layout, q, k, v, size)
    monkeypatch.setattr(layouts, "_kernel", lambda q: "padded")
    off = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(attend(layout, q, k, v, size), expected, rtol=off, atol=off)
    unweighted = attend(layout, q, k, v)
    torch.testing.assert_close(unweighted, attend(layout, q, k, v, torch.ones_like(size)), rtol=off, atol=off)


@pytest.mark.parametrize("hidden", [False, True])
def test_a_training_step_makes_no_matrix_of_all_rows(hidden, monkeypatch):
    """The largest tensor of forward and backward grows with the rows, not with their square."""
    largest = []
    for n in (256, 1024):
        layout = Layout([n], torch.device("cpu"))
        inputs = [x.requires_grad_() for x in torch.randn(3, n, 1, 8).unbind(0)]
        weight = torch.ones(n)
        weight[1::2] = 0.0 if hidden else 1.0
        with Sizes() as sizes:
            attend(layout, *inputs, weight.requires_grad_()).sin().sum().backward()
        largest.append(sizes.most)
    assert largest[1] <= 4 * largest[0]


class Sizes(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.most = max([self.most, *made])
        return out


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
