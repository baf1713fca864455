"""What the ranks do; each scenario returns JSON, which the tests assert in the parent.

A scenario does many things in one process group, because each start of DeepSpeed costs seconds.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.batch import Batch, Metrics, Size
from dstrain.checkpoint.manifest import read_manifest, write_manifest
from dstrain.engine.config import ScheduleConfig
from dstrain.engine.launch import load_deepspeed
from dstrain.engine.teacher_engine import TeacherEngine
from dstrain.engine.training_engine import TrainEngine
from dstrain.errors import CheckpointError, TrainingError
from dstrain.models.config import PlainEmbedding
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.weights import TensorSource, load_canonical, to_canonical
from dstrain.objectives.objective import LossOutput
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh
from tests.batches import collate
from tests.parallel.adapting import adapted_curves, adapted_resume, other_base  # noqa: F401
from tests.parallel.agreement import disagreements  # noqa: F401
from tests.parallel.compiling import compiled_layers  # noqa: F401
from tests.parallel.distilling import distilled, placements, resident, resumed_student  # noqa: F401
from tests.parallel.elastic import legs  # noqa: F401
from tests.parallel.estimating import holdings  # noqa: F401
from tests.parallel.meshes import collectives, meshes  # noqa: F401
from tests.parallel.on_policy import on_policy  # noqa: F401
from tests.parallel.reading import readings  # noqa: F401
from tests.parallel.setting import EOS, build_engine, build_module, load, num_targets, padded, save, sentences, share
from tests.parallel.tensor_parallel import sequence_collectives, tensor_collectives, tensor_faults, tensor_runs  # noqa: F401
from tests.parallel.trace import repeat
from tests.parallel.variants import variant_curves  # noqa: F401

Report = dict[str, Any]


def curves(mesh: Mesh, *, runs: list[dict[str, Any]]) -> list[list[Report]]:
    """The reports of each run; a run is its options, with `steps` and `parts`."""
    return [curve(mesh, **run) for run in runs]


def curve(mesh: Mesh, *, steps: int, parts: int, **options: Any) -> list[Report]:
    """The reports of one run from the first step on. options: those of `build_engine`; dropout, objective (a dict)."""
    engine = build_engine(mesh, build_module(options.pop("dropout", 0.1), **options.pop("objective", {})), **options)
    reports = [asdict(engine.train_step(*share(step, mesh, parts))) for step in range(steps)]
    engine.close()
    return reports


def resumed(
    mesh: Mesh, *, shards: str, deepspeed: str, reader: str | None = None, kind: str = "adamw", half: int = 3, **options: Any
) -> Report:
    """Twice `half` steps at once, and `half` steps saved and continued by another engine; dropout and averaging are on."""
    options |= {"ema": {"decay": 0.7}, "optimizer": {"kind": kind, "weight_decay": 0.1}}
    engines = [build_engine(mesh, build_module(dropout=0.3), deepspeed=name, **options) for name in (deepspeed, deepspeed)]
    straight, writer = engines
    expected = [asdict(straight.train_step(*share(step, mesh, 4))) for step in range(2 * half)]
    found = [asdict(writer.train_step(*share(step, mesh, 4))) for step in range(half)]
    save(writer, Path(shards))
    continued = build_engine(mesh, build_module(dropout=0.3), deepspeed=reader or deepspeed, **options)
    load(continued, Path(shards))
    found += [asdict(continued.train_step(*share(step, mesh, 4))) for step in range(half, 2 * half)]
    return {
        "expected": expected,
        "found": found,
        "expected_weights": [digest(straight.gather_weights(averaged=averaged)) for averaged in (False, True)],
        "found_weights": [digest(continued.gather_weights(averaged=averaged)) for averaged in (False, True)],
    }


def fp16_refusal(mesh: Mesh) -> str:
    """What is said where the processor cannot compute in fp16."""
    pretend_fp16(mesh, False)
    return error_of(partial(build_engine, mesh, build_module(), precision="fp16"))


def fp16_curve(mesh: Mesh, **run: Any) -> list[Report]:
    """A curve in fp16 on any processor: torch computes it anyway, DeepSpeed asks for fast instructions first."""
    pretend_fp16(mesh, True)
    return curve(mesh, precision="fp16", **run)


def masters_at_start(mesh: Mesh, *, deepspeed: str) -> bool:
    """Whether a bf16 engine starts from the very weights of the model, on rank 0."""
    module = build_module()
    expected = digest(to_canonical(module.model))
    return digest(build_engine(mesh, module, deepspeed=deepspeed, precision="bf16").gather_weights(averaged=False)) in (
        expected,
        None,
    )


def pretend_fp16(mesh: Mesh, able: bool) -> None:
    """Let DeepSpeed believe that the processor can or cannot compute in fp16."""
    load_deepspeed(mesh).accelerator.get_accelerator().is_fp16_supported = lambda: able


def refused(mesh: Mesh, *, shards: str) -> dict[str, str]:
    """What engines of other settings say about a checkpoint of ZeRO-1; nothing if they take it."""
    directory = Path(shards)
    writer = build_engine(mesh, build_module(), deepspeed="zero1")
    path = save(writer, directory)

    def answer(module: TrainModule, **options: Any) -> str:
        return error_of(partial(load, build_engine(mesh, module, deepspeed="zero1", **options), directory))

    said = {
        "itself": answer(build_module()),
        "average": answer(build_module(), ema={"decay": 0.9}),
        "untied": answer(build_module(embedding=PlainEmbedding(tie="none"))),
    }
    manifest = read_manifest(path)

    def scalars(**changes: Any) -> str:
        if mesh.world.rank == 0:
            write_manifest(path, manifest.model_copy(update={"scalars": {**manifest.scalars, **changes}}))
        mesh.world.barrier()
        return error_of(partial(load, writer, directory))

    said |= {
        "step below 0": scalars(optimizer_step=-1),
        "step as text": scalars(step="3"),
        "no scaler": scalars(loss_scaler=None),
        "a scale of 0": scalars(loss_scaler={"cur_scale": 0}),
    }
    shard = path / "rank_00001.safetensors"
    if mesh.world.rank == 1:
        shard.write_bytes(shard.read_bytes()[:1000])
    mesh.world.barrier()
    return {**said, "damaged": error_of(partial(load, writer, directory))}


def error_of(action: Callable[[], object]) -> str:
    """The message of the error that the action raises."""
    try:
        action()
    except (CheckpointError, TrainingError) as error:
        return str(error)
    return ""


def views(mesh: Mesh, *, deepspeed: str) -> Report:
    """The weights as others see them, against a plain loop and a plain model."""
    engine = build_engine(mesh, build_module(dropout=0.3), deepspeed=deepspeed, ema={"decay": 0.8, "start_step": 2})
    average: dict[str, Tensor] = {}
    for step in range(4):
        engine.train_step(*share(step, mesh, 4))
        now = whole(mesh, engine, averaged=False)
        updates = step + 1 - 2
        keep = min(0.8, (1 + updates) / (10 + updates)) if updates > 0 else 0.0
        average = {name: keep * average.get(name, value) + (1 - keep) * value for name, value in now.items()}
    kept = whole(mesh, engine, averaged=True)
    batch = collate(sentences(99))
    result = {
        "average_error": max(float((kept[name] - average[name]).abs().max()) for name in average),
        "moved": max(float((kept[name] - now[name]).abs().max()) for name in now),
        "names": sorted(now) == sorted(to_canonical(build_module().model)),
        "loss": float(engine.evaluate(batch).loss_sum),
        "plain_loss": plain_loss(now, batch),
        "plain_average_loss": plain_loss(kept, batch),
        "generation_error": generation_error(mesh, engine, now, averaged=False),
        "average_generation_error": generation_error(mesh, engine, kept, averaged=True),
        "training": engine.module.training,
    }
    with engine.averaged_weights():
        result["average_loss"] = float(engine.evaluate(batch).loss_sum)
    result["loss_afterwards"] = float(engine.evaluate(batch).loss_sum)
    result["unchanged"] = digest(now) == digest(whole(mesh, engine, averaged=False))
    return result


def whole(mesh: Mesh, engine: TrainEngine, *, averaged: bool) -> dict[str, Tensor]:
    """The engine's weights on every rank."""
    weights = mesh.world.broadcast_object(engine.gather_weights(averaged=averaged))
    assert weights is not None
    return weights


