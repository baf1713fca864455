"""Counted masks: the loss of a step with dropout is a function of its examples, however they are batched."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dstrain.batch import Batch
from dstrain.data.batching.collate import PackedSize
from dstrain.models.config import DecoderOnlyConfig, EncoderDecoderConfig
from dstrain.nn.dropout import Dropout, MaskKeys, attention_dropout, mask_pass, seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.parallel.group import Group
from tests.batches import collate
from tests.unit.models.build import small_config, small_model

PAIRS = [([5, 6, 7, 8, 9, 2], [9, 8, 7, 2]), ([4, 2], [11, 12, 13, 14, 2]), ([6, 6, 2], [9, 2]), ([8, 9, 2], [4, 5, 6, 2])]
IDS = [40, 7, 1_000_000_000, 3]
DROPOUT: dict[str, Any] = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}
CONFIGS: list[EncoderDecoderConfig | DecoderOnlyConfig] = [
    small_config(**DROPOUT),
    DecoderOnlyConfig.model_validate(
        {
            "kind": "decoder_only",
            "model_dim": 24,
            "decoder": {"depth": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 56, "feed_forward": "gated"},
            "position": {"kind": "rotary"},
            **DROPOUT,
        }
    ),
]


def losses(config: EncoderDecoderConfig | DecoderOnlyConfig, *batches: Batch, step: int = 3) -> tuple[float, list[Tensor]]:
    """Of a step of some micro-batches, and its gradients."""
    model = small_model(config).train()
    seed_masks(1, step)
    total = 0.0
    for batch in batches:
        loss = build_cross_entropy(CrossEntropyConfig())(model, batch).loss_sum
        loss.backward()
        total += loss.item()
    return total, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_batching_order_padding_and_packing_move_no_mask(config: EncoderDecoderConfig | DecoderOnlyConfig) -> None:
    kind = config.kind
    expected, gradients = losses(config, collate(PAIRS, kind=kind, ids=IDS))
    others = {
        "micro-batches": [collate([pair], kind=kind, ids=[number]) for pair, number in zip(PAIRS, IDS, strict=True)],
        "reversed": [collate(PAIRS[::-1], kind=kind, ids=IDS[::-1])],
        "packed": [collate(PAIRS, kind=kind, ids=IDS, packed=PackedSize(32))],
    }
    for name, batches in others.items():
        loss, other = losses(config, *batches)
        assert loss == pytest.approx(expected, rel=1e-6), name
        for own, reference in zip(other, gradients, strict=True):
            assert (own - reference).norm() < 1e-4 * reference.norm(), name
    assert losses(config, collate(PAIRS, kind=kind, ids=IDS), step=4)[0] != pytest.approx(expected, rel=1e-3)
    assert losses(config, collate(PAIRS, kind=kind, ids=[40, 7, 5, 3]))[0] != pytest.approx(expected, rel=1e-4)


def test_depths_places_and_passes_have_masks_of_their_own() -> None:
    sequences = collate(PAIRS).target
    seed_masks(1, 0)
    x, part, masks = torch.ones(*sequences.tokens.shape, 64), Dropout(0.5), MaskKeys.of(sequences)
    with mask_pass(1):
        second = MaskKeys.of(sequences)
    drawn = []
    for site in (masks.at(0), masks.at(1), second.at(0), masks.at(0)):
        with site:
            drawn += [part(x), part(x)]
    assert torch.equal(drawn[0], drawn[6])  # computed again
    assert torch.equal(drawn[1], drawn[7])
    for first in range(6):
        for other in range(first):
            assert 0.4 < (drawn[first] == drawn[other]).float().mean().item() < 0.6


def test_a_rank_draws_for_its_features_and_heads_what_one_process_draws() -> None:
    sequences = collate(PAIRS).target
    seed_masks(1, 0)
    x = torch.ones(*sequences.tokens.shape, 30)
    with MaskKeys.of(sequences).at(0):
        whole = Dropout(0.5)(x)
        heads = attention_dropout(0.5, 6, heads=None).mask_keys
    for rank in range(3):
        group = Group(rank, 3, None, torch.device("cpu"))
        with MaskKeys.of(sequences).at(0):
            assert torch.equal(Dropout(0.5, features=group)(x[..., :10]), whole[..., 10 * rank : 10 * rank + 10])
            assert torch.equal(attention_dropout(0.5, 2, heads=group).mask_keys, heads[:, 2 * rank : 2 * rank + 2])


def test_a_sequence_rank_draws_for_its_tokens_and_in_attention_for_all_tokens_of_its_heads() -> None:
    sequences = collate(PAIRS, packed=PackedSize(multiple=8)).target
    seed_masks(1, 0)
    count = len(sequences.tokens) // 2
    with MaskKeys.of(sequences).at(0):
        whole = Dropout(0.5)(torch.ones(2 * count, 30))
        heads = attention_dropout(0.5, 8, heads=None).mask_keys
    for tensor_rank, rank in ((0, 0), (0, 1), (1, 0), (1, 1)):
        tensor, sequence = (Group(number, 2, None, torch.device("cpu")) for number in (tensor_rank, rank))
        with MaskKeys.of(sequences.share(rank, 2)).at(0):
            assert torch.equal(Dropout(0.5)(torch.ones(count, 30)), whole[rank * count : (rank + 1) * count])
            first = 4 * tensor_rank + 2 * rank
            own = attention_dropout(0.5, 2, heads=tensor, sequence=sequence).mask_keys
            assert torch.equal(own, heads[first : first + 2])


def test_padding_and_empty_micro_batches_have_keys_too() -> None:
    for packed in (None, PackedSize(64)):
        batch = collate([], packed=packed)
        for side in (batch.source, batch.target):
            assert side.keys.shape == side.tokens.shape


def test_layer_drop_drops_the_same_layers_for_every_micro_batch() -> None:
    config = small_config(dropout=0.0, encoder={"depth": 4, "num_heads": 4, "ffn_dim": 16, "layer_drop": 0.5})
    whole, _ = losses(config, collate(PAIRS, ids=IDS))
    parts, _ = losses(config, *(collate([pair], ids=[number]) for pair, number in zip(PAIRS, IDS, strict=True)))
    assert parts == pytest.approx(whole, rel=1e-6)
