"""DeepSpeed's JSON: what is shipped works, what is wrong is named with its place and remedy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dstrain.engine.config import EngineConfig
from dstrain.engine.ds_config import DIRECTORIES, ModelSize, read_ds_config, resolve_ds_config, resolve_reader_config
from dstrain.engine.ds_schema import OffloadSection
from dstrain.errors import RecipeError
from tests.paths import ROOT

SHIPPED = ["zero0", "zero1", "zero1_cluster", "zero1_offload", "zero2", "zero2_offload", "zero3", "zero3_offload"]
ZERO1: dict[str, Any] = {"zero_optimization": {"stage": 1}}
SIZE = ModelSize(parameters=160_000_000, largest_layer=4_000_000)


def write(directory: Path, content: Any) -> str:
    path = directory / "file.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


def message(directory: Path, content: Any, **engine: Any) -> str:
    """What is said about the file, without its path."""
    path = write(directory, content)
    with pytest.raises(RecipeError) as error:
        read_ds_config(EngineConfig(deepspeed=path, **engine), replicas=2)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return "\n".join(line.removeprefix(f"{path}: ") for line in lines)


def resolve(directory: Path, content: Any, *, replicas: int = 1, size: ModelSize = SIZE, **engine: Any) -> dict[str, Any]:
    """What DeepSpeed gets for a file of this content."""
    return resolve_ds_config(EngineConfig(deepspeed=write(directory, content), **engine), replicas=replicas, size=size)


def auto_values(content: Any) -> list[Any]:
    if isinstance(content, dict):
        return [found for value in content.values() for found in auto_values(value)]
    return [content] if content == "auto" else []


def test_these_files_are_shipped() -> None:
    assert sorted(path.stem for directory in DIRECTORIES for path in directory.glob("*.json")) == SHIPPED


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in SHIPPED for precision in ("fp32", "bf16", "fp16") if (name, precision[2:]) != ("zero0", "16")],
)
def test_shipped_files_resolve_without_auto(name: str, precision: Any) -> None:
    engine = EngineConfig(deepspeed=name, precision=precision, clip_norm=0.5)
    resolved = resolve_ds_config(engine, replicas=3, size=SIZE)
    assert auto_values(resolved) == []
    assert resolved["zero_optimization"]["stage"] == int(name[4])
    assert resolved["gradient_clipping"] == 0.5
    assert (resolved["bf16"]["enabled"], resolved["fp16"]["enabled"]) == (precision == "bf16", precision == "fp16")
    assert (resolved["train_batch_size"], resolved["train_micro_batch_size_per_gpu"]) == (3, 1)
    assert ("offload_optimizer" in resolved["zero_optimization"]) == name.endswith("offload")


def test_the_additions_that_the_readme_shows_are_accepted(tmp_path: Path) -> None:
    text = (ROOT / "ds_configs" / "README.md").read_text().split("```json\n")[1].split("```")[0]
    resolved = resolve(tmp_path, f"{{{text}}}", precision="bf16", replicas=8)
    assert resolved["data_types"] == {"grad_accum_dtype": "bf16"}
    assert resolved["zero_optimization"]["zero_hpz_partition_size"] == 8


def test_the_readme_tells_about_every_file() -> None:
    table = (ROOT / "ds_configs" / "README.md").read_text()
    assert all(f"| `{name}` |" in table for name in SHIPPED)


def test_clipping_is_explicit_even_where_the_file_is_silent(tmp_path: Path) -> None:
    resolved = resolve(tmp_path, ZERO1)
    assert resolved["gradient_clipping"] == 0.0


def test_values_of_the_file_arrive(tmp_path: Path) -> None:
    content = {
        "zero_optimization": {"stage": 3, "reduce_bucket_size": 1000, "stage3_param_persistence_threshold": 0},
        "fp16": {"loss_scale_window": 50},
        "gradient_clipping": 1.5,
        "flops_profiler": {"enabled": True},
    }
    resolved = resolve(tmp_path, content, precision="fp16", clip_norm=1.5)
    assert resolved["zero_optimization"].items() >= content["zero_optimization"].items()
    assert resolved["fp16"] == {"enabled": True, "loss_scale_window": 50}
    assert resolved["flops_profiler"] == {"enabled": True}


@pytest.mark.parametrize(
    ("stage", "replicas", "precision", "types"),
    [
        (1, 8, "bf16", ("fp32", "fp32")),
        (2, 8, "bf16", ("fp32", "bf16")),
        (3, 9, "bf16", ("fp32", "fp32")),
        (3, 9, "fp16", (None, None)),
        (3, 9, "fp32", (None, None)),
    ],
)
def test_bf16_gradients_add_up_in_fp32(stage: int, replicas: int, precision: str, types: Any, tmp_path: Path) -> None:
    """types: of sums over micro-batches, and over ranks; None for DeepSpeed's own, which is that of the parameters."""
    resolved = resolve(tmp_path, {"zero_optimization": {"stage": stage}}, replicas=replicas, precision=precision)
    assert (resolved.get("data_types", {}).get("grad_accum_dtype"), resolved.get("communication_data_type")) == types


