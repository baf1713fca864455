"""dstrain from Python: the verbs as functions, and a bundle as an object that generates and scores text.

    from dstrain.api import load
    model = load("RUN/bundles/best")
    for hypotheses in model.generate(["a man rides a bike .", "two dogs run ."], beam_size=5):
        print(hypotheses[0].score, hypotheses[0].text)

Each verb is a function of one options object with the options of the command line; `dstrain` calls the same functions.
A name brings what it needs when it is first asked for: importing this module costs nothing, not even torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dstrain.build.bundle_model import BundleModel, load
    from dstrain.build.doctor import diagnose
    from dstrain.build.dumping import DumpOptions, dump_logits
    from dstrain.build.estimate import EstimateOptions, estimate
    from dstrain.build.evaluation import validate
    from dstrain.build.extension import ExtendOptions, extend
    from dstrain.build.generation import generate_file
    from dstrain.build.generation_options import GenerateOptions
    from dstrain.build.growth import GrowOptions, grow
    from dstrain.build.labeling import LabelOptions, pseudo_label
    from dstrain.build.perplexity import perplexity
    from dstrain.build.perplexity_options import PerplexityOptions
    from dstrain.build.training import train
    from dstrain.build.training_options import TeacherOptions, TrainOptions
    from dstrain.build.validation_options import ValidateOptions
    from dstrain.data.prepared.prepare import prepare
    from dstrain.recipe_file import load_recipe

__all__ = [
    "BundleModel",
    "DumpOptions",
    "EstimateOptions",
    "ExtendOptions",
    "GenerateOptions",
    "GrowOptions",
    "LabelOptions",
    "PerplexityOptions",
    "TeacherOptions",
    "TrainOptions",
    "ValidateOptions",
    "diagnose",
    "dump_logits",
    "estimate",
    "extend",
    "generate_file",
    "grow",
    "load",
    "load_recipe",
    "perplexity",
    "prepare",
    "pseudo_label",
    "train",
    "validate",
]

_MODULES = {
    "BundleModel": "dstrain.build.bundle_model",
    "DumpOptions": "dstrain.build.dumping",
    "EstimateOptions": "dstrain.build.estimate",
    "ExtendOptions": "dstrain.build.extension",
    "GenerateOptions": "dstrain.build.generation_options",
    "GrowOptions": "dstrain.build.growth",
    "LabelOptions": "dstrain.build.labeling",
    "PerplexityOptions": "dstrain.build.perplexity_options",
    "TeacherOptions": "dstrain.build.training_options",
    "TrainOptions": "dstrain.build.training_options",
    "ValidateOptions": "dstrain.build.validation_options",
    "diagnose": "dstrain.build.doctor",
    "dump_logits": "dstrain.build.dumping",
    "estimate": "dstrain.build.estimate",
    "extend": "dstrain.build.extension",
    "generate_file": "dstrain.build.generation",
    "grow": "dstrain.build.growth",
    "load": "dstrain.build.bundle_model",
    "load_recipe": "dstrain.recipe_file",
    "perplexity": "dstrain.build.perplexity",
    "prepare": "dstrain.data.prepared.prepare",
    "pseudo_label": "dstrain.build.labeling",
    "train": "dstrain.build.training",
    "validate": "dstrain.build.evaluation",
}
"""Where each of them is; the imports above are for type checkers, which cannot read this."""


def __getattr__(name: str) -> object:
    """One of the names above, imported now."""
    if name not in _MODULES:
        raise AttributeError(f"module 'dstrain.api' has no attribute '{name}'; it has {', '.join(__all__)}")
    value: object = getattr(import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
