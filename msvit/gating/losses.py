"""The gate losses: what holds a gate's decisions at a budget, and which shape their distribution is given.

With m `[B, h, w]` the soft gates (1 = coarse), g* the target rate and v_(1) ≤ … ≤ v_(n) sorted values:

    CvM(v; F) = mean_i ( i/(n+1) − F(v_(i)) )²                          Cramér–von Mises distance to a prior F
    gbas:   mean_l CvM(m_l; RB(p_l, T)) + λ CvM(p; hyperprior(g*, σ))   per position l, over the batch
    bas:    CvM(m; RB(g*, T))                                           all gates of the batch in one
    l0:     max(0, g* − mean m)
    ratio:  (mean m − g*)²

GBaS is Havtorn et al. 2023, BaS Bejnordi et al. 2020, the ratio loss is DynamicViT's kind (Rao et al. 2021). Values
that do follow F have E[CvM] = 1 / (6 (n+1)), the mean variance of uniform order statistics.
"""

import math
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import in_interval, known_settings, one_of
from ..core.gather import global_batch
from ..core.precision import in_full
from .beta import beta_cdf
from .cdf import GRADIENTS, TIES, cvm, normal_cdf, relaxed_bernoulli_cdf, route

PRIORS = {"relaxed_bernoulli": relaxed_bernoulli_cdf, "beta": beta_cdf}
HYPERPRIORS = {"normal": normal_cdf, "beta": beta_cdf}


def bas_loss(
    gates: Tensor,
    params: tuple[Tensor | float, Tensor | float],
    prior: str = "relaxed_bernoulli",
    *,
    gradients: str = "both",
    ties: str = "order",
) -> Tensor:
    """Shape a batch: all gates of the batch in one CvM against a prior with the two `params` of its CDF."""
    one_of("prior", prior, PRIORS)
    in_interval("gates", gates, "[0, 1]")
    return cvm(gates, PRIORS[prior], params=params, gradients=gradients, ties=ties)


def gbas_loss(
    gates: Tensor,
    p: Tensor,
    temperature: Tensor | float = 0.3,
    target: float = 0.6,
    sigma: float = 0.1,
    *,
    prior: str = "relaxed_bernoulli",
    hyperprior: str = "normal",
    hyper_weight: float = 1.0,
    gradients: str = "both",
    ties: str = "order",
) -> Tensor:
    """Return generalized batch shaping, mean_l CvM(m_l; prior(p_l, T)) + λ CvM(p; hyperprior).

    The prior is RelaxedBernoulli(p_l, T), or Beta(T p_l, T (1 − p_l)), whose mean is p_l and which for T = 1 is the
    Beta(a, 1 − a) of batch shaping; either is a pair of peaks at 0 and 1 for small T. The hyperprior is Normal(g*, σ)
    or the Beta of mean g* and standard deviation σ. Equal p_l share their rank: before the gates differ, no position
    is preferred.

    Args:
        gates: m `[B, h, w]`.
        p: p_l `[h, w]` in (0, 1).
        temperature: T, a number or `[h, w]`.
        target: g*.
        sigma: σ, how much the positions are to differ.
        hyper_weight: λ.
        gradients: As in `cvm`; p and T are the prior.
        ties: As in `cvm`, for the gates.
    """
    one_of("prior", prior, PRIORS)
    if gates.shape[1:] != p.shape:
        raise ValueError(f"p has shape {list(p.shape)}; expected the gates' grid {list(gates.shape[1:])}")
    in_interval("gates", gates, "[0, 1]")
    gates, (p, temperature) = route(gates, (p, temperature), gradients)
    loss = cvm(gates, PRIORS[prior], dim=0, params=_prior_params(prior, p, temperature), ties=ties).mean()
    if not hyper_weight:
        return loss
    hyper = _hyper_params(hyperprior, target, sigma)
    return loss + hyper_weight * cvm(p, HYPERPRIORS[hyperprior], params=hyper, ties="average")


def _prior_params(prior: str, p: Tensor | float, temperature: Tensor | float) -> tuple:
    """Return the two parameters of the prior's CDF, from its location or mean p and its temperature."""
    return (temperature * p, temperature * (1 - p)) if prior == "beta" else (p, temperature)


