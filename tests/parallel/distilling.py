"""What the ranks do with teachers; each scenario returns JSON, which the tests assert in the parent."""

import gc
import hashlib
import math
import resource
import weakref
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.batch import Batch, Size
from dstrain.checkpoint.reader import open_checkpoint
from dstrain.distillation.build import build_distillation
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.signals import TeacherSignals
from dstrain.engine.launch import load_deepspeed
from dstrain.engine.teacher_engine import TeacherEngine
from dstrain.engine.training_engine import TrainEngine
from dstrain.model_output import ActivationCapture, Tap
from dstrain.models.config import (
    DecoderStackConfig,
    EncoderDecoderConfig,
    FactorizedEmbedding,
    PlainEmbedding,
    StackConfig,
    VocabularySizes,
)
from dstrain.models.factory import Model, build_model, initial_values
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.objectives.cross_entropy import CrossEntropy, target_hidden
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.group import Group
from dstrain.parallel.mesh import Mesh
from dstrain.recipe import ObjectiveConfig
from tests.batches import collate
from tests.parallel.setting import TIED, VOCABULARY, build_engine, build_module, load, num_targets, save, sentences

Report = dict[str, Any]


def teacher_model(config: EncoderDecoderConfig, *, seed: int = 3, sequence: Group | None = None) -> Model:
    """Of another width and depth than the student; some of its matrices exceed ZeRO-3's threshold for sharing out."""
    model = build_model(config, VOCABULARY, seed=seed, sequence=sequence)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    return model


def teacher(
    mesh: Mesh, *, seed: int = 3, placement: str = "replicated", precision: str = "fp32", factorized: bool = False
) -> TeacherEngine:
    """Such an online teacher."""
    model = teacher_model(FACTORIZED_TEACHER if factorized else TEACHER, seed=seed, sequence=mesh.sequence)
    return TeacherEngine(model, placement=placement, precision=precision, mesh=mesh)


def config_of(*, dim: int, ffn_dim: int, depths: tuple[int, int]) -> EncoderDecoderConfig:
    return EncoderDecoderConfig(
        model_dim=dim,
        encoder=StackConfig(depth=depths[0], num_heads=4, ffn_dim=ffn_dim),
        decoder=DecoderStackConfig(depth=depths[1], num_heads=4, ffn_dim=ffn_dim),
        embedding=PlainEmbedding(tie="all"),
    )


TEACHER = config_of(dim=72, ffn_dim=160, depths=(3, 2))
FACTORIZED_TEACHER = TEACHER.model_copy(update={"embedding": FactorizedEmbedding(tie="all", dim=288)})
PROJECTED = TEACHER.model_copy(update={"embedding": PlainEmbedding(tie="all", output_dim=72)})
FACTORIZED = FactorizedEmbedding(tie="all", dim=12, activation="gelu")
"""Of the student; the teacher's is wide enough for both factors to be shared out."""
INSIDE = (Tap("hidden_states", "encoder", 2), Tap("attention", "decoder", 1), Tap("attention", "cross", 2))


def seen(engine: TeacherEngine, batch: Batch) -> list[Tensor]:
    """Copies of features and weight, and of what stands inside."""
    capture = ActivationCapture(INSIDE)
    with engine.open(batch, capture) as (features, weight):
        return [features.clone(), weight.clone(), *(capture.captured[tap] for tap in INSIDE)]


def placements(mesh: Mesh) -> Report:
    """What teachers show, by placement and precision, and how many numbers a rank holds of each; each rank has other batches."""
    found: Report = {}
    for precision in ("fp32", "bf16"):
        for placement in ("replicated", "sharded", "offloaded"):
            source = OneAtATime(to_canonical(teacher_model(PROJECTED)))
            empty = build_model(PROJECTED, VOCABULARY, seed=None)
            engine = TeacherEngine(empty, placement=placement, precision=precision, mesh=mesh, weights=source)
            captured = [seen(engine, collate(sentences(10 * mesh.world.rank + step))) for step in range(3)]
            found[f"{placement} {precision}"] = {
                "digest": digest([value for pair in captured for value in pair]),
                "held": held(engine),
                "again": all(map(torch.equal, seen(engine, collate(sentences(10 * mesh.world.rank))), captured[0])),
                "dtype": str(captured[0][0].dtype),
                "training": next(engine._forward.children()).training,
            }
            engine.close()
    return found


