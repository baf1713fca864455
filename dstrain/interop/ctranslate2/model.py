"""A bundle's weights in the slots of a CTranslate2 specification.

A specification is a tree of named slots which `ctranslate2.specs` makes from the numbers of a stack. Maps of the same input are
stacked in the order q, k, v. All values are float32; equal tensors, tied or of repeated layers, are stored once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, assert_never

import numpy as np
import numpy.typing as npt
import torch

from dstrain.errors import ExportError
from dstrain.interop.ctranslate2.limits import ACTIVATION_ENUM
from dstrain.models.config import DecoderStackConfig, ModelConfig, StackConfig
from dstrain.models.position_config import (
    DynamicNtkScaling,
    LinearScaling,
    NoScaling,
    NtkScaling,
    RotaryPosition,
    YarnScaling,
)
from dstrain.models.rotary import build_rotary
from dstrain.nn.position import SinusoidalPositions, sinusoids
from dstrain.nn.rotary import Rotary
from dstrain.ops.activation import ACTIVATIONS
from dstrain.ops.rotary import inverse_frequencies, stretched_theta
from dstrain.protocols import WeightSource

Float32Array = npt.NDArray[np.float32]
StackSide = Literal["source", "target"]


@dataclass(frozen=True)
class SpecBuilder:
    """Makes the specification of one model. specs: the module `ctranslate2.specs`. used: the tensors that it has read."""

    specs: Any
    config: ModelConfig
    weights: WeightSource
    used: set[str] = field(default_factory=set)

    def build(self) -> Any:
        """The specification with all weights, without vocabularies. ExportError if it has no slot for one of them."""
        if self.config.kind == "encoder_decoder":
            spec = self.specs.TransformerSpec(self.encoder(), self.decoder())
        else:
            spec = self.specs.TransformerDecoderModelSpec(self.decoder())
        spec.config.layer_norm_epsilon = self.config.norm.eps
        if unused := sorted(set(self.weights.names()) - self.used):
            raise ExportError(f"CTranslate2 has no slot for {len(unused)} tensors of the bundle, such as {unused[0]}")
        return spec

    def encoder(self) -> Any:
        """The stack that reads the source, with its embedding."""
        assert self.config.kind == "encoder_decoder"
        stack = self.config.encoder
        spec = self.specs.TransformerEncoderSpec(stack.depth, stack.num_heads, **self._stack_arguments("encoder", stack))
        self._fill_input(spec, spec.embeddings[0], "source", self.config.max_source_length)
        self._fill_stack(spec, "encoder", stack)
        return spec

    def decoder(self) -> Any:
        """The stack that predicts the target, with its embedding and the output layer."""
        config, stack = self.config, self.config.decoder
        spec = self.specs.TransformerDecoderSpec(
            stack.depth,
            stack.num_heads,
            with_encoder_attention=config.kind == "encoder_decoder",
            alibi=config.position.kind == "alibi",
            alibi_use_positive_positions=True,  # a softmax does not see what all keys of a query have in common
            alignment_heads=0,  # attention is averaged over all heads of the last layer
            **self._stack_arguments("decoder", stack),
        )
        self._fill_input(spec, spec.embeddings, "target", config.max_target_length)
        self._fill_stack(spec, "decoder", stack)
        spec.projection.weight = self._output_matrix()
        return spec

    def _stack_arguments(self, name: str, stack: StackConfig) -> dict[str, Any]:
        """Of a stack's specification. It has a final norm for pre-norm stacks only, so `_fill_stack` sets the order of norms."""
        arguments = {
            "pre_norm": True,
            "no_final_norm": not self._has(f"{name}.final_norm.weight"),
            "activation": self.specs.Activation[ACTIVATION_ENUM[self.config.activation]],
            "layernorm_embedding": self.config.embedding.norm,
            "ffn_glu": stack.feed_forward == "gated",
            "rms_norm": self.config.norm.kind == "rms_norm",
            "num_heads_kv": stack.num_kv_heads or stack.num_heads,
        }
        position = self.config.position
        return {**arguments, **self._rotary_arguments(position, stack)} if position.kind == "rotary" else arguments

    def _rotary_arguments(self, position: RotaryPosition, stack: StackConfig) -> dict[str, Any]:
        dim, theta, scaling = position.rotated_features(self._head_dim(stack)), position.theta, {}
        match position.scaling:
            case NoScaling():
                pass
            case LinearScaling(factor=factor):
                scaling = {"rotary_scaling_type": self.specs.RotaryScalingType.Linear, "rotary_scaling_factor": factor}
            case NtkScaling(factor=factor):
                theta = float(stretched_theta(theta, dim, factor))
            case YarnScaling():  # a scaling by divisors of the frequencies, which `_fill_yarn` gives
                scaling = {"rotary_scaling_type": self.specs.RotaryScalingType.Su}
            case DynamicNtkScaling():
                raise AssertionError("refused by `unsupported`")
            case other:
                assert_never(other)
        interleave = position.layout == "interleaved"
        return {"rotary_dim": dim, "rotary_interleave": interleave, "rotary_base": theta, **scaling}

    def _fill_input(self, spec: Any, embedding: Any, side: StackSide, max_length: int) -> None:
        embedding.weight = self._token_vectors(side)
        spec.scale_embeddings = math.sqrt(self.config.model_dim) if self.config.embedding.scale else 1.0
        if self.config.embedding.norm:
            self._fill_norm(spec.layernorm_embedding, f"{side}_embedding.norm")
        kind, dim = self.config.position.kind, self.config.model_dim
        if kind == "sinusoidal":
            first = SinusoidalPositions.FIRST_ROW
            spec.position_encodings.encodings = sinusoids(first + max_length, dim)[first:].contiguous().numpy()
        elif kind == "learned":
            spec.position_encodings.encodings = self._read(f"{side}_embedding.positions.weight")
        elif kind == "none" or (kind == "alibi" and side == "source"):
            spec.position_encodings.encodings = np.zeros((max_length, dim), np.float32)  # without a table it adds sinusoids

    def _fill_stack(self, spec: Any, name: str, stack: StackConfig) -> None:
        spec.pre_norm = self.config.norm_order == "pre"
        if self._has(f"{name}.final_norm.weight"):
            self._fill_norm(spec.layer_norm, f"{name}.final_norm")
        for layer, index in zip(spec.layer, stack.schedule, strict=True):
            path = f"{name}.layers.{index}"
            self._fill_self_attention(layer.self_attention, path, stack)
            if isinstance(stack, DecoderStackConfig):
                self._fill_cross_attention(layer.attention, path, stack)
            self._fill_feed_forward(layer.ffn, path, stack)

    def _fill_self_attention(self, spec: Any, path: str, stack: StackConfig) -> None:
        self._fill_norm(spec.layer_norm, f"{path}.self_attention_norm")
        qkv, out = spec.linear
        self._fill_linear(qkv, *(f"{path}.self_attention.{part}_proj" for part in "qkv"))
        self._fill_linear(out, f"{path}.self_attention.out_proj")
        position = self.config.position
        if isinstance(position, RotaryPosition) and isinstance(position.scaling, YarnScaling):
            self._fill_yarn(spec, qkv, position, stack)

    def _fill_yarn(self, spec: Any, qkv: Any, position: RotaryPosition, stack: StackConfig) -> None:
        """Divisors of the plain frequencies, and the scaling of queries and keys, which the rows of their maps take over."""
        head_dim = self._head_dim(stack)
        dim, rotary = position.rotated_features(head_dim), build_rotary(position, head_dim)
        assert isinstance(rotary, Rotary)
        inv_freq, attention_scaling = rotary.rotary_frequencies()
        divisors = (inverse_frequencies(dim, position.theta) / inv_freq).numpy()
        spec.rotary_scaling_long_factor = spec.rotary_scaling_short_factor = divisors
        heads = stack.num_heads + (stack.num_kv_heads or stack.num_heads)
        for tensor in (qkv.weight, qkv.bias):
            rows = tensor[: heads * head_dim].reshape(heads, head_dim, -1)  # a view
            rows[:, :dim] *= float(attention_scaling)

    def _fill_cross_attention(self, spec: Any, path: str, stack: DecoderStackConfig) -> None:
        self._fill_norm(spec.layer_norm, f"{path}.cross_attention_norm")
        spec.num_heads_kv = np.int32(stack.num_cross_kv_heads or stack.num_heads)
        query, key_value, out = spec.linear
        self._fill_linear(query, f"{path}.cross_attention.q_proj")
        self._fill_linear(key_value, f"{path}.cross_attention.k_proj", f"{path}.cross_attention.v_proj")
        self._fill_linear(out, f"{path}.cross_attention.out_proj")

    def _fill_feed_forward(self, spec: Any, path: str, stack: StackConfig) -> None:
        self._fill_norm(spec.layer_norm, f"{path}.feed_forward_norm")
        path = f"{path}.feed_forward"
        if stack.feed_forward == "gated":
            self._fill_linear(spec.linear_0, f"{path}.gate_proj")
            self._fill_linear(spec.linear_0_noact, f"{path}.up_proj")
        else:
            self._fill_linear(spec.linear_0, f"{path}.up_proj")
        self._fill_linear(spec.linear_1, f"{path}.down_proj")

    def _fill_linear(self, spec: Any, *paths: str) -> None:
        """One map from the rows of several."""
        spec.weight = np.concatenate([self._read(f"{path}.weight") for path in paths])
        if self._has(f"{paths[0]}.bias"):
            spec.bias = np.concatenate([self._read(f"{path}.bias") for path in paths])

    def _fill_norm(self, spec: Any, path: str) -> None:
        spec.gamma = self._read(f"{path}.weight")
        if self._has(f"{path}.bias"):
            spec.beta = self._read(f"{path}.bias")

    def _token_vectors(self, side: StackSide) -> Float32Array:
        """(V, D): the table, of a factorized embedding after its activation and its map to the width of the model."""
        path = self._tokens(side)
        if self._has(f"{path}.weight"):
            return self._read(f"{path}.weight")
        assert self.config.embedding.kind == "factorized"
        activate = ACTIVATIONS[self.config.embedding.activation]
        narrow = activate(torch.from_numpy(self._read(f"{path}.table.weight"))).numpy()
        return self._product(narrow, self._read(f"{path}.up_proj.weight").T)

    def _output_matrix(self) -> Float32Array:
        """(V, D): the vocabulary matrix after the maps from the width of the model to its own."""
        path = self._tokens("target")
        tied, factorized = not self._has("projection.weight"), self._has(f"{path}.table.weight")
        matrix = self._read(("projection" if not tied else f"{path}.table" if factorized else path) + ".weight")
        if self._has("projection.output_proj.weight"):
            return self._product(matrix, self._read("projection.output_proj.weight"))
        return self._product(matrix, self._read(f"{path}.up_proj.weight").T) if tied and factorized else matrix

    def _tokens(self, side: StackSide) -> str:
        """Where the token vectors of a side are stored: those of a shared matrix under the source."""
        shared = self.config.kind == "encoder_decoder" and self.config.embedding.tie == "all"
        return f"{'source' if shared else side}_embedding.tokens"

    @staticmethod
    def _product(a: Float32Array, b: Float32Array) -> Float32Array:
        return np.ascontiguousarray(a @ b)

    def _head_dim(self, stack: StackConfig) -> int:
        return self.config.model_dim // stack.num_heads

    def _has(self, name: str) -> bool:
        return name in self.weights.names()

    def _read(self, name: str) -> Float32Array:
        """A copy, for quantization writes into the arrays."""
        self.used.add(name)
        value: Float32Array = self.weights.read(name).to(torch.float32, copy=True).numpy()
        return value
