"""Figures of runs and of gate losses in one style, by matplotlib; those of `plots.interactive` are by plotly."""

# ruff: noqa: F401  (names for `from msvit import plots`)
from .anchors import ANCHORS, anchors_beside
from .curves import learning_curves
from .gate_learning import agreement, decidedness, pulls, winnings, worth_maps
from .gate_loss import cdf_fit, hyperprior_fit, prior_map
from .methods import beside_baselines, cost_shares, fronts, low_pass, reconstruction, stage_maps
from .runs import front, gate_maps, importance, parallel, picture_pairs, positions, ranking, token_counts, tradeoff
from .segmentation import quality, segmentation_maps
from .style import save, with_note
