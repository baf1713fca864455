"""On a GPU the CPU never waits inside a micro-batch: for no position kind, layout, objective or source of signals.

`PretendedGpu` notes each operation for which a real one would be waited for. Losses and gradients are the CPU's, so what runs
there is what trains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.data.prepared.dataset import open_dataset
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.objective import Distillation
from dstrain.distillation.signals import SignalSource, TeacherSignals
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig, RDropConfig
from dstrain.objectives.objective import Objective
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.kernels import OPS
from tests.batches import EOS, PAD, collate
from tests.pretended_gpu import GPU, PretendedGpu, to_gpu
from tests.unit.distillation.test_distillation import PlainTeacher
from tests.unit.distillation.test_features import ALL, STUDENT, TEACHER, config_of, objective_of
from tests.unit.distillation.toy_store import batch_of, prepared, stored, teacher_for

VOCABULARY = VocabularySizes(source=37, target=37, pad_id=PAD, eos_id=EOS)
PAIRS = [([5, 6, 7, EOS], [8, EOS]), ([9, EOS], [9, 5, 6, EOS]), ([4, 8, 8, 5, 6, EOS], [7, 7, EOS])]
LENGTHS = {"original_length": 4, "factor": 2.0}
POSITIONS: dict[str, dict[str, Any]] = {
    **{kind: {"kind": kind} for kind in ("sinusoidal", "learned", "none", "alibi")},
    **{
        f"rotary_{scaling['kind']}": {"kind": "rotary", "scaling": scaling}
        for scaling in (
            {"kind": "none"},
            {"kind": "linear", "factor": 2.0},
            {"kind": "ntk", "factor": 2.0},
            {"kind": "dynamic_ntk", **LENGTHS},
            {"kind": "yarn", **LENGTHS},
            {"kind": "dynamic_yarn", **LENGTHS, "from_length": 3},
        )
    },
}


@pytest.fixture(autouse=True)
def kernels_that_run_here() -> Iterator[None]:
    """Of each op the one that fits everywhere; what the kernels of a GPU wait for only a GPU can tell (`tests/gpu/`)."""
    with ExitStack() as stack:
        for op in OPS.values():
            fallback = [kernel.name for kernel in op.kernels if kernel.device_type is None and not kernel.on_request]
            stack.enter_context(op.forced(fallback[-1]))
        yield


def train_module(tree: dict[str, Any], objective: Objective) -> TrainModule:
    model = build_model(config_of(tree), VOCABULARY, seed=1)
    return TrainModule(model, objective).train()


def outcome(module: TrainModule, batches: list[Batch]) -> tuple[Tensor, list[Tensor]]:
    """What the engine does of a step, but for its reading of the sums: loss and gradients."""
    selection = module.objective.selection
    selected: list[Tensor | None] = [None] * len(batches)
    seed_masks(1, 0)
    if selection is not None and not batches[0].sampled:
        with torch.no_grad():
            own = [module(batch, selection.scan) for batch in batches]
        selected = list(selection.select(own, torch.cat(own)))
    outputs = [module.objective(module.model, batch, chosen) for batch, chosen in zip(batches, selected, strict=True)]
    total = torch.stack([output.loss_sum for output in outputs]).sum()
    return total, list(torch.autograd.grad(total, list(module.parameters())))


def waits(module: TrainModule, batches: list[Batch]) -> list[str]:
    """What a GPU would be waited for in a step, which gives the CPU's results there."""
    expected = outcome(module, batches)
    if (selection := module.objective.selection) is not None:
        selection.load_state({})
    with PretendedGpu() as gpu:
        to_gpu(module)
        for teacher in getattr(getattr(module.objective, "signals", None), "teachers", []):
            to_gpu(teacher.model)
        with torch.no_grad():
            module(batches[0].to(GPU))  # tables are made in the first forward pass
        gpu.waits.clear()
        loss, gradients = outcome(module, [batch.to(GPU) for batch in batches])
        found = list(gpu.waits)
        values = loss.cpu(), [gradient.cpu() for gradient in gradients]
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    return found


