"""Features: loops over single sentences and tokens, padding and splits, every key acts, projections, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from dstrain.batch import Batch, ModelKind
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import AttentionFeature, HiddenStatesFeature
from dstrain.distillation.feature_plan import plan_features, uniform
from dstrain.distillation.objective import Distillation
from dstrain.distillation.signals import TeacherSignals
from dstrain.errors import RecipeError
from dstrain.model_output import ActivationCapture, Tap
from dstrain.models.config import DecoderOnlyConfig, ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.objectives.train_module import TrainModule
from dstrain.recipe import ObjectiveConfig
from tests.batches import EOS, PAD, collate
from tests.unit.distillation.test_distillation import PlainTeacher, step
from tests.unit.objectives.test_cross_entropy import VOCAB_SIZE, batch_of, empty_batch, gradients, pairs

VOCABULARY = VocabularySizes(source=VOCAB_SIZE, target=VOCAB_SIZE, pad_id=PAD, eos_id=EOS)
STUDENT: dict[str, Any] = {
    "kind": "encoder_decoder",
    "model_dim": 16,
    "position": {"kind": "rotary"},
    "encoder": {"depth": 3, "unique_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 20},
    "decoder": {"depth": 2, "unique_layers": 1, "num_heads": 2, "num_kv_heads": 1, "num_cross_kv_heads": 1, "ffn_dim": 20},
    "dropout": 0.0,
}
TEACHER: dict[str, Any] = {
    "kind": "encoder_decoder",
    "model_dim": 24,
    "norm_order": "pre",
    "position": {"kind": "alibi"},
    "encoder": {"depth": 4, "num_heads": 3, "ffn_dim": 28},
    "decoder": {"depth": 3, "num_heads": 6, "num_kv_heads": 2, "ffn_dim": 28},
}
DECODER_ONLY: dict[str, Any] = {**STUDENT, "kind": "decoder_only", "decoder": {"depth": 2, "num_heads": 2, "ffn_dim": 20}}
del DECODER_ONLY["encoder"]
ALL: list[dict[str, Any]] = [
    {"kind": "hidden_states", "side": "encoder", "weight": 0.3, "layers": {0: 0, 3: 4}},
    {"kind": "hidden_states", "side": "decoder", "weight": 0.7, "loss": "cosine"},
    {"kind": "attention", "side": "encoder", "weight": 1.3, "layers": {1: 2}},
    {"kind": "attention", "side": "decoder", "weight": 0.9, "loss": "squared_error"},
    {"kind": "attention", "side": "cross", "weight": 0.6, "loss": "cosine", "layers": {2: 1, 1: 3}},
]
NAMES = [
    "feature_encoder_hidden_states_mse",
    "feature_decoder_hidden_states_cosine",
    "feature_encoder_attention_kl",
    "feature_decoder_attention_squared_error",
    "feature_cross_attention_cosine",
]


def config_of(tree: dict[str, Any]) -> ModelConfig:
    config: ModelConfig = TypeAdapter(ModelConfig).validate_python(tree)
    return config


def model_of(tree: dict[str, Any], seed: int) -> Model:
    model = build_model(config_of(tree), VOCABULARY, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def objective_of(*features: dict[str, Any], **changes: Any) -> ObjectiveConfig:
    section = {"kind": "distillation", "chunk_tokens": 5, "features": features, **changes}
    config: ObjectiveConfig = TypeAdapter(ObjectiveConfig).validate_python(section)
    return config


def module_of(
    *features: dict[str, Any],
    student: dict[str, Any] = STUDENT,
    teacher: dict[str, Any] = TEACHER,
    seed: int = 1,
    **changes: Any,
) -> tuple[TrainModule, Model]:
    config, teacher_model = objective_of(*features, **changes), model_of(teacher, seed=7)
    plans = plan_features(config, config_of(student), [config_of(teacher)])
    objective = build_distillation(config, TeacherSignals([PlainTeacher(teacher_model)]), features=plans, seed=seed)
    return TrainModule(model_of(student, seed=1), objective), teacher_model


def depth_of(tree: dict[str, Any], side: str) -> int:
    return int(tree["encoder" if side == "encoder" else "decoder"]["depth"])


def distance(loss: str, student: Tensor, teacher: Tensor) -> Tensor:
    match loss:
        case "mse":
            return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True)) / len(student)
        case "squared_error":
            return sum((s - t) ** 2 for s, t in zip(student, teacher, strict=True))
        case "cosine":
            return 1 - (student * teacher).sum() / student.norm() / teacher.norm()
        case _:
            return sum(t * (t.log() - s.log()) for s, t in zip(student, teacher, strict=True) if t > 0)


def by_loops(module: TrainModule, teacher: Model, feature: dict[str, Any], projection: Tensor, sentences: list[Batch]) -> Tensor:
    """The sum of one feature over single sentences, token by token. projection: (student's width, teacher's)."""
    kind, side = feature["kind"], feature["side"]
    loss = feature.get("loss", "mse" if kind == "hidden_states" else "kl")
    layers = feature.get("layers") or {
        layer: math.ceil(layer * depth_of(TEACHER, side) / depth_of(STUDENT, side))
        for layer in range(1, depth_of(STUDENT, side) + 1)
    }
    total = torch.zeros((), dtype=projection.dtype)
    for sentence in sentences:
        for own, teacher_model in layers.items():
            records = [ActivationCapture([Tap(kind, side, layer)]) for layer in (own, teacher_model)]
            module.model(sentence.source, sentence.target, records[0])
            with torch.no_grad():
                teacher(sentence.source, sentence.target, records[1])
            students, teachers = (next(iter(capture.captured.values()))[0] for capture in records)
            if kind == "hidden_states":
                students = students @ projection
            of_tokens = [distance(loss, s, t) for s, t in zip(students, teachers, strict=True)]
            share = sentence.num_targets / len(of_tokens) if side == "encoder" else 1
            total = total + share * sum(of_tokens) / len(layers)
    return total


def test_sums_and_gradients_are_those_of_loops_over_sentences_and_tokens() -> None:
    (sources, targets), (plain, _) = pairs(5, 1, 9), module_of()
    module, teacher = module_of(*ALL, kd_weight=0.7)
    module.double(), teacher.double()  # gradients reach 350; distances and attention are computed in float32 all the same
    batch, sentences = batch_of(sources, targets), [batch_of([s], [t]) for s, t in zip(sources, targets, strict=True)]
    (output,) = step(module, [batch])
    assert list(output.metrics.sums)[-5:] == NAMES
    projections = dict(module.objective.named_parameters())
    assert [tuple(weight.shape) for weight in projections.values()] == [(24, 16), (24, 16)], "one for each, whatever its layers"
    matrices = iter(weight.T for weight in projections.values())
    expected = Distillation(objective_of(kd_weight=0.7), module.objective.signals)(module.model, batch).loss_sum
    for name, feature in zip(NAMES, ALL, strict=True):
        projection = next(matrices) if feature["kind"] == "hidden_states" else torch.empty(0)
        value = by_loops(module, teacher, feature, projection, sentences)
        torch.testing.assert_close(output.metrics.sums[name], value.detach(), rtol=1e-5, atol=1e-5, check_dtype=False)
        assert not output.metrics.sums[name].requires_grad
        expected = expected + feature["weight"] * value
    torch.testing.assert_close(output.loss_sum, expected)
    found, requested = gradients(module, output.loss_sum), gradients(module, expected)
    torch.testing.assert_close(found, requested, rtol=1e-4, atol=1e-4)
    assert all(gradient.any() for name, gradient in found.items() if name.startswith("objective"))
    assert list(module.model.state_dict()) == list(plain.model.state_dict())


def test_a_step_of_own_samples_learns_features_too() -> None:
    module, _ = module_of(*ALL, on_policy={"fraction": 0.5})
    (output,) = step(module, [replace(batch_of(*pairs(5, 1, 9)), sampled=True)])
    features = sum(feature["weight"] * output.metrics.sums[name] for name, feature in zip(NAMES, ALL, strict=True))
    torch.testing.assert_close(output.loss_sum.detach(), output.metrics.sums["on_policy_kd"] + features)


@pytest.mark.parametrize("kind", ["encoder_decoder", "decoder_only"])
def test_one_batch_is_the_sum_of_its_parts(kind: ModelKind) -> None:
    own = ALL if kind == "encoder_decoder" else [feature for feature in ALL if feature["side"] == "decoder"]
    student, teacher = (STUDENT, TEACHER) if kind == "encoder_decoder" else (DECODER_ONLY, {**DECODER_ONLY, "model_dim": 20})
    module, _ = module_of(*own, student=student, teacher=teacher, selection={"kind": "word"})
    sources, targets = pairs(5, 1, 23 if kind == "encoder_decoder" else 9)
    (whole,) = step(module, [batch_of(sources, targets, kind)])
    parts = step(module, [*(batch_of([s], [t], kind) for s, t in zip(sources, targets, strict=True)), empty_batch(kind)])
    for name in whole.metrics.sums:
        torch.testing.assert_close(
            torch.stack([part.metrics.sums[name] for part in parts]).sum(), whole.metrics.sums[name], rtol=1e-5, atol=1e-4
        )
    total = torch.stack([part.loss_sum for part in parts]).sum()
    torch.testing.assert_close(total, whole.loss_sum)
    torch.testing.assert_close(gradients(module, total), gradients(module, whole.loss_sum), rtol=1e-4, atol=1e-3)


def test_an_empty_micro_batch_adds_exactly_zero() -> None:
    module, _ = module_of(*ALL)
    (output,) = step(module, [empty_batch()])
    assert all(value == 0 for value in (output.loss_sum, *output.metrics.sums.values()))
    found = gradients(module, output.loss_sum)
    assert len(found) == len(list(module.parameters()))
    assert all(not gradient.any() for gradient in found.values())


def test_distances_of_models_in_16_bits_are_taken_in_32() -> None:
    (whole, _), (module, teacher) = module_of(*ALL), module_of(*ALL)
    module.bfloat16()
    teacher.bfloat16()
    batch = batch_of(*pairs(5, 1, 9))
    (output,), (expected,) = step(module, [batch]), step(whole, [batch])
    for name in NAMES:
        assert output.metrics.sums[name].dtype == torch.float32
        torch.testing.assert_close(output.metrics.sums[name], expected.metrics.sums[name], rtol=0.05, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(module, output.loss_sum).values())


class Counting(torch.nn.Module):
    """A model that notes what it was asked to record."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model
        self.kind = model.kind
        self.asked: list[bool] = []

    def forward(self, source: Any, target: Any, capture: ActivationCapture | None = None) -> Any:
        self.asked.append(capture is not None)
        return self.model(source, target, capture)

    @property
    def projection(self) -> Any:
        return self.model.projection

    def reduce_projection(self, hidden: Tensor, reduce: Callable[[Tensor, Tensor], Any]) -> Any:
        return self.model.reduce_projection(hidden, reduce)


