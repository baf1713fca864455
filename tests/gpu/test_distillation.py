"""Distillation on a GPU: the CPU's values and gradients, little memory, no waiting for the device in a step or a dump."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.objective import Distillation
from dstrain.distillation.signals import SignalSource, TeacherSignals
from dstrain.distillation.store.codec import TokenKeys, build_codec
from dstrain.distillation.store.dump import select_in_chunks
from dstrain.distillation.store.manifest import DenseMethod, Method, SampleMethod, TopKMethod, merge_store
from dstrain.distillation.store.store import open_store
from dstrain.ops.device_time import seconds_between, timestamp
from dstrain.ops.teacher_signal import DenseSignal, SparseSignal
from dstrain.ops.token_loss.distillation import linear_distillation, reference_linear_distillation
from tests.unit.distillation.test_stored_distillation import AtWork
from tests.unit.distillation.toy_store import batch_of, dump, dumper, prepared, stored, teacher_for
from tests.unit.ops.test_token_distillation import dense, draws, outcome, probabilities, student, terms, top_k_signal

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]
GPU = torch.device("cuda")
METHODS = [SampleMethod(), TopKMethod(k=5), DenseMethod()]


@pytest.fixture(autouse=True)
def syncs_are_allowed_again() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared") / "data")


def on(device: torch.device, thing: Any) -> Any:
    """Tensors and signals on a device, leaves with their wish for a gradient."""
    if isinstance(thing, Tensor):
        return thing.detach().to(device).requires_grad_(thing.requires_grad)
    if isinstance(thing, SparseSignal):
        return replace(thing, **{name: on(device, value) for name, value in vars(thing).items() if isinstance(value, Tensor)})
    return DenseSignal([on(device, each) for each in thing.features], [on(device, each) for each in thing.weights])


def signals(kind: str, dtype: torch.dtype) -> DenseSignal | SparseSignal:
    """Of 123 tokens and 77 entries."""
    whole = dense(123, 77, dtype, teachers=2)
    match kind:
        case "dense":
            return whole
        case "sample":
            return replace(draws(probabilities(whole), 12), with_tail=False)
        case _:
            return top_k_signal(probabilities(whole), 12, tail=True)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("kind", ["dense", "sample", "topk"])
def test_values_and_gradients_equal_the_cpus(kind: str, dtype: torch.dtype, tolerance: float, temperature: float) -> None:
    everything = (*student(123, 16, 77, dtype), signals(kind, dtype))
    expected, found = (
        outcome(linear_distillation, *(on(device, thing) for thing in everything), terms=terms(temperature=temperature))
        for device in (torch.device("cpu"), GPU)
    )
    torch.testing.assert_close([value.cpu() for value in found], expected, rtol=tolerance, atol=tolerance)


def step_memory(function: Any, everything: tuple[Any, ...]) -> int:
    """Bytes that a loss with its gradients takes at most, beyond its inputs."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    outcome(function, *everything, terms=terms(temperature=2.0), chunk_tokens=256)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_chunks_take_less_than_a_sixth_of_all_logits() -> None:
    """4,096 tokens of 131,072 entries: a matrix of them has 2 GiB."""
    if torch.cuda.get_device_properties(GPU).total_memory < 60 << 30:
        pytest.skip("all logits at once need a GPU of 60 GiB")
    generator = torch.Generator(GPU).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=GPU) / 16

    features, weight = normal(4096, 256).requires_grad_(), normal(131_072, 256).requires_grad_()
    labels = torch.randint(131_072, (4096,), generator=generator, device=GPU)
    everything = (features, weight, labels, DenseSignal([normal(4096, 256)], [normal(131_072, 256)]))
    chunked, naive = (step_memory(function, everything) for function in (linear_distillation, reference_linear_distillation))
    print(f"chunked {chunked / 2**30:.2f} GiB, naive {naive / 2**30:.2f} GiB")
    assert chunked < 0.15 * naive


@pytest.mark.parametrize("method", [None, *METHODS], ids=str)
def test_a_step_never_waits(method: Method | None, data: Path, tmp_path: Path) -> None:
    """None: an online teacher."""
    teacher, model = teacher_for(data), teacher_for(data, seed=4).train().to(GPU)
    store = None if method is None else stored(data, tmp_path / "logits", method, teacher=teacher)
    source: SignalSource = store or TeacherSignals([AtWork(teacher.to(GPU))])
    objective, batch = Distillation(DistillationConfig(), source), batch_of(open_dataset(data, "train"), [59, 3, 17, 0])
    for mode in ("default", "error"):  # libraries start in the first step
        torch.cuda.set_sync_debug_mode(mode)
        objective(model, batch.to(GPU)).loss_sum.backward()
    torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_choosing_what_is_kept_never_waits(method: Method) -> None:
    features, weight, _ = (on(GPU, tensor.detach()) for tensor in student(123, 16, 77, torch.float32))
    codec, keys = build_codec(method, 77), TokenKeys(np.arange(123), np.arange(123))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        kept = select_in_chunks(features, weight, codec=codec, keys=keys, temperature=2.0, size=50)
    torch.cuda.set_sync_debug_mode("default")
    assert codec.is_whole([part.cpu().numpy() for part in kept]).all()
    features[7, 3] = torch.nan
    kept = select_in_chunks(features, weight, codec=codec, keys=keys, temperature=2.0, size=50)
    assert (~codec.is_whole([part.cpu().numpy() for part in kept])).nonzero()[0].tolist() == [7]


def test_a_dump_equals_the_cpus(data: Path, tmp_path: Path) -> None:
    teacher, dataset = teacher_for(data), open_dataset(data, "train")
    method = TopKMethod(k=teacher.vocabulary.target, dtype="float32")
    expected = stored(data, tmp_path / "cpu", method, teacher=teacher).signal(batch_of(dataset, range(len(dataset))))
    work = replace(dumper(data, tmp_path / "gpu", method, teacher=teacher.to(GPU)), device=str(GPU))
    report = dump(work)
    assert 0 < report.teacher_seconds <= report.seconds
    merge_store(tmp_path / "gpu", "a test")
    found = open_store(tmp_path / "gpu", data=data, manifest=load_manifest(data)).signal(batch_of(dataset, range(len(dataset))))
    rows = [torch.zeros_like(signal.probs).scatter_(1, signal.ids, signal.probs) for signal in (found, expected)]
    torch.testing.assert_close(*rows, rtol=1e-4, atol=1e-6)


def test_a_gpus_work_is_timed_and_not_its_launch() -> None:
    begin, start = timestamp(GPU), time.perf_counter()
    torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second at 2 GHz
    end, launched = timestamp(GPU), time.perf_counter() - start
    assert seconds_between(begin, end) > max(0.03, 2 * launched)
