"""Packed batches distil what padded ones do: teachers, features, selection, stores, R-Drop and the student's own samples."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch, ModelKind
from dstrain.data.batching.collate import Collator, PackedSize
from dstrain.data.prepared.dataset import open_dataset
from dstrain.distillation.build import build_distillation
from dstrain.distillation.config import GlobalByLanguageSelection
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.features import source_weights
from dstrain.distillation.selection import Selection
from dstrain.distillation.signals import TeacherSignals
from dstrain.distillation.store.dump import ShardDraft, token_keys
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.teacher_signal import KeptSignal, SparseSignal
from tests.batches import EOS, PAD, collate
from tests.unit.distillation.test_distillation import PlainTeacher, step
from tests.unit.distillation.test_features import ALL, DECODER_ONLY, STUDENT, TEACHER, config_of, model_of, objective_of
from tests.unit.distillation.test_on_policy import STEP, TYPES, ToyModel, batch_of, own_samples, written
from tests.unit.distillation.toy_store import prepared, stored, teacher_for
from tests.unit.objectives.test_cross_entropy import gradients, pairs

PACKED = PackedSize(multiple=16)
"""So there is padding after the last sequence."""
KINDS: list[ModelKind] = ["encoder_decoder", "decoder_only"]


def both(kind: ModelKind, **options: Any) -> tuple[Batch, Batch]:
    """The same examples packed and padded."""
    examples = list(zip(*pairs(5, 1, 9, 3), strict=True))
    packed, padded = (collate(examples, kind=kind, packed=packed, **options) for packed in (PACKED, None))
    return packed, padded


def assert_close(found: Tensor, expected: Tensor) -> None:
    """To 1e-6 of the largest number."""
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def assert_equal_steps(module: TrainModule, packed: Batch, padded: Batch) -> None:
    """Each by a module of its own, for a selection remembers the values of the steps before."""
    outputs: list[LossOutput] = []
    grads: list[dict[str, Tensor]] = []
    for own, batch in ((copy.deepcopy(module), packed), (module, padded)):
        (output,) = step(own, [batch])
        grads.append(gradients(own, output.loss_sum))
        outputs.append(output._replace(loss_sum=output.loss_sum.detach()))
    found, expected = outputs
    assert (found.size, found.metrics.counts) == (expected.size, expected.metrics.counts)
    assert_close(found.loss_sum, expected.loss_sum)
    for values in ([each.metrics.sums for each in outputs], grads):
        for name, value in values[1].items():
            assert_close(values[0][name], value)


SELECTIONS: list[dict[str, Any]] = [
    {"kind": "word"},
    {"kind": "batch", "rate": 0.4},
    {"kind": "global_by_language", "rate": 0.4, "tags": ["a"]},
]


def module_of(student: dict[str, Any], teacher: dict[str, Any], features: list[dict[str, Any]], **changes: Any) -> TrainModule:
    """In float64, for distances and attention cancel; activations are compared in float32 all the same."""
    config = objective_of(*features, **changes)
    signals = TeacherSignals([PlainTeacher(model_of(teacher, seed=7).double())])
    plans = plan_features(config, config_of(student), [config_of(teacher)])
    return TrainModule(model_of(student, seed=1), build_distillation(config, signals, features=plans)).double()


@pytest.mark.parametrize("selection", SELECTIONS, ids=lambda section: section["kind"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_features_and_selection_equal_the_padded_ones(kind: ModelKind, selection: dict[str, Any]) -> None:
    student, teacher, features = STUDENT, TEACHER, ALL
    if kind == "decoder_only":
        student, teacher = DECODER_ONLY, {**DECODER_ONLY, "model_dim": 20}
        features = [feature for feature in ALL if feature["side"] == "decoder"]
    assert_equal_steps(module_of(student, teacher, features, selection=selection), *both(kind))


@pytest.mark.parametrize(("student", "teacher"), [(STUDENT, DECODER_ONLY), (DECODER_ONLY, STUDENT)])
def test_a_teacher_of_the_other_kind_reads_packed_sequences(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    features = [{"kind": "hidden_states", "side": "decoder", "layers": {2: 2}}]
    batches = both(student["kind"], teacher_kinds=[teacher["kind"]])
    assert_equal_steps(module_of(student, teacher, features), *batches)


@pytest.mark.parametrize("kind", KINDS)
def test_r_drop_equals_the_padded_one(kind: ModelKind) -> None:
    """Two passes without dropout of the model, so that the masks of both layouts cannot differ."""
    tree = STUDENT if kind == "encoder_decoder" else DECODER_ONLY
    config = CrossEntropyConfig(r_drop={"alpha": 3.0}, average="sentences", chunk_tokens=5)
    assert_equal_steps(TrainModule(model_of(tree, seed=1), build_cross_entropy(config)).double(), *both(kind))


@pytest.mark.parametrize("method", [SampleMethod(), TopKMethod(k=8)], ids=lambda method: method.kind)
def test_a_store_is_read_and_written_by_example_and_position(method: Method, tmp_path: Path) -> None:
    data = prepared(tmp_path / "data")
    dataset, teacher = open_dataset(data, "train"), teacher_for(data)
    store = stored(data, tmp_path / "logits", method, teacher=teacher)
    ids = np.array([59, 3, 17, 0])
    examples = [dataset[row] for row in ids]
    packed, padded = (
        Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, packed=packed)(examples, ids) for packed in (PACKED, None)
    )
    found, expected = store.signal(packed), store.signal(padded)
    assert isinstance(found, SparseSignal) and isinstance(expected, SparseSignal)
    assert all(torch.equal(getattr(found, name), getattr(expected, name)) for name in ("ids", "probs", "tail"))
    drafts = [ShardDraft(store._codec) for _ in range(2)]
    logits = torch.randn(packed.num_targets, store.manifest.job.vocab_size, generator=torch.Generator().manual_seed(1))
    for draft, batch in zip(drafts, (packed, padded), strict=True):
        draft.add(batch, [tensor.numpy() for tensor in store._codec.select(logits.clone(), token_keys(batch))])
    for name, pieces in drafts[1]._pieces.items():
        for one, other in zip(drafts[0]._pieces[name], pieces, strict=True):
            assert np.array_equal(one.values, other.values) and np.array_equal(one.lengths, other.lengths)


def _rows(signal: KeptSignal) -> np.ndarray[Any, Any]:
    """All that it has of each token."""
    if isinstance(signal, SparseSignal):
        return torch.cat([signal.ids, signal.probs, signal.tail[:, None]], 1).numpy()
    return np.concatenate(signal.log_probs)


def test_a_share_of_a_batch_has_its_part_of_signals_statistics_and_weights(tmp_path: Path) -> None:
    data = prepared(tmp_path / "data")
    dataset, teacher = open_dataset(data, "train"), teacher_for(data)
    ids = np.array([59, 3, 17, 0])
    whole = Collator("encoder_decoder", pad_id=PAD, eos_id=EOS, packed=PACKED)([dataset[row] for row in ids], ids)
    shares = [whole.share(rank, 4) for rank in range(4)]
    assert all(share.num_targets < whole.num_targets for share in shares)
    for method in (SampleMethod(), DenseMethod()):
        store = stored(data, tmp_path / method.kind, method, teacher=teacher)
        found, expected = [store.signal(share) for share in shares], store.signal(whole)
        parts = [_rows(signal) for signal in (*found, expected)]
        assert np.array_equal(np.concatenate(parts[:-1]), parts[-1])
    selection = Selection(GlobalByLanguageSelection(tags=["a"]))
    nll = torch.arange(float(whole.num_targets))
    counts = [share.num_targets for share in shares]
    statistics = [selection.statistics(*own) for own in zip(shares, nll.split(counts), strict=True)]
    assert torch.equal(torch.cat(statistics), selection.statistics(whole, nll))
    assert torch.equal(torch.cat([source_weights(share) for share in shares]), source_weights(whole))


def test_own_samples_are_of_the_examples_whatever_the_layout() -> None:
    work = own_samples(ToyModel(TYPES, seed=3))
    packed, padded = (work(STEP, [batch_of(range(9), packed=packed)]) for packed in (PACKED, None))
    assert packed[0].num_targets == padded[0].num_targets
    assert written(packed[1]) == written(padded[1])
