"""Encoder and decoder layers equal torch's own, with the same weights: another author's wiring of norms and residuals."""

from typing import Any, Literal

import pytest
import torch
from torch import nn

from dstrain.batch import Sequences
from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, StackConfig, VocabularySizes
from dstrain.models.encoder_decoder import EncoderDecoder
from dstrain.models.factory import build_model
from dstrain.models.weights import to_canonical

BATCH, SOURCE, TARGET, DIM = 5, 9, 7, 24
STACK: dict[str, Any] = {"depth": 3, "num_heads": 3, "ffn_dim": 40}


def our_model(norm_order: Literal["pre", "post"], activation: Literal["relu", "gelu"]) -> EncoderDecoder:
    config = EncoderDecoderConfig(
        model_dim=DIM,
        encoder=StackConfig(**STACK),
        decoder=DecoderStackConfig(**STACK),
        norm_order=norm_order,
        activation=activation,
        dropout=0.0,
    )
    model = build_model(config, VocabularySizes(source=50, target=60), seed=5)
    generator = torch.Generator().manual_seed(6)
    for tensor in to_canonical(model).values():
        tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator))
    return model


def torch_model(ours: EncoderDecoder, norm_order: str, activation: str) -> nn.Transformer:
    theirs = nn.Transformer(DIM, 3, 3, 3, 40, 0.0, activation, batch_first=True, norm_first=norm_order == "pre")
    if norm_order == "post":
        theirs.encoder.norm = theirs.decoder.norm = None
    weights = to_canonical(ours)
    pairs = {"feed_forward.up_proj": "linear1", "feed_forward.down_proj": "linear2"}
    norms = {
        "encoder": ["self_attention_norm", "feed_forward_norm"],
        "decoder": ["self_attention_norm", "cross_attention_norm", "feed_forward_norm"],
    }
    state = {}
    for side in ("encoder", "decoder"):
        for index in range(3):
            here = f"{side}.layers.{index}"
            for kind in ("weight", "bias"):
                for our, their in pairs.items():
                    state[f"{here}.{their}.{kind}"] = weights[f"{here}.{our}.{kind}"]
                for number, norm in enumerate(norms[side], 1):
                    state[f"{here}.norm{number}.{kind}"] = weights[f"{here}.{norm}.{kind}"]
                for our, their in (("self_attention", "self_attn"), ("cross_attention", "multihead_attn")):
                    if f"{here}.{our}.q_proj.{kind}" in weights:
                        blocks = [weights[f"{here}.{our}.{block}_proj.{kind}"] for block in "qkv"]
                        state[f"{here}.{their}.in_proj_{kind}"] = torch.cat(blocks)
                        state[f"{here}.{their}.out_proj.{kind}"] = weights[f"{here}.{our}.out_proj.{kind}"]
        if norm_order == "pre":
            for kind in ("weight", "bias"):
                state[f"{side}.norm.{kind}"] = weights[f"{side}.final_norm.{kind}"]
    theirs.load_state_dict(state)
    return theirs


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("activation", ["relu", "gelu"])
@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_hidden_states_and_gradients(norm_order: Literal["pre", "post"], activation: Literal["relu", "gelu"]) -> None:
    ours = our_model(norm_order, activation)
    theirs = torch_model(ours, norm_order, activation)
    generator = torch.Generator().manual_seed(7)
    lengths = torch.tensor([9, 1, 4, 9, 5])
    source = torch.randint(4, 50, (BATCH, SOURCE), generator=generator)
    target = torch.randint(4, 60, (BATCH, TARGET), generator=generator)
    hidden = ours(Sequences(source, lengths), Sequences(target, torch.full((BATCH,), TARGET))).hidden

    x, y = (
        embedding(tokens, 0, tokens.shape[1]).detach()
        for embedding, tokens in zip((ours.source_embedding, ours.target_embedding), (source, target), strict=True)
    )
    padding = torch.arange(SOURCE) >= lengths[:, None]
    causal = torch.ones(TARGET, TARGET, dtype=torch.bool).triu(1)
    expected = theirs(x, y, tgt_mask=causal, src_key_padding_mask=padding, memory_key_padding_mask=padding, tgt_is_causal=True)
    torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)

    hidden.square().sum().backward()
    expected.square().sum().backward()
    qkv = ours.encoder.layers[0].self_attention.qkv
    torch.testing.assert_close(qkv.weight.grad, theirs.encoder.layers[0].self_attn.in_proj_weight.grad, rtol=1e-5, atol=1e-4)
    up_proj = ours.decoder.layers[1].feed_forward.up_proj
    torch.testing.assert_close(up_proj.weight.grad, theirs.decoder.layers[1].linear1.weight.grad, rtol=1e-5, atol=1e-4)
