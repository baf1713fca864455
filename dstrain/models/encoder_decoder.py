"""The encoder-decoder transformer: teacher-forced for training, step by step with a cache for generation.

It only connects its parts; `models/factory.py` makes them from a configuration.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dstrain.batch import ModelKind, Sequences
from dstrain.model_output import ActivationCapture, Memory, ModelOutput
from dstrain.models.config import EncoderDecoderConfig, VocabularySizes
from dstrain.models.prepared import PreparedModel
from dstrain.nn.attention_bias import AttentionBias, AttentionContext
from dstrain.nn.cache import KeyValueCache, is_identity
from dstrain.nn.capture import StackCapture
from dstrain.nn.decoding import DecodingPlan
from dstrain.nn.dropout import MEMORY_SITE, MaskKeys
from dstrain.nn.embedding import InputEmbedding, Projection, logits
from dstrain.nn.encoding import EncodingPlan
from dstrain.nn.layers import DecoderLayer, EncoderLayer
from dstrain.nn.stack import LayerStack
from dstrain.ops.bias import causal_bias, padding_bias
from dstrain.ops.decoding_layers import SourceKeys
from dstrain.protocols import DecodingState, Generative

_R = TypeVar("_R")


class EncoderDecoderPlan(NamedTuple):
    """Both stacks prepared for generation."""

    encoding: EncodingPlan
    decoding: DecodingPlan


class EncoderDecoderState:
    """What decoding remembers: the source's keys and values by depth, once a sentence; those of the target, once a row."""

    def __init__(
        self,
        *,
        plan: DecodingPlan | None,
        source: list[SourceKeys],
        source_bias: Tensor | None,
        target: KeyValueCache,
        rows_per_sentence: int,
    ) -> None:
        self.plan = plan
        self.source = source  # by depth: keys, values (b, H, S, K), the same ones if a layer runs again; S in whole blocks
        self.source_bias = source_bias  # (b, 1, 1, S)
        self.target = target
        self.rows_per_sentence = rows_per_sentence

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row `rows[i]` was; rows: (n,), each within its own sentence, equally many of each."""
        if not is_identity(rows):
            self.target.select(rows)
        self.rows_per_sentence = len(rows) // len(self.source[0][0])

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these; sentences: (b,) ascending indices of the present ones."""
        first = sentences[:, None] * self.rows_per_sentence
        self.target.select((first + torch.arange(self.rows_per_sentence, device=sentences.device)).flatten())
        self.source = select_sentences(self.source, sentences)
        if self.source_bias is not None:
            self.source_bias = self.source_bias.index_select(0, sentences)


