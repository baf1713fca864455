"""FLOPs by formula, and by torch's counter of what runs."""

from dataclasses import replace

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dstrain.estimate.flops import flops
from dstrain.ops.kernels import MATMUL, TRAINING_ATTENTION
from tests.unit.estimate.cases import MODELS, Case


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("checkpointing", "tiles"), [("none", 1), ("full", 1), ("none", 3), ("full", 3)])
def test_products_are_counted_exactly(name: str, checkpointing: str, tiles: int) -> None:
    """In bf16 and by torch: the counter knows no products that add to a tensor. Of attention it counts those of its formula."""
    case = Case(name, "bf16", rows=3, source=40, target=44, checkpointing=checkpointing, tiles=tiles)
    kernels = TRAINING_ATTENTION.forced("scaled_dot_product_attention")
    with FlopCounterMode(display=False) as counter, kernels, MATMUL.forced("torch"), sdpa_kernel(SDPBackend.MATH):
        case.loss().backward()
    expected = flops(case.workload, case.layout).total
    if checkpointing == "full" and tiles > 1:  # what is computed a third time stops where nothing more is needed
        assert 0.95 * expected < counter.get_total_flops() <= expected
    else:
        assert counter.get_total_flops() == expected


def test_two_passes_and_repetitions() -> None:
    case = Case("post-norm", "bf16", rows=3, source=40, target=44)
    once, twice = (flops(replace(case.workload, loss=loss), case.layout) for loss in ("cross_entropy", "r_drop"))
    assert twice.model == 2 * once.model
    repeated = flops(case.workload, replace(case.layout, checkpointing="full"))
    assert repeated.model == once.model
    assert repeated.total - once.total == once.layers + once.attention
