"""From an objective's configuration to the objective."""

from dstrain.objectives.config import ObjectiveConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.protocols import Objective


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective of `config`."""
    return CrossEntropy(config)
