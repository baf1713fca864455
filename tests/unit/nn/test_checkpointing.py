"""Activation checkpointing moves no result, and keeps less."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.nn.checkpointing import checkpoint_layers
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from tests.batches import collate
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


def step(config: EncoderDecoderConfig | DecoderOnlyConfig, mode: Any) -> tuple[float, list[Tensor], int]:
    """The loss, all gradients, and the bytes that autograd keeps between the passes."""
    model = small_model(config).train()
    checkpoint_layers(model, mode)
    storages: dict[int, int] = {}
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    seed_masks(5, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batch = collate(PAIRS * 8, kind=model.kind)
        loss = build_cross_entropy(CrossEntropyConfig())(model, batch).loss_sum
    kept = sum(storages.values())
    loss.backward()
    return loss.item(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None], kept


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


def test_selective_repeats_no_linear_map_and_full_repeats_them_once() -> None:
    flops = {}
    for mode in ("none", "selective", "full"):
        model = small_model(CONFIGS[0]).train()
        checkpoint_layers(model, mode)  # type: ignore[arg-type]
        with FlopCounterMode(display=False) as counter:
            build_cross_entropy(CrossEntropyConfig())(model, collate(PAIRS)).loss_sum.backward()
        flops[mode] = counter.get_total_flops()
    assert flops["none"] <= flops["selective"] < 1.05 * flops["none"]  # on a CPU attention is made of bmm, which is repeated
    assert 1.2 * flops["none"] < flops["full"] <= 4 / 3 * flops["none"]


def test_without_gradient_nothing_is_checkpointed() -> None:
    model = small_model().eval()
    source = collate(PAIRS)
    with torch.no_grad():
        expected = model(source.source, source.target).hidden
        checkpoint_layers(model, "full")
        assert torch.equal(model(source.source, source.target).hidden, expected)
