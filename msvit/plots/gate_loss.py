"""Figures of a gate loss: how well the gates fit their priors, and the priors' locations their hyperprior."""

from copy import deepcopy

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from torch import Tensor

from ..gating.losses import BaS, GBaS, cvm
from .style import BLUE, GREEN, GREY, VERMILION


@torch.no_grad()
def cdf_fit(gates: Tensor, loss: GBaS | BaS) -> Figure:
    """Draw the empirical CDF of soft gates `[B, h, w]` against the loss's prior.

    For GBaS at the positions of the lowest, the middle and the highest p, for BaS over all gates. The legend has each
    CvM, beside the 1 / (6 (n+1)) that is to be expected of gates that do follow the prior.
    """
    loss, gates = _on_cpu(loss, GBaS, BaS), gates.detach().float().cpu()
    figure, axes = plt.subplots(figsize=(6.4, 4.2), layout="constrained")
    for (name, values, prior), color in zip(_curves(gates, loss), (BLUE, GREEN, VERMILION), strict=False):
        n, x = len(values), torch.sigmoid(torch.linspace(-12, 12, 601))
        distance = cvm(values, prior).item()
        heights, label = torch.arange(1, n + 1) / (n + 1), f"{name}CvM {distance:.1e} (exp. {1 / (6 * (n + 1)):.1e})"
        axes.step(values.sort().values.clamp(1e-6, 1 - 1e-6), heights, where="post", color=color, label=label)
        axes.plot(x, prior(x), "--", color=color, linewidth=1)
    axes.plot([], [], "--", color=GREY, linewidth=1, label="prior")
    axes.set(xscale="logit", xlim=(1e-4, 1 - 1e-4), ylim=(0, 1), ylabel="share of gates ≤ m")
    axes.set_xlabel("soft gate m: 0 fine, 1 coarse (logit scale)")
    axes.legend(loc="upper left", fontsize="small")
    return figure


@torch.no_grad()
def prior_map(loss: GBaS) -> Figure:
    """Draw p_l over the positions of the picture: where regions are coarse more often, and where less."""
    loss = _on_cpu(loss, GBaS)
    p = loss.p.numpy()
    figure, axes = plt.subplots(figsize=(4.6, 3.8), layout="constrained")
    figure.colorbar(axes.imshow(p, cmap="cividis"), label="p, the prior's share of coarse decisions", format="%.2f")
    if max(p.shape) <= 8:
        middle = (p.min() + p.max()) / 2
        for (row, column), value in np.ndenumerate(p):
            color = "white" if value < middle else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize="small", color=color)
    axes.set(xlabel="coarse column", ylabel="coarse row")
    figure.suptitle(_moments(loss), fontsize="medium")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    return figure


@torch.no_grad()
def hyperprior_fit(loss: GBaS) -> Figure:
    """Draw the p_l against their hyperprior: as densities, and as the CDFs that the loss compares."""
    loss = _on_cpu(loss, GBaS)
    p = loss.p.flatten().sort().values
    edges = torch.linspace(0, 1, 401)
    heights = loss.hyper_cdf(edges)
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", sharex=True)
    left.hist(p.numpy(), bins=20, range=(0, 1), density=True, color=BLUE, alpha=0.6)
    left.plot((edges[1:] + edges[:-1]) / 2, heights.diff() * 400, "--", color=VERMILION)
    left.set(xlabel="p", ylabel="density")
    right.step(p, torch.arange(1, len(p) + 1) / (len(p) + 1), where="post", color=BLUE, label="p of all positions")
    right.plot(edges, heights, "--", color=VERMILION, label=f"hyperprior ({loss.hyperprior})")
    right.set(xlabel="p", ylabel="share of positions ≤ p", xlim=(0, 1), ylim=(0, 1))
    right.legend(loc="upper left", fontsize="small")
    figure.suptitle(_moments(loss), fontsize="medium")
    return figure


def _curves(gates: Tensor, loss: GBaS | BaS) -> list[tuple]:
    """Return name, values and prior CDF of each curve that is drawn."""
    if isinstance(loss, BaS):
        return [("", gates.flatten(), loss.cdf)]
    order, curves = loss.p.flatten().argsort().tolist(), []
    for position in dict.fromkeys((order[0], order[len(order) // 2], order[-1])):
        row, column = divmod(position, loss.grid[1])

        def prior(x: Tensor, row: int = row, column: int = column) -> Tensor:
            return loss.cdf(x[:, None, None])[:, row, column]

        curves.append((f"({row}, {column}): p {loss.p[row, column]:.2f}, ", gates[:, row, column], prior))
    return curves


def _moments(loss: GBaS) -> str:
    return f"p {loss.p.mean():.3f} ± {loss.p.std():.3f} over positions, asked for {loss.target:.3f} ± {loss.sigma:.3f}"


def _on_cpu(loss: GBaS | BaS, *kinds: type) -> GBaS | BaS:
    if not isinstance(loss, kinds):
        names = " or ".join(kind.__name__ for kind in kinds)
        raise TypeError(f"{type(loss).__name__} has no such prior to draw; expected {names}")
    return deepcopy(loss).cpu()
