"""Compiled layers: the bits of plain ones, one graph a part without a break, none for further sizes, the same names."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.models.factory import Model
from dstrain.models.weights import to_canonical
from dstrain.nn.compiling import compile_layers
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.ops.kernels import MATMUL
from tests.batches import EOS, collate
from tests.unit.adapters.adapted import adapted, lora
from tests.unit.models.build import small_config, small_model

GRAPHS_OF_A_PAIR = 5
"""Two of the encoder's layers, three of the decoder's, whatever their number."""
STACK = {"depth": 1, "num_heads": 3, "ffn_dim": 40}
PAIR: EncoderDecoderConfig = small_config(position={"kind": "rotary"}, encoder=STACK, decoder=STACK)
STACKED = DecoderOnlyConfig.model_validate(
    {
        "kind": "decoder_only",
        "model_dim": 24,
        "decoder": {"depth": 3, "unique_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 20, "feed_forward": "gated"},
        "norm_order": "pre",
        "norm": {"kind": "rms_norm"},
        "position": {"kind": "rotary"},
        "dropout": 0.2,
        "activation_dropout": 0.1,
    }
)


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests() -> Iterator[None]:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with MATMUL.forced("torch"):  # the kernel of a graph, for the same bits without one
        yield
    torch._dynamo.reset()


def batch_of(model: Model, size: int, seed: int) -> Batch:
    """Five pairs of random lengths in `size` tokens a side."""
    draw = random.Random(seed)

    def side() -> list[int]:
        return [*(draw.randint(4, 40) for _ in range(draw.randint(1, 5))), EOS]

    return collate([(side(), side()) for _ in range(5)], kind=model.kind, packed=PackedSize(multiple=size))


def outcome(model: Model, batch: Batch, step: int) -> list[Tensor]:
    """Loss and gradients, dropout included."""
    seed_masks(3, step)
    loss = build_cross_entropy(CrossEntropyConfig())(model, batch).loss_sum
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def breaks() -> dict[str, int]:
    return dict(torch._dynamo.utils.counters["graph_break"])


def test_one_graph_a_part_for_one_size_two_for_many() -> None:
    plain, compiled = (small_model(PAIR).train() for _ in range(2))
    counter = CompileCounter()
    compile_layers(compiled, "layers", backend=counter)
    graphs = []
    for step, size in enumerate((64, 64, 64, 96, 128)):
        batch = batch_of(plain, size, seed=step)
        torch.testing.assert_close(outcome(compiled, batch, step), outcome(plain, batch, step), rtol=0, atol=0)
        graphs.append(counter.frame_count)
    assert graphs[0] == 0, "the first micro-batch runs as it is"
    assert graphs[1:3] == [GRAPHS_OF_A_PAIR] * 2, "sequences of other lengths, the same number of tokens"
    assert graphs[3:] == [2 * GRAPHS_OF_A_PAIR] * 2, "other numbers of tokens"
    assert breaks() == {}


@pytest.mark.parametrize("case", ["stacked", "bfloat16", pytest.param("adapted", marks=pytest.mark.slow)])
def test_recurrent_bfloat16_and_adapted_layers(case: str) -> None:
    def model() -> Model:
        if case == "adapted":
            return adapted(lora("*", dropout=0.1), PAIR).train()
        return small_model(STACKED).train() if case == "stacked" else small_model(PAIR).bfloat16().train()

    plain, compiled, counter = model(), model(), CompileCounter()
    compile_layers(compiled, "layers", backend=counter)
    batch = batch_of(plain, 64, seed=1)
    for step in range(2):
        torch.testing.assert_close(outcome(compiled, batch, step), outcome(plain, batch, step), rtol=0, atol=0)
    assert counter.frame_count == (2 if case == "stacked" else GRAPHS_OF_A_PAIR)
    assert breaks() == {}


def test_weights_keep_their_names_and_evaluation_makes_no_graph() -> None:
    plain, compiled, counter = small_model(PAIR), small_model(PAIR), CompileCounter()
    compile_layers(compiled, "layers", backend=counter)
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    assert to_canonical(compiled).keys() == to_canonical(plain).keys()
    with torch.no_grad():
        batch = batch_of(plain, 64, seed=1)
        expected, _, found = (model(batch.source, batch.target).hidden for model in (plain, compiled, compiled))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    outcome(compiled.train(), batch_of(plain, 64, seed=1), 0)  # the first that trains, whatever was evaluated before
    assert counter.frame_count == 0


def test_none_compiles_nothing() -> None:
    model, counter = small_model(PAIR).train(), CompileCounter()
    compile_layers(model, "none", backend=counter)
    for step in range(2):
        outcome(model, batch_of(model, 64, seed=1), step)
    assert counter.frame_count == 0


def test_what_cannot_become_one_graph_is_an_error() -> None:
    model = small_model(PAIR).train()
    model.encoder.layers[0].feed_forward.activation = printing
    compile_layers(model, "layers", backend="eager")
    outcome(model, batch_of(model, 64, seed=1), 0)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        outcome(model, batch_of(model, 64, seed=1), 1)


def printing(x: Tensor) -> Tensor:
    """An activation that a graph cannot hold."""
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    return x.relu()