@pytest.mark.parametrize("kind", ["word", "word_and_sequence", "batch", "global", "global_by_language"])
def test_one_forward_each_and_no_features_in_a_scan(kind: str) -> None:
    """All tokens learn from inside, whatever the selection."""
    selection = {"kind": kind, **({"tags": ["a"]} if kind == "global_by_language" else {})}
    module, teacher = module_of(*ALL, selection=selection)
    module.model = student = Counting(module.model)
    module.objective.signals.teachers[0].model = teacher_model = Counting(teacher)
    batches = [batch_of(*pairs(5, 1, 9)), batch_of(*pairs(3))]
    outputs = step(module, batches)
    scanned = kind not in {"word", "word_and_sequence"}
    assert teacher_model.asked == [True, True]
    assert student.asked == [False, False] * scanned + [True, True]
    plain, _ = module_of(*ALL)
    for output, expected in zip(outputs, step(plain, batches), strict=True):
        for name in NAMES:
            torch.testing.assert_close(output.metrics.sums[name], expected.metrics.sums[name])


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("weight", {"weight": 0.5}),
    ("layers", {"layers": {1: 1}}),
    ("layers", {"layers": {1: 2}}),
    ("layers", {"layers": {2: 2}}),
    ("loss", {"loss": "cosine"}),
    ("side", {"side": "encoder"}),
]


