"""Activation checkpointing moves no result, and keeps less."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.nn.checkpointing import checkpoint_layers, tile_feed_forward
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.ops.kernels import MATMUL, TRAINING_ATTENTION
from tests.batches import collate
from tests.kernels import kernels_here
from tests.unit.models.build import small_config, small_model

PAIRS = [([5, 6, 7, 8, 9, 2], [9, 8, 7, 2]), ([4, 2], [11, 12, 13, 14, 2])]
MODES = ["selective", "full", "offload"]
DECODER = {"depth": 3, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 56, "feed_forward": "gated"}
CONFIGS: list[EncoderDecoderConfig | DecoderOnlyConfig] = [
    small_config(attention_dropout=0.1, activation_dropout=0.1),
    small_config(),
    DecoderOnlyConfig.model_validate(
        {"kind": "decoder_only", "model_dim": 24, "decoder": DECODER, "position": {"kind": "rotary"}, "dropout": 0.2}
    ),
]


def step(
    config: EncoderDecoderConfig | DecoderOnlyConfig, mode: Any, *, tiles: int = 1, rows: int = 16
) -> tuple[float, list[Tensor], int]:
    """The loss, all gradients, and the bytes that autograd keeps between the passes."""
    model = small_model(config).train()
    checkpoint_layers(model, mode)
    tile_feed_forward(model, tiles)
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    seed_masks(5, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = collate(PAIRS * (rows // 2), kind=model.kind)
        loss = build_cross_entropy(CrossEntropyConfig())(model, batch).loss_sum
    kept = sum(storages.values())
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None], kept


@pytest.fixture(params=kernels_here("matmul"))
def matmul(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernel of products."""
    with MATMUL.forced(request.param):
        yield request.param


@pytest.mark.usefixtures("matmul")
@pytest.mark.parametrize("config", CONFIGS, ids=["attention_dropout", "encoder_decoder", "decoder_only"])
def test_losses_and_gradients_are_the_same_bits_and_less_is_kept(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    loss, gradients, everything = step(config, "none")
    kept = {}
    for mode in MODES:
        own_loss, own_gradients, kept[mode] = step(config, mode)
        assert own_loss == loss
        assert len(own_gradients) == len(gradients)
        assert all(torch.equal(own, other) for own, other in zip(own_gradients, gradients, strict=True)), mode
    assert 2 * kept["full"] < everything


def test_selective_repeats_no_linear_map_and_full_repeats_them_once(matmul: str) -> None:
    # Of the native ones only those with a new result are counted: not gradients of weights, which neither mode repeats.
    passes = {"torch": 3, "native": 2}[matmul]
    formula = {torch.ops.dstrain.matmul: lambda left, right, bias, out_shape=None, **_: 2 * left[0] * left[1] * right[1]}
    flops = {}
    for mode in ("none", "selective", "full"):
        model = small_model(CONFIGS[0]).train()
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        with FlopCounterMode(display=False, custom_mapping=formula) as counter:
            build_cross_entropy(CrossEntropyConfig())(model, collate(PAIRS)).loss_sum.backward()
        flops[mode] = counter.get_total_flops()
    assert flops["none"] <= flops["selective"] < 1.05 * flops["none"]  # on a CPU attention is made of bmm, which is repeated
    assert (1 + 0.6 / passes) * flops["none"] < flops["full"] <= (1 + 1 / passes) * flops["none"]


def test_without_gradient_nothing_is_checkpointed() -> None:
    model = small_model().eval()
    source = collate(PAIRS)
    with torch.no_grad():
        expected = model(source.source, source.target).hidden
        checkpoint_layers(model, "full")
        assert torch.equal(model(source.source, source.target).hidden, expected)


GATED = CONFIGS[2].model_copy(update={"activation_dropout": 0.3})


@pytest.mark.parametrize("config", [CONFIGS[0], GATED], ids=["plain", "gated"])
@pytest.mark.parametrize("mode", ["none", "selective", "full", "offload"])
def test_tiles_of_feed_forward_networks_move_nothing(config: EncoderDecoderConfig | DecoderOnlyConfig, mode: str) -> None:
    """Masks of dropout included, in 3 tiles and in 60, of which some are empty."""
    loss, gradients, kept = step(config, "none", rows=4)
    for tiles in (3, 60):
        own_loss, own_gradients, own_kept = step(config, mode, tiles=tiles, rows=4)
        assert own_loss == pytest.approx(loss, rel=1e-6)
        for own, other in zip(own_gradients, gradients, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))
        assert own_kept < kept


class LargestStorages(TorchDispatchMode):
    """The largest storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize(("kind", "width"), [("plain", 1), ("gated", 2)])
@pytest.mark.parametrize("mode", ["none", "full"])
def test_wide_activations_exist_for_one_tile_only(kind: str, width: int, mode: Any) -> None:
    """In both passes of 8 features, so narrow that wide activations are the largest that there is; counted numbers."""
    decoder = {"depth": 2, "num_heads": 2, "ffn_dim": 256, "feed_forward": kind}
    config = DecoderOnlyConfig.model_validate({"kind": "decoder_only", "model_dim": 8, "decoder": decoder, "dropout": 0.0})
    largest = {}
    for tiles in (1, 8):
        model = small_model(config).train()
        checkpoint_layers(model, mode)
        tile_feed_forward(model, tiles)
        batch = collate([([5, 2], [*range(4, 34), 2])] * 4, kind="decoder_only")
        # whose kernel keeps no scores: more numbers than there are wide activations
        with TRAINING_ATTENTION.forced("scaled_dot_product_attention"), LargestStorages() as storages:
            model(batch.source, batch.target).hidden.sum().backward()
        largest[tiles] = max(storages.numbers)
    tokens = batch.target.tokens.numel()
    assert tokens == 128
    assert largest == {1: tokens * 256 * width, 8: tokens // 8 * 256 * width}
