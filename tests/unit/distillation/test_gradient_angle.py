"""The gradient-angle test of a store: exact where everything is kept, right against autograd, and telling bias from noise."""

from __future__ import annotations

import math
import tracemalloc
from itertools import islice, pairwise
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.data.batching.loader import TrainLoader
from dstrain.data.batching.plan import StepPlan
from dstrain.data.config import BatchingConfig
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.distillation.store.gradient_angle import Angle, gradient_angles, random_batches
from dstrain.distillation.store.manifest import Method, SampleMethod, TopKMethod
from dstrain.distillation.store.store import LogitStore
from dstrain.models.config import EncoderDecoderConfig
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import build_model
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy, target_hidden
from tests.unit.distillation.toy_store import COLLATOR, EOS, prepared, stored, teacher_for


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


def angles(
    student: EncoderDecoder, teacher: EncoderDecoder, store: LogitStore, dataset: Dataset, tokens: list[int]
) -> list[Angle]:
    batches = random_batches(dataset, 1000, COLLATOR)
    parameters = list(student.parameters())
    return list(
        gradient_angles(student, parameters, teacher, store.signal, batches, tokens=tokens, temperature=store.temperature)
    )


def test_a_store_of_all_entries_has_no_angle(data: Path, tmp_path: Path) -> None:
    teacher, student = teacher_for(data), teacher_for(data, seed=4)
    method = TopKMethod(k=teacher.vocabulary.target, dtype="float32", temperature=2.0)
    store = stored(data, tmp_path / "logits", method, teacher=teacher)
    found = angles(student, teacher, store, open_dataset(data, "train"), [1, 100, 10**9])
    assert [angle.tokens for angle in found] == sorted(angle.tokens for angle in found)
    assert found[0].tokens > 1
    assert found[-1].tokens == store.manifest.job.tokens
    for angle in found:
        assert angle.degrees < 0.05
        assert angle.norm_ratio == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("method", [SampleMethod(draws=3), TopKMethod(k=4, dtype="float32", temperature=2.0)])
def test_angle_and_ratio_are_those_of_autograd(method: Method, data: Path, tmp_path: Path) -> None:
    """Losses written out: a tail is one more entry, whose probability is the sum of all entries that were not kept."""
    teacher, student = teacher_for(data, sharpness=3.0), teacher_for(data, seed=4)
    store = stored(data, tmp_path / "logits", method, teacher=teacher)
    dataset = open_dataset(data, "train")
    (found,) = angles(student, teacher, store, dataset, [1])
    batch = next(random_batches(dataset, 1000, COLLATOR))
    signal, temperature = store.signal(batch), store.temperature

    def log_probs(model: EncoderDecoder) -> Tensor:
        return F.log_softmax(model.project(target_hidden(model, batch)) / temperature, -1)

    whole = -(log_probs(teacher).exp().detach() * log_probs(student)).sum()
    own, kept = log_probs(student), torch.zeros(())
    for row, (ids, probs, tail) in enumerate(zip(signal.ids, signal.probs, signal.tail, strict=True)):
        there = [int(id_) for id_ in ids if id_ >= 0]
        kept = kept - (probs[: len(there)] * own[row, there]).sum()
        if tail > 0:
            kept = kept - tail * torch.log1p(-own[row, there].exp().sum())
    vectors = [torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(student.parameters()))]) for loss in (kept, whole)]
    cosine = F.cosine_similarity(vectors[0].double(), vectors[1].double(), dim=0)
    assert found.degrees == pytest.approx(math.degrees(math.acos(cosine)), rel=1e-3)
    assert found.norm_ratio == pytest.approx(float(vectors[0].norm() / vectors[1].norm()), rel=1e-4)


def test_random_batches_hold_every_row_once(data: Path) -> None:
    dataset = open_dataset(data, "train")
    batches = list(random_batches(dataset, 90, COLLATOR))
    rows = torch.cat([batch.examples.ids for batch in batches]).tolist()
    assert sorted(rows) == list(range(len(dataset)))
    assert rows != sorted(rows)
    for batch in batches:
        assert max(batch.target.tokens.numel(), batch.reading.tokens.numel()) <= 90 or len(batch.examples.ids) == 1


class ManyRows:
    """Half a million rows of one token."""

    source_lengths = target_lengths = np.ones(500_000, np.int32)

    def __len__(self) -> int:
        return len(self.target_lengths)

    def __getitem__(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([EOS]), np.array([EOS])


def test_the_first_batch_does_not_wait_for_the_order_of_all_rows() -> None:
    tracemalloc.start()
    next(random_batches(cast(Dataset, ManyRows()), 10, COLLATOR))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * len(ManyRows())


def briefly_trained(data: Path, steps: int) -> EncoderDecoder:
    """A teacher that has seen a few batches: it knows which entries are frequent, and little else."""
    dataset = open_dataset(data, "train")
    stack = {"depth": 1, "num_heads": 2, "ffn_dim": 64}
    parts = {"model_dim": 64, "encoder": stack, "decoder": stack, "dropout": 0.0, "embedding": {"kind": "plain", "tie": "all"}}
    config = EncoderDecoderConfig.model_validate(parts)
    model = build_model(config, teacher_for(data).vocabulary, seed=5)
    objective, optimizer = CrossEntropy(CrossEntropyConfig()), torch.optim.Adam(model.parameters(), lr=1e-3)
    plan = StepPlan(dataset.lengths, BatchingConfig(tokens_per_step=1000, max_tokens=1000), seed=1)
    with TrainLoader(dataset, plan, COLLATOR) as loader:
        for step, batches in islice(loader, steps):
            losses = [objective(model, batch).loss_sum for batch in batches]
            torch.stack(losses).sum().div(step.num_targets).backward()
            optimizer.step()
            optimizer.zero_grad()
    return model.eval()


@pytest.mark.slow
def test_the_angle_of_samples_falls_and_that_of_the_top_k_tokens_stays(tmp_path: Path) -> None:
    """A flat teacher of 600 entries, a fresh student, 1k, 4k and 16k tokens; the best 12 with and without the tail."""
    data = prepared(tmp_path / "data", num_pairs=2500, vocab_size=600)
    teacher, dataset = briefly_trained(data, 60), open_dataset(data, "train")
    student = build_model(teacher.config, teacher.vocabulary, seed=6).eval()
    tokens = [1024, 4096, 16384]

    def degrees(method: Method, *, renormalize: bool = False) -> list[float]:
        directory = tmp_path / f"{method.kind}{renormalize}"
        store = stored(data, directory, method, teacher=teacher, renormalize=renormalize)
        found = angles(student, teacher, store, dataset, tokens)
        print(method.kind, renormalize, [(a.tokens, round(a.degrees, 2), round(a.norm_ratio, 3)) for a in found])
        assert [angle.tokens // wanted for angle, wanted in zip(found, tokens, strict=True)] == [1, 1, 1]
        if method.kind == "sample":
            assert all(angle.norm_ratio == pytest.approx(1, abs=0.05) for angle in found)
        return [angle.degrees for angle in found]

    sampled, best, scaled = degrees(SampleMethod()), degrees(TopKMethod(k=12)), degrees(TopKMethod(k=12), renormalize=True)
    for before, after in pairwise(sampled):
        assert 1.5 < before / after < 2.7  # four times the tokens: half the angle
    for biased in (best, scaled):
        assert biased[2] > 0.7 * biased[0]
        assert sampled[2] <= biased[2] / 4
