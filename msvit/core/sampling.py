"""Decisions drawn with noise: the Gumbel-sigmoid, and hard decisions with the gradient of soft ones."""

import torch
from torch import Tensor


def add_logistic_noise(logits: Tensor) -> Tensor:
    """Return logits + log u - log(1 - u) with u ~ Uniform(0, 1); log u - log(1 - u) is the difference of two Gumbels.

    Of the sigmoid of this over T a relaxed Bernoulli variable is made (Maddison et al. 2017, Jang et al. 2017).
    """
    u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)  # away from 0 and 1, so that both logarithms are finite
    return logits + u.log() - (-u).log1p()


def straight_through(soft: Tensor, threshold: float | Tensor = 0.5) -> Tensor:
    """Return 1 where soft > threshold, else 0; the gradient is that of soft (Bengio et al. 2013)."""
    return with_gradient_of(soft, (soft > threshold).to(soft.dtype))


def with_gradient_of(soft: Tensor, hard: Tensor) -> Tensor:
    """Return the hard decisions, exactly 0 or 1, with the gradient of the soft ones where these have one."""
    return hard + (soft - soft.detach()) if soft.requires_grad else hard