@pytest.mark.parametrize("kind", ["hidden_states", "attention"])
def test_every_key_changes_the_loss(kind: str) -> None:
    batch = batch_of(*pairs(5, 1, 9))

    def loss_of(*features: dict[str, Any]) -> float:
        return step(module_of(*features)[0], [batch])[0].loss_sum.item()

    first = {"kind": kind, "side": "decoder"}
    changes = [change for _, change in CHANGES]
    changes += [{"side": "cross"}, {"loss": "squared_error"}] if kind == "attention" else [{"layers": {0: 0}}]
    losses = [loss_of(), loss_of(first), *(loss_of({**first, **change}) for change in changes)]
    assert len(set(losses)) == len(losses)
    fields = AttentionFeature.model_fields if kind == "attention" else HiddenStatesFeature.model_fields
    assert {key for key, _ in CHANGES} | {"kind"} == set(fields)


def test_projections_only_if_widths_differ_and_only_from_the_seed() -> None:
    same, _ = module_of(ALL[1], teacher={**STUDENT, "norm_order": "pre"})
    assert not list(same.objective.parameters())
    one, again, other = (dict(module_of(*ALL, seed=seed)[0].objective.named_parameters()) for seed in (1, 1, 2))
    (alone,) = module_of(ALL[1], student={**STUDENT, "activation": "gelu"})[0].objective.parameters()
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    first, second = one.values()
    assert torch.equal(second, alone), "other features and another model move nothing"
    assert not torch.equal(first, second)
    assert all(not torch.equal(one[name], other[name]) for name in one)
    assert first.abs().max() <= 1 / math.sqrt(16)
    assert first.std().item() == pytest.approx(1 / math.sqrt(16) / math.sqrt(3), rel=0.1)