def plain_loss(weights: dict[str, Tensor], batch: Batch) -> float:
    """The loss sum of a plain model with these weights."""
    module = build_module().eval()
    load_canonical(module.model, TensorSource(weights))
    with torch.no_grad():
        return float(module(batch).loss_sum)


def generation_error(mesh: Mesh, engine: TrainEngine, weights: dict[str, Tensor], *, averaged: bool) -> float:
    """Largest difference of logits to a plain model; every rank takes another number of decoder steps."""
    plain = build_module().eval().model
    load_canonical(plain, TensorSource(weights))
    with engine.generation_model(averaged=averaged) as model:
        found, expected = (decode(candidate, steps=1 + 2 * mesh.world.rank) for candidate in (model, plain))
    return float((found - expected).abs().max())


@torch.no_grad()
def decode(model: EncoderDecoder, *, steps: int) -> Tensor:
    """Logits of feeding EOS and then always the same token."""
    source = padded([source for source, _ in sentences(5)[:3]], 1)
    state = model.start(source, num_sentences=3, rows_per_sentence=1, max_length=8)
    inputs = [EOS] + [7] * (steps - 1)
    return torch.cat([model.step(torch.full((3, 1), token), state) for token in inputs], dim=1)


class Poison(torch.autograd.Function):
    """The identity, with a gradient that is not a number."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * math.nan


class Faulty(TrainModule):
    """A module whose loss or gradient becomes not a number when it is told so."""

    fault = ""

    def forward(self, batch: Batch, compute: Any = None) -> LossOutput:
        output: LossOutput = super().forward(batch, compute)
        if self.fault == "gradient":
            return output._replace(loss_sum=Poison.apply(output.loss_sum))
        return output._replace(loss_sum=output.loss_sum * math.nan) if self.fault == "loss" else output


def guarded(mesh: Mesh, *, deepspeed: str, precision: str, fault: str) -> Report:
    """One good step, then one with a fault on the last rank only."""
    plain = build_module()
    module = Faulty(plain.model, plain.objective)
    engine = build_engine(mesh, module, deepspeed=deepspeed, precision=precision)
    engine.train_step(*share(0, mesh, 4))
    before = digest(engine.gather_weights(averaged=False))
    module.fault = fault if mesh.world.rank == mesh.world.size - 1 else ""
    error = error_of(partial(engine.train_step, *share(1, mesh, 4)))
    return {"error": error, "step": engine.step, "unchanged": before == digest(engine.gather_weights(averaged=False))}


def empty_micro_batches(mesh: Mesh, *, deepspeed: str) -> Report:
    """Two steps with and without micro-batches that hold nothing."""
    lean, padded_out = (build_engine(mesh, build_module(), deepspeed=deepspeed) for _ in range(2))
    reports: dict[str, list[Report]] = {"without": [], "with": []}
    for step in range(2):
        batches, targets = share(step, mesh, 4)
        reports["without"].append(asdict(lean.train_step(batches, targets)))
        reports["with"].append(asdict(padded_out.train_step([batches[0], collate([]), *batches[1:], collate([])], targets)))
    same = digest(lean.gather_weights(averaged=False)) == digest(padded_out.gather_weights(averaged=False))
    return {**reports, "same_weights": same}


class Renaming(TrainModule):
    """Each micro-batch reports under a name that depends on it, so that ranks report different names in one step."""

    def forward(self, batch: Batch, compute: Any = None) -> Any:
        output = super().forward(batch, compute)
        return output._replace(
            metrics=Metrics.over(batch.num_targets, {f"nll_{batch.num_targets % 3}": output.metrics.sums["nll"]})
        )


def mixed_names(mesh: Mesh, *, deepspeed: str) -> Report:
    """Metrics of a step whose micro-batches report different names, by the engine and by a loop over all micro-batches."""
    plain = build_module()
    engine = build_engine(mesh, Renaming(plain.model, plain.objective), deepspeed=deepspeed)
    report = engine.train_step(*share(0, mesh, 4))
    fresh, pairs = build_module(), sentences(0)
    renaming = Renaming(fresh.model, fresh.objective)
    expected = Metrics[float]()
    for part in range(4):
        metrics = renaming(collate(pairs[part::4])).metrics
        expected = expected + Metrics({name: float(value) for name, value in metrics.sums.items()}, metrics.counts)
    return {"found": asdict(report.metrics), "expected": asdict(expected)}


def repeated(mesh: Mesh, *, files: list[str], precision: str, times: int = 64) -> list[list[float]]:
    """For each DeepSpeed file the gradient's norm of one micro-batch, and of it so many times over."""
    (batch,), size = share(0, mesh, 1)
    norms = []
    for file in files:
        engines = [build_engine(mesh, build_module(), deepspeed=file, precision=precision) for _ in range(2)]
        many = Size(times * size.num_targets, times * size.num_sentences)
        norms.append([engines[0].train_step([batch], size).grad_norm, engines[1].train_step([batch] * times, many).grad_norm])
    return norms