def test_sequence_ranks_add_up_gradients_in_fp32(tmp_path: Path) -> None:
    content = {"zero_optimization": {"stage": 2}}
    resolved = resolve(tmp_path, content, replicas=2, precision="bf16", parallel={"sequence": 2})
    assert resolved["communication_data_type"] == "fp32"


def test_a_file_may_choose_other_types_of_gradients(tmp_path: Path) -> None:
    content = {**ZERO1, "data_types": {"grad_accum_dtype": "bf16"}}
    resolved = resolve(tmp_path, content, precision="bf16")
    assert (resolved["data_types"], resolved["communication_data_type"]) == ({"grad_accum_dtype": "bf16"}, "bf16")
    assert resolve(tmp_path, {**ZERO1, "communication_data_type": "bf16"}, precision="bf16")["communication_data_type"] == "bf16"


def test_the_limits_of_a_teacher_follow_its_size_as_those_of_a_student_do(tmp_path: Path) -> None:
    size = ModelSize(160_000_000, 4_000_000)
    student = resolve(tmp_path, {"zero_optimization": {"stage": 3}}, size=size)["zero_optimization"]
    for offload in (None, OffloadSection(device="cpu", pin_memory=False)):
        teacher = resolve_reader_config("bf16", ranks=3, size=size, offload=offload)
        zero = teacher["zero_optimization"]
        assert (teacher["train_batch_size"], teacher["bf16"], teacher["fp16"]) == (3, {"enabled": True}, {"enabled": False})
        assert zero["stage3_max_live_parameters"] == student["stage3_max_live_parameters"] == 20_000_000
        assert zero["stage3_prefetch_bucket_size"] == student["stage3_prefetch_bucket_size"] == 10_000_000
        assert zero["stage3_max_reuse_distance"] == 0
        assert zero.get("offload_param") == (None if offload is None else {"device": "cpu", "pin_memory": False})
        assert auto_values(teacher) == []


@pytest.mark.parametrize("content", [{"stage": 3}, {"stage": 3, "sub_group_size": "auto", "stage3_max_live_parameters": "auto"}])
def test_limits_follow_the_model(content: Any, tmp_path: Path) -> None:
    def limits(*size: int) -> list[int]:
        zero = resolve(tmp_path, {"zero_optimization": content}, size=ModelSize(*size))["zero_optimization"]
        keys = ("reduce_bucket_size", "sub_group_size", "stage3_prefetch_bucket_size", "stage3_max_live_parameters")
        return [zero[key] for key in (*keys, "stage3_max_reuse_distance")]

    million = 1_000_000
    assert limits(160 * million, 4 * million) == [size * million for size in (10, 10, 10, 20, 10)], "a sixteenth"
    assert limits(160 * million, 64 * million) == [size * million for size in (64, 64, 64, 128, 64)], "the largest layer"
    assert limits(32_000 * million, million) == [size * million for size in (500, 1000, 50, 1000, 1000)], "DeepSpeed's defaults"
    adapted = limits(160 * million, 4 * million, 2 * million)
    assert adapted == [size * million for size in (2, 2, 10, 20, 10)], "gradients and optimizer state are those of adapters"


