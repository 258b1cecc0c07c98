"""Attention written out: what the class token gives to each row, and DynamicViT's attention by a policy."""

import pytest
import torch

from msvit.core.attention import Layout, attend
from msvit.core.attention_weights import attend_by_policy, attention_of_first


@pytest.mark.parametrize("lengths", [[5, 5], [3, 6, 1]])
def test_gradients_of_what_the_first_gives_zero_weights_included(lengths, unbounded):
    layout = Layout(lengths, torch.device("cpu"))
    q, k = torch.randn(2, sum(lengths), 2, 3, dtype=torch.float64).requires_grad_().unbind(0)
    weight = torch.randint(0, 2, (sum(lengths),)).double().index_fill(0, layout.ends[:-1], 1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda *rows: attention_of_first(layout, *rows), (q, k))
    assert torch.autograd.gradcheck(lambda *rows: attention_of_first(layout, *rows), (q, k, weight))


def test_what_the_first_gives_is_cut_as_attention_is():
    """It is attention on values that are one for a key and zero for the others, and so are its gradients."""
    layout = Layout([6], torch.device("cpu"))
    q, k = torch.randn(2, 6, 1, 6, dtype=torch.float64).mul(2)
    weight = torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64, requires_grad=True)
    out = attend(layout, q, k, torch.eye(6, dtype=torch.float64)[:, None], weight)[0, 0]
    given = attention_of_first(layout, q, k, weight)
    torch.testing.assert_close(given, out)
    s = q[0, 0] @ k[:, 0].T / 6**0.5
    assert (s.exp()[1::2] > s[::2].exp().sum()).any()
    for i in range(6):
        pair = [torch.autograd.grad(x[i], weight, retain_graph=True)[0] for x in (given, out)]
        torch.testing.assert_close(*pair)


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