def gradient_dtypes(mesh: Mesh, *, files: list[str]) -> dict[str, list[str]]:
    """In which dtypes a bf16 engine takes gradients, for each DeepSpeed file."""
    found = {}
    for file in files:
        module = build_module()
        build_engine(mesh, module, deepspeed=file, precision="bf16")
        found[Path(file).stem] = sorted({str(parameter.grad_dtype) for parameter in module.parameters()})
    return found


def linear_map(mesh: Mesh) -> bool:
    """Whether torch's linear map is its own with a partitioned model and a sharded teacher, and afterwards."""
    before = torch.nn.functional.linear
    teacher = TeacherEngine(build_module().model, placement="sharded", precision="fp32", mesh=mesh)
    engine = build_engine(mesh, build_module(), deepspeed="zero3")
    beside = torch.nn.functional.linear
    engine.close()
    teacher.close()
    return before is beside is torch.nn.functional.linear


def against_torch(mesh: Mesh, *, deepspeed: str) -> Report:
    """Five steps of decoupled weight decay with clipping, by the engine and by a bare loop of torch's AdamW."""
    optimizer = {"kind": "adamw", "weight_decay": 0.5, "learning_rate": 0.01, "eps": 1e-4}
    engine = build_engine(mesh, build_module(), deepspeed=deepspeed, clip_norm=1.2, optimizer=optimizer)
    module = build_module()
    matrices = [parameter for parameter in module.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in module.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.5}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-4)
    norms: list[list[float]] = []
    for step in range(5):
        pairs = sentences(step)
        for group in plain.param_groups:
            group["lr"] = 0.01 * min(step / 4, 1)
        (module(collate(pairs)).loss_sum / num_targets(pairs)).backward()
        norm = float(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.2))
        plain.step()
        plain.zero_grad()
        norms.append([engine.train_step(*share(step, mesh, 4)).grad_norm, norm])
    found, expected = whole(mesh, engine, averaged=False), to_canonical(module.model)
    return {"norms": norms, "error": max(float((found[name] - expected[name]).abs().max()) for name in expected)}


