"""What engines hold and send, beside their estimates: bytes of states, and of all collectives of a step."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.data.batching.collate import PackedSize
from dstrain.engine.config import AdamConfig, ConstantSchedule, EmaConfig, EngineConfig, ParallelConfig
from dstrain.engine.ds_config import find_ds_config
from dstrain.engine.launch import load_deepspeed
from dstrain.engine.training_engine import TrainEngine
from dstrain.estimate.parameters import ParameterSizes
from dstrain.estimate.states import states
from dstrain.estimate.traffic import traffic
from dstrain.estimate.workload import ParallelLayout, Sharding, Workload
from dstrain.models.config import ModelConfig
from dstrain.models.factory import build_model, initial_values
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.cross_entropy import CrossEntropy
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel import group as group_module
from dstrain.parallel.mesh import Mesh, build_mesh
from tests.batches import collate
from tests.parallel.setting import EOS, VOCABULARY, size_of
from tests.parallel.tensor_parallel import MODELS

Report = dict[str, Any]
ROWS, LENGTH, CHUNK, MICRO_BATCHES = 6, 10, 16, 2


def holdings(mesh: Mesh, *, files: str, cases: list[Report]) -> list[Report]:
    """For each case what is measured and what is estimated."""
    load_deepspeed(mesh)
    return [_case(Path(files) / f"{number}_{mesh.world.rank}.json", **case) for number, case in enumerate(cases)]


def _case(
    file: Path,
    *,
    deepspeed: str,
    precision: Any,
    tensor: int,
    model: str,
    sequence: int = 1,
    checkpointing: Any = "none",
    ema: bool = False,
    zero: Any = None,
) -> Report:
    """Micro-batches of equal sentences. Of two steps the second is measured: the first one makes the optimizer's moments.

    Stage 3 keeps no parameter whole, so that it gathers all of them.
    """
    content = json.loads(find_ds_config(deepspeed).read_text())
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    content["zero_optimization"] |= zero or {}
    file.write_text(json.dumps({**content, "comms_logger": {"enabled": True}}))
    parallel = ParallelConfig(tensor=tensor, sequence=sequence)
    settings = EngineConfig(deepspeed=str(file), precision=precision, activation_checkpointing=checkpointing, parallel=parallel)
    mesh = build_mesh("cpu", tensor=tensor, sequence=sequence)
    config: Any = TypeAdapter(ModelConfig).validate_python({**MODELS[model], "dropout": 0.1})
    built = build_model(config, VOCABULARY, seed=None, tensor=mesh.tensor, sequence=mesh.sequence)
    sizes = ParameterSizes.of(built)
    engine = TrainEngine(
        TrainModule(built, CrossEntropy(CrossEntropyConfig(chunk_tokens=CHUNK))),
        optimizer=AdamConfig(learning_rate=0.005, weight_decay=0.1),
        schedule=ConstantSchedule(),
        engine=settings,
        ema=EmaConfig(decay=0.9) if ema else None,
        seed=7,
        mesh=mesh,
        weights=initial_values(build_model(config, VOCABULARY, seed=None), VOCABULARY, 1),
    )
    measured = _measured(engine)
    length = LENGTH if config.kind == "encoder_decoder" else 2 * LENGTH - 1
    workload = Workload(
        model=config,
        vocabulary=VOCABULARY,
        precision=precision,
        loss="cross_entropy",
        chunk_tokens=CHUNK,
        tokens_per_step=MICRO_BATCHES * ROWS * LENGTH * mesh.data.size,
        source_length=LENGTH,
        target_length=LENGTH,
        ema=ema,
        decay_groups=True,
    )
    sharding = Sharding.of(settings, replicas=mesh.replicas.size, size=sizes.model_size)
    layout = ParallelLayout(mesh.world.size, tensor, sequence, ROWS * length, checkpointing, sharding, "cpu", packed=sequence > 1)
    held = states(workload, layout, sizes)
    estimated = {name: getattr(held, name) for name in ("parameters", "gradients", "optimizer", "ema")}
    for transfer in traffic(workload, layout, sizes):
        key = transfer.group if transfer.group in ("tensor", "sequence") else transfer.operation
        estimated[key] = estimated.get(key, 0) + transfer.bytes
    return {"measured": measured, "estimated": estimated}


def _measured(engine: TrainEngine) -> Report:
    """Bytes held after the first micro-batch of the second step, and bytes of the step's collectives by operation."""
    sentence = [*range(4, 3 + LENGTH), EOS]
    shared = engine.mesh.sequence.size
    packed = PackedSize(shared) if shared > 1 else None
    batch = collate([(sentence, sentence)] * ROWS, kind=engine.module.model.kind, packed=packed)
    batches = [batch] * MICRO_BATCHES
    size = size_of(batches * engine.mesh.data.size)
    engine.train_step(batches, size)
    logged = deepspeed.comm.comm.comms_logger.comms_dict
    logged.clear()
    report: Report = {}
    backward, all_reduce, all_to_all = engine._engine.backward, group_module.dist.all_reduce, group_module.dist.all_to_all_single

    def observed_backward(*arguments: Any, **options: Any) -> None:
        backward(*arguments, **options)
        if "parameters" not in report:
            report.update(_held(engine))

    def counted_all_reduce(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if options.get("group") is engine.mesh.tensor.process_group:
            report["tensor"] = report.get("tensor", 0) + tensor.nbytes
        return all_reduce(tensor, *arguments, **options)

    def counted_all_to_all(received: Tensor, tensor: Tensor, **options: Any) -> Any:
        report["sequence"] = report.get("sequence", 0) + tensor.nbytes
        return all_to_all(received, tensor, **options)

    engine._engine.backward, group_module.dist.all_reduce = observed_backward, counted_all_reduce
    group_module.dist.all_to_all_single = counted_all_to_all
    try:
        engine.train_step(batches, size)
    finally:
        group_module.dist.all_reduce, group_module.dist.all_to_all_single = all_reduce, all_to_all
    for operation, entries in logged.items():
        # the log has what a rank gives: of a gathered tensor its own part
        ranks = engine.mesh.replicas.size if operation.startswith("all_gather") else 1
        name = operation.removesuffix("_into_tensor").removesuffix("_tensor")
        report[name] = sum(ranks * bytes_ * entry[0] for bytes_, entry in entries.items())
    engine._comms_logger = deepspeed.comm.comm.comms_logger.enabled = False
    engine.close()
    return report


def _held(engine: TrainEngine) -> Report:
    optimizer, parameters = engine._engine.optimizer, list(engine._trained.values())
    masters = engine._masters.tensors
    moments = [each for state in engine._engine.basic_optimizer.state.values() for key, each in state.items() if key != "step"]
    whole = [gradient for each in parameters for gradient in (each.grad, getattr(each, "grad_accum", None))]
    match engine.stage:
        case 0 | 1:
            gradients = whole
        case 2:
            gradients = [*optimizer.averaged_gradients.values()]  # in bf16; in fp32 they are views of reduction buckets
        case 3:
            gradients = [optimizer.grad_partitions_flat_buffer]
    return {
        "parameters": _bytes(each.ds_tensor if engine.stage == 3 else each.data for each in parameters),
        "gradients": _bytes(gradients),
        "optimizer": _bytes([*([] if engine.stage == 0 else masters), *moments]),
        "ema": _bytes(engine._average.tensors) if engine._average else 0,
    }


def _bytes(tensors: Iterable[Any]) -> int:
    """Of distinct storages, in lists of lists."""
    storages = {}
    for each in tensors:
        if isinstance(each, Tensor):
            storages[each.untyped_storage().data_ptr()] = each.untyped_storage().nbytes()
        elif each is not None:
            storages[id(each)] = _bytes(each)
    return sum(storages.values())
