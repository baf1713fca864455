"""From the configuration of a loss on labels to the objective."""

from __future__ import annotations

from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.objective import Objective
from dstrain.objectives.r_drop import RDrop


def build_cross_entropy(config: CrossEntropyConfig) -> Objective:
    """Cross-entropy, in training with R-Drop if the configuration has it."""
    return CrossEntropy(config) if config.r_drop is None else RDrop(config, config.r_drop)
