"""The gate losses against plain loops in float64, against mpmath, and in closed form."""

import itertools
import json
import math
import os

import mpmath
import numpy as np
import pytest
import scipy.stats
import torch
from torch.autograd import gradcheck

from msvit.gating.losses import (
    L0,
    BaS,
    GBaS,
    NoLoss,
    Ratio,
    bas_loss,
    beta_cdf,
    cvm,
    gbas_loss,
    make_loss,
    normal_cdf,
    relaxed_bernoulli_cdf,
)

CDFS = {"relaxed_bernoulli": relaxed_bernoulli_cdf, "beta": beta_cdf, "normal": normal_cdf}
NAMES = ("gbas", "bas", "l0", "ratio", "none")
REFERENCE = os.environ.get("MSVIT_REFERENCE")


def f64(*values, grad=True):
    """Float64 tensors with gradients, of numbers or arrays."""
    made = [torch.as_tensor(v, dtype=torch.float64).clone().requires_grad_(grad) for v in values]
    return made[0] if len(made) == 1 else made


# --- CDFs ---------------------------------------------------------------------------------------------------


def beta_by_mpmath(x, a, b):
    """I_x(a, b) and its derivatives in x, a and b, to 25 digits."""
    with mpmath.workdps(25):
        value = mpmath.betainc(a, b, 0, x, regularized=True)
        by_x = mpmath.mpf(x) ** (a - 1) * (1 - mpmath.mpf(x)) ** (b - 1) / mpmath.beta(a, b)
        by_a = mpmath.diff(lambda t: mpmath.betainc(t, b, 0, x, regularized=True), a)
        by_b = mpmath.diff(lambda t: mpmath.betainc(a, t, 0, x, regularized=True), b)
        return [float(v) for v in (value, by_x, by_a, by_b)]


@pytest.mark.parametrize(("a", "b"), list(itertools.product([0.05, 0.3, 1, 2.5, 50], repeat=2)))
def test_beta_equals_mpmath_with_its_derivatives(a, b):
    turn = (a + 1) / (a + b + 2)  # where one tail takes over from the other
    x = f64([1e-6, 1e-3, 0.3, turn, math.nextafter(turn, 1), 0.8, 1 - 1e-6])
    parameters = f64(torch.full_like(x, a), torch.full_like(x, b))
    y = beta_cdf(x, *parameters)
    found = torch.stack([y, *torch.autograd.grad(y.sum(), (x, *parameters))], 1).detach().numpy()
    expected = [beta_by_mpmath(v, a, b) for v in x.tolist()]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-15)


def test_beta_far_beyond_the_range_it_promises():
    x = f64(np.linspace(0.001, 0.999, 41), grad=False)
    for a, b in itertools.product([0.003, 2000.0, 77.0], repeat=2):
        np.testing.assert_allclose(beta_cdf(x, a, b), scipy.stats.beta.cdf(x, a, b), rtol=1e-8, atol=1e-12)


def test_relaxed_bernoulli_and_normal_in_closed_form():
    x = np.linspace(0.01, 0.99, 21)
    found = relaxed_bernoulli_cdf(f64(x), 0.3, 0.7).detach()
    np.testing.assert_allclose(found, 1 / (1 + 3 / 7 * (x / (1 - x)) ** -0.7), rtol=1e-13)
    assert relaxed_bernoulli_cdf(f64(0.5), 0.3, 0.01).item() == pytest.approx(0.7)  # P(x > 1/2) = p at every T
    found = normal_cdf(f64(x), 0.6, 0.1).detach()
    np.testing.assert_allclose(found, scipy.stats.norm.cdf(x, 0.6, 0.1), rtol=1e-12, atol=1e-16)


@pytest.mark.parametrize("name", CDFS)
@pytest.mark.long
def test_gradcheck_of_cdfs(name):
    x = f64(torch.rand(3, 4, 5) * 0.98 + 0.01)
    p, q = f64(torch.rand(4, 1) * 0.8 + 0.1), f64(torch.rand(5) * 3 + 0.1)  # both broadcast against x
    assert gradcheck(CDFS[name], (x, p, q))