def _hyper_params(hyperprior: str, target: float, sigma: float) -> tuple[float, float]:
    """Return the two parameters of the hyperprior with mean `target` and standard deviation `sigma`."""
    one_of("hyperprior", hyperprior, HYPERPRIORS)
    in_interval("target", target, "(0, 1)")
    in_interval("sigma", sigma, "(0, inf)")
    if hyperprior == "normal":
        return target, sigma
    concentration = target * (1 - target) / sigma**2 - 1
    if concentration <= 0:
        limit = math.sqrt(target * (1 - target))
        raise ValueError(f"sigma={sigma:g} is more than any Beta of mean {target:g} has; use less than {limit:.3g}")
    return target * concentration, (1 - target) * concentration


class GateLoss(nn.Module):
    """What all gate losses share: `loss(gates)` of soft gates `[B, h, w]` is one number, over the global batch.

    It is not multiplied by `weight`: that is the trainer's to do.

    Args:
        grid: (h, w), coarse regions of a picture.
        target: g*, the share of regions that is to be coarse.
        weight: What the trainer multiplies the loss with.
    """

    def __init__(self, grid: tuple[int, int], target: float = 0.6, weight: float = 30.0):
        super().__init__()
        if len(grid) != 2 or min(grid) < 1:
            raise ValueError(f"grid={tuple(grid)}; expected (h, w), the coarse regions of a picture")
        in_interval("target", target, "(0, 1)")
        in_interval("weight", weight, "[0, inf)")
        self.grid, self.target, self.weight = tuple(grid), float(target), float(weight)

    def forward(self, gates: Tensor) -> Tensor:
        if gates.dim() != 3 or tuple(gates.shape[1:]) != self.grid or not gates.is_floating_point():
            raise ValueError(
                f"gates are {gates.dtype} {list(gates.shape)}; expected floats [B, {self.grid[0]}, {self.grid[1]}] "
                "(another picture size has another grid: make the loss for `model.grid(images.shape[-2:])`)"
            )
        gates = global_batch(in_full(gates))
        in_interval("gates", gates, "[0, 1]")
        return self.distance(gates)

    def distance(self, gates: Tensor) -> Tensor:
        """Return the loss of checked gates `[B, h, w]` in float32 or float64."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"grid={self.grid}, target={self.target:g}, weight={self.weight:g}"


class GBaS(GateLoss):
    """`gbas_loss` with priors of its own: p_l = σ(logits_l), and T_l, learned by gradient descent with the gate.

    They need no averaging between processes: each computes the same gradient from the same global batch.

    Args:
        grid: As in `GateLoss`, like target and weight.
        temperature: T; the T_l start here, and stay here unless `learn_temperature`.
        sigma: As in `gbas_loss`, like prior, hyperprior, hyper_weight, gradients and ties.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        target: float = 0.6,
        sigma: float = 0.1,
        temperature: float = 0.3,
        prior: str = "relaxed_bernoulli",
        hyperprior: str = "normal",
        hyper_weight: float = 1.0,
        learn_temperature: bool = False,
        gradients: str = "both",
        ties: str = "order",
        weight: float = 30.0,
    ):
        super().__init__(grid, target, weight)
        one_of("prior", prior, PRIORS)
        one_of("gradients", gradients, GRADIENTS)
        one_of("ties", ties, TIES)
        in_interval("temperature", temperature, "(0, inf)")
        in_interval("hyper_weight", hyper_weight, "[0, inf)")
        self.hyper = _hyper_params(hyperprior, target, sigma)
        self.sigma, self.hyperprior, self.hyper_weight = float(sigma), hyperprior, float(hyper_weight)
        self.prior, self.gradients, self.ties = prior, gradients, ties
        self.logits = self._per_position(math.log(target / (1 - target)), gradients != "values")
        self.log_temperature = self._per_position(math.log(temperature), gradients != "values" and learn_temperature)

    def _per_position(self, value: float, learned: bool) -> Tensor:
        """Return a number per position: a parameter or, so that none waits for a gradient in vain, a buffer."""
        return (nn.Parameter if learned else nn.Buffer)(torch.full(self.grid, value))

    @property
    def p(self) -> Tensor:
        """p_l `[h, w]`, the share of coarse decisions that each position's prior stands for."""
        eps = torch.finfo(self.logits.dtype).eps
        return self.logits.sigmoid().clamp(eps, 1 - eps)

    @property
    def temperature(self) -> Tensor:
        """T_l `[h, w]`."""
        return self.log_temperature.exp()

    def distance(self, gates: Tensor) -> Tensor:
        return gbas_loss(
            gates, self.p, self.temperature, self.target, self.sigma, prior=self.prior, hyperprior=self.hyperprior,
            hyper_weight=self.hyper_weight, gradients=self.gradients, ties=self.ties,
        )  # fmt: skip

    def cdf(self, x: Tensor) -> Tensor:
        """Return F(x) of the prior of each position; x broadcasts against `[h, w]`."""
        return PRIORS[self.prior](x, *_prior_params(self.prior, self.p, self.temperature))

    def hyper_cdf(self, p: Tensor) -> Tensor:
        """Return F(p) of the hyperprior."""
        return HYPERPRIORS[self.hyperprior](p, *self.hyper)


