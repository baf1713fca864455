"""Training over tensor and sequence groups: every variant and objective, on meshes of several shapes in one process group."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.adapters.config import LoraConfig
from dstrain.adapters.freeze import freeze
from dstrain.adapters.lora import inject
from dstrain.distillation.build import build_distillation
from dstrain.distillation.feature_plan import plan_features
from dstrain.distillation.signals import TeacherSignals
from dstrain.engine.config import AdamConfig, ConstantSchedule, EmaConfig, EngineConfig
from dstrain.engine.launch import load_deepspeed
from dstrain.engine.training_engine import TrainEngine
from dstrain.errors import TrainingError
from dstrain.models.config import ModelConfig
from dstrain.models.factory import build_model, initial_values
from dstrain.models.weights import TensorSource, to_canonical
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel import group as group_module
from dstrain.parallel.mesh import Mesh, build_mesh
from dstrain.recipe import ObjectiveConfig
from tests.batches import collate
from tests.parallel import on_policy
from tests.parallel.distilling import TEACHER, held, queues, share, teacher
from tests.parallel.setting import VOCABULARY, load, packed_on, padded, save, sentences
from tests.parallel.stored_signals import StoredSignals

Report = dict[str, Any]
STACK: Report = {"depth": 2, "num_heads": 4, "ffn_dim": 48}
PAIR: Report = {"kind": "encoder_decoder", "model_dim": 24, "encoder": STACK, "decoder": STACK, "dropout": 0.0}
GATED: Report = {"feed_forward": "gated"}
MODELS: dict[str, Report] = {
    "plain": {**PAIR, "norm_order": "pre", "embedding": {"kind": "plain", "tie": "all"}},
    "rotary": {
        "kind": "decoder_only",
        "model_dim": 32,
        "decoder": {**STACK, **GATED, "num_kv_heads": 2},
        "norm": {"kind": "rms_norm"},
        "position": {"kind": "rotary"},
        "embedding": {"kind": "plain", "tie": "decoder"},
        "dropout": 0.0,
    },
    "alibi": {
        **PAIR,
        "encoder": {**STACK, "unique_layers": 1},
        "decoder": {**STACK, "unique_layers": 1, "output_activation": "tanh"},
        "position": {"kind": "alibi"},
        "embedding": {"kind": "factorized", "tie": "all", "dim": 12, "activation": "gelu"},
    },
    "untied": {
        **PAIR,
        "decoder": {**STACK, "num_kv_heads": 2, "num_cross_kv_heads": 2},
        "position": {"kind": "learned"},
        "embedding": {"kind": "plain", "tie": "none", "output_dim": 16},
    },
}
DROPOUTS = ("dropout", "attention_dropout", "activation_dropout")
LORA: Report = {"rank": 3, "alpha": 6, "targets": ["*"]}


def _curve(*, steps: int = 20, parts: int = 2, **options: Any) -> Report:
    engine = _engine(**options)
    if options.get("objective", {}).get("on_policy"):
        reports = on_policy.train(engine.mesh, engine, 0, steps)
    else:
        reports = [asdict(engine.train_step(*_share(engine, step, parts))) for step in range(steps)]
    report = {"reports": reports, "queues": queues(engine), "validated": _validated(engine), **_outputs(engine)}
    signals = getattr(engine.module.objective, "signals", None)
    report["held"] = [held(one) for one in signals.teachers] if isinstance(signals, TeacherSignals) else []
    engine.close()
    return report


def _share(engine: TrainEngine, step: int, parts: int) -> Any:
    return share(step, engine.mesh, parts, kind=engine.module.model.kind, packed=packed_on(engine.mesh))


def _validated(engine: TrainEngine) -> list[float]:
    """Loss, targets and sentences."""
    batch = collate(sentences(99), kind=engine.module.model.kind, packed=packed_on(engine.mesh))
    output = engine.evaluate(batch)
    return engine.mesh.sequence.all_reduce_sums([float(output.loss_sum), *output.size])


def _outputs(engine: TrainEngine) -> Report:
    """The whole weights, and logits of the generation model."""
    weights = engine.mesh.world.broadcast_object(engine.gather_weights(averaged=False)) or {}
    source = padded([source for source, _ in sentences(5)[:3]], 1)
    with engine.generation_model(averaged=False) as model, torch.no_grad():
        state = model.start(source, num_sentences=3, rows_per_sentence=1, max_length=4)
        logits = torch.cat([model.step(torch.full((3, 1), token), state) for token in (7, 9)], 1)
    return {
        "weights": {name: [float(value.double().sum()), float(value.double().norm())] for name, value in sorted(weights.items())},
        "shapes": {name: list(value.shape) for name, value in sorted(weights.items())},
        "logits": logits.flatten().tolist(),
    }


@cache
def _mesh(tensor: int, sequence: int) -> Mesh:
    return build_mesh("cpu", tensor=tensor, sequence=sequence)


def _engine(
    *,
    tensor: int = 1,
    sequence: int = 1,
    model: str = "plain",
    deepspeed: str = "zero1",
    precision: str = "fp32",
    clip_norm: float = 0.0,
    kind: str = "adam",
    ema: bool = False,
    adapter: Report | None = None,
    objective: Report | None = None,
    teachers: Sequence[str] = (),
    store: Report | None = None,
    dropout: float = 0.0,
    checkpointing: Any = "none",
    tiles: int = 1,
) -> TrainEngine:
    """teachers: placement of each. store: the method by which the teacher's signal is kept. objective: its section. dropout:
    everywhere."""
    mesh = _mesh(tensor, sequence)
    config: Any = TypeAdapter(ModelConfig).validate_python({**MODELS[model], **dict.fromkeys(DROPOUTS, dropout)})
    engines = [teacher(mesh, seed=3 + number, placement=placement) for number, placement in enumerate(teachers)]
    projections = "fused" if adapter is None else "separate"
    built = build_model(config, VOCABULARY, projections=projections, seed=None, tensor=mesh.tensor, sequence=mesh.sequence)
    weights: Any = initial_values(build_model(config, VOCABULARY, seed=None), VOCABULARY, 1)
    if adapter is not None:
        settings = LoraConfig(**{**LORA, **adapter})
        base = {name: tensor.clone() for name, tensor in to_canonical(build_model(config, VOCABULARY, seed=1)).items()}
        weights = _Trained(inject(built, settings, TensorSource(base), seed=5))
        freeze(built, settings)
    return TrainEngine(
        TrainModule(built, *_objective(objective or {}, config, engines, store)),
        optimizer=AdamConfig(learning_rate=0.005, kind=kind, weight_decay=0.1),
        schedule=ConstantSchedule(warmup_steps=2),
        engine=EngineConfig(
            deepspeed=deepspeed,
            precision=precision,
            clip_norm=clip_norm,
            activation_checkpointing=checkpointing,
            feed_forward_tiles=tiles,
        ),
        ema=EmaConfig(decay=0.7) if ema else None,
        seed=7,
        mesh=mesh,
        weights=weights,
    )


class _Trained:
    """An adapter that is no longer fresh: its B is not zero, so that every tensor gets a gradient."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def names(self) -> Any:
        return self.source.names()

    def shape(self, name: str) -> Any:
        return self.source.shape(name)

    def read(self, name: str) -> Tensor:
        tensor = self.source.read(name)
        return tensor + 0.02 * torch.arange(tensor.numel()).sin().view_as(tensor) if name.endswith("lora_b") else tensor