@pytest.mark.parametrize("name", ["relaxed_bernoulli", "beta"])
def test_ends_are_exact_and_have_finite_gradients(name):
    x, p, q = (torch.tensor(v, requires_grad=True) for v in ([0.0, 1.0, 1e-38, 1e-9, 1 - 2**-24], 0.3, 0.05))
    y = CDFS[name](x, p, q)
    assert y[:2].tolist() == [0, 1]
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (x, p, q))
    assert x.grad[:2].tolist() == [0, 0]
    assert (x.grad[2:] > 0).all()


# --- the distance -------------------------------------------------------------------------------------------


def loop_cvm(values, prior, p, q):
    """CvM of a flat array by a plain loop, with its gradients in the values, in p and in q."""
    cdf = {
        "beta": scipy.stats.beta.cdf,
        "normal": scipy.stats.norm.cdf,
        "relaxed_bernoulli": lambda x, p, t: scipy.special.expit(t * scipy.special.logit(x) - scipy.special.logit(p)),
    }[prior]
    n, loss, grads = len(values), 0.0, [np.zeros(len(values)), 0.0, 0.0]
    for rank, i in enumerate(np.argsort(values), 1):
        x, h = values[i], 1e-6
        gap = rank / (n + 1) - cdf(x, p, q)
        loss += gap**2 / n
        grads[0][i] = -2 * gap / n * (cdf(x + h, p, q) - cdf(x - h, p, q)) / (2 * h)
        grads[1] -= 2 * gap / n * (cdf(x, p + h, q) - cdf(x, p - h, q)) / (2 * h)
        grads[2] -= 2 * gap / n * (cdf(x, p, q + h) - cdf(x, p, q - h)) / (2 * h)
    return loss, *grads


FAMILIES = [
    ("beta", (8, 6), 0.6, 0.4), ("beta", (8, 6), 2.0, 6.0), ("relaxed_bernoulli", (8, 6), 0.3, 0.25),
    ("normal", (12,), 0.5, 0.1), ("beta", (12,), 3.0, 7.0),
]  # fmt: skip