class OneAtATime(TensorSource):
    """Tensors of which a reader may hold one: the next is given when the last has been freed."""

    def read(self, name: str) -> torch.Tensor:
        """A copy of the tensor."""
        last = vars(self).get("last", lambda: None)
        assert last() is None, f"{name} is read while another tensor is held"
        tensor = super().read(name).clone()
        vars(self)["last"] = weakref.ref(tensor)
        return tensor


def held(engine: TeacherEngine) -> int:
    """Parameters in this rank's memory between two forwards."""
    parameters = engine._forward.parameters()
    return sum(p.ds_tensor.numel() if hasattr(p, "ds_tensor") and p.numel() == 0 else p.numel() for p in parameters)


def held_by_teachers(engine: TrainEngine) -> list[str]:
    """A digest of what this rank holds of each teacher's parameters, and of what the teacher shows. Collective."""
    teachers = engine.module.objective.signals.teachers
    held = [[getattr(p, "ds_tensor", p.data) for p in one._forward.parameters()] for one in teachers]
    return [digest([*own, *seen(one, collate(sentences(98)))]) for own, one in zip(held, teachers, strict=True)]


def naively_distilled(steps: int, *, temperature: float, hard_weight: float) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a bare loop: all logits at once, reverse KL written out, torch's Adam, a whole teacher."""
    student, teacher = build_module(embedding=FACTORIZED).model, teacher_model(FACTORIZED_TEACHER).eval()
    adam = torch.optim.Adam(student.parameters(), betas=(0.9, 0.98))
    losses, norms = [], []
    for step in range(steps):
        batch = collate(sentences(step))
        logits = student.project(target_hidden(student, batch))
        with torch.no_grad():
            teacher_log_probs = teacher.project(target_hidden(teacher, batch)).div(temperature).log_softmax(1)
        student_log_probs = (logits / temperature).log_softmax(1)
        kd = temperature**2 * (student_log_probs.exp() * (student_log_probs - teacher_log_probs)).sum()
        hard = torch.nn.functional.cross_entropy(logits, batch.targets.labels, reduction="sum")
        loss = (hard_weight * hard + (1 - hard_weight) * kd) / batch.num_targets
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in student.parameters() if p.grad is not None])))
        losses.append(loss.item())
        adam.param_groups[0]["lr"] = 0.005 * min(step / 4, 1)
        adam.step()
    return losses, norms


def digest(tensors: list[Tensor]) -> str:
    """SHA-256 of all bytes."""
    return hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for tensor in tensors)).hexdigest()


def student(
    mesh: Mesh,
    *,
    placement: str = "replicated",
    teachers: int = 1,
    dropout: float = 0.0,
    factorized: bool = False,
    **options: Any,
) -> TrainEngine:
    """An engine that distils; options: objective (its section), and those of `setting.build_engine`."""
    section = {"kind": "distillation", "chunk_tokens": 16, **options.pop("objective", {})}
    config = TypeAdapter(ObjectiveConfig).validate_python(section)
    engines = [teacher(mesh, seed=3 + number, placement=placement, factorized=factorized) for number in range(teachers)]
    model = build_module(dropout, FACTORIZED if factorized else TIED).model
    plans = plan_features(config, model.config, [TEACHER] * teachers)
    objective = build_distillation(config, TeacherSignals(engines), features=plans, seed=5)
    module = TrainModule(model, objective, CrossEntropy(config.validation))
    return build_engine(mesh, module, **options)


def distilled(mesh: Mesh, *, runs: list[Report]) -> list[Report]:
    """Reports, queue and weights of each run; a run is its options, with `steps` and `parts`."""
    return [_distilled(mesh, **run) for run in runs]


