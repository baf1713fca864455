"""Trainings whose ranks are started with different options; none gets as far as a model."""

from pathlib import Path
from typing import Any

from dstrain.build import training_plan
from dstrain.build.training import train
from dstrain.build.training_options import TeacherOptions
from dstrain.errors import DstrainError
from dstrain.parallel.mesh import Mesh
from dstrain.recipe_file import load_recipe


def disagreements(mesh: Mesh, *, cases: list[list[dict[str, Any]]]) -> list[list[str]]:
    """What this rank's training ends with in each case, which has the options of every rank: kind of error and message."""
    own = training_plan.__version__
    found = []
    for options in cases:
        case = options[mesh.world.rank]
        training_plan.__version__ = case.get("version", own)
        chosen = training_plan.TrainOptions(
            data=Path(case["data"]),
            output=Path(case["output"]),
            base=None if case["base"] is None else Path(case["base"]),
            teachers=TeacherOptions(tuple(map(Path, case["teachers"])), case["placement"]),
            device="cpu",
        )
        try:
            train(load_recipe("translation/quickstart", case["settings"]), chosen)
        except DstrainError as error:
            found.append([type(error).__name__, str(error)])
    return found
