"""Trainings whose ranks are started with different words; none gets as far as a model."""

from pathlib import Path
from typing import Any

import dstrain.build.training as building
from dstrain.build.teachers import TeacherOptions
from dstrain.errors import DstrainError
from dstrain.parallel.mesh import Mesh
from dstrain.recipe_file import load_recipe


def disagreements(mesh: Mesh, *, cases: list[list[dict[str, Any]]]) -> list[list[str]]:
    """What this rank's training ends with in each case, which has the words of every rank: kind of error and message."""
    own = building.__version__
    found = []
    for words in cases:
        case = words[mesh.world.rank]
        building.__version__ = case.get("version", own)
        try:
            building.train(
                load_recipe("translation/quickstart", case["settings"]),
                data=Path(case["data"]),
                output=Path(case["output"]),
                device="cpu",
                teachers=TeacherOptions(tuple(map(Path, case["teachers"])), case["placement"]),
                base=None if case["base"] is None else Path(case["base"]),
            )
        except DstrainError as error:
            found.append([type(error).__name__, str(error)])
    return found
