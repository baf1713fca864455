"""Which layers of a student learn from which of a teacher: derived from the two configurations, before anything is built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from dstrain.batch import ModelKind
from dstrain.distillation.config import DistillationConfig, FeatureConfig
from dstrain.errors import RecipeError
from dstrain.models.config import ModelConfig, StackConfig


class PlannedFeature(NamedTuple):
    """A feature that fits. pairs: layers of student and teacher. student_dim, teacher_dim: widths of their hidden states."""

    config: FeatureConfig
    pairs: tuple[tuple[int, int], ...]
    student_dim: int
    teacher_dim: int
    teacher_kind: ModelKind


def plan_features(config: DistillationConfig, student: ModelConfig, teachers: Sequence[ModelConfig]) -> list[PlannedFeature]:
    """The features of a distillation.

    teachers: those at work. Raises RecipeError unless there is exactly one, and if a stack or a layer is missing in a model.
    """
    if not config.features:
        return []
    require_one_teacher(len(teachers))
    named = ((f"objective.features.{number}", feature) for number, feature in enumerate(config.features))
    return [_planned(where, feature, student, teachers[0]) for where, feature in named]


def require_one_teacher(number: int) -> None:
    """Raise RecipeError unless there is exactly one online teacher."""
    if number != 1:
        raise RecipeError(
            f"objective.features needs the activations of one online teacher, but there are {number or 'none'}; name one "
            "--teacher BUNDLE (an ensemble has no layers in common), or leave objective.features out"
        )


def uniform(student_depth: int, teacher_depth: int) -> dict[int, int]:
    """Each layer of the student -> the teacher's at the same relative depth, rounded up, so that the last maps to the last."""
    return {layer: -(-layer * teacher_depth // student_depth) for layer in range(1, student_depth + 1)}


def _planned(where: str, feature: FeatureConfig, student: ModelConfig, teacher: ModelConfig) -> PlannedFeature:
    student_stack, other = _stack(where, feature, student, "student"), _stack(where, feature, teacher, "teacher")
    if feature.kind == "attention" and student.kind != teacher.kind:
        raise RecipeError(
            f"{where}.kind = attention compares attention over tokens, but the decoder of a decoder-only model attends to the "
            f"source too: the student is {student.kind}, the teacher {teacher.kind}; choose kind: hidden_states, or leave it out"
        )
    layers = uniform(student_stack.depth, other.depth) if feature.layers is None else feature.layers
    _require_layers(where, feature, "student", layers.keys(), student_stack.depth)
    _require_layers(where, feature, "teacher", layers.values(), other.depth)
    return PlannedFeature(feature, tuple(layers.items()), student.model_dim, teacher.model_dim, teacher.kind)


def _stack(where: str, feature: FeatureConfig, model: ModelConfig, role: str) -> StackConfig:
    """The stack that a feature is of."""
    if model.kind == "encoder_decoder":
        return model.encoder if feature.side == "encoder" else model.decoder
    if feature.side != "decoder":
        raise RecipeError(f"{where}.side = {feature.side}, but the {role} is decoder_only; choose side: decoder, or leave it out")
    return model.decoder


def _require_layers(where: str, feature: FeatureConfig, role: str, layers: Iterable[int], depth: int) -> None:
    missing = [layer for layer in layers if layer > depth]
    if missing:
        first = 0 if feature.kind == "hidden_states" else 1
        stack = "encoder" if feature.side == "encoder" else "decoder"
        raise RecipeError(
            f"{where}.layers names layer {missing[0]} of the {role}, whose {stack} has {depth}; choose from {first} to {depth}"
        )
