"""Public: the code is in :mod:`dora_dist.method.importance`."""

from dora_dist.method.importance import (
    WEIGHT_CRITERIA,
    LayerParameters,
    ScoreFunction,
    component_magnitudes,
    component_scores,
    random_scores,
    score_layers,
    smooth,
    squared_magnitudes,
    weight_criterion,
)

__all__ = [
    "WEIGHT_CRITERIA",
    "LayerParameters",
    "ScoreFunction",
    "component_magnitudes",
    "component_scores",
    "random_scores",
    "score_layers",
    "smooth",
    "squared_magnitudes",
    "weight_criterion",
]