class Jumping(TrainModule):
    """A module whose loss is multiplied by a factor that may change from step to step."""

    factor = 1.0

    def forward(self, batch: Batch, compute: Any = None) -> LossOutput:
        output: LossOutput = super().forward(batch, compute)
        return output._replace(loss_sum=output.loss_sum * self.factor)


def stable_adamw(mesh: Mesh, *, deepspeed: str) -> Report:
    """Seven steps whose gradients jump twice, by the engine and by loops over single tensors with and without update clipping."""
    optimizer = {"kind": "stable_adamw", "weight_decay": 0.3, "learning_rate": 0.01, "eps": 1e-4}
    plain, unclipped, trained = (Jumping(module.model, module.objective) for module in (build_module() for _ in range(3)))
    engine = build_engine(mesh, trained, deepspeed=deepspeed, optimizer=optimizer)
    states: dict[Any, list[Tensor]] = {}
    norms, ratios = [], []
    for step in range(7):
        rate, batch = 0.01 * min(step / 4, 1), collate(sentences(step))
        for module in (plain, unclipped, trained):
            module.factor = {3: 20.0, 5: 100.0}.get(step, 1.0)
        for module in (plain, unclipped):
            (module(batch).loss_sum / batch.num_targets).backward()
        norm = float(torch.nn.utils.get_total_norm([parameter.grad for parameter in plain.parameters()]))
        ratios += [stable_update(parameter, states, step + 1, rate, clip=True) for parameter in plain.parameters()]
        for parameter in unclipped.parameters():
            stable_update(parameter, states, step + 1, rate, clip=False)
        norms.append([engine.train_step(*share(step, mesh, 2 * mesh.world.size)).grad_norm, norm])
    found = whole(mesh, engine, averaged=False)
    errors = [
        max(float((found[name] - expected[name]).abs().max()) for name in found)
        for expected in (to_canonical(plain.model), to_canonical(unclipped.model))
    ]
    return {"norms": norms, "error": errors[0], "error_without_clipping": errors[1], "largest": max(ratios)}