def test_layers_left_out_are_assigned_evenly_last_to_last() -> None:
    assert uniform(3, 6) == {1: 2, 2: 4, 3: 6}
    assert uniform(4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert uniform(3, 2) == {1: 1, 2: 2, 3: 2}
    assert uniform(1, 12) == {1: 12}


def feature(**keys: Any) -> dict[str, Any]:
    return {"kind": "attention", "side": "decoder", **keys}


@pytest.mark.parametrize(
    ("section", "student", "teachers", "message"),
    [
        (
            feature(kind="hidden_states", side="encoder", layers={1: 1, 4: 2}),
            STUDENT,
            [TEACHER],
            "objective.features.0.layers names layer 4 of the student, whose encoder has 3; choose from 0 to 3",
        ),
        (
            feature(layers={1: 1, 2: 4}),
            STUDENT,
            [TEACHER],
            "objective.features.0.layers names layer 4 of the teacher, whose decoder has 3; choose from 1 to 3",
        ),
        (
            feature(side="cross"),
            DECODER_ONLY,
            [DECODER_ONLY],
            "objective.features.0.side = cross, but the student is decoder_only; choose side: decoder",
        ),
        (
            feature(kind="hidden_states", side="encoder"),
            STUDENT,
            [DECODER_ONLY],
            "objective.features.0.side = encoder, but the teacher is decoder_only; choose side: decoder",
        ),
        (
            feature(),
            STUDENT,
            [DECODER_ONLY],
            "objective.features.0.kind = attention compares attention over tokens, but the decoder of a decoder-only model",
        ),
        (
            feature(),
            STUDENT,
            [TEACHER, TEACHER],
            "objective.features needs the activations of one online teacher, but there are 2; name one --teacher BUNDLE",
        ),
        (
            feature(),
            STUDENT,
            [],
            "objective.features needs the activations of one online teacher, but there are none",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_built(
    section: dict[str, Any], student: dict[str, Any], teachers: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        plan_features(objective_of(section), config_of(student), [config_of(teacher) for teacher in teachers])
    assert message in str(caught.value)


def test_hidden_states_of_targets_fit_between_both_kinds_of_model() -> None:
    section = feature(kind="hidden_states", layers={2: 2})
    module, _ = module_of(section, student=STUDENT, teacher=DECODER_ONLY)
    (output,) = step(module, [collate(list(zip(*pairs(5, 1, 9), strict=True)), teacher_kinds=["decoder_only"])])
    assert output.metrics.sums["feature_decoder_hidden_states_mse"] > 0
    assert isinstance(config_of(DECODER_ONLY), DecoderOnlyConfig)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (feature(layers={}), "at least 1 item"),
        (feature(layers={0: 1}), "greater than 0"),
        (feature(kind="hidden_states", layers={-1: 1}), "greater than or equal to 0"),
        (feature(layers="even"), "valid dictionary"),
        (feature(kind="hidden_states", side="cross"), "'encoder' or 'decoder'"),
        (feature(kind="hidden_states", loss="kl"), "'mse' or 'cosine'"),
        (feature(loss="mse"), "'squared_error', 'kl' or 'cosine'"),
        (feature(weight=0), "greater than 0"),
        (feature(heads=2), "Extra inputs"),
        ({"kind": "logits", "side": "decoder"}, "'hidden_states', 'attention'"),
    ],
)
def test_contradictions_are_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        objective_of(section)
    assert message in str(caught.value)


def test_the_same_feature_twice_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"features\.0 and features\.2 are both attention of side decoder by kl"):
        objective_of(feature(), feature(loss="cosine"), feature(layers={1: 2}))


def test_signals_are_asked_for_features() -> None:
    config = objective_of(feature())
    plans = plan_features(config, config_of(STUDENT), [config_of(TEACHER)])
    teachers = [PlainTeacher(model_of(TEACHER, seed=seed)) for seed in (1, 2)]
    with pytest.raises(RecipeError, match="needs the activations of one online teacher, but there are 2"):
        build_distillation(config, TeacherSignals(teachers), features=plans)
    with pytest.raises(ValueError, match="must both be present or both absent"):
        build_distillation(config, TeacherSignals(teachers[:1]))