def test_ranks_that_are_not_known_yet_are_not_checked(tmp_path: Path) -> None:
    path = write(tmp_path, {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}})
    assert read_ds_config(EngineConfig(deepspeed=path)).zero_optimization.zero_hpz_partition_size == 8


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**ZERO1, "gradient_cliping": 1.0}, "gradient_cliping: unknown key; did you mean gradient_clipping?"),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_sise": 5}},
            "zero_optimization.reduce_bucket_sise: unknown key; did you mean reduce_bucket_size?",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memry": True}}},
            "zero_optimization.offload_optimizer.pin_memry: unknown key; did you mean pin_memory?",
        ),
        ({**ZERO1, "fp16": {"loss_scale_windw": 5}}, "fp16.loss_scale_windw: unknown key; did you mean loss_scale_window?"),
        ({**ZERO1, "flops_profiler": {"xyz": 1}}, "flops_profiler.xyz: unknown key; valid: detailed, enabled, module_depth"),
        (
            {**ZERO1, "data_types": {"grad_accum_dtype": "fp32", "grad_accum_type": "fp32"}},
            "data_types.grad_accum_type: unknown key; did you mean grad_accum_dtype?",
        ),
        ({**ZERO1, "optimizer": {"type": "AdamW"}}, "optimizer: not taken from this file; set the recipe's optimizer section"),
        ({**ZERO1, "scheduler": {}}, "scheduler: not taken from this file; set the recipe's schedule section"),
        ({**ZERO1, "checkpoint": {}}, "checkpoint: not taken from this file; set the recipe's checkpoint section"),
        ({**ZERO1, "torch_autocast": {}}, "torch_autocast: not taken from this file; set engine.precision in the recipe"),
        ({**ZERO1, "train_batch_size": 32}, "train_batch_size: not taken from this file; set batching.tokens_per_step in the"),
        ({**ZERO1, "aio": {}}, "aio: not taken from this file; offloading to NVMe is not supported; offload to cpu"),
        ({**ZERO1, "activation_checkpointing": {}}, "activation_checkpointing: not taken from this file; "),
        (
            {"zero_optimization": {"stage": 3, "memory_efficient_linear": True}},
            "zero_optimization.memory_efficient_linear: not taken from this file; the linear maps of models keep",
        ),
        ({"zero_optimization": {}}, "zero_optimization.stage: missing; give it a value"),
        ({}, "zero_optimization: missing; give it a value"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage: should be 0, 1, 2 or 3, not 4"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device: should be 'cpu' or 'none', not 'nvme'",
        ),
        ({"zero_optimization": {"stage": "auto"}}, "zero_optimization.stage: should be 0, 1, 2 or 3, not 'auto'"),
        ({"zero_optimization": 2}, "zero_optimization: should be a section, not 2"),
        ([1], "the file holds no JSON object; see ds_configs/zero1.json"),
    ],
)
def test_what_the_schema_refuses(content: Any, expected: str, tmp_path: Path) -> None:
    found = message(tmp_path, content)
    assert found.startswith(expected)
    assert len(found.splitlines()) == 1


def test_a_wrong_value_of_an_auto_key_is_one_message(tmp_path: Path) -> None:
    found = message(tmp_path, {**ZERO1, "gradient_clipping": "always"})
    assert found == "gradient_clipping: should be a valid number or 'auto', not 'always'"


def test_all_mistakes_are_reported_together(tmp_path: Path) -> None:
    found = message(tmp_path, {"zero_optimization": {"stage": 1, "a": 1}, "b": 2, "optimizer": {}})
    assert [line.split(":")[0] for line in found.splitlines()] == ["zero_optimization.a", "b", "optimizer"]


