"""Models of parts drawn at random, trained for a few steps under several ZeRO stages in one process group."""

from typing import Any

from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import build_model
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from tests.parallel.setting import VOCABULARY, build_engine, share
from tests.unit.models.build import random_config


def variant(seed: int) -> EncoderDecoderConfig | DecoderOnlyConfig:
    """With dropout, whose masks are the same on any ranks."""
    return random_config(seed).model_copy(update={"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1})


def variant_curves(mesh: Mesh, *, seeds: list[int], stages: list[str], steps: int) -> dict[str, list[list[list[float]]]]:
    """By stage and seed the loss and gradient norm of each step."""
    found: dict[str, list[list[list[float]]]] = {}
    for stage in stages:
        found[stage] = [_curve(mesh, seed, stage, steps) for seed in seeds]
    return found


def _curve(mesh: Mesh, seed: int, stage: str, steps: int) -> list[list[float]]:
    model = build_model(variant(seed), VOCABULARY, seed=1)
    objective: Any = build_cross_entropy(CrossEntropyConfig(chunk_tokens=16))
    engine = build_engine(mesh, TrainModule(model, objective), deepspeed=stage)
    reports = [engine.train_step(*share(step, mesh, 2, model.kind)) for step in range(steps)]
    engine.close()
    return [[report.loss, report.grad_norm] for report in reports]
