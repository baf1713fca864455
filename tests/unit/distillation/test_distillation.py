"""The objective: the plain formula, padding and splits, every key acts, no key is inert, selection over a whole step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from torch.nn import functional as F

from dstrain.batch import Batch
from dstrain.build.training_options import TeacherOptions, check_teacher_options
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import (
    DistillationConfig,
    ForwardKl,
    GlobalByLanguageSelection,
    GlobalSelection,
    JensenShannon,
    SkewKl,
)
from dstrain.distillation.objective import Distillation
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import SignalRequest, TeacherSignals
from dstrain.errors import RecipeError
from dstrain.model_output import ActivationCapture
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import build_model
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy, target_hidden
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.recipe import ObjectiveConfig
from tests.batches import EOS, IGNORE_INDEX, PAD, labels_of
from tests.unit.objectives.test_cross_entropy import VOCAB_SIZE, batch_of, empty_batch, gradients, pairs

VOCABULARY = VocabularySizes(source=VOCAB_SIZE, target=VOCAB_SIZE, pad_id=PAD, eos_id=EOS)


def model_of(width: int, seed: int) -> EncoderDecoder:
    config = EncoderDecoderConfig(
        model_dim=width,
        encoder=StackConfig(depth=1, num_heads=2, ffn_dim=24),
        decoder=DecoderStackConfig(depth=1, num_heads=2, ffn_dim=24),
        embedding=PlainEmbedding(tie="all"),
        dropout=0.0,
    )
    model = build_model(config, VOCABULARY, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


class PlainTeacher:
    """A teacher without an engine."""

    def __init__(self, model: EncoderDecoder) -> None:
        self.model = model.eval()

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            operands = self.model.projection.operands(target_hidden(self.model, batch.for_kind(self.model.kind), capture))
        yield operands


def config_of(**changes: Any) -> ObjectiveConfig:
    return TypeAdapter(ObjectiveConfig).validate_python({"kind": "distillation", "chunk_tokens": 5, **changes})


TEACHERS = [PlainTeacher(model_of(24, seed=7)), PlainTeacher(model_of(20, seed=8))]


def module_of(teachers: int = 1, **changes: Any) -> TrainModule:
    config = config_of(**changes)
    objective = build_distillation(config, TeacherSignals(TEACHERS[:teachers]))
    return TrainModule(model_of(16, seed=1), objective, CrossEntropy(config.validation))


def step(module: TrainModule, batches: Sequence[Batch]) -> list[LossOutput]:
    """What the engine does of a step: scan, select, then all losses."""
    selection = module.objective.selection
    if selection is None or any(batch.sampled for batch in batches):
        return [module(batch) for batch in batches]
    with torch.no_grad():
        own = [module(batch, selection.scan) for batch in batches]
    selected = selection.select(own, torch.cat(own))
    return [module(batch, partial(module.objective, selected=chosen)) for batch, chosen in zip(batches, selected, strict=True)]


def state_of(module: TrainModule) -> dict[int, Tensor]:
    return {} if module.objective.selection is None else module.objective.selection.state()


def logits_of(model: EncoderDecoder, batch: Batch) -> Tensor:
    return model.project(model(batch.source, batch.target).hidden).flatten(0, 1)


def plain_losses(module: TrainModule, batch: Batch, temperature: float, teachers: int) -> tuple[Tensor, Tensor]:
    """Hard loss and divergence of each token, padding at 0, in words of torch."""
    labels = labels_of(batch).flatten()
    logits = logits_of(module.model, batch)
    smoothing = 0.1 * VOCAB_SIZE / (VOCAB_SIZE - 1)
    hard = F.cross_entropy(logits, labels, label_smoothing=smoothing, ignore_index=IGNORE_INDEX, reduction="none")
    with torch.no_grad():
        probs = [F.softmax(logits_of(teacher.model, batch) / temperature, 1) for teacher in TEACHERS[:teachers]]
    mean = torch.stack(probs).mean(0)
    kd = temperature**2 * F.kl_div(F.log_softmax(logits / temperature, 1), mean, reduction="none").sum(1)
    return hard, kd.masked_fill(labels == IGNORE_INDEX, 0)


@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_sums_and_gradients_are_those_of_the_plain_formula(temperature: float, teachers: int) -> None:
    module, batch = module_of(teachers, temperature=temperature, kd_weight=0.7, hard_weight=0.4), batch_of(*pairs(5, 1, 9))
    (output,) = step(module, [batch])
    hard, kd = (values.sum() for values in plain_losses(module, batch, temperature, teachers))
    expected = 0.4 * hard + 0.7 * kd
    nll = F.cross_entropy(logits_of(module.model, batch), labels_of(batch).flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert output.size.num_targets == output.metrics.sums["selected"] == 24
    assert list(output.metrics.sums) == ["nll", "hard", "kd", "agreement", "selected"]
    torch.testing.assert_close(output.loss_sum, expected)
    torch.testing.assert_close(output.metrics.sums["hard"], hard.detach())
    torch.testing.assert_close(output.metrics.sums["kd"], kd.detach())
    torch.testing.assert_close(output.metrics.sums["nll"], nll.detach())
    torch.testing.assert_close(gradients(module, output.loss_sum), gradients(module, expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [0.2, 0.5, 1.0])
def test_batch_selection_is_that_of_the_whole_step(rate: float) -> None:
    module, (sources, targets) = module_of(selection={"kind": "batch", "rate": rate}), pairs(5, 1, 9)
    whole = batch_of(sources, targets)
    hard, kd = plain_losses(module, whole, 1.0, 1)
    labels = labels_of(whole).flatten()
    nll = F.cross_entropy(logits_of(module.model, whole), labels, ignore_index=IGNORE_INDEX, reduction="none")
    real = nll[labels != IGNORE_INDEX]
    chosen = (nll >= real.topk(-int(-len(real) * rate // 1)).values[-1]) & (labels != IGNORE_INDEX)
    expected = hard.sum() + kd[chosen].sum()
    for parts in ([[0, 1, 2]], [[2], [0, 1]], [[1], [0], [2], []]):
        batches = [batch_of([sources[i] for i in part], [targets[i] for i in part]) if part else empty_batch() for part in parts]
        outputs = step(module, batches)
        torch.testing.assert_close(torch.stack([output.loss_sum for output in outputs]).sum(), expected)
        assert sum(output.metrics.sums["selected"].item() for output in outputs) == chosen.sum()


def test_one_batch_is_the_sum_of_its_parts() -> None:
    module, (sources, targets) = module_of(divergence={"kind": "reverse_kl"}), pairs(5, 1, 9)
    (whole,) = step(module, [batch_of(sources, targets)])
    parts = step(module, [*(batch_of([s], [t]) for s, t in zip(sources, targets, strict=True)), empty_batch()])
    for name in whole.metrics.sums:
        torch.testing.assert_close(torch.stack([part.metrics.sums[name] for part in parts]).sum(), whole.metrics.sums[name])
    torch.testing.assert_close(torch.stack([part.loss_sum for part in parts]).sum(), whole.loss_sum)


@pytest.mark.parametrize("selection", ["word_and_sequence", "batch", "global"])
def test_an_empty_micro_batch_adds_exactly_zero(selection: str) -> None:
    module = module_of(selection={"kind": selection})
    (output,) = step(module, [empty_batch()])
    assert output.size.num_targets == 0
    assert all(value == 0 for value in (output.loss_sum, *output.metrics.sums.values()))
    assert all(not gradient.any() for gradient in gradients(module, output.loss_sum).values())


CHANGES: list[tuple[str, dict[str, Any]]] = [
    ("divergence", {"divergence": {"kind": "reverse_kl"}}),
    ("divergence", {"divergence": {"kind": "total_variation"}}),
    ("divergence.beta", {"divergence": {"kind": "jensen_shannon", "beta": 0.3}}),
    ("divergence.alpha", {"divergence": {"kind": "skew_kl", "alpha": 0.3}}),
    ("temperature", {"temperature": 2.0}),
    ("kd_weight", {"kd_weight": 0.5}),
    ("hard_weight", {"hard_weight": 0.5}),
    ("label_smoothing", {"label_smoothing": 0.2}),
    ("selection", {"selection": {"kind": "word"}}),
    ("selection.rate", {"selection": {"kind": "batch", "rate": 0.3}}),
    ("selection.rate", {"selection": {"kind": "global", "rate": 0.3}}),
    ("selection.queue_size", {"selection": {"kind": "global", "rate": 0.3, "queue_size": 5}}),
    ("selection", {"selection": {"kind": "global_by_language", "rate": 0.3, "tags": ["a"]}}),
]
"""The remaining keys: chunk_tokens moves nothing (test_token_distillation), tags are compared with the data (test_tags),
teacher_precision is the engine's and renormalize the store's (test_teachers), on_policy changes the batches (test_on_policy), and
features have a file of their own (test_features)."""


def losses_of(**changes: Any) -> list[float]:
    module = module_of(**changes)
    return [step(module, [batch_of(*pairs(*lengths))])[0].loss_sum.item() for lengths in ((5, 1, 9), (7, 7), (3, 2, 4))]


def test_every_key_changes_the_loss() -> None:
    found = [
        losses_of(),
        *(losses_of(**change) for _, change in CHANGES),
        losses_of(divergence={"kind": "skew_kl", "alpha": 0.6}),
    ]
    found.append(losses_of(divergence={"kind": "jensen_shannon", "beta": 0.6}))
    assert losses_of() == found[0]
    assert len({tuple(losses) for losses in found}) == len(found)
    keys = {key for key, _ in CHANGES}
    elsewhere = {"kind", "chunk_tokens", "teacher_precision", "renormalize", "on_policy", "features"}
    assert {key.split(".")[0] for key in keys} | elsewhere == set(DistillationConfig.model_fields)
    assert {key.split(".")[1] for key in keys if key.startswith("selection.")} | {"kind", "tags"} == set(
        GlobalByLanguageSelection.model_fields
    )
    assert set(JensenShannon.model_fields) | set(SkewKl.model_fields) == {"kind", "beta", "alpha"}
    assert set(ForwardKl.model_fields) == {"kind"}


def test_word_learns_from_the_teacher_only() -> None:
    config = config_of(selection={"kind": "word"})
    assert (config.hard_weight, config.label_smoothing) == (0.0, 0.0)
    assert config_of(**config.model_dump(mode="json")) == config
    module = module_of(selection={"kind": "word"})
    (output,) = step(module, [batch_of(*pairs(5, 1, 9))])
    assert output.loss_sum == output.metrics.sums["kd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"selection": {"kind": "word"}, "hard_weight": 1},
            "selection.kind = word learns from the teacher only, but hard_weight = 1",
        ),
        ({"hard_weight": 0}, "word_and_sequence learns from the labels too, but hard_weight = 0; choose selection: {kind: word}"),
        (
            {"selection": {"kind": "word"}, "label_smoothing": 0.1},
            "label_smoothing = 0.1 smooths the hard loss, but hard_weight = 0",
        ),
        ({"temperature": 0}, "greater than 0"),
        ({"kd_weight": 0}, "greater than 0"),
        ({"selection": {"kind": "batch", "rate": 0}}, "greater than 0"),
        ({"selection": {"kind": "batch", "rate": 1.1}}, "less than or equal to 1"),
        ({"selection": {"kind": "global", "queue_size": 0}}, "greater than 0"),
        ({"selection": {"kind": "batch", "queue_size": 5}}, "Extra inputs"),
        ({"selection": {"kind": "global_by_language", "tags": []}}, "at least 1 item"),
        ({"divergence": {"kind": "jensen_shannon", "beta": 1.1}}, "less than or equal to 1"),
        ({"divergence": {"kind": "skew_kl", "alpha": 0}}, "greater than 0"),
        ({"divergence": {"kind": "forward_kl", "beta": 0.5}}, "Extra inputs"),
        ({"on_policy": {"fraction": 0}}, "greater than 0"),
        ({"on_policy": {"fraction": 1.5}}, "less than or equal to 1"),
        ({"on_policy": {"temperature": 0}}, "greater than 0"),
        ({"on_policy": {"temperature": -1}}, "greater than 0"),
        ({"on_policy": {"top_k": 0}}, "greater than 0"),
        ({"on_policy": {"top_p": 0}}, "greater than 0"),
        ({"on_policy": {"max_length_ratio": -1}}, "greater than or equal to 0"),
        ({"on_policy": {"max_length_offset": 0}}, "greater than 0"),
        ({"on_policy": {"lambda": 0.5}}, "Extra inputs"),
        (
            {"on_policy": {"fraction": 1}, "selection": {"kind": "batch"}},
            "on_policy.fraction = 1 leaves no step with labels, which selection.kind = batch needs; choose selection",
        ),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config_of(**changes)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "teacher", "logits", "message"),
    [
        (config_of(), False, False, "objective.kind = distillation needs a teacher: add --teacher BUNDLE, or --logits LOGITS"),
        (config_of(), True, True, "--teacher and --logits are two sources of the same signal"),
        (CrossEntropyConfig(), True, False, "objective.kind = cross_entropy has no use for a teacher: leave --teacher out"),
        (CrossEntropyConfig(), False, True, "objective.kind = cross_entropy has no use for a teacher: leave --logits out"),
        (
            config_of(teacher_precision="bf16"),
            False,
            True,
            "teacher_precision = bf16 is the precision of an online teacher",
        ),
        (config_of(renormalize=True), True, False, "objective.renormalize is for dumped logits of method topk"),
    ],
)
def test_a_missing_and_a_superfluous_teacher_are_refused(
    config: DistillationConfig | CrossEntropyConfig, teacher: bool, logits: bool, message: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        check_teacher_options(config, options_of(teacher=teacher, logits=logits))
    assert message in str(caught.value)


def options_of(*, teacher: bool, logits: bool) -> TeacherOptions:
    return TeacherOptions((Path("bundle"),) if teacher else (), logits=Path("logits") if logits else None)


def test_a_source_of_signals_that_fits_is_accepted() -> None:
    check_teacher_options(config_of(teacher_precision="bf16"), options_of(teacher=True, logits=False))
    check_teacher_options(config_of(renormalize=True), options_of(teacher=False, logits=True))
    check_teacher_options(CrossEntropyConfig(), options_of(teacher=False, logits=False))


@pytest.mark.parametrize("option", [{"placement": "sharded"}, {"vocabulary_map": Path("map.yaml")}])
def test_options_of_a_teacher_without_one_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="say how a teacher works: add --teacher BUNDLE, or leave them out"):
        check_teacher_options(CrossEntropyConfig(), TeacherOptions(**option))


class Kept:
    """A source that refuses."""

    def require(self, request: SignalRequest) -> None:
        raise RecipeError(f"no {request.divergence} at {request.temperature}, on_policy = {request.on_policy}")


def test_a_source_is_asked_for_what_the_recipe_wants() -> None:
    with pytest.raises(RecipeError, match=r"no skew_kl at 2\.0, on_policy = False"):
        Distillation(config_of(divergence={"kind": "skew_kl"}, temperature=2), Kept())
    with pytest.raises(RecipeError, match=r"no forward_kl at 1\.0, on_policy = True"):
        Distillation(config_of(on_policy={"fraction": 0.1}), Kept())


def test_validation_is_the_students_own_loss_and_leaves_the_queue() -> None:
    module, batch = module_of(selection={"kind": "global", "rate": 0.5, "queue_size": 9}), batch_of(*pairs(5, 1, 9))
    step(module, [batch])
    queue = module.objective.selection.state()["queue.0"].tolist()
    module.eval()
    output = module(batch)
    expected = TrainModule(module.model, CrossEntropy(CrossEntropyConfig(label_smoothing=0.1)))(batch)
    torch.testing.assert_close(output.loss_sum, expected.loss_sum)
    assert list(output.metrics.sums) == ["nll"]
    assert module.objective.selection.state()["queue.0"].tolist() == queue
    assert len(queue) == 9


def test_the_teacher_learns_nothing() -> None:
    module = module_of(2)
    before = [parameter.clone() for teacher in TEACHERS for parameter in teacher.model.parameters()]
    step(module, [batch_of(*pairs(5, 1, 9))])[0].loss_sum.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    after = [parameter for teacher in TEACHERS for parameter in teacher.model.parameters()]
    assert all(parameter.grad is None for parameter in after)
    assert all(map(torch.equal, before, after))
    assert len(list(module.parameters())) == len(list(module.model.parameters()))


@pytest.mark.parametrize("kind", ["word", "word_and_sequence", "batch", "global", "global_by_language"])
def test_a_step_of_samples_learns_from_the_teacher_only(kind: str) -> None:
    """Every token, whatever the selection, with its queue left as it was; a sample without an EOS is scored as any other."""
    tags = {"tags": ["a"]} if kind == "global_by_language" else {}
    module = module_of(temperature=2.0, kd_weight=0.7, on_policy={}, selection={"kind": kind, **tags})
    sources, targets = pairs(5, 1, 9)
    (given,) = step(module, [batch_of(sources, targets)])
    assert given.metrics.sums["on_policy"] == 0
    before = state_of(module)
    batch = replace(batch_of(sources, [targets[0], targets[1][:-1], targets[2]]), sampled=True)
    output = module(batch)
    _, kd = plain_losses(module, batch, 2.0, 1)
    assert output.size.num_targets == output.metrics.sums["on_policy"] == 23
    assert set(output.metrics.sums) == {"on_policy_nll", "on_policy_kd", "on_policy_agreement", "on_policy"}
    torch.testing.assert_close(output.loss_sum, 0.7 * kd.sum())
    torch.testing.assert_close(output.metrics.sums["on_policy_kd"], kd.sum().detach())
    torch.testing.assert_close(gradients(module, output.loss_sum), gradients(module, 0.7 * kd.sum()), rtol=1e-4, atol=1e-5)
    after = state_of(module)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[tag], after[tag]) for tag in before)
    empty = module(replace(empty_batch(), sampled=True))
    assert empty.loss_sum == 0
    assert empty.metrics.sums.keys() == output.metrics.sums.keys()


def test_a_queue_is_shared_by_the_batches_of_a_step() -> None:
    selection = Selection(GlobalSelection(queue_size=1000))
    objective = Distillation(config_of(), TeacherSignals(TEACHERS[:1]), selection=selection)
    module = TrainModule(model_of(16, seed=1), objective)
    sizes = []
    for _ in range(2):
        step(module, [batch_of(*pairs(5, 1, 9)), batch_of(*pairs(3)), empty_batch()])
        sizes.append(len(selection.state()["queue.0"]))
    assert sizes == [30, 60]