class Models(NamedTuple):
    """Of student and teacher."""

    student: dict[str, Any]
    teacher: dict[str, Any]

    def widened(self, factor: int) -> Models:
        """By so many times; kernels of a GPU need heads of 16 features and more."""
        return Models(*({**tree, "model_dim": factor * tree["model_dim"]} for tree in self))

    def online(self, count: int = 1) -> TeacherSignals:
        """Teachers beside the student."""
        config = config_of(self.teacher)
        return TeacherSignals([PlainTeacher(build_model(config, VOCABULARY, seed=7 + number)) for number in range(count)])

    def distillation(self, signals: SignalSource, features: tuple[dict[str, Any], ...] = (), **changes: Any) -> Objective:
        config = objective_of(*features, **changes)
        plans = plan_features(config, config_of(self.student), [config_of(self.teacher)]) if features else ()
        return build_distillation(config, signals, features=plans, seed=1)


MODELS = Models({**STUDENT, "dropout": 0.2}, TEACHER)


STACK = {"depth": 1, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 20, "feed_forward": "gated"}
SMALL = {"model_dim": 16, "decoder": STACK, "dropout": 0.2}


@pytest.mark.parametrize("position", POSITIONS)
def test_no_position_makes_a_packed_micro_batch_wait(position: str) -> None:
    tree = {**SMALL, "kind": "encoder_decoder", "encoder": STACK, "position": POSITIONS[position]}
    module = train_module(tree, build_cross_entropy(CrossEntropyConfig()))
    assert waits(module, [collate(PAIRS, packed=PackedSize(multiple=16))]) == []


@pytest.mark.parametrize("position", ["sinusoidal", "alibi", "rotary_none", "rotary_dynamic_yarn"])
def test_no_position_makes_a_padded_micro_batch_wait(position: str) -> None:
    tree = {**SMALL, "kind": "decoder_only", "position": POSITIONS[position]}
    module = train_module(tree, build_cross_entropy(CrossEntropyConfig()))
    assert waits(module, [collate(PAIRS, kind="decoder_only")]) == []


OBJECTIVES: dict[str, Callable[[Models], Objective]] = {
    "sentences": lambda of: build_cross_entropy(CrossEntropyConfig(average="sentences", label_smoothing=0.1)),
    "r_drop": lambda of: build_cross_entropy(CrossEntropyConfig(r_drop=RDropConfig())),
    "features": lambda of: of.distillation(of.online(), tuple(ALL)),
    "ensemble": lambda of: of.distillation(of.online(2), temperature=2.0),
    **{
        divergence: lambda of, kind=divergence: of.distillation(of.online(), divergence={"kind": kind})  # type: ignore[misc]
        for divergence in ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation", "skew_kl")
    },
}


def batch_for(objective: str, multiple: int = 16) -> Batch:
    """Packed, unless the objective reads activations."""
    return collate(PAIRS, packed=None if objective == "features" else PackedSize(multiple))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_objective_makes_a_micro_batch_wait(objective: str) -> None:
    module = train_module(MODELS.student, OBJECTIVES[objective](MODELS))
    assert waits(module, [batch_for(objective)]) == []


def test_no_sampled_batch_makes_a_micro_batch_wait() -> None:
    module = train_module(STUDENT, MODELS.distillation(MODELS.online(), on_policy={"fraction": 0.5}))
    batch = replace(collate(PAIRS), sampled=True)
    assert waits(module, [batch]) == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


@pytest.mark.parametrize("method", [SampleMethod(), TopKMethod(k=5), DenseMethod()], ids=lambda method: method.kind)
def test_no_store_makes_a_micro_batch_wait(method: Method, data: Path, tmp_path: Path) -> None:
    teacher, student = teacher_for(data), teacher_for(data, seed=4)
    store = stored(data, tmp_path / "logits", method, teacher=teacher)
    module = TrainModule(student, Distillation(DistillationConfig(), store)).train()
    assert waits(module, [batch_of(open_dataset(data, "train"), [59, 3, 17, 0])]) == []


SELECTIONS: list[dict[str, Any]] = [{"kind": "global"}, {"kind": "global_by_language", "tags": ["xx"]}]


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda of: of["kind"])
def test_a_selection_waits_once_a_step(selection: dict[str, Any]) -> None:
    """For the numbers of tokens of all its micro-batches, by which it chooses some."""
    module = train_module(STUDENT, MODELS.distillation(MODELS.online(), selection=selection))
    found = waits(module, [collate(PAIRS), collate(PAIRS[1:], ids=[7, 8])])
    assert len(found) == 1, found
