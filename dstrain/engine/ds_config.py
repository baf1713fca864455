"""DeepSpeed's JSON: found by name, checked to the last key, and filled one way from the recipe.

Torch-free, so that a login node can check it. See ds_schema.py for the keys of a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from dstrain.config_base import Precision
from dstrain.engine.config import EngineConfig
from dstrain.engine.ds_schema import BELONGS_ELSEWHERE, DeepSpeedFile, OffloadSection, ZeroSection
from dstrain.errors import RecipeError, nearest
from dstrain.storage.explain import EXPECTED, shown
from dstrain.storage.parsing import read_tree

PACKAGE = Path(__file__).parent.parent
DIRECTORIES = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")
"""Where shipped files lie: inside an installed package, or beside it in a checkout."""
MODEL_PARTS = 16
"""A limit of ZeRO that is "auto" is this part of the model, but at least its largest layer and at most DeepSpeed's default."""
LARGE_GROUP = 8
"""Ranks up to which gradients in bf16 are summed in bf16."""
_DEFAULT_LIMITS = {
    "reduce_bucket_size": 500_000_000,
    "sub_group_size": 1_000_000_000,
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
_LIMITS_OF_GRADIENTS = ("reduce_bucket_size", "sub_group_size")


class ModelSize(NamedTuple):
    """Numbers of a model, of the module that holds most of them itself, which ZeRO-3 gathers at once, and of what is trained.

    trained: less than `parameters` beside frozen ones, such as those under an adapter; None for all.
    """

    parameters: int
    largest_layer: int
    trained: int | None = None


def read_ds_config(engine: EngineConfig, *, replicas: int | None = None) -> DeepSpeedFile:
    """The file that `engine.deepspeed` names, checked. replicas: of the parameters, None if not known yet.

    Raises RecipeError with every mistake of the file: file, dotted path, value, remedy.
    """
    path = find_ds_config(engine.deepspeed)
    content = _read(path)
    mistakes = _mistakes(content) or _disagreements(DeepSpeedFile.model_validate(content), engine, replicas)
    if mistakes:
        raise RecipeError("\n".join(f"{path}: {mistake}" for mistake in mistakes))
    return DeepSpeedFile.model_validate(content)


def resolve_ds_config(engine: EngineConfig, *, replicas: int, size: ModelSize) -> dict[str, Any]:
    """The dictionary that `deepspeed.initialize` gets for a model, without any "auto". Raises RecipeError as `read_ds_config`."""
    file = read_ds_config(engine, replicas=replicas)
    resolved = file.model_dump(mode="json", exclude_unset=True)
    resolved |= _gradient_types(file, engine, replicas)
    resolved["zero_optimization"] |= _limits(file.zero_optimization, size)
    resolved |= {
        "train_batch_size": replicas,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": engine.clip_norm,
        "bf16": {**resolved.get("bf16", {}), "enabled": engine.precision == "bf16", "check_grad_overflow": True},
        "fp16": {**resolved.get("fp16", {}), "enabled": engine.precision == "fp16"},
        # Else DeepSpeed replaces torch's linear map for the whole process; ops/linear.py keeps no gathered weight anyway.
        "zero_optimization": {**resolved["zero_optimization"], "memory_efficient_linear": False},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},
    }
    return resolved


def resolve_reader_config(precision: Precision, *, ranks: int, size: ModelSize, offload: OffloadSection | None) -> dict[str, Any]:
    """The same for a model that is partitioned over `ranks` and only read, such as a teacher: ZeRO-3 without an optimizer."""
    zero = ZeroSection(stage=3, stage3_param_persistence_threshold=10_000, stage3_max_reuse_distance=0, offload_param=offload)
    section = zero.model_dump(mode="json", exclude_unset=True, exclude_none=True) | _limits(zero, size)
    return {
        "train_batch_size": ranks,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": precision == "bf16"},
        "fp16": {"enabled": precision == "fp16"},
        "zero_optimization": {**section, "memory_efficient_linear": False},
        "timers": {"throughput": {"enabled": False}},
    }


