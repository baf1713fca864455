"""The table of kernels: what it chooses, that it can be overridden, and what it says of itself."""

from typing import get_args

import pytest
import torch
from pydantic import ValidationError

from dstrain.engine.config import EngineConfig, KernelsConfig
from dstrain.errors import RecipeError
from dstrain.ops.cpu.attention import batched_attention
from dstrain.ops.kernel import Deferred, Kernel, Op
from dstrain.ops.kernels import (
    ARGMAX,
    OPS,
    TRAINING_ATTENTION,
    fused_attention,
    kernel_names,
    kernel_states,
    kernels_by_name,
    kernels_in_use,
)
from tests.kernels import NEEDS_COMPILER

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("op", "device", "dtype", "size", "name"),
    [
        pytest.param(TRAINING_ATTENTION, CPU, torch.float32, 16_384, "native", marks=NEEDS_COMPILER),
        (TRAINING_ATTENTION, CPU, torch.float32, 16_385, "scaled_dot_product_attention"),
        (TRAINING_ATTENTION, CPU, torch.bfloat16, 400, "batched_products"),
        (TRAINING_ATTENTION, CPU, torch.bfloat16, 40_000, "batched_products"),
        (TRAINING_ATTENTION, CPU, torch.float64, 1, "scaled_dot_product_attention"),
        (TRAINING_ATTENTION, CUDA, torch.float32, 1, "scaled_dot_product_attention"),
        (ARGMAX, CPU, torch.float64, 0, "numpy"),
        (ARGMAX, CPU, torch.bfloat16, 0, "torch"),
        (ARGMAX, CUDA, torch.float32, 0, "torch"),
    ],
)
def test_the_first_kernel_that_fits_is_chosen(op: Op, device: torch.device, dtype: torch.dtype, size: int, name: str) -> None:
    chosen = op.choose(device, dtype, size)
    assert chosen in {kernel.function for kernel in op.kernels if kernel.name == name}


def toy() -> Op:
    missing = Kernel("library", torch.sin, package="no_such_package", device_type="cpu")
    present = Kernel("installed", torch.cos, package="numpy", dtypes=(torch.float64, torch.float16), max_size=9)
    asked_for = Kernel("new", torch.exp, on_request=True)
    return Op(
        "toy", [missing, present, asked_for, Kernel("elsewhere", torch.abs, "cuda"), Kernel("fallback", torch.tan)], unit="rows"
    )


def test_every_condition_is_met_or_said() -> None:
    op = toy()
    assert op.choose(CPU, torch.float32) is torch.tan
    assert [op.choose(CPU, torch.float64, size) for size in (9, 10)] == [torch.cos, torch.tan]
    assert op.choose(CUDA, torch.float32) is torch.abs
    assert {name: str(state) for name, state in op.states("cpu", torch.float32).items()} == {
        "library": "no_such_package is not installed",
        "installed": "for float64 and float16 only",
        "new": "on request",
        "elsewhere": "for cuda only",
        "fallback": "chosen",
    }
    assert {name: str(state) for name, state in op.states("cuda", torch.float64).items()} == {
        "library": "no_such_package is not installed",
        "installed": "chosen up to 9 rows",
        "new": "on request",
        "elsewhere": "chosen",
        "fallback": "further down the table",
    }


def test_a_forced_kernel_is_taken_for_its_dtypes_until_the_end_of_the_block() -> None:
    op = toy()
    with op.forced("installed"):
        assert op.choose(CPU, torch.float64, size=10) is torch.cos
        assert op.choose(CPU, torch.float32) is torch.tan
        with op.forced("new"):
            assert op.choose(CPU, torch.float32) is torch.exp
            assert [name for name, state in op.states("cpu", torch.float32).items() if state.is_chosen] == ["new"]
        assert op.choose(CPU, torch.float64, size=10) is torch.cos
    assert op.choose(CPU, torch.float64, size=10) is torch.tan