def _distilled(mesh: Mesh, *, steps: int, parts: int, **options: Any) -> Report:
    engine = student(mesh, **options)
    initial, distilled_by = held_weights(mesh, engine)["projections"], held_by_teachers(engine)
    reports = [asdict(engine.train_step(*share(step, mesh, parts))) for step in range(steps)]
    validated = float(engine.evaluate(collate(sentences(99))).loss_sum)
    found = {
        "reports": reports,
        "queues": queues(engine),
        "validated": validated,
        "initial": initial,
        "teachers": [distilled_by, held_by_teachers(engine)],
        **held_weights(mesh, engine),
    }
    engine.close()
    return found


def share(step: int, mesh: Mesh, parts: int, **options: Any) -> tuple[list[Batch], Size]:
    """This rank's micro-batches, with the number of each sentence in the data set. options: of `collate`."""
    pairs = sentences(step)
    numbers = list(range(parts))[mesh.data.rank :: mesh.data.size]
    ids = range(100 * step, 100 * step + len(pairs))
    batches = [collate(pairs[part::parts], ids=ids[part::parts], **options) for part in numbers]
    return batches, Size(num_targets(pairs), len(pairs))


def held_weights(mesh: Mesh, engine: TrainEngine) -> Report:
    """What a bundle would hold, and the projections that the objective learns, whole."""
    weights = engine.gather_weights(averaged=False) or {}
    own = dict(engine.module.objective.named_parameters())
    projections = {name: engine._masters.full(parameter).flatten().tolist() for name, parameter in own.items()}
    return {"bundle": mesh.world.broadcast_object(sorted(weights)), "projections": projections}


def queues(engine: TrainEngine) -> dict[str, list[float]]:
    """What the objective carries from step to step."""
    selection = engine.module.objective.selection
    state = {} if selection is None else selection.state()
    return {name.removeprefix("queue."): queue.tolist() for name, queue in state.items()}


def resumed_student(mesh: Mesh, *, shards: str, deepspeed: str, placement: str, features: Sequence[Report] = ()) -> Report:
    """Four steps at once, and two steps saved and continued by another engine; dropout is on."""
    options = {
        "deepspeed": deepspeed,
        "placement": placement,
        "dropout": 0.3,
        "objective": {"selection": {"kind": "global", "rate": 0.5, "queue_size": 150}, "features": features},
    }
    straight, writer = student(mesh, **options), student(mesh, **options)
    expected = [asdict(straight.train_step(*share(step, mesh, 4))) for step in range(4)]
    found = [asdict(writer.train_step(*share(step, mesh, 4))) for step in range(2)]
    writer.evaluate(collate(sentences(99)))
    stored = open_checkpoint(save(writer, Path(shards)))
    continued = student(mesh, **options)
    load(continued, Path(shards))
    found += [asdict(continued.train_step(*share(step, mesh, 4))) for step in range(2, 4)]
    return {
        "expected": expected,
        "found": found,
        "queues": [queues(straight), queues(continued)],
        "saved_numbers": sum(math.prod(entry.shape) for name, entry in stored.tensors.items() if name.startswith("master/")),
        "student_numbers": sum(parameter.numel() for parameter in build_module().parameters()),
        "held": [held_weights(mesh, engine) for engine in (straight, continued)],
    }


def resident(mesh: Mesh, *, placement: str, dim: int, depth: int) -> Report:
    """Resident memory of this rank in MiB: before a teacher of some size, the highest while it is built, with it, the highest."""
    load_deepspeed(mesh)  # every training process has it
    import_module("torch._dynamo")  # by which ZeRO-3 marks its functions: 200 MiB that are no teacher's
    before = resident_mib()
    sizes = VocabularySizes(source=16000, target=16000)
    model = build_model(config_of(dim=dim, ffn_dim=4 * dim, depths=(depth, depth)), sizes, seed=None)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    weights = initial_values(model, sizes, 1)
    engine = TeacherEngine(model, placement=placement, precision="fp32", mesh=mesh, weights=weights)
    built = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    for step in range(2):
        seen(engine, collate(sentences(step)))
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"before": before, "built": built, "with": resident_mib(), "peak": peak, "model": numbers * 4 / 2**20}


def resident_mib() -> float:
    """Resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024