class EncoderDecoder(nn.Module):
    """Implements `protocols.TeacherForced` and `protocols.Generative`."""

    def __init__(
        self,
        *,
        config: EncoderDecoderConfig,
        vocabulary: VocabularySizes,
        source_embedding: InputEmbedding,
        source_attention_bias: AttentionBias,
        encoder: LayerStack[EncoderLayer],
        target_embedding: InputEmbedding,
        target_attention_bias: AttentionBias,
        decoder: LayerStack[DecoderLayer],
        projection: Projection,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.source_embedding = source_embedding
        self.source_attention_bias = source_attention_bias
        self.encoder = encoder
        self.target_embedding = target_embedding
        self.target_attention_bias = target_attention_bias
        self.decoder = decoder
        self.projection = projection

    @property
    def kind(self) -> ModelKind:
        """How it reads an example."""
        return self.config.kind

    def forward(self, source: Sequences | None, target: Sequences, capture: ActivationCapture | None = None) -> ModelOutput:
        """All target positions at once. capture: the activations to store."""
        source = required(source)
        memory = self.encode(source, capture)
        masks, memory_masks = MaskKeys.of(target), MaskKeys.of(source)
        x = self.target_embedding.embed(target, masks)
        memory_context = self.target_attention_bias.for_memory(source, target, x)
        context, hooks = self.target_attention_bias.for_sequences(target, x), StackCapture(capture, "decoder")

        def run(depth: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            with memory_masks.at(MEMORY_SITE + depth):
                key, value = layer.cross_attention.project_memory(memory.hidden)
            passed: Tensor = layer(x, key, value, context=context, memory_context=memory_context, hooks=hooks.layer(depth))
            return passed

        return ModelOutput(self.decoder(x, run, hooks, masks), memory)

    def encode(self, source: Sequences, capture: ActivationCapture | None = None) -> Memory:
        """The encoder's output, (B, S, D) or (N, D); what is at padding has no meaning."""
        masks = MaskKeys.of(source)
        x = self.source_embedding.embed(source, masks)
        context, hooks = self.source_attention_bias.for_sequences(source, x), StackCapture(capture, "encoder")

        def run(depth: int, layer: EncoderLayer, x: Tensor) -> Tensor:
            passed: Tensor = layer(x, context=context, hooks=hooks.layer(depth))
            return passed

        return Memory(self.encoder(x, run, hooks, masks), source.lengths)

    def project(self, hidden: Tensor) -> Tensor:
        """Logits. (..., D) -> (..., V)"""
        return self.reduce_projection(hidden, logits)

    def invalidates_cache(self, length: int) -> bool:
        """Whether a sequence of `length` tokens changes the results of its earlier tokens, in the decoder."""
        return self.target_attention_bias.invalidates_cache(length)

    def reduce_projection(self, hidden: Tensor, reduce: Callable[..., _R]) -> _R:
        """`reduce(features, weight, vocabulary=...)` inside the projection's forward; see `protocols.TeacherForced`."""
        result: _R = self.projection(hidden, reduce)
        return result

    def prepared(self) -> Generative:
        """See `protocols.Generative`."""
        if self.training:
            return self
        encoding = EncodingPlan(self.source_embedding, self.encoder, self.source_attention_bias, self.decoder)
        decoding = DecodingPlan(self.target_embedding, self.decoder, self.projection)
        return PreparedModel(self, EncoderDecoderPlan(encoding, decoding))

    @torch.no_grad()
    def start(
        self,
        source: Sequences | None,
        *,
        num_sentences: int,
        rows_per_sentence: int,
        max_length: int,
        plan: EncoderDecoderPlan | None = None,
    ) -> EncoderDecoderState:
        """Encode the source once per sentence and allocate `max_length` decoder inputs. plan: see `prepared`."""
        source = required(source)
        stack, keys = self.config.decoder, self._source_keys(source) if plan is None else plan.encoding.read(source)
        return EncoderDecoderState(
            plan=None if plan is None else plan.decoding,
            source=keys,
            source_bias=padding_bias(source.lengths, keys[0][0].shape[2], keys[0][0].dtype),
            target=KeyValueCache(
                depth=stack.depth,
                num_rows=num_sentences * rows_per_sentence,
                num_heads=self.decoder.passes(lambda layer: layer.self_attention.num_kv_heads)[0],
                max_length=max_length,
                head_dim=self.config.model_dim // stack.num_heads,
                like=keys[0][0],
                keep_tokens=self.target_attention_bias.may_invalidate_cache,
            ),
            rows_per_sentence=rows_per_sentence,
        )

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Feed the next inputs. tokens: (N, t) -> logits after each, (N, t, V). state: made by `start`."""
        assert isinstance(state, EncoderDecoderState)
        inputs = state.target.inputs(tokens, self.target_attention_bias.invalidates_cache(state.target.length + tokens.shape[1]))
        past, width = state.target.length, inputs.shape[1]
        plan = state.plan if width == 1 else None
        embed = self.target_embedding if plan is None else plan.embed
        x = embed(inputs, past, past + width)
        mask = causal_bias(width, past + width, x.dtype, x.device) if width > 1 else None
        context = self.target_attention_bias.for_decoding(past, 0, past + width, mask, x)
        if plan is not None:
            result = plan.step(x, state.target, context, state.source, state.source_bias)
        else:
            result = self.project(self._run_modules(x, state, context)[:, -tokens.shape[1] :])
        state.target.advance(width)
        return result

    def _source_keys(self, source: Sequences) -> list[SourceKeys]:
        """By depth, by the modules."""
        hidden = self.encode(source).hidden
        return self.decoder.passes(lambda layer: layer.cross_attention.project_memory(hidden))

    def _run_modules(self, x: Tensor, state: EncoderDecoderState, context: AttentionContext) -> Tensor:
        """The layers by their modules, and any number of positions. (N, t, D) -> (N, t, D)"""
        memory_context = AttentionContext(bias=state.source_bias)

        def run(depth: int, layer: DecoderLayer, x: Tensor) -> Tensor:
            key, value = state.source[depth]
            cache = state.target.at(depth)
            passed: Tensor = layer(x, key, value, context=context, memory_context=memory_context, cache=cache)
            return passed

        hidden: Tensor = self.decoder(x, run)
        return hidden


def select_sentences(source: list[SourceKeys], sentences: Tensor) -> list[SourceKeys]:
    """Keys and values of some sentences, each tensor once however many depths share it."""
    chosen = {id(pair): tuple(part.index_select(0, sentences) for part in pair) for pair in source}
    return [(chosen[id(pair)][0], chosen[id(pair)][1]) for pair in source]


def required(source: Sequences | None) -> Sequences:
    """The source, which an encoder-decoder cannot do without."""
    if source is None:
        raise ValueError("an encoder-decoder model needs a source")
    return source