def test_kernels_of_triton_run_on_a_cpu_in_its_interpreter_only(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel("triton", torch.sin, "cuda", package="triton")
    monkeypatch.setattr("dstrain.ops.kernel.find_spec", lambda _: object())
    assert [kernel.problem(device, torch.float32) for device in ("cuda", "cpu")] == [None, "for cuda only"]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernel.problem("cpu", torch.float32) is None
    monkeypatch.setattr("dstrain.ops.kernel.find_spec", lambda _: None)
    assert kernel.problem("cpu", torch.float32) == "triton is not installed"


def test_a_deferred_function_is_imported_at_its_first_call() -> None:
    absent = Deferred("no_such_module", "function")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        absent()
    assert Deferred("math", "pow")(2, 3) == 8


def test_a_recipe_may_name_every_kernel_and_no_other() -> None:
    fields = {name: get_args(field.annotation) for name, field in KernelsConfig.model_fields.items()}
    assert {op: list(names) for op, names in fields.items()} == {op: ["auto", *kernel_names(op)] for op in OPS}


def test_named_kernels_run_until_the_end_of_the_block() -> None:
    assert KernelsConfig().by_name == {}
    names = KernelsConfig(argmax="torch", training_attention="scaled_dot_product_attention").by_name
    assert names == {"argmax": "torch", "training_attention": "scaled_dot_product_attention"}
    with kernels_by_name(names, "cpu", torch.float32):
        assert ARGMAX.choose(CPU, torch.float32) is ARGMAX.kernels[-1].function
        assert TRAINING_ATTENTION.choose(CPU, torch.float32, 1) is TRAINING_ATTENTION.kernels[-1].function
    assert ARGMAX.choose(CPU, torch.float32) is ARGMAX.kernels[0].function


def test_without_a_compiler_the_next_kernel_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dstrain.ops.kernel.native.problem", lambda: "no C++ compiler")
    op = Op("training_attention", TRAINING_ATTENTION.kernels, unit=TRAINING_ATTENTION.unit)
    assert op.choose(CPU, torch.float32, 400) is batched_attention
    assert op.choose(CPU, torch.float32, 401) is fused_attention
    assert op.problem("native", "cpu", torch.float32) == "no C++ compiler"


@pytest.mark.parametrize(("op", "kernel"), [("norm", "liger"), ("matmul", "native")])
def test_compiled_layers_refuse_a_kernel_that_cannot_be_part_of_a_graph(op: str, kernel: str) -> None:
    with pytest.raises(ValidationError, match=rf"kernels\.{op} = {kernel} cannot be part of it; choose kernels\.{op}: auto, or"):
        EngineConfig.model_validate({"compile": "layers", "kernels": {op: kernel}})


def test_a_named_kernel_that_cannot_run_is_refused_with_the_reason() -> None:
    message = r"packed_attention = varlen cannot run here \(for cuda only\); choose packed_attention: auto or padded_rows"
    with pytest.raises(RecipeError, match=message):
        kernels_by_name({"packed_attention": "varlen"}, "cpu", torch.float32)
    for choice in ("auto", "padded_rows"):
        with kernels_by_name(KernelsConfig.model_validate({"packed_attention": choice}).by_name, "cpu", torch.float32):
            pass
    with pytest.raises(RecipeError, match=r"varlen cannot run here \(for bfloat16 and float16 only\)"):
        kernels_by_name({"packed_attention": "varlen"}, "cuda", torch.float32)


def test_liger_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its package, on a CPU, and for a vocabulary that ranks share."""
    with pytest.raises(
        ValidationError, match=r"cross_entropy = liger needs the whole vocabulary .* parallel.tensor = 2 .* triton"
    ):
        EngineConfig.model_validate({"kernels": {"cross_entropy": "liger"}, "parallel": {"tensor": 2}})
    monkeypatch.setattr("dstrain.ops.kernel.find_spec", lambda _: object())
    with pytest.raises(RecipeError, match=r"norm = liger cannot run here \(for cuda only\); choose norm: auto or torch"):
        kernels_by_name({"norm": "liger"}, "cpu", torch.float32)
    monkeypatch.setattr("dstrain.ops.kernel.find_spec", lambda name: None if name == "liger_kernel" else object())
    with pytest.raises(
        RecipeError, match=r"liger cannot run here \(liger_kernel is not installed\); choose .* auto or triton or torch"
    ):
        kernels_by_name({"cross_entropy": "liger"}, "cuda", torch.float32)


def test_every_argmax_takes_the_first_of_equal_values() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 0.0], [0.0, 0.0, 5.0]])
    for kernel in ARGMAX.kernels:
        assert kernel.function(scores).tolist() == [[1], [0], [2]]


def test_losses_compute_in_float32_whatever_the_model_s_dtype() -> None:
    assert kernel_states("cpu", torch.bfloat16)["argmax"]["numpy"].is_chosen


def test_the_table_in_a_line() -> None:
    names = {"argmax": "torch", "training_attention": "scaled_dot_product_attention"}
    in_use = kernels_in_use("cpu", torch.float32, names).split(", ")
    assert in_use[-2:] == ["torch for argmax", "scaled_dot_product_attention for training_attention"]
    assert {"counted_masks", "padded_rows", "torch"} < set(in_use)
    assert "numpy" not in in_use
    assert "batched_products" not in in_use
