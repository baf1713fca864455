"""Distillation gives the sums that the predecessor computed of a teacher, a student and three batches (golden/ref/kd).

Its gates count padding: of n real and m padded tokens it takes the k hardest, k = ceil((n + m) rate). Where no gate is at work
the objective must give its values as they are. Where one is, a rate is chosen here that gives the same k among the real tokens:
so formula, selection, queue and gradients are compared through the objective itself.
"""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.batch import Batch
from dstrain.distillation.build import build_distillation
from dstrain.distillation.selection import threshold
from dstrain.distillation.signals import TeacherSignals
from dstrain.interop.fairseq.checkpoint import convert, read_fairseq_checkpoint
from dstrain.model_output import ActivationCapture
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import build_model
from dstrain.models.weights import TensorSource, load_canonical
from dstrain.objectives.cross_entropy import target_hidden
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.recipe import ObjectiveConfig
from tests.parallel.trace import recorded_batches
from tests.paths import GOLDEN, needs_golden

pytestmark = needs_golden
FOLDER = GOLDEN / "ref" / "kd"


def model(name: str) -> EncoderDecoder:
    config, vocabulary, weights = convert(read_fairseq_checkpoint(FOLDER / f"{name}.pt"))
    found = build_model(config, vocabulary, seed=None).eval()
    load_canonical(found, TensorSource(weights))
    return found


class PlainTeacher:
    def __init__(self, teacher: EncoderDecoder) -> None:
        self.teacher = teacher

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            operands = self.teacher.projection.operands(target_hidden(self.teacher, batch.for_kind(self.teacher.kind), capture))
        yield operands


def module_of(selection: dict[str, Any], student: EncoderDecoder | None = None) -> TrainModule:
    section = {"kind": "distillation", "selection": selection}
    if selection["kind"] != "word":
        section["label_smoothing"] = 0.1
    config = TypeAdapter(ObjectiveConfig).validate_python(section)
    objective = build_distillation(config, TeacherSignals([PlainTeacher(model("teacher"))]))
    module = TrainModule(student or model("student"), objective)
    module.training = True  # the objective trains, the model stays in evaluation mode, as it was recorded
    return module


def golden(case: str) -> list[dict[str, float]]:
    found: list[dict[str, float]] = json.loads((FOLDER / "losses.json").read_text())["cases"][case]["batches_in_order"]
    return found


def one_step(module: TrainModule, batch: Batch) -> LossOutput:
    selection, selected = module.objective.selection, None
    if selection is not None:
        with torch.no_grad():
            statistics = module(batch, selection.scan)
        (selected,) = selection.select([statistics], statistics)
    output: LossOutput = module.objective(module.model, batch, selected)
    return output


def check(output: LossOutput, module: TrainModule, expected: dict[str, float]) -> None:
    assert output.size.num_targets == expected["sample_size"]
    assert output.loss_sum.item() == pytest.approx(expected["loss"], rel=1e-5)
    assert output.metrics.sums["kd"].item() == pytest.approx(expected["kd_loss"], rel=1e-5)
    assert output.metrics.sums["nll"].item() == pytest.approx(expected["nll_loss"], rel=1e-5)
    module.zero_grad()
    output.loss_sum.backward()
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in module.parameters() if parameter.grad is not None])
    assert norm.item() == pytest.approx(expected["grad_norm_total"], rel=1e-4)


@pytest.mark.parametrize(
    ("case", "selection"),
    [
        ("word_level", {"kind": "word"}),
        ("default_args", {"kind": "word"}),
        ("word_seq_level", {"kind": "word_and_sequence"}),
        ("batch_level_1.0", {"kind": "batch", "rate": 1.0}),
    ],
)
def test_strategies_without_a_gate(case: str, selection: dict[str, Any]) -> None:
    module = module_of(selection)
    for batch, expected in zip(recorded_batches(GOLDEN), golden(case), strict=True):
        check(one_step(module, batch), module, expected)


def padded_count(real: int, padding: int, rate: float) -> float:
    """The rate that takes of the real tokens as many as the predecessor takes of all."""
    count = math.ceil((real + padding) * rate)
    assert count <= real, "the gate of this case is a padded position"
    return (count - 0.5) / real


@pytest.mark.parametrize("rate", [0.25, 0.5])
def test_batch_level(rate: float) -> None:
    for batch, expected in zip(recorded_batches(GOLDEN), golden(f"batch_level_{rate}"), strict=True):
        own = padded_count(batch.num_targets, batch.target.tokens.numel() - batch.num_targets, rate)
        module = module_of({"kind": "batch", "rate": own})
        check(one_step(module, batch), module, expected)


def test_global_level() -> None:
    """A queue that never overflows: after three batches 83 real values, theirs with 45 of padding beside."""
    student, state = model("student"), {}
    padding = 0
    for batch, expected in zip(recorded_batches(GOLDEN), golden("global_level_0.5"), strict=True):
        padding += batch.target.tokens.numel() - batch.num_targets
        real = batch.num_targets + len(state.get("queue.0", []))
        assert real + padding == expected["queue_len"]
        module = module_of({"kind": "global", "rate": padded_count(real, padding, 0.5), "queue_size": 10000}, student)
        assert module.objective.selection is not None
        module.objective.selection.load_state(state)
        check(one_step(module, batch), module, expected)
        state = module.objective.selection.state()
    assert len(state["queue.0"]) == 83


@pytest.mark.parametrize(
    ("case", "rate", "queue_size"), [("global_level_0.5_q40", 0.5, 40), ("global_level_0.25_q100", 0.25, 100)]
)
def test_gates_of_an_overfull_queue(case: str, rate: float, queue_size: int) -> None:
    """Their queue written out, padding and surplus included: our gate over its values selects what they selected."""
    with np.load(FOLDER / "io.npz") as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    queue = torch.empty(0)
    for number, expected in enumerate(golden(case)):
        student, teacher = (arrays[f"b{number}.{name}_logits"].flatten(0, 1).log_softmax(1) for name in ("student", "teacher"))
        target = arrays[f"b{number}.target"].flatten()
        nll = -student.gather(1, target[:, None]).squeeze(1).masked_fill(target == 1, 0)
        if len(nll) + len(queue) >= queue_size:
            queue = queue[len(nll) :]
        queue = torch.cat([queue, nll])
        assert len(queue) == expected["queue_len"]
        kd = (teacher.exp() * (teacher - student)).sum(1)
        chosen = (nll >= threshold(queue, rate)) & (target != 1)
        assert kd[chosen].sum().item() == pytest.approx(expected["kd_loss"], rel=1e-5)
