"""Layouts of models of 1, 7 and 30 billion parameters on 8 to 1,024 GPUs, and what is never recommended."""

from dataclasses import replace
from typing import Any

import pytest
from pydantic import TypeAdapter

from dstrain.engine.config import EngineConfig
from dstrain.errors import RecipeError
from dstrain.estimate.parameters import count_parameters
from dstrain.estimate.planner import candidates, estimate_layout, recommend
from dstrain.estimate.workload import Cluster, Rates, TeacherModel, Workload
from dstrain.models.config import ModelConfig, VocabularySizes, tensor_problems

GIB = 2**30
RATES = Rates(gemm=600e12, memory=2.7e12, intra_node=360e9, inter_node=40e9)
BF16 = EngineConfig(precision="bf16")
SIZES = {1: (2048, 22, 16, 5504), 7: (4096, 32, 32, 11008), 30: (6656, 60, 52, 17920)}
"""Billions of parameters -> width, layers, heads, inner width."""


def language_model(billions: int) -> Any:
    dim, depth, heads, inner = SIZES[billions]
    stack = {"depth": depth, "num_heads": heads, "ffn_dim": inner, "feed_forward": "gated"}
    return TypeAdapter(ModelConfig).validate_python(
        {
            "kind": "decoder_only",
            "model_dim": dim,
            "decoder": stack,
            "norm": {"kind": "rms_norm"},
            "norm_order": "pre",
            "activation": "silu",
            "position": {"kind": "rotary"},
            "dropout": 0.0,
        }
    )


def translator(heads: int = 16) -> Any:
    stack = {"depth": 18, "num_heads": heads, "ffn_dim": 8192}
    shape = {"kind": "encoder_decoder", "model_dim": 64 * heads, "encoder": stack, "decoder": stack}
    return TypeAdapter(ModelConfig).validate_python({**shape, "norm_order": "pre", "activation": "gelu"})


def workload(model: Any, *, tokens: int = 4_000_000, length: int = 4096, **changes: Any) -> Workload:
    source = length if model.kind == "encoder_decoder" else 1
    vocabulary = VocabularySizes(source=64_000, target=64_000)
    plain = Workload(model, vocabulary, "bf16", "cross_entropy", 1024, tokens, source, length, longest_row=length)
    return replace(plain, **changes)


def cluster(gpus: int, memory: int = 80, rates: Rates = RATES) -> Cluster:
    return Cluster(max(1, gpus // 8), min(gpus, 8), memory * GIB, rates)


@pytest.mark.parametrize("billions", SIZES)
def test_models_are_laid_out_on_8_to_1024_gpus(billions: int) -> None:
    work = workload(language_model(billions))
    assert count_parameters(work.model, work.vocabulary).total == pytest.approx(billions * 1e9, rel=0.4)
    found = [recommend(work, BF16, cluster(gpus)) for gpus in (8, 64, 1024)]
    for estimate, gpus in zip(found, (8, 64, 1024), strict=True):
        layout = estimate.layout
        assert estimate.memory.fits(80 * GIB)
        assert layout.data * layout.sequence * layout.tensor == gpus
        assert layout.tensor <= 8
        assert not any(tensor_problems(work.model, layout.tensor))
        assert estimate.micro_batches * layout.data * layout.max_tokens >= work.tokens_per_step
    speeds = [estimate.tokens_per_second for estimate in found]
    assert speeds[0] < speeds[1] < speeds[2]


def test_a_model_that_fits_nowhere_but_in_memory_of_the_cpu_is_offloaded() -> None:
    estimate = recommend(workload(language_model(30)), BF16, cluster(8))
    assert estimate.layout.sharding.name == "zero3_offload"
    assert estimate.memory.host == pytest.approx(18 / 8 * estimate.parameters.total, rel=0.2)


def test_the_simplest_of_equally_fast_layouts_is_recommended() -> None:
    layout = recommend(workload(translator(), length=64), BF16, cluster(8)).layout
    assert (layout.tensor, layout.sequence, layout.sharding.name, layout.checkpointing) == (1, 1, "zero1", "none")


def test_heads_that_do_not_divide_give_no_tensor_group() -> None:
    layouts = list(candidates(workload(translator(heads=6), length=64), BF16, cluster(8), ["zero1"]))
    assert {layout.tensor for layout in layouts} == {1, 2}
    three = list(candidates(workload(translator(heads=6), length=64), BF16, Cluster(2, 3, 80 * GIB, RATES), ["zero1"]))
    assert {layout.tensor for layout in three} == {1}  # ffn_dim = 8192 does not divide by 3


def test_a_cluster_of_absurd_size_is_laid_out_at_once() -> None:
    layouts = candidates(workload(translator(), length=64), BF16, Cluster(10**15, 8, 80 * GIB, RATES), ["zero1"])
    assert {layout.tensor for layout in layouts} == {1, 2, 4, 8}


def test_a_slow_network_and_little_memory_ask_for_tensor_groups() -> None:
    slow = replace(RATES, inter_node=1e9)
    estimate = recommend(workload(language_model(7), tokens=100_000), BF16, cluster(64, rates=slow))
    assert estimate.layout.tensor > 1


def test_a_long_row_is_shared_by_a_sequence_group() -> None:
    estimate = recommend(workload(language_model(7), length=131_072), BF16, cluster(64))
    assert estimate.layout.sequence > 1
    assert estimate.layout.max_tokens >= 131_072


def test_what_fits_nowhere_is_said_with_a_remedy() -> None:
    with pytest.raises(RecipeError, match=r"no layout on 1 GPUs fits: the smallest needs .* GiB .*; take more GPUs, more memory"):
        recommend(workload(language_model(7)), BF16, cluster(1, memory=4))


def test_a_teacher_an_average_and_r_drop_cost_what_they_hold() -> None:
    work = workload(translator(), length=64)
    layout = recommend(work, BF16, cluster(8)).layout
    plain = estimate_layout(work, layout).memory
    sizes = count_parameters(work.model, work.vocabulary)
    averaged = estimate_layout(replace(work, ema=True), layout).memory
    assert averaged.states.ema == pytest.approx(4 * sizes.trained / 8, rel=1e-6)
    double = estimate_layout(replace(work, loss="r_drop"), layout).memory
    assert double.activations.kept == 2 * plain.activations.kept
    teacher = TeacherModel(work.model, work.vocabulary, "bf16", "replicated")
    taught = estimate_layout(replace(work, loss="dense_distillation", teachers=(teacher,)), layout)
    assert taught.memory.states.teacher == 2 * sizes.total
    assert taught.flops.teachers == pytest.approx(taught.flops.model / 3, rel=1e-6)
