"""The decoder-only transformer: a causal language model, which continues a source if there is one.

A source and its target are one sequence, which the `Collator` makes: the source's tokens, its EOS, which is the first input of
the target, and the target's tokens. In generation the source fills the first columns of the cache, in which rows of different
lengths are right-padded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from dstrain.batch import ModelKind, Sequences
from dstrain.model_output import ActivationCapture, ModelOutput
from dstrain.models.config import DecoderOnlyConfig, VocabularySizes
from dstrain.models.prepared import PreparedModel
from dstrain.nn.attention_bias import AttentionBias, AttentionContext
from dstrain.nn.cache import KeyValueCache, is_identity
from dstrain.nn.capture import StackCapture
from dstrain.nn.decoding import DecodingPlan
from dstrain.nn.dropout import NO_MASKS, MaskKeys
from dstrain.nn.embedding import InputEmbedding, Projection, logits
from dstrain.nn.layers import EncoderLayer
from dstrain.nn.position import Positions
from dstrain.nn.stack import LayerStack
from dstrain.ops.bias import causal_bias, mask_bias
from dstrain.protocols import DecodingState, Generative

_R = TypeVar("_R")


class DecoderOnlyState:
    """What decoding remembers: keys and values of the source, `width` columns, and after them those of the target.

    lengths: (b,) source tokens of each sentence; None if every source fills its columns.
    """

    def __init__(
        self, cache: KeyValueCache, *, plan: DecodingPlan | None, width: int, lengths: Tensor | None, rows_per_sentence: int
    ) -> None:
        self.plan = plan
        self.cache = cache
        self.width = width
        self.lengths = lengths
        self.rows_per_sentence = rows_per_sentence
        self._sentences = cache.num_rows // rows_per_sentence

    def reorder(self, rows: Tensor) -> None:
        """Row i continues what row `rows[i]` was; rows: (n,), each within its own sentence, equally many of each."""
        if not is_identity(rows) or len(rows) != self.cache.num_rows:
            self.cache.select(rows)
        self.rows_per_sentence = len(rows) // self._sentences

    def keep(self, sentences: Tensor) -> None:
        """Forget all sentences but these; sentences: (b,) ascending indices of the present ones."""
        first = sentences[:, None] * self.rows_per_sentence
        self.cache.select((first + torch.arange(self.rows_per_sentence, device=sentences.device)).flatten())
        self._sentences = len(sentences)
        if self.lengths is not None:
            self.lengths = self.lengths.index_select(0, sentences)

    def row_lengths(self) -> Tensor | None:
        """(N,) source tokens of each row."""
        return None if self.lengths is None else self.lengths.repeat_interleave(self.rows_per_sentence)


class DecoderOnly(nn.Module):
    """Implements `protocols.TeacherForced` and `protocols.Generative`."""

    def __init__(
        self,
        *,
        config: DecoderOnlyConfig,
        vocabulary: VocabularySizes,
        target_embedding: InputEmbedding,
        target_attention_bias: AttentionBias,
        decoder: LayerStack[EncoderLayer],
        projection: Projection,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        self.target_embedding = target_embedding
        self.target_attention_bias = target_attention_bias
        self.decoder = decoder
        self.projection = projection

    @property
    def kind(self) -> ModelKind:
        """How it reads an example."""
        return self.config.kind

    def forward(self, source: Sequences | None, target: Sequences, capture: ActivationCapture | None = None) -> ModelOutput:
        """All positions at once. source: None, for `target` holds the sources. capture: the activations to store."""
        if source is not None:
            raise ValueError("a decoder-only model reads source and target as one sequence; let a Collator join them")
        masks = MaskKeys.of(target)
        x = self.target_embedding.embed(target, masks)
        context = self.target_attention_bias.for_sequences(target, x)
        return ModelOutput(self._run(x, context, capture=capture, masks=masks), None)

    def _run(
        self,
        x: Tensor,
        context: AttentionContext,
        cache: KeyValueCache | None = None,
        capture: ActivationCapture | None = None,
        masks: MaskKeys = NO_MASKS,
    ) -> Tensor:
        hooks = StackCapture(capture, "decoder")

        def run(depth: int, layer: EncoderLayer, x: Tensor) -> Tensor:
            kept = None if cache is None else cache.at(depth)
            passed: Tensor = layer(x, context=context, cache=kept, hooks=hooks.layer(depth))
            return passed

        hidden: Tensor = self.decoder(x, run, hooks, masks)
        return hidden

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
        return self if self.training else PreparedModel(self, DecodingPlan(self.target_embedding, self.decoder, self.projection))

    @torch.no_grad()
    def start(
        self,
        source: Sequences | None,
        *,
        num_sentences: int,
        rows_per_sentence: int,
        max_length: int,
        plan: DecodingPlan | None = None,
    ) -> DecoderOnlyState:
        """Read the sources, each without its final EOS, and allocate `max_length` decoder inputs behind. plan: see `prepared`."""
        lengths = None if source is None else source.lengths - 1
        width = 0 if source is None else source.tokens.shape[1] - 1
        stack = self.config.decoder
        cache = KeyValueCache(
            depth=stack.depth,
            num_rows=num_sentences,
            num_heads=self.decoder.passes(lambda layer: layer.self_attention.num_kv_heads)[0],
            max_length=width + max_length,
            head_dim=self.config.model_dim // stack.num_heads,
            like=self.projection.weight,
            keep_tokens=self.target_attention_bias.may_invalidate_cache,
        )
        if source is not None and lengths is not None and width > 0:
            prompt = Sequences(cache.inputs(source.tokens[:, :width], moved=False), lengths)
            x = self.target_embedding.embed(prompt)
            self._run(x, self.target_attention_bias.for_sequences(prompt, x), cache)
            cache.advance(width)
        if lengths is not None and lengths.device.type == "cpu" and bool((lengths == width).all()):
            lengths = None
        state = DecoderOnlyState(cache, plan=plan, width=width, lengths=lengths, rows_per_sentence=1)
        if rows_per_sentence > 1:
            state.reorder(torch.arange(num_sentences, device=cache.device).repeat_interleave(rows_per_sentence))
        return state

    @torch.no_grad()
    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """Feed the next inputs. tokens: (N, t) -> logits after each, (N, t, V). state: made by `start`."""
        assert isinstance(state, DecoderOnlyState)
        inputs = state.cache.inputs(tokens, self.target_attention_bias.invalidates_cache(state.cache.length + tokens.shape[1]))
        past, new = state.cache.length, inputs.shape[1]
        query, keys, unfilled = _decoding_positions(state, new)
        plan = state.plan if new == 1 else None
        embed = self.target_embedding if plan is None else plan.embed
        x = embed(inputs, query, past + new)
        mask = causal_bias(new, past + new, x.dtype, x.device) if new > 1 else None
        if unfilled is not None:
            unfilled_bias = mask_bias(unfilled, x.dtype)[:, None, None, :]  # (N, 1, 1, past + t)
            mask = unfilled_bias if mask is None else torch.minimum(mask, unfilled_bias)
        context = self.target_attention_bias.for_decoding(query, keys, past + new, mask, x)
        if plan is not None:
            result = plan.step(x, state.cache, context)
        else:
            result = self.project(self._run(x, context, state.cache)[:, -tokens.shape[1] :])
        state.cache.advance(new)
        return result


def _decoding_positions(state: DecoderOnlyState, new: int) -> tuple[Positions, Positions, Tensor | None]:
    """Positions of `new` tokens and of all columns with them, and which columns are padding of a source, (N, columns)."""
    past, lengths = state.cache.length, state.row_lengths()
    if lengths is None:
        return past, 0, None
    columns = torch.arange(past + new, device=lengths.device)
    padding = (state.width - lengths)[:, None]  # (N, 1)
    keys = torch.where(columns < state.width, columns, columns - padding)
    unfilled = (columns >= lengths[:, None]) & (columns < state.width)
    return keys[:, past:], keys, unfilled
