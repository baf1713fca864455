"""Speed and memory of training and generation on one GPU, at real sizes; on a CPU at toy sizes, to see that it runs.

    python tools/bench_gpu.py [--rows NAME ...] [--steps 10] [--minutes 9] [--peak 989] [--json]

Each row runs in a process of its own: random pairs of full length, bf16, the engine with `zero1` and AdamW, packed sequences. It
prints target tokens a second, model FLOPs as a share of the GPU's peak (`estimate/flops.py`: no recomputation, no teachers;
--peak: TFLOP/s, that of an H200 in bf16 without sparsity), and the highest allocated memory. `plain` runs each op by the kernel
that fits everywhere, `kernels` by those that a recipe has to ask for, too. Rows for which no time is left are named.

translation: 32 tokens a side, 32,768 entries. lm: 2,048 tokens, 50,304 entries. kd: the student is `big`, the teacher `deep`.
random_shapes: lengths of 1 to 32 tokens; memory that torch reserved beside the tensors' at their highest, over all steps.
transformers: the same shape, data and optimizer under its own model, without DeepSpeed; only if it is installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from gpu_shapes import EOS, PAD, SHAPES, UNK, Shape, collator_of, library_model, random_batch, random_ids, uneven_batch

from dstrain.batch import Batch
from dstrain.config_base import Precision
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import PlannedStep
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.objective import Distillation
from dstrain.distillation.on_policy import OwnSamples
from dstrain.distillation.signals import SignalRequest, SignalSource, TeacherSignals
from dstrain.distillation.store.store import moved
from dstrain.engine.config import AdamConfig, ConstantSchedule, EngineConfig
from dstrain.engine.construction import size_of
from dstrain.engine.teacher_engine import TeacherEngine
from dstrain.engine.training_engine import TrainEngine
from dstrain.estimate.flops import flops
from dstrain.estimate.workload import ParallelLayout, Sharding, Workload
from dstrain.generation.config import BeamSearchConfig
from dstrain.generation.constraints import SpecialIds
from dstrain.generation.generator import Generator
from dstrain.models.config import LengthLimits
from dstrain.models.factory import Model, build_model
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig, OnPolicyConfig
from dstrain.objectives.objective import Objective
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.kernels import OPS
from dstrain.ops.teacher_signal import SparseSignal
from dstrain.parallel.mesh import Mesh, build_mesh

KEPT_ENTRIES = 12


class RandomStore:
    """Implements `SignalSource`: entries as a store would read them, made once, copied to the device for each batch."""

    def __init__(self, shape: Shape) -> None:
        count = shape.rows * shape.length
        ids = torch.randint(shape.vocab_size - KEPT_ENTRIES, (count, 1)) + torch.arange(KEPT_ENTRIES)
        self._signal = SparseSignal(ids, torch.full((count, KEPT_ENTRIES), 0.9 / KEPT_ENTRIES), torch.full((count,), 0.1))

    def require(self, request: SignalRequest) -> None:
        """Gives anything."""

    @contextmanager
    def open(self, batch: Batch, capture: object = None) -> Iterator[SparseSignal]:
        """The first entries, whatever the batch."""
        yield moved(self._signal[: batch.num_targets], batch.targets.labels.device)  # type: ignore[misc]

    def close(self) -> None:
        """Nothing is open."""


@dataclass(frozen=True)
class Bench:
    """How rows are measured. mesh: of one rank."""

    mesh: Mesh
    steps: int
    peak: float

    @property
    def precision(self) -> Precision:
        """Of the model's computation."""
        return "bf16" if self.on_gpu else "fp32"

    @property
    def on_gpu(self) -> bool:
        """Whether there is one."""
        return self.mesh.device.type == "cuda"

    def model(self, shape: Shape) -> Model:
        """With random weights, drawn where it computes."""
        model = build_model(shape.model, shape.sizes, seed=None).to_empty(device=self.mesh.device)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        return model

    def engine(self, shape: Shape, objective: Objective | None = None) -> TrainEngine:
        """Of plain training unless an objective is given."""
        chosen = objective or build_cross_entropy(CrossEntropyConfig(label_smoothing=0.1))
        return TrainEngine(
            TrainModule(self.model(shape), chosen),
            optimizer=AdamConfig(learning_rate=1e-4, weight_decay=0.1),
            schedule=ConstantSchedule(),
            engine=EngineConfig(precision=self.precision, clip_norm=1.0),
            ema=None,
            seed=1,
            mesh=self.mesh,
        )

    def teachers(self, shape: Shape) -> TeacherSignals:
        """One, whole."""
        engine = TeacherEngine(self.model(shape), placement="replicated", precision=self.precision, mesh=self.mesh)
        return TeacherSignals([engine])

    def timed(self, step: Callable[[int], int]) -> dict[str, float]:
        """Tokens a second over `steps` calls after three, and the memory. step: number of the call -> its target tokens."""
        for number in range(3):
            step(number)
        self._wait()
        begin = time.perf_counter()
        tokens = sum(step(3 + number) for number in range(self.steps))
        self._wait()
        seconds = time.perf_counter() - begin
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"tokens_per_second": tokens / seconds, "gib": peak / 2**30}

    def utilization(self, shape: Shape, found: dict[str, float]) -> dict[str, float]:
        """With the share of the GPU's peak that the model's own products take; of a CPU no peak is known."""
        if not self.on_gpu:
            return found
        per_second = model_flops(shape, self.precision) * found["tokens_per_second"] / (shape.rows * shape.length)
        return {**found, "mfu": per_second / (self.peak * 1e12)}

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


