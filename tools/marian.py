"""A model of dstrain as Transformers' Marian, with identical weights: what the benches compare speeds by."""

from __future__ import annotations

import torch
from transformers import MarianConfig, MarianMTModel

from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.weights import to_canonical
from dstrain.nn.position import SinusoidalPositions, sinusoids

NAMES = {
    "self_attention_norm": "self_attn_layer_norm",
    "self_attention": "self_attn",
    "cross_attention_norm": "encoder_attn_layer_norm",
    "cross_attention": "encoder_attn",
    "feed_forward_norm": "final_layer_norm",
    "feed_forward.up_proj": "fc1",
    "feed_forward.down_proj": "fc2",
}


def marian_model(ours: EncoderDecoder, *, positions: int) -> MarianMTModel:
    """A copy with the same dropout. positions: of the table.

    It is post-norm, with ReLU, sinusoidal positions and one matrix for all embeddings; weights of other names fail to load.
    Attention takes the kernel that Transformers chooses.
    """
    config, sizes = ours.config, ours.vocabulary
    start = sizes.special_ids[-1]
    copy = MarianMTModel(
        MarianConfig(
            vocab_size=sizes.target,
            d_model=config.model_dim,
            encoder_layers=config.encoder.depth,
            decoder_layers=config.decoder.depth,
            encoder_attention_heads=config.encoder.num_heads,
            decoder_attention_heads=config.decoder.num_heads,
            encoder_ffn_dim=config.encoder.ffn_dim,
            decoder_ffn_dim=config.decoder.ffn_dim,
            activation_function="relu",
            dropout=config.dropout,
            attention_dropout=config.attention_dropout,
            activation_dropout=config.activation_dropout,
            max_position_embeddings=positions,
            scale_embedding=True,
            pad_token_id=sizes.pad_id,
            eos_token_id=sizes.eos_id,
            bos_token_id=0,
            decoder_start_token_id=start,
            forced_eos_token_id=None,
        )
    )
    copy.load_state_dict(marian_weights(ours, positions))
    return copy


def marian_weights(ours: EncoderDecoder, positions: int) -> dict[str, torch.Tensor]:
    """Ours under Marian's names."""
    weights = {}
    for name, tensor in to_canonical(ours).items():
        if "embedding" in name:
            weights["model.shared.weight"] = tensor
            continue
        stack, layers, index, rest = name.split(".", 3)
        part = next(own for own in NAMES if rest.startswith(own))
        weights[f"model.{stack}.{layers}.{index}.{rest.replace(part, NAMES[part])}"] = tensor
    first, shared = SinusoidalPositions.FIRST_ROW, weights["model.shared.weight"]
    for stack in ("encoder", "decoder"):
        weights[f"model.{stack}.embed_positions.weight"] = sinusoids(first + positions, ours.config.model_dim)[first:]
        weights[f"model.{stack}.embed_tokens.weight"] = shared
    return {**weights, "lm_head.weight": shared, "final_logits_bias": torch.zeros(1, len(shared))}