def _gradient_types(file: DeepSpeedFile, engine: EngineConfig, replicas: int) -> dict[str, Any]:
    """In which types gradients add up: in bf16 training fp32 over micro-batches, and over ranks where rounding would tell.

    Stage 1 reduces the sum of a whole step, which is in fp32 already; stages 2 and 3 reduce every micro-batch. A
    sequence rank has the gradients of a part of each sentence.
    """
    if engine.precision != "bf16":
        return {}
    accumulation = "fp32" if file.data_types is None else file.data_types.grad_accum_dtype
    exact = (
        replicas > LARGE_GROUP or engine.parallel.sequence > 1 or (file.zero_optimization.stage == 1 and accumulation == "fp32")
    )
    communication = file.communication_data_type or ("fp32" if exact else "bf16")
    return {"data_types": {"grad_accum_dtype": accumulation}, "communication_data_type": communication}


def _limits(zero: ZeroSection, size: ModelSize) -> dict[str, int]:
    """The values of limits that are "auto"."""
    limits = {}
    for name, most in _DEFAULT_LIMITS.items():
        if getattr(zero, name) == "auto":
            layers = 2 if name == "stage3_max_live_parameters" else 1  # the one at work and those that are gathered ahead
            limits[name] = max(layers * size.largest_layer, min(most, layers * size.parameters // MODEL_PARTS))
            if size.trained is not None and name in _LIMITS_OF_GRADIENTS:
                limits[name] = min(limits[name], size.trained)
    return limits


def find_ds_config(name_or_path: str) -> Path:
    """The file of a shipped name (`zero1`) or a path. Raises RecipeError with the nearest name."""
    if "/" in name_or_path or name_or_path.endswith(".json"):
        path = Path(name_or_path)
        if not path.is_file():
            shipped = path.stem if path.stem in _names() else f"one of {', '.join(_names())}"
            raise RecipeError(f"engine.deepspeed: no file {path}; give a path to a DeepSpeed JSON file, or {shipped}")
        return path
    for directory in DIRECTORIES:
        if (directory / f"{name_or_path}.json").is_file():
            return directory / f"{name_or_path}.json"
    raise RecipeError(f"engine.deepspeed: no DeepSpeed configuration {name_or_path!r}; {nearest(name_or_path, _names())}")


def _names() -> list[str]:
    return sorted({path.stem for directory in DIRECTORIES for path in directory.glob("*.json")})


def _read(path: Path) -> Any:
    try:
        return read_tree(path)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: not a readable JSON file: {error}; fix the file") from error


def _mistakes(content: Any) -> list[str]:
    """The mistakes against the schema, one line each."""
    if not isinstance(content, dict):
        return ["the file holds no JSON object; see ds_configs/zero1.json"]
    try:
        DeepSpeedFile.model_validate(content)
    except ValidationError as error:
        grouped: dict[tuple[str, ...], list[Any]] = {}
        for detail in error.errors(include_url=False):
            grouped.setdefault(_path_of(content, detail["loc"]), []).append(detail)
        return [_explain(path, details) for path, details in grouped.items()]
    return []


def _path_of(content: Any, location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The part of pydantic's location that is a path of the file, without the names of a union's members."""
    path: list[str] = []
    for key in location:
        if isinstance(content, dict):
            path.append(str(key))
            content = content.get(key)
    return tuple(path)


def _explain(path: tuple[str, ...], details: list[Any]) -> str:
    """One line for the mistake at `path`; several details are the members of a union."""
    where = ".".join(path)
    match details[0]["type"]:
        case "extra_forbidden" if where in BELONGS_ELSEWHERE:
            return f"{where}: not taken from this file; {BELONGS_ELSEWHERE[where]}"
        case "extra_forbidden":
            return f"{where}: unknown key; {nearest(path[-1], _section(path[:-1]).model_fields)}"
        case "missing":
            return f"{where}: missing; give it a value"
    messages = " or ".join(EXPECTED.get(detail["type"], detail["msg"].removeprefix("Input should be ")) for detail in details)
    return f"{where}: should be {messages}, not {shown(details[0]['input'])}"


def _section(path: tuple[str, ...]) -> type[BaseModel]:
    """The model of the section at `path`."""
    model: type[BaseModel] = DeepSpeedFile
    for key in path:
        annotation = model.model_fields[key].annotation
        members = getattr(annotation, "__args__", (annotation,))
        model = next(member for member in members if isinstance(member, type) and issubclass(member, BaseModel))
    return model


def _disagreements(file: DeepSpeedFile, engine: EngineConfig, replicas: int | None) -> list[str]:
    """Literals that contradict the recipe, and combinations that cannot train right."""
    zero, precision = file.zero_optimization, engine.precision
    mistakes = [
        f'{name} = {getattr(file, name)}: micro-batches are made of tokens; write "auto" and set batching.max_tokens'
        for name in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
        if getattr(file, name) not in ("auto", 1)
    ]
    if file.gradient_clipping not in ("auto", engine.clip_norm):
        clip = file.gradient_clipping
        mistakes.append(f'gradient_clipping = {clip}, but the recipe has engine.clip_norm = {engine.clip_norm}; write "auto"')
    for name, section in (("bf16", file.bf16), ("fp16", file.fp16)):
        if section.enabled not in ("auto", precision == name):
            value = str(section.enabled).lower()
            mistakes.append(f'{name}.enabled = {value}, but the recipe has engine.precision = {precision}; write "auto"')
    if zero.stage == 0 and precision != "fp32":
        mistakes.append(
            f"zero_optimization.stage = 0 cannot train in {precision}: DeepSpeed's unpartitioned 16-bit optimizer counts a "
            "step too many, which bends the loss curve; use zero1, which needs less memory too"
        )
    if zero.stage == 0 and zero.offload_optimizer is not None:
        mistakes.append("zero_optimization.offload_optimizer: stage 0 offloads nothing; use stage 1, 2 or 3")
    if zero.stage != 3 and zero.offload_param is not None:
        mistakes.append(f"zero_optimization.offload_param: parameters are offloaded by stage 3 only, not {zero.stage}")
    if zero.stage == 3 and engine.compile != "none":
        mistakes.append(
            f"engine.compile = {engine.compile} needs whole parameters, which stage 3 gathers module by module; choose zero1 or "
            "zero2, or engine.compile: none"
        )
    accumulation = file.data_types.grad_accum_dtype if file.data_types else precision
    if accumulation not in ("fp32", precision):
        mistakes.append(
            f"data_types.grad_accum_dtype = {accumulation} does not work with engine.precision = {precision}; leave it out, or "
            "use fp32"
        )
    return mistakes + _hierarchy_mistakes(zero, engine, replicas)


def _hierarchy_mistakes(zero: ZeroSection, engine: EngineConfig, replicas: int | None) -> list[str]:
    """What speaks against a second, smaller partition of the parameters. DeepSpeed makes it of consecutive ranks."""
    size, key = zero.zero_hpz_partition_size, "zero_optimization.zero_hpz_partition_size"
    if size == 1:
        return []
    mistakes = []
    if zero.stage != 3:
        mistakes.append(f"{key} = {size}: parameters are partitioned by stage 3 only, not {zero.stage}; leave it out")
    if engine.parallel.tensor > 1:
        mistakes.append(
            f"{key} = {size} does not work with engine.parallel.tensor = {engine.parallel.tensor}: its groups would mix slices "
            "of different tensor ranks; leave one of them out"
        )
    elif replicas is not None and replicas % size != 0:
        mistakes.append(f"{key} = {size} does not divide the number of ranks, {replicas}; set it to the ranks of a node")
    return mistakes
