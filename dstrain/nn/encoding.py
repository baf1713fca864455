"""What generation needs of a source: its keys and values for every depth of the decoder, by functions instead of modules.

As in `decoding.py`, the weights of the moment go to kernels. The projections of all depths are one product.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.batch import Sequences
from dstrain.nn.attention_bias import AttentionBias
from dstrain.nn.embedding import InputEmbedding
from dstrain.nn.layer_parts import blocks_part, layer_parts, norm_part, stack_kernel
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.stack import LayerStack
from dstrain.ops.cpu.attention import KEY_BLOCK
from dstrain.ops.decoding_layers import SourceKeys
from dstrain.ops.encoding_layers import EncodingLayers, RowContext
from dstrain.ops.kernels import ENCODING_LAYERS
from dstrain.ops.layer_parts import FixedMap, fixed_map, norm_map


class EncodingPlan:
    """An encoder and the decoder's projections of its output, prepared. Weights must not change while a plan is in use."""

    def __init__(
        self,
        embedding: InputEmbedding,
        encoder: LayerStack[EncoderLayer],
        attention_bias: AttentionBias,
        decoder: LayerStack[DecoderLayer],
    ) -> None:
        self._embedding = embedding
        self._attention_bias = attention_bias
        self._layers: EncodingLayers = stack_kernel(ENCODING_LAYERS, encoder.passes(layer_parts))
        self._final_norm = norm_map(norm_part(encoder.final_norm))
        self._keys = _source_keys(decoder)

    def read(self, source: Sequences) -> list[SourceKeys]:
        """Keys and values by depth, in whole blocks, with zeros behind the columns of the source."""
        x = self._embedding.embed(source)
        context = self._attention_bias.for_sequences(source, x)
        hidden = self._layers(x, RowContext(context.bias, context.causal, context.rotation))
        return self._keys(self._final_norm(hidden))


def _source_keys(decoder: LayerStack[DecoderLayer]) -> Callable[[Tensor], list[SourceKeys]]:
    """(B, S, D) -> by depth; depths that share a layer share its keys."""
    unique = [layer.cross_attention for layer in decoder.passes(lambda layer: layer)]
    modules = list({id(module): module for module in unique}.values())
    by_depth = [modules.index(module) for module in unique]
    parts = [blocks_part(module.kv) for module in modules]
    known = [part for part in parts if isinstance(part, FixedMap)]
    if len(known) < len(parts):

        def project(hidden: Tensor) -> list[SourceKeys]:
            keys = [_in_blocks(*module.project_memory(hidden)) for module in modules]
            return [keys[index] for index in by_depth]

        return project
    product, head_dim = fixed_map(_concatenated(known)), modules[0].head_dim

    def project_together(hidden: Tensor) -> list[SourceKeys]:
        batch, length, _ = hidden.shape
        heads = product(hidden.flatten(0, 1)).view(batch, length, len(parts), 2, -1, head_dim).permute(2, 3, 0, 4, 1, 5)
        keys = heads.new_zeros(*heads.shape[:4], length + -length % KEY_BLOCK, head_dim)  # (layers, 2, B, H or fewer, S, K)
        keys[:, :, :, :, :length] = heads
        pairs = [(key, value) for key, value in keys]  # the same pair for depths that share a layer
        return [pairs[index] for index in by_depth]

    return project_together


def _concatenated(parts: Sequence[FixedMap]) -> FixedMap:
    """One map that gives the outputs of all."""
    biases = [part.bias for part in parts if part.bias is not None]
    return FixedMap(torch.cat([part.weight for part in parts]), torch.cat(biases) if biases else None)


def _in_blocks(key: Tensor, value: Tensor) -> SourceKeys:
    missing = (0, 0, 0, -key.shape[2] % KEY_BLOCK)
    return F.pad(key, missing).contiguous(), F.pad(value, missing).contiguous()