@pytest.mark.parametrize(("prior", "shape", "p", "q"), FAMILIES)
def test_one_distance_equals_the_loop(prior, shape, p, q):
    values = f64(torch.rand(shape) * 0.94 + 0.03)
    params = f64(p, q)
    loss = cvm(values, CDFS[prior], params=tuple(params))
    loss.backward()
    expected, by_values, by_p, by_q = loop_cvm(values.detach().numpy().ravel(), prior, p, q)
    assert loss.item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(values.grad.numpy().ravel(), by_values, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose([t.grad.item() for t in params], [by_p, by_q], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("prior", ["relaxed_bernoulli", "beta"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_distance_per_position_equals_the_loop(prior, dim):
    values, (p, q) = f64(torch.rand(16, 4) * 0.94 + 0.03), f64([0.2, 0.4, 0.6, 0.8], [0.3, 0.3, 0.5, 0.5])
    given = (values, p, q) if dim == 0 else (values.T, p[:, None], q[:, None])
    losses = cvm(given[0], CDFS[prior], dim, params=given[1:])
    assert losses.shape == (4,)
    losses.mean().backward()
    for k in range(4):
        column = values.detach().numpy()[:, k]
        expected, by_values, by_p, by_q = loop_cvm(column, prior, p[k].item(), q[k].item())
        assert losses[k].item() == pytest.approx(expected, rel=1e-10)
        np.testing.assert_allclose(values.grad.numpy()[:, k], by_values / 4, rtol=1e-5, atol=1e-9)
        np.testing.assert_allclose([p.grad[k], q.grad[k]], [by_p / 4, by_q / 4], rtol=1e-5, atol=1e-9)


@pytest.mark.skipif(not REFERENCE, reason="MSVIT_REFERENCE names no file with values of the reference implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_implementation(dtype):
    with open(REFERENCE) as file:
        cases = json.load(file)
    assert len(cases) == 6
    for case in cases:
        values, p = (torch.tensor(case[k], dtype=dtype, requires_grad=True) for k in ("values", "param1"))
        symmetric = case["prior"] == "symbeta"
        q = 1 - p if symmetric else torch.tensor(case["param2"], dtype=dtype, requires_grad=True)
        cdf = CDFS["beta" if symmetric else case["prior"]]
        loss = cvm(values, cdf, None if case["dim"] is None else 0, params=(p, q)).mean()
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], abs=1e-6), case["name"]
        exact = (values > 1e-3) & (values < 1 - 1e-3)
        if cdf is beta_cdf:
            density = scipy.stats.beta.pdf(values.detach(), p.item(), q.item())
            exact = torch.from_numpy((density > 1e-3) & (density < 100))  # what the reference does not clip
        difference = (values.grad - torch.tensor(case["grad_values"]))[exact]
        assert exact.float().mean() > 0.9
        assert difference.abs().max() < 1e-5, case["name"]
        for grad, tensor in (("grad_param1", p), ("grad_param2", q)):
            if grad in case:
                np.testing.assert_allclose(tensor.grad, case[grad], atol=1e-5)


def test_ties_share_their_rank_in_every_row():
    values = torch.tensor([[0.2, 0.2, 0.9, 0.2], [0.5, 0.1, 0.5, 0.7], [0.3, 0.3, 0.3, 0.3]], dtype=torch.float64)
    ranks = scipy.stats.rankdata(values, axis=1) / 5
    found = cvm(values, beta_cdf, 1, params=(1.0, 1.0), ties="average")
    np.testing.assert_allclose(found, ((ranks - values.numpy()) ** 2).mean(1), atol=1e-12)
    # In order, the ranks of ties spread and only lift the distance, by their variance.
    ordered = cvm(values, beta_cdf, 1, params=(1.0, 1.0))
    np.testing.assert_allclose(ordered[2] - found[2], np.var([0.2, 0.4, 0.6, 0.8]), atol=1e-12)
    assert torch.equal(cvm(values.T, beta_cdf, 0, params=(1.0, 1.0), ties="average"), found)


def test_pooled_values_are_ranked_under_their_own_prior():
    """If every value is the same quantile of its prior as its rank says, the distance is zero, whatever the values."""
    quantiles = torch.tensor([[0.2, 0.8], [0.6, 0.4]], dtype=torch.float64)
    p, t = f64([0.1, 0.9], [0.3, 0.8], grad=False)
    values = torch.sigmoid((torch.logit(quantiles) + torch.logit(p)) / t)
    assert cvm(values, relaxed_bernoulli_cdf, params=(p, t)).item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("gradients", ["both", "values", "prior"])
def test_gradients_flow_where_they_are_told_to(gradients):
    losses = (
        lambda gates, p, t, which: bas_loss(gates, (p, t), gradients=which),
        lambda gates, p, t, which: gbas_loss(gates, p, t, gradients=which),
    )
    for loss in losses:
        tensors = f64(torch.rand(8, 2, 3), torch.rand(2, 3) * 0.8 + 0.1, torch.rand(2, 3) + 0.1)
        loss(*tensors, gradients).backward()
        gates, p, t = (x.grad for x in tensors)
        assert (gates is None) == (gradients == "prior")
        assert (p is None) == (t is None) == (gradients == "values")
        for x, found in zip(tensors, (gates, p, t), strict=True):
            x.grad = None
            assert found is None or torch.equal(found, torch.autograd.grad(loss(*tensors, "both"), x)[0])


@pytest.mark.parametrize("prior", ["relaxed_bernoulli", "beta"])
@pytest.mark.parametrize("hyperprior", ["normal", "beta"])
@pytest.mark.long
def test_gradcheck_of_losses(prior, hyperprior):
    gates, p, t = f64(torch.rand(6, 2, 3) * 0.9 + 0.05, torch.rand(2, 3) * 0.6 + 0.2, torch.rand(2, 3) + 0.3)
    assert gradcheck(lambda *x: gbas_loss(*x, prior=prior, hyperprior=hyperprior), (gates, p, t))
    assert gradcheck(lambda g, p, t: bas_loss(g, (p, t), prior), (gates, p, t))


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck_of_modules(name):
    loss = make_loss(name, (2, 3), 0.7, **({"learn_temperature": True} if name == "gbas" else {})).double()
    gates = f64(torch.rand(6, 2, 3) * 0.9 + 0.05)
    with torch.no_grad():  # apart, since the ranks of equal means jump
        [q.add_(torch.randn_like(q) * 0.2) for q in loss.parameters()]
    assert gradcheck(lambda g, *_: loss(g), (gates, *loss.parameters()))


# --- what the losses do -------------------------------------------------------------------------------------


def sample(n, p, t, shape=()):
    """n draws of the relaxed Bernoulli distribution."""
    noise = torch.logit(torch.rand(n, *shape, dtype=torch.float64))
    return torch.sigmoid((torch.logit(torch.as_tensor(p, dtype=torch.float64)) + noise) / t)


def test_samples_of_the_prior_score_their_expectation_and_others_more():
    n, positions = 64, 2000
    values = sample(n, 0.4, 0.3, (positions,))
    own = cvm(values, relaxed_bernoulli_cdf, 0, params=(0.4, 0.3))
    expectation, error = 1 / (6 * (n + 1)), own.std().item() / positions**0.5
    assert own.mean().item() == pytest.approx(expectation, abs=4 * error)
    assert error < expectation / 20
    for p, t in ((0.6, 0.3), (0.4, 0.6), (0.2, 0.3)):
        assert cvm(values, relaxed_bernoulli_cdf, 0, params=(p, t)).mean() > 2 * expectation
    beta = torch.distributions.Beta(*f64(2.0, 6.0, grad=False)).sample((n, positions))
    assert cvm(beta, beta_cdf, 0, params=(2, 6)).mean().item() == pytest.approx(expectation, rel=0.1)


@pytest.mark.parametrize("start", [-1.0, 2.0])
@pytest.mark.long
def test_free_values_come_to_target_and_spread(start):
    """g* and σ, for the share of coarse decisions per position and for the p_l."""
    loss = GBaS((8, 8), target=0.6, sigma=0.1)
    scores = (start + torch.randn(64, 8, 8) * 0.5).requires_grad_()
    groups = [{"params": [scores]}, {"params": loss.parameters(), "lr": 0.05}]
    optimizer = torch.optim.Adam(groups, lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        (100 * loss(torch.sigmoid(scores))).backward()
        optimizer.step()
    for rate in ((scores > 0).float().mean(0), loss.p.detach()):
        assert rate.mean().item() == pytest.approx(0.6, abs=0.03)
        assert rate.std().item() == pytest.approx(0.1, abs=0.03)


def test_no_position_is_preferred_before_the_gates_differ():
    loss = GBaS((3, 3))
    loss(torch.rand(8, 1, 1).expand(8, 3, 3)).backward()
    torch.testing.assert_close(loss.logits.grad, loss.logits.grad[0, 0].expand(3, 3))


def test_one_position_without_hyperprior_is_batch_shaping():
    gates = torch.rand(16, 1, 1)
    for prior in ("relaxed_bernoulli", "beta"):
        generalized = GBaS((1, 1), 0.7, prior=prior, temperature=0.5, hyper_weight=0)
        torch.testing.assert_close(generalized(gates), BaS((1, 1), 0.7, prior=prior, temperature=0.5)(gates))


def test_plain_losses_in_closed_form():
    gates = torch.full((2, 2, 2), 0.4, requires_grad=True)
    for loss, value, slope in ((L0, 0.2, -1), (Ratio, 0.04, -0.4), (NoLoss, 0, 0)):
        found = loss((2, 2), 0.6)(gates)
        assert found.item() == pytest.approx(value)
        (grad,) = torch.autograd.grad(found, gates)
        torch.testing.assert_close(grad, torch.full_like(gates, slope / 8))
    assert L0((2, 2), 0.3)(gates).item() == 0
    assert Ratio((2, 2), 0.3)(gates).item() == pytest.approx(0.01)


def test_the_hyperprior_has_the_mean_and_spread_asked_for():
    a, b = GBaS((2, 2), 0.6, sigma=0.2, hyperprior="beta").hyper
    assert scipy.stats.beta.mean(a, b) == pytest.approx(0.6)
    assert scipy.stats.beta.std(a, b) == pytest.approx(0.2)


@pytest.mark.parametrize("learned", [False, True])
def test_priors_are_learned_saved_and_loaded(learned):
    loss = GBaS((2, 3), 0.7, temperature=0.4, learn_temperature=learned)
    assert len(list(loss.parameters())) == 1 + learned
    torch.testing.assert_close(loss.p, torch.full((2, 3), 0.7))
    torch.testing.assert_close(loss.temperature, torch.full((2, 3), 0.4))
    assert not list(GBaS((2, 3), learn_temperature=learned, gradients="values").parameters())
    loss(torch.rand(8, 2, 3)).backward()
    assert all(q.grad.abs().min() > 0 for q in loss.parameters())
    with torch.no_grad():
        loss.logits.copy_(torch.randn(2, 3) * 30)  # saturated, yet locations stay inside (0, 1)
    assert loss(torch.rand(8, 2, 3)).isfinite()
    other = GBaS((2, 3), learn_temperature=learned)
    other.load_state_dict(loss.state_dict())
    assert torch.equal(other.p, loss.p)
    assert torch.equal(other.temperature, loss.temperature)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("prior", ["relaxed_bernoulli", "beta"])
def test_saturated_gates_stay_finite_in_autocast(name, dtype, prior):
    settings = {"prior": prior, "temperature": 0.1} if name in ("gbas", "bas") else {}
    loss = make_loss(name, (2, 3), **settings)
    scores = torch.tensor([-100.0, -16.7, -14.0, -4.0, 0.0, 9.0, 12.0, 100.0])[:, None, None].expand(8, 2, 3)
    scores = scores.to(dtype).clone().requires_grad_()
    with torch.autocast("cpu", dtype=dtype if dtype != torch.float32 else torch.bfloat16):
        gates = torch.sigmoid(scores)
        value = loss(gates)
    assert gates.dtype == dtype
    assert gates.min() == 0
    assert gates.max() == 1
    assert value.dtype == torch.float32
    assert value.isfinite()
    value.backward()
    assert scores.grad.isfinite().all()
    assert all(q.grad.isfinite().all() for q in loss.parameters())
    with torch.no_grad():
        assert value.item() == pytest.approx(loss(gates.double()).item(), abs=1e-5)


# --- bad input ----------------------------------------------------------------------------------------------

GATES = torch.full((4, 2, 2), 0.5)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: make_loss("gbass", (2, 2)),
            r"gate loss='gbass' is not known; .* 'gbas'. There are: gbas, bas, l0, ratio",
        ),
        (lambda: make_loss("l0", (2, 2), sigma=0.1), r"'l0' has no setting 'sigma'. It has: weight"),
        (
            lambda: make_loss("gbas", (2, 2), sigm=0.1),
            r"'sigm'; the nearest is 'sigma'. It has: sigma, temperature",
        ),
        (lambda: GBaS((2, 2), target=1.0), r"target=1.0 lies outside \(0, 1\)"),
        (lambda: GBaS((2, 2), sigma=0.0), r"sigma=0.0 lies outside \(0, inf\)"),
        (lambda: GBaS((2, 2), sigma=0.5, hyperprior="beta"), r"sigma=0.5 is more .* use less than 0.49"),
        (lambda: GBaS((2, 2), temperature=-1), r"temperature=-1 lies outside \(0, inf\)"),
        (lambda: GBaS((2, 2), hyper_weight=float("nan")), r"hyper_weight=nan lies outside \[0, inf\)"),
        (lambda: GBaS((2, 2), prior="normal"), r"prior='normal' is not known. There are: relaxed_bernoulli, beta"),
        (
            lambda: GBaS((2, 2), hyperprior="uniform"),
            r"hyperprior='uniform' is not known; .*. There are: normal, beta",
        ),
        (lambda: GBaS((2, 2), gradients="value"), r"gradients='value' is not known; the nearest is 'values'"),
        (lambda: BaS((2, 2), ties="mean"), r"ties='mean' is not known. There are: order, average"),
        (lambda: L0((2, 2), weight=-1.0), r"weight=-1.0 lies outside \[0, inf\)"),
        (lambda: L0((2, 2), weight=math.inf), r"weight=inf lies outside \[0, inf\)"),
        (lambda: L0((2, 0)), r"grid=\(2, 0\); expected \(h, w\)"),
        (lambda: cvm(GATES, beta_cdf, params=(0.0, 1.0)), r"a=0.0 lies outside \(0, inf\)"),
        (lambda: cvm(GATES, relaxed_bernoulli_cdf, params=(1.5, 1.0)), r"p=1.5 lies outside \(0, 1\)"),
        (lambda: normal_cdf(GATES, 0.5, 0.0), r"std=0.0 lies outside \(0, inf\)"),
        (lambda: normal_cdf(GATES * math.inf, 0.5, 1.0), r"x has inf, outside \(-inf, inf\)"),
        (lambda: beta_cdf(GATES + 1, 1.0, 1.0), r"x has 1.5, outside \[0, 1\]"),
        (lambda: gbas_loss(GATES, torch.full((3, 2), 0.5)), r"p has shape \[3, 2\]; expected the gates' grid \[2, 2\]"),
        (lambda: bas_loss(GATES[:1, :1, :1], (0.6, 0.3)), r"1 value to compare .* expected 2 or more"),
    ],
)
def test_bad_settings(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("gates", "match"),
    [
        (GATES + 0.6, r"gates has 1.1, outside \[0, 1\]"),
        (GATES - 0.6, r"gates has -0.1"),
        (torch.where(torch.arange(16).view(4, 2, 2) == 7, torch.nan, GATES), r"gates has NaN, outside \[0, 1\]"),
        (GATES[:0], "gates is empty"),
        (torch.full((4, 3, 2), 0.5), r"\[4, 3, 2\]; expected floats \[B, 2, 2\]"),
        (GATES[0], r"\[2, 2\]; expected floats"),
        (GATES > 0, r"torch.bool"),
    ],
)
def test_bad_gates(name, gates, match):
    with pytest.raises(ValueError, match=match):
        make_loss(name, (2, 2))(gates)


def test_a_batch_of_one_has_no_distribution_per_position():
    with pytest.raises(ValueError, match="1 value to compare with a distribution; expected 2 or more"):
        GBaS((2, 2))(GATES[:1])
    for name in ("bas", "l0", "ratio", "none"):
        assert make_loss(name, (2, 2))(GATES[:1]).isfinite()


# --- pictures -----------------------------------------------------------------------------------------------


def test_plots_draw_what_the_loss_holds():
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot as plt

    from msvit.plots import gate_loss as plots

    loss, gates = GBaS((2, 3), learn_temperature=True), torch.rand(16, 2, 3)
    with torch.no_grad():
        loss.logits.copy_(torch.randn(2, 3))
    shown = plots.prior_map(loss).axes[0].images[0].get_array()
    np.testing.assert_array_equal(shown, loss.p.detach())
    fit = plots.cdf_fit(gates, loss).axes[0]
    row, column = divmod(loss.p.argmin().item(), 3)
    np.testing.assert_array_equal(fit.lines[0].get_xdata(), gates[:, row, column].sort().values)
    x = torch.as_tensor(fit.lines[1].get_xdata())
    drawn = relaxed_bernoulli_cdf(x, loss.p[row, column], loss.temperature[row, column]).detach()
    np.testing.assert_allclose(fit.lines[1].get_ydata(), drawn, rtol=1e-5)
    assert len(plots.cdf_fit(gates, BaS((2, 3))).axes[0].lines[0].get_xdata()) == gates.numel()
    left, right = plots.hyperprior_fit(loss).axes
    np.testing.assert_array_equal(right.lines[0].get_xdata(), loss.p.detach().flatten().sort().values)
    assert sum(bar.get_height() * bar.get_width() for bar in left.patches) == pytest.approx(1)
    for number in plt.get_fignums():
        assert all(axes.get_xlabel() or axes.get_ylabel() for axes in plt.figure(number).axes)
    plt.close("all")
    with pytest.raises(TypeError, match="Ratio has no such prior to draw; expected GBaS or BaS"):
        plots.cdf_fit(gates, Ratio((2, 3)))