def _objective(section: Report, config: Any, engines: list[Any], store: Report | None) -> tuple[Any, ...]:
    parsed: Any = TypeAdapter(ObjectiveConfig).validate_python({"kind": "cross_entropy", "chunk_tokens": 16, **section})
    if parsed.kind == "cross_entropy":
        return (build_cross_entropy(parsed),)
    plans = plan_features(parsed, config, [TEACHER] * len(engines))
    signals = TeacherSignals(engines) if store is None else StoredSignals(*engines, store, VOCABULARY.target)
    return build_distillation(parsed, signals, features=plans, seed=5), CrossEntropy(CrossEntropyConfig())


def tensor_runs(mesh: Mesh, *, cases: list[Report], leg: Report | None, shards: str) -> Report:
    """The reports of all cases, and those of a leg of a longer curve; see `_leg`."""
    load_deepspeed(mesh)
    return {"cases": [_curve(**case) for case in cases], "leg": _leg(Path(shards), **leg) if leg else {}}


def _leg(shards: Path, *, first: int, last: int, **options: Any) -> Report:
    """Steps [first, last), from the checkpoint in `shards` on unless they are the first, and saved there."""
    engine = _engine(**options)
    if first:
        load(engine, shards)
    losses = [engine.train_step(*_share(engine, step, 4)).loss for step in range(first, last)]
    save(engine, shards)
    layout = engine.layout
    engine.close()
    return {"losses": losses, "layout": layout}