class BaS(GateLoss):
    """`bas_loss` against RelaxedBernoulli(g*, T), or Beta(T g*, T (1 − g*)): fixed, and the same for all positions."""

    def __init__(
        self,
        grid: tuple[int, int],
        target: float = 0.6,
        temperature: float = 0.3,
        prior: str = "relaxed_bernoulli",
        ties: str = "order",
        weight: float = 30.0,
    ):
        super().__init__(grid, target, weight)
        one_of("prior", prior, PRIORS)
        one_of("ties", ties, TIES)
        in_interval("temperature", temperature, "(0, inf)")
        self.temperature, self.prior, self.ties = float(temperature), prior, ties

    def distance(self, gates: Tensor) -> Tensor:
        return bas_loss(gates, _prior_params(self.prior, self.target, self.temperature), self.prior, ties=self.ties)

    def cdf(self, x: Tensor) -> Tensor:
        """Return F(x) of the prior."""
        return PRIORS[self.prior](x, *_prior_params(self.prior, self.target, self.temperature))


class L0(GateLoss):
    """max(0, g* − mean m): asks for enough coarse regions, and is content with more."""

    def distance(self, gates: Tensor) -> Tensor:
        return (self.target - gates.mean()).relu()


class Ratio(GateLoss):
    """(mean m − g*)²: holds the rate from both sides, and says nothing about single gates."""

    def distance(self, gates: Tensor) -> Tensor:
        return (gates.mean() - self.target).square()


class NoLoss(GateLoss):
    """Zero, with a gradient that is zero: what the others are compared with."""

    def distance(self, gates: Tensor) -> Tensor:
        return 0 * gates.sum()


LOSSES = {"gbas": GBaS, "bas": BaS, "l0": L0, "ratio": Ratio, "none": NoLoss}


def make_loss(name: str, grid: tuple[int, int], target: float = 0.6, **settings) -> GateLoss:
    """Return the gate loss of this name; `settings` are those of its class."""
    make = partial(LOSSES[one_of("gate loss", name, LOSSES)], grid, target)
    return make(**known_settings(f"the gate loss {name!r}", settings, make))


class LevelLosses(nn.Module):
    """The losses of a quadtree's gates: `loss(*gates)` adds up one for each size of regions, from small to large.

    What a size's gates are compared with is the share of its regions within one token, their own or a larger one.
    """

    def __init__(self, losses: list[GateLoss]):
        super().__init__()
        self.levels = nn.ModuleList(losses)

    @property
    def weight(self) -> float:
        """What the trainer multiplies the sum with."""
        return self.levels[0].weight

    def forward(self, *gates: Tensor) -> Tensor:
        return sum(loss(m) for loss, m in zip(self.levels, gates, strict=True))


def make_losses(name: str, grids: list[tuple[int, int]], targets: list[float], **settings) -> GateLoss | LevelLosses:
    """Return the gate loss of this name for each size of regions with its own target; of one size, the loss alone."""
    losses = [make_loss(name, grid, target, **settings) for grid, target in zip(grids, targets, strict=True)]
    return losses[0] if len(losses) == 1 else LevelLosses(losses)