@pytest.mark.parametrize(
    ("content", "engine", "expected"),
    [
        ({**ZERO1, "gradient_clipping": 1.0}, {}, "gradient_clipping = 1.0, but the recipe has engine.clip_norm = 0.0; write"),
        ({**ZERO1, "bf16": {"enabled": True}}, {}, "bf16.enabled = true, but the recipe has engine.precision = fp32; write"),
        (
            {**ZERO1, "fp16": {"enabled": False}},
            {"precision": "fp16"},
            "fp16.enabled = false, but the recipe has engine.precision = fp16; write",
        ),
        ({**ZERO1, "gradient_accumulation_steps": 4}, {}, "gradient_accumulation_steps = 4: micro-batches are made of tokens;"),
        ({**ZERO1, "train_micro_batch_size_per_gpu": 8}, {}, "train_micro_batch_size_per_gpu = 8: micro-batches are made of"),
        (
            {"zero_optimization": {"stage": 0}},
            {"precision": "bf16"},
            "zero_optimization.stage = 0 cannot train in bf16: DeepSpeed's unpartitioned 16-bit optimizer counts a step too "
            "many, which bends the loss curve; use zero1, which needs less memory too",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            {},
            "zero_optimization.offload_optimizer: stage 0 offloads nothing; use stage 1, 2 or 3",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {},
            "zero_optimization.offload_param: parameters are offloaded by stage 3 only, not 2",
        ),
        (
            {**ZERO1, "data_types": {"grad_accum_dtype": "fp16"}},
            {"precision": "bf16"},
            "data_types.grad_accum_dtype = fp16 does not work with engine.precision = bf16; leave it out, or use fp32",
        ),
        (
            {"zero_optimization": {"stage": 3}},
            {"compile": "layers"},
            "engine.compile = layers needs whole parameters, which stage 3 gathers module by module; choose zero1 or zero2, or",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            {"parallel": {"tensor": 2}},
            "zero_optimization.zero_hpz_partition_size = 2 does not work with engine.parallel.tensor = 2: its groups would mix",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 4}},
            {},
            "zero_optimization.zero_hpz_partition_size = 4 does not divide the number of ranks, 2; set it to the ranks of a node",
        ),
        (
            {"zero_optimization": {"stage": 2, "zero_hpz_partition_size": 2}},
            {},
            "zero_optimization.zero_hpz_partition_size = 2: parameters are partitioned by stage 3 only, not 2; leave it out",
        ),
    ],
)
def test_what_contradicts_the_recipe(content: Any, engine: dict[str, Any], expected: str, tmp_path: Path) -> None:
    assert message(tmp_path, content, **engine).startswith(expected)


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    text = '{"zero_optimization": {"stage": 1, "stage": 2}}'
    assert message(tmp_path, text) == "not a readable JSON file: the key 'stage' is given twice; fix the file"


def test_a_file_that_is_no_json(tmp_path: Path) -> None:
    assert message(tmp_path, '{"zero_optimization": ').startswith("not a readable JSON file: Expecting value: line 1")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("zero", "engine.deepspeed: no DeepSpeed configuration 'zero'; did you mean zero"),
        ("mine", "engine.deepspeed: no DeepSpeed configuration 'mine'; valid: zero0, zero1, "),
        ("zero1.json", "engine.deepspeed: no file zero1.json; give a path to a DeepSpeed JSON file, or zero1"),
        ("mine.json", "engine.deepspeed: no file mine.json; give a path to a DeepSpeed JSON file, or one of zero0, "),
    ],
)
def test_a_name_that_is_not_there(name: str, expected: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_ds_config(EngineConfig(deepspeed=name))
    assert str(error.value).startswith(expected)


def test_checking_loads_no_torch() -> None:
    code = "import dstrain.engine.ds_config, sys; print([m for m in ('torch', 'deepspeed', 'numpy') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"