def model_flops(shape: Shape, precision: Precision) -> float:
    """Of a training step of one micro-batch."""
    joint, config = shape.model.kind == "decoder_only", EngineConfig(precision=precision)
    workload = Workload(
        model=shape.model,
        vocabulary=shape.sizes,
        precision=precision,
        loss="cross_entropy",
        chunk_tokens=1024,
        tokens_per_step=shape.tokens,
        source_length=1 if joint else shape.length,
        target_length=shape.length,
    )
    size = size_of(build_model(shape.model, shape.sizes, seed=None))
    sharding = Sharding.of(config, replicas=1, size=size)
    layout = ParallelLayout(1, 1, 1, max_tokens=shape.rows * shape.length, checkpointing="none", sharding=sharding)
    return flops(workload, layout).model


def kernels(*, on: bool, device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Inside, each op by the kernel that a recipe has to ask for, if there is one that runs here; or by the plain one."""
    stack = ExitStack()
    for op in OPS.values():
        asked = [each.name for each in op.kernels if each.on_request and op.problem(each.name, device.type, dtype) is None]
        plain = [each.name for each in op.kernels if each.device_type is None and not each.on_request]
        if names := (asked if on else plain[-1:]):
            stack.enter_context(op.forced(names[0]))
    return stack


def train(bench: Bench, shape: Shape, *, on: bool) -> dict[str, float]:
    """Plain training."""
    with kernels(on=on, device=bench.mesh.device, dtype=torch.bfloat16 if bench.on_gpu else torch.float32):
        return bench.utilization(shape, trained(bench, shape, bench.engine(shape), collator_of(shape)))


def trained(bench: Bench, shape: Shape, engine: TrainEngine, collator: Collator) -> dict[str, float]:
    """An engine on eight batches in turns, which are made before."""
    batches = [random_batch(shape, collator, seed) for seed in range(8)]
    if bench.on_gpu:
        batches = [batch.pinned() for batch in batches]

    def step(number: int) -> int:
        batch = batches[number % len(batches)]
        return engine.train_step([batch], batch.size).num_targets

    try:
        return bench.timed(step)
    finally:
        engine.close()


def random_shapes(bench: Bench, shape: Shape) -> dict[str, float]:
    """Plain training on packed pairs of uneven lengths. reserved_share: of memory that torch took, beside what tensors had."""
    engine, collator = bench.engine(shape), collator_of(shape)

    def step(number: int) -> int:
        batch = uneven_batch(shape, collator, number)
        return engine.train_step([batch.pinned() if bench.on_gpu else batch], batch.size).num_targets

    try:
        found = bench.timed(step)
    finally:
        engine.close()
    if not bench.on_gpu:
        return found
    return {**found, "reserved_share": torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated()}


def distilled(bench: Bench, shape: Shape, teacher: Shape, *, way: str) -> dict[str, float]:
    """With a teacher beside the student, or with stored entries."""
    signals: SignalSource = RandomStore(shape) if way == "stored" else bench.teachers(teacher)
    engine = bench.engine(shape, Distillation(DistillationConfig(), signals))
    return bench.utilization(shape, trained(bench, shape, engine, collator_of(shape, teacher=teacher)))


def distilled_on_policy(bench: Bench, shape: Shape, teacher: Shape) -> dict[str, float]:
    """Every step on the student's own samples; a random student ends none before its limit, the length of the data."""
    config = DistillationConfig(on_policy=OnPolicyConfig(fraction=0.5, max_length_ratio=0, max_length_offset=shape.length))
    engine, collator = bench.engine(shape, Distillation(config, bench.teachers(teacher))), collator_of(shape, teacher=teacher)
    assert config.on_policy is not None
    own = OwnSamples(
        config=config.on_policy,
        student=partial(engine.generation_model, averaged=False),
        ranks=bench.mesh.data,
        sequence=bench.mesh.sequence,
        ids=SpecialIds(PAD, EOS, UNK),
        max_length=shape.length + 1,
        collator=collator,
        max_tokens=2 * shape.tokens,
        seed=1,
        device=bench.mesh.device,
        beat=lambda _doing: None,
    )

    def step(number: int) -> int:
        planned = PlannedStep(1, number, np.arange(shape.rows), shape.tokens, last_of_epoch=False)
        planned, batches = own(planned, [random_batch(shape, collator, number)])
        return engine.train_step(batches, planned.size).num_targets

    try:
        return bench.timed(step)
    finally:
        engine.close()


def generated(bench: Bench, shape: Shape) -> dict[str, float]:
    """Beam search, beam 5, as many tokens as the source has."""
    model = bench.model(shape).to(torch.bfloat16 if bench.on_gpu else torch.float32).eval()
    count = shape.length - 1
    config = BeamSearchConfig(min_length=count, max_length_ratio=0, max_length_offset=count, max_tokens=5 * shape.tokens)
    limits = LengthLimits(2 * shape.length, 2 * shape.length, joint=False)
    generator = Generator(model, config=config, ids=SpecialIds(PAD, EOS, UNK), limits=limits, device=bench.mesh.device)

    def step(number: int) -> int:
        sources = [row.tolist() for row in random_ids(shape, shape.rows, number)]
        return sum(len(best.tokens) for best, *_ in generator.translate_ids(sources))

    return bench.timed(step)


def transformers(bench: Bench, shape: Shape) -> dict[str, float]:
    """A model of the library of the same shape, in its usual loop: autocast, fused AdamW, padded rows."""
    model = library_model(shape).to(bench.mesh.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def step(number: int) -> int:
        sides = [np.stack(random_ids(shape, shape.rows, 2 * number + side)) for side in (0, 1)]
        targets, sources = (torch.from_numpy(side).to(bench.mesh.device) for side in sides)
        inputs = targets if shape.model.kind == "decoder_only" else sources
        with torch.autocast(bench.mesh.device.type, dtype=torch.bfloat16, enabled=bench.on_gpu):
            loss = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return targets.numel()

    return bench.utilization(shape, bench.timed(step))


Row = Callable[[Bench, Callable[[str], Shape]], dict[str, float]]
"""Measured by a bench on shapes by name."""


def rows() -> dict[str, Row]:
    """All of them, the most important first."""
    found: dict[str, Row] = {}
    for name in SHAPES:
        found[f"{name}_kernels"] = lambda bench, shape, name=name: train(bench, shape(name), on=True)  # type: ignore[misc]
        found[f"{name}_plain"] = lambda bench, shape, name=name: train(bench, shape(name), on=False)  # type: ignore[misc]
    for way in ("online", "stored"):
        found[f"kd_{way}"] = lambda bench, shape, way=way: distilled(  # type: ignore[misc]
            bench, shape("big_32k"), shape("deep_16k"), way=way
        )
    found["random_shapes"] = lambda bench, shape: random_shapes(bench, shape("big_4k"))
    found["kd_on_policy"] = lambda bench, shape: distilled_on_policy(bench, shape("big_4k"), shape("deep_16k"))
    found["generation"] = lambda bench, shape: generated(bench, shape("big_4k"))
    if find_spec("transformers") is not None:
        found["transformers_big_32k"] = lambda bench, shape: transformers(bench, shape("big_32k"))
        found["transformers_lm_125m"] = lambda bench, shape: transformers(bench, shape("lm_125m"))
    return found


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    """One row, here."""
    bench = Bench(build_mesh("auto"), args.steps, args.peak)
    return rows()[name](bench, lambda shape: SHAPES[shape] if bench.on_gpu else SHAPES[shape].toy)


def shown(name: str, found: dict[str, float]) -> str:
    """A row for people."""
    mfu = f"{found['mfu']:7.1%}" if "mfu" in found else " " * 7
    reserved = f"  reserved {found['reserved_share']:.3f} x" if "reserved_share" in found else ""
    return f"{name:22} {found['tokens_per_second']:12,.0f} tokens/s {mfu} {found['gib']:8.2f} GiB{reserved}"


def main() -> int:
    """Print a row after another, each measured in its process on a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=rows(), default=list(rows()), metavar="NAME", help=", ".join(rows()))
    parser.add_argument("--steps", type=int, default=10, help="measured steps, after three")
    parser.add_argument("--minutes", type=float, default=9.0, help="no row starts later")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of the GPU")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each row")
    args = parser.parse_args()
    end, failed, left_out = time.monotonic() + 60 * args.minutes, 0, []
    alone = len(args.rows) == 1 or not torch.cuda.is_available()  # toy sizes need no memory of their own
    for name in args.rows:
        if time.monotonic() > end:
            left_out.append(name)
            continue
        found = measure(name, args) if alone else measured_apart(name, args)
        failed += found is None
        if found is not None:
            print(json.dumps({"row": name, **found}) if args.json else shown(name, found), flush=True)
    if left_out:
        print(f"no time was left for {', '.join(left_out)}: raise --minutes, or name them by --rows", file=sys.stderr)
    return int(failed > 0 or bool(left_out))


def measured_apart(name: str, args: argparse.Namespace) -> dict[str, float] | None:
    """One row in another process; None, and the end of its messages, if it fails."""
    command = [
        sys.executable,
        str(Path(__file__)),
        "--rows",
        name,
        "--steps",
        str(args.steps),
        "--peak",
        str(args.peak),
        "--json",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        print(f"{name:22} failed: {run.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
        return None
    found: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    return {key: value for key, value in found.items() if key != "row"}


if __name__ == "__main__":
    raise SystemExit(main())
