"""A decoder's step of one token a row, by functions instead of modules.

So little is computed in such a step that calling the modules takes a CPU as long as the products do. A generation therefore
prepares the decoder once, from the weights of that moment: the layers' weights go to a kernel (`ops/decoding_layers.py`).
Modules remain the definition: tests hold the steps of every variant to them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from dstrain.nn.attention_bias import AttentionContext
from dstrain.nn.cache import KeyValueCache
from dstrain.nn.embedding import InputEmbedding, Projection, TokenEmbedding, logits
from dstrain.nn.layer_parts import layer_parts, norm_part, stack_kernel
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.position import Positions
from dstrain.nn.stack import LayerStack
from dstrain.ops.activation import TensorMap
from dstrain.ops.decoding_layers import DecodingLayers, DecodingStep, SourceKeys
from dstrain.ops.kernels import DECODING_LAYERS
from dstrain.ops.layer_parts import FixedMap, fixed_map, norm_map


class DecodingPlan:
    """A decoder from its input to its vocabulary projection, prepared.

    Copied matrices stay as they were, everything else is read as it is: weights must not change while a plan is in use.
    """

    def __init__(
        self, embedding: InputEmbedding, decoder: LayerStack[DecoderLayer] | LayerStack[EncoderLayer], projection: Projection
    ) -> None:
        self.embed = _embedding(embedding)
        self._layers: DecodingLayers = stack_kernel(DECODING_LAYERS, decoder.passes(layer_parts))
        self._final_norm = norm_map(norm_part(decoder.final_norm))
        self._project = _projection(projection)

    def step(
        self,
        x: Tensor,
        cache: KeyValueCache,
        context: AttentionContext,
        source: Sequence[SourceKeys] = (),
        source_bias: Tensor | None = None,
    ) -> Tensor:
        """Logits after one new token, the cache not advanced. x: (N, 1, D); context: of that token -> (N, 1, V)

        source: by depth, in whole blocks of keys; source_bias: (B, 1, 1, S), None if all of it is seen.
        """
        bias = cache.block_bias(context.bias)
        step = DecodingStep(cache, context.rotation, bias, source, _of_key_heads(source, source_bias, x))
        return self._project(self._final_norm(self._layers(x[:, 0], step))).unsqueeze(1)


def _of_key_heads(source: Sequence[SourceKeys], bias: Tensor | None, like: Tensor) -> Tensor:
    """(B, 1, 1, S) -> (B * heads of keys, 1, S); something that adds nothing for None."""
    if bias is None:
        return like.new_zeros(1, 1, 1)
    return bias.expand(-1, source[0][0].shape[1], -1, -1).flatten(0, 1)


def _embedding(module: InputEmbedding) -> Callable[[Tensor, Positions, int], Tensor]:
    """The input stage without dropout, called as the module is. (N, 1) -> (N, 1, D)"""
    positions, norm, scale = module.positions.forward, norm_map(norm_part(module.norm)), module.scale
    tokens: TensorMap = module.tokens
    if isinstance(module.tokens, TokenEmbedding) and module.tokens.vocabulary is None:
        tokens = partial(torch.embedding, module.tokens.weight)

    def embed(ids: Tensor, where: Positions, end_position: int) -> Tensor:
        x = tokens(ids)
        return norm(torch.add(positions(where, end_position, x), x, alpha=scale))

    return embed


def _projection(module: Projection) -> TensorMap:
    """(N, D) -> logits (N, V)"""
    if type(module) is not Projection or module.vocabulary is not None:
        return lambda hidden: module(hidden, logits)
    product = fixed_map(FixedMap(module.weight, None))
    return lambda hidden: product(module.operands(hidden)[0])