def tensor_collectives(mesh: Mesh, *, tensor: int) -> dict[str, list[int]]:
    """All-reduces of forward and backward of one micro-batch by model, without those of DeepSpeed."""
    load_deepspeed(mesh)
    return {model: [*_collectives(model, tensor)] for model in ("plain", "rotary")}


def sequence_collectives(mesh: Mesh, *, sequence: int) -> dict[str, list[int]]:
    """All-to-alls of forward and backward of one micro-batch by model; there must be no other collective."""
    load_deepspeed(mesh)
    return {model: [*_collectives(model, sequence=sequence)] for model in ("plain", "rotary")}


def _collectives(model: str, tensor: int = 1, sequence: int = 1) -> Iterator[int]:
    engine = _engine(model=model, tensor=tensor, sequence=sequence, deepspeed="zero0")
    module, group = engine.module, engine.mesh.sequence
    batch = collate(sentences(0), kind=module.model.kind, packed=packed_on(engine.mesh)).share(group.rank, group.size)
    calls, names = [0], ("all_reduce", "all_to_all_single")
    before = {name: getattr(group_module.dist, name) for name in names}

    def counted(function: Any, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        return function(*arguments, **options)

    for name in names:
        setattr(group_module.dist, name, partial(counted, before[name]))
    try:
        loss = module.train().objective(module.model, batch).loss_sum
        yield calls[0]
        loss.backward()
        yield calls[0]
    finally:
        for name in names:
            setattr(group_module.dist, name, before[name])


def tensor_faults(mesh: Mesh, *, tensor: int, stages: list[str]) -> list[Report]:
    """A step in which one tensor rank only has a gradient that is not finite."""
    load_deepspeed(mesh)
    return [_fault(stage, tensor) for stage in stages]


def _fault(stage: str, tensor: int) -> Report:
    engine = _engine(deepspeed=stage, tensor=tensor)
    engine.train_step(*_share(engine, 0, 4))
    before = engine.gather_weights(averaged=False)
    last = engine.mesh.tensor.rank == engine.mesh.tensor.size - 1
    norm = engine.module.model.encoder.layers[0].feed_forward.up_proj
    norm.register_full_backward_hook(lambda module, inputs, outputs: tuple(grad * float("nan" if last else 1) for grad in inputs))
    error = ""
    try:
        engine.train_step(*_share(engine, 1, 4))
    except TrainingError as caught:
        error = str(caught)
    after = engine.gather_weights(averaged=False)
    same = before is None or after is None or all(torch.equal(before[name], after[name]) for name in before)
    report = {"error": error, "step": engine.step, "unchanged": same}
    engine.close()
    return report