@torch.no_grad()
def stable_update(parameter: Any, states: dict[Any, list[Tensor]], step: int, rate: float, *, clip: bool) -> float:
    """One update of one tensor with Adam's own bias correction; returns the RMS."""
    mean, square = states.setdefault(parameter, [torch.zeros_like(parameter), torch.zeros_like(parameter)])
    mean.copy_(0.9 * mean + 0.1 * parameter.grad)
    square.copy_(0.98 * square + 0.02 * parameter.grad**2)
    direction, variance = mean / (1 - 0.9**step), square / (1 - 0.98**step)
    ratio = float((parameter.grad**2 / variance.clamp(min=1e-8)).mean().sqrt())
    rate = rate / max(1.0, ratio) if clip else rate
    if parameter.ndim > 1:
        parameter.mul_(1 - rate * 0.3)
    parameter.sub_(rate * direction / (variance.sqrt() + 1e-4))
    parameter.grad = None
    return ratio


def digest(weights: dict[str, Tensor] | None) -> str | None:
    """SHA-256 of all bytes, in order of names."""
    if weights is None:
        return None
    return hashlib.sha256(b"".join(weights[name].numpy().tobytes() for name in sorted(weights))).hexdigest()


def several(mesh: Mesh, *, scenarios: dict[str, list[Any]]) -> dict[str, Any]:
    """Many scenarios in one process group: key -> name and arguments of each."""
    return {key: globals()[name](mesh, **arguments) for key, (name, arguments) in scenarios.items()}


def traces(mesh: Mesh, *, golden: str, runs: dict[str, dict[str, Any]], deepspeed: str) -> dict[str, Any]:
    """The predecessor's recorded runs, repeated; a run is its schedule and what else differs."""
    found = {}
    for name, run in runs.items():
        schedule = TypeAdapter(ScheduleConfig).validate_python(run["schedule"])
        found[name] = repeat(mesh, Path(golden), deepspeed=deepspeed, **{**run, "schedule": schedule})
    return found
