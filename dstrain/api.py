"""dstrain from Python: the verbs as functions, and a bundle as an object that generates and scores text.

    from dstrain.api import load
    model = load("RUN/bundles/best")
    for hypotheses in model.generate(["a man rides a bike .", "two dogs run ."], beam_size=5):
        print(hypotheses[0].score, hypotheses[0].text)

Each verb is a function of one options object with the options of the command line; `dstrain` calls the same functions.
"""

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
