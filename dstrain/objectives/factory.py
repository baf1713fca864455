"""From an objective's configuration to the objective."""

from dstrain.objectives.config import ObjectiveConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.r_drop import RDrop
from dstrain.protocols import Objective


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective of `config`."""
    return CrossEntropy(config) if config.r_drop is None else RDrop(config, config.r_drop)
