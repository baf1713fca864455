"""A store as the signal source of the distillation objective: all entries kept = the online teacher; kept entries cost little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.data.prepared.dataset import open_dataset
from dstrain.distillation.config import (
    DistillationConfig,
    DivergenceConfig,
    ForwardKl,
    JensenShannon,
    ReverseKl,
    SkewKl,
    TotalVariation,
    WordSelection,
)
from dstrain.distillation.objective import Distillation, signal_request
from dstrain.distillation.signals import SignalSource, TeacherSignals
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod
from dstrain.distillation.store.store import LogitStore
from dstrain.model_output import ActivationCapture
from dstrain.models.factory import Model
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy, target_hidden
from dstrain.objectives.objective import Objective
from tests.unit.distillation.toy_store import batch_of, prepared, stored, teacher_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


class AtWork:
    """A whole teacher beside the student."""

    def __init__(self, model: Model) -> None:
        self.model = model

    @contextmanager
    def open(self, batch: Batch, capture: ActivationCapture | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            operands = self.model.projection.operands(target_hidden(self.model, batch.for_kind(self.model.kind), capture))
        yield operands

    def close(self) -> None:
        pass


def loss_and_gradients(objective: Objective, student: Model, batch: Batch) -> tuple[dict[str, Tensor], list[Tensor]]:
    output = objective(student, batch)
    gradients = torch.autograd.grad(output.loss_sum, list(student.parameters()))
    return {"loss": output.loss_sum.detach(), **output.metrics.sums}, list(gradients)


DIVERGENCES: list[DivergenceConfig] = [ForwardKl(), ReverseKl(), JensenShannon(), TotalVariation(), SkewKl()]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("kind", "divergence"), [("dense", ForwardKl()), *(("topk", each) for each in DIVERGENCES)], ids=lambda part: str(part)[:12]
)
def test_all_entries_kept_teach_what_the_teacher_at_work_teaches(
    kind: str, divergence: DivergenceConfig, temperature: float, data: Path, tmp_path: Path
) -> None:
    teacher, student = teacher_for(data), teacher_for(data, seed=4)
    types = teacher.vocabulary.target
    method: Method = DenseMethod(temperature=temperature)
    if kind == "topk":
        method = TopKMethod(k=types, dtype="float32", temperature=temperature)
    store = stored(data, tmp_path / "logits", method, teacher=teacher)
    config = DistillationConfig(divergence=divergence, temperature=temperature)
    store.require(signal_request(config))
    batch = batch_of(open_dataset(data, "train"), [59, 3, 17, 0])
    online = loss_and_gradients(Distillation(config, TeacherSignals([AtWork(teacher)])), student, batch)
    offline = loss_and_gradients(Distillation(config, store), student, batch)
    exact = kind == "topk"  # dense is kept in 16 bits
    torch.testing.assert_close(offline[0], online[0], rtol=1e-5 if exact else 2e-3, atol=1e-5 if exact else 1e-3)
    for found, expected in zip(offline[1], online[1], strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=(1e-5 if exact else 5e-3) * scale + 1e-7)


@pytest.fixture(scope="module")
def dense_stores(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[float, LogitStore]:
    """By the temperature of the dump."""
    directory, teacher = tmp_path_factory.mktemp("dense"), teacher_for(data)
    return {
        temperature: stored(data, directory / f"{temperature:g}", DenseMethod(temperature=temperature), teacher=teacher)
        for temperature in (1.0, 2.0)
    }


@pytest.mark.parametrize("dumped_at", [1.0, 2.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES, ids=lambda d: d.kind)
def test_a_dense_store_teaches_every_divergence_at_every_temperature(
    divergence: DivergenceConfig, temperature: float, dumped_at: float, data: Path, dense_stores: dict[float, LogitStore]
) -> None:
    alone = {"selection": WordSelection(), "hard_weight": 0, "label_smoothing": 0}
    config = DistillationConfig(divergence=divergence, temperature=temperature, chunk_tokens=7, **alone)
    student, batch = teacher_for(data, seed=4), batch_of(open_dataset(data, "train"), [59, 3, 17, 0])
    dense_stores[dumped_at].require(signal_request(config))
    at_work = TeacherSignals([AtWork(teacher_for(data))])
    online, offline = (
        loss_and_gradients(Distillation(config, source), student, batch) for source in (at_work, dense_stores[dumped_at])
    )
    torch.testing.assert_close(offline[0], online[0], rtol=2e-3, atol=1e-3)
    most = 5e-2 if divergence.kind == "total_variation" else 3e-3  # its slope jumps where both probabilities are the same
    for found, expected in zip(offline[1], online[1], strict=True):
        assert (found - expected).norm() <= most * expected.norm() + 1e-6


@pytest.mark.parametrize("method", [None, SampleMethod(), TopKMethod(k=5), DenseMethod()], ids=str)
def test_a_step_asks_nothing_of_its_device(
    method: Method | None, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a device without memory, which cannot answer; a GPU would have to be waited for. None: an online teacher."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)  # this device has no autocast
    monkeypatch.setattr(torch, "autocast", lambda device, enabled: nullcontext())
    elsewhere, teacher, student = torch.device("meta"), teacher_for(data), teacher_for(data, seed=4).train()
    signals: SignalSource = TeacherSignals([AtWork(teacher.to(elsewhere))])
    if method is not None:
        signals = stored(data, tmp_path / "logits", method, teacher=teacher_for(data))
    batch = batch_of(open_dataset(data, "train"), [59, 3, 17, 0])
    output = Distillation(DistillationConfig(), signals)(student.to(elsewhere), batch.to(elsewhere))
    output.loss_sum.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    with pytest.raises(RuntimeError, match="meta tensor"):
        output.loss_sum.item()


@pytest.mark.slow
def test_training_from_a_store_costs_a_tenth_more_at_most(tmp_path: Path) -> None:
    """Forward and backward of the shape of multi30k_tiny with 8,000 entries; CPU seconds, in turns, the best of each."""
    from dstrain.models.config import VocabularySizes
    from dstrain.models.factory import build_model
    from dstrain.recipe_file import load_recipe

    data = prepared(tmp_path / "data", num_pairs=300, vocab_size=600)
    config, sizes = load_recipe("translation/multi30k_tiny").model, VocabularySizes(source=8000, target=8000)
    student, teacher = (build_model(config, sizes, seed=seed) for seed in (1, 2))
    store = stored(data, tmp_path / "logits", SampleMethod(), teacher=teacher.eval())
    batch = batch_of(open_dataset(data, "train"), range(250))
    plain: Objective = CrossEntropy(CrossEntropyConfig(chunk_tokens=256))
    distilled: Objective = Distillation(DistillationConfig(), store)
    spent: dict[str, list[float]] = {"plain": [], "distilled": []}
    for _ in range(6):
        for name, objective in (("plain", plain), ("distilled", distilled)):
            start = time.process_time()
            objective(student, batch).loss_sum.backward()
            spent[name].append(time.process_time() - start)
    print({name: round(min(times), 3) for name, times in spent.items()})
    assert min(spent["distilled"]) <= 1.1 * min(spent["plain"]), spent
