"""Which kernel runs an op: the table by device, dtype, problem size and installed packages. No other module chooses.

A kernel is chosen unasked if it is certain to be the faster one there. One that nobody has measured yet is `on_request`: it runs
if `engine.kernels` of a recipe names it. All kernels of an op have one signature and compute the same; tests hold each to the
op's reference. `dstrain doctor` prints the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dstrain.errors import RecipeError
from dstrain.ops.activation import composed_gate
from dstrain.ops.cache_moves import CachedEntries, indexed_moves
from dstrain.ops.continuations import composed_best_continuations, indexed_extension, log_probs
from dstrain.ops.cpu.argmax import numpy_argmax
from dstrain.ops.cpu.attention import batched_attention, counted_dropout_attention, decoding_products
from dstrain.ops.cpu.linear import SMALLEST, packed_linear, transposed_linear
from dstrain.ops.cpu.native import is_amd
from dstrain.ops.cpu.products import LEAST_SIDE, LEAST_SIZE, native_matmul, torch_matmul
from dstrain.ops.dropout import CountedMask, counted_dropout
from dstrain.ops.kernel import Deferred, Kernel, KernelState, Op
from dstrain.ops.norm import NormedSum, NormWeights, plain_norm
from dstrain.ops.packed_attention import PackedPair, RowAttention, flex, padded_rows, varlen
from dstrain.ops.rotary import CosSin, RotaryLayout, apply_rotary


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, causal: bool) -> Tensor:
    """torch's own, which picks among several."""
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias, is_causal=causal)


def fused_dropout_attention(
    query: Tensor, key: Tensor, value: Tensor, *, bias: Tensor | None, causal: bool, dropout: float, mask_keys: Tensor
) -> Tensor:
    """torch's own, whose generator draws."""
    grouped = len(key[0]) != len(query[0])
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=bias, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
    )


def fused_decoding_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """torch's own, which takes a bias of four dimensions."""
    query, key, value, bias = (each.unsqueeze(0) for each in (query, key, value, bias.expand(-1, -1, key.shape[1])))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).squeeze(0)


def plain_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """torch's own."""
    return partial(F.linear, weight=weight, bias=bias)


def torch_argmax(scores: Tensor) -> Tensor:
    """(n, V) -> (n, 1)"""
    return scores.argmax(1, keepdim=True)


TRAINING_ATTENTION: Op[Callable[[Tensor, Tensor, Tensor, Tensor | None, bool], Tensor]] = Op(
    "training_attention",
    [
        Kernel(
            "native",
            Deferred("dstrain.ops.cpu.native_attention", "native_attention"),
            "cpu",
            (torch.float32,),
            max_size=16_384,
            native=True,
        ),
        Kernel("batched_products", batched_attention, "cpu", (torch.float32,), max_size=400),
        Kernel("batched_products", batched_attention, "cpu", (torch.bfloat16,), max_size=40_000),
        Kernel("scaled_dot_product_attention", fused_attention),
    ],
    unit="scores per head",
)
"""Attention with gradient, with as many key as query heads and no dropout. Size: T x S."""

DROPOUT_ATTENTION: Op[Callable[..., Tensor]] = Op(
    "dropout_attention",
    [
        Kernel("counted_masks", counted_dropout_attention, "cpu"),
        Kernel("scaled_dot_product_attention", fused_dropout_attention),
    ],
)
"""Attention with dropout of its probabilities. The kernels of a GPU draw from torch's generator, each rank other masks."""

DecodingAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

DECODING_ATTENTION: Op[DecodingAttention] = Op(
    "decoding_attention",
    [
        Kernel("decoding_products", decoding_products, "cpu", (torch.float32,)),
        Kernel("scaled_dot_product_attention", fused_decoding_attention),
    ],
)
"""Attention of one new token a row, without gradient; by heads of keys: (P, Q, K), twice (P, S, K), bias -> (P, Q, K)."""

MATMUL: Op[Callable[..., Tensor]] = Op(
    "matmul",
    [
        Kernel("torch", torch_matmul, max_size=LEAST_SIZE - 1),
        Kernel("native", native_matmul, "cpu", (torch.float32,), native=True, on_request=not is_amd()),
        Kernel("torch", torch_matmul),
    ],
    unit="multiply-adds",
)
"""Products of matrices in training, forward and backward: of the layers' linear maps and of the vocabulary."""


def matmul_kernel(left: Tensor, right: Tensor) -> Callable[..., Tensor]:
    """That of `MATMUL` for left (M, K) and right (K, N), as they come."""
    dtype = left.dtype if left.dtype == right.dtype else torch.bfloat16
    if torch.compiler.is_compiling():  # would make a graph for each answer, and holds one kernel anyway
        return MATMUL.choose(left.device, dtype)
    sides = (*left.shape, right.shape[1])
    return MATMUL.choose(left.device, dtype, prod(sides) if min(sides) >= LEAST_SIDE else 0)


FIXED_LINEAR: Op[Callable[[Tensor, Tensor | None], Callable[[Tensor], Tensor]]] = Op(
    "fixed_linear",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.panels", "native_linear"), "cpu", (torch.float32,), native=True),
        Kernel("transposed_linear", transposed_linear, "cpu", (torch.float32,), max_size=SMALLEST - 1),
        Kernel("packed_linear", packed_linear, "cpu", (torch.float32,)),
        Kernel("linear", plain_linear),
    ],
    unit="elements of the weight",
)
"""The linear map of a weight that does not change: weight (O, I), bias -> (N, I) -> (N, O)."""

DECODING_LAYERS: Op[Callable[..., Any]] = Op(
    "decoding_layers",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.decoding_layers", "native_layers"), "cpu", (torch.float32,), native=True),
        Kernel("composed", Deferred("dstrain.ops.decoding_layers", "composed_layers")),
    ],
)
"""`DecodingLayers` of the layers of a decoder that stay as they are."""

ENCODING_LAYERS: Op[Callable[..., Any]] = Op(
    "encoding_layers",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.encoding_layers", "native_encoding"), "cpu", (torch.float32,), native=True),
        Kernel("composed", Deferred("dstrain.ops.encoding_layers", "composed_encoding")),
    ],
)
"""`EncodingLayers` of the layers of an encoder that stay as they are."""

CACHE_MOVES: Op[Callable[[CachedEntries, Tensor, Tensor], bool]] = Op(
    "cache_moves",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.beam_search", "native_moves"), "cpu", native=True),
        Kernel("indexed", indexed_moves),
    ],
)
"""Entries of a cache that change as its rows continue others."""

LOG_PROBS: Op[Callable[[Tensor], Tensor]] = Op(
    "log_probs",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.beam_search", "native_log_probs"), "cpu", native=True),
        Kernel("torch", log_probs),
    ],
    dtype=torch.float32,
)
"""Log-probabilities of a step's logits in generation, in their place."""

CONTINUATIONS: Op[Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]] = Op(
    "continuations",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.beam_search", "native_best_continuations"), "cpu", native=True),
        Kernel("block_maxima", composed_best_continuations),
    ],
    dtype=torch.float32,
)
"""The best continuations of hypotheses."""

EXTENSION: Op[Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]] = Op(
    "extension",
    [
        Kernel("native", Deferred("dstrain.ops.cpu.beam_search", "native_extension"), "cpu", native=True),
        Kernel("indexed", indexed_extension),
    ],
    dtype=torch.float32,
)
"""Hypotheses and their totals, one token longer."""

PackedAttention = Callable[[Tensor, Tensor, Tensor, PackedPair, RowAttention], Tensor]

PACKED_ATTENTION: Op[PackedAttention] = Op(
    "packed_attention",
    [Kernel("varlen", varlen, "cuda", (torch.bfloat16, torch.float16)), Kernel("padded_rows", padded_rows)],
)
"""Attention of packed sequences, without ALiBi and dropout."""

PACKED_ALIBI_ATTENTION: Op[PackedAttention] = Op(
    "packed_alibi_attention", [Kernel("flex", flex, "cuda", compiled=True), Kernel("padded_rows", padded_rows)]
)
"""Attention of packed sequences with ALiBi, without dropout."""

ARGMAX: Op[Callable[[Tensor], Tensor]] = Op(
    "argmax",
    [Kernel("numpy", numpy_argmax, "cpu", (torch.float32, torch.float64)), Kernel("torch", torch_argmax)],
    dtype=torch.float32,
)
"""The index of the maximum of each row of logits, the first of equal ones."""


def _triton(function: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> Kernel[Any]:
    """A kernel of `ops/triton/`. function: MODULE.NAME."""
    module, _, name = function.partition(".")
    deferred = Deferred(f"dstrain.ops.triton.{module}", name)
    return Kernel("triton", deferred, "cuda", dtypes, package="triton", on_request=True, compiled=True)


def _liger(name: str, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)) -> Kernel[Any]:
    """One of `ops/liger.py`, which calls the package Liger."""
    return Kernel(
        "liger", Deferred("dstrain.ops.liger", name), "cuda", dtypes, package="liger_kernel", on_request=True, compiled=True
    )


DROPOUT: Op[Callable[[Tensor, CountedMask, Tensor | None], Tensor]] = Op(
    "dropout", [_triton("dropout.triton_dropout"), Kernel("torch", counted_dropout)]
)
"""Counted dropout of an input, to which a residual may be added."""


def sum_with_residual(x: Tensor, residual: Tensor | None, mask: CountedMask | None) -> Tensor:
    """residual + x, of which `mask` drops elements; x itself without a residual. (..., D) each"""
    if residual is None:
        return x
    return residual + x if mask is None else DROPOUT.choose(x.device, x.dtype)(x, mask, residual)


def composed_norm(x: Tensor, norm: NormWeights, residual: Tensor | None = None, mask: CountedMask | None = None) -> NormedSum:
    """The norm of x, or of residual + x, of which `mask` drops elements, after the sum itself. (..., D) each"""
    total = sum_with_residual(x, residual, mask)
    return NormedSum(total, plain_norm(total, norm))


NORM: Op[Callable[[Tensor, NormWeights, Tensor | None, CountedMask | None], NormedSum]] = Op(
    "norm", [_triton("norm.triton_norm"), _liger("liger_norm"), Kernel("torch", composed_norm)]
)
"""LayerNorm and RMSNorm of an input, or of its sum with a residual after dropout, and that sum."""

ROTATION: Op[Callable[[Tensor, CosSin, RotaryLayout], Tensor]] = Op(
    "rotary", [_triton("rotary.triton_rotary"), Kernel("torch", apply_rotary)]
)
"""The rotation of queries or keys by their positions."""

GATE: Op[Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]] = Op(
    "gate", [_triton("gate.triton_gate"), Kernel("torch", composed_gate)]
)
"""activation(gate) * up of a gated feed-forward network."""


def _token_loss(function: str) -> Kernel[Any]:
    """One of `ops/token_loss/`, whose files read this table. function: MODULE.NAME."""
    module, _, name = function.partition(".")
    return Kernel("torch", Deferred(f"dstrain.ops.token_loss.{module}", name))


CROSS_ENTROPY: Op[Callable[..., Any]] = Op(
    "cross_entropy",
    [
        _triton("cross_entropy.triton_cross_entropy", (torch.float32,)),
        _liger("liger_cross_entropy", (torch.float32,)),
        _token_loss("cross_entropy.composed_cross_entropy"),
    ],
    dtype=torch.float32,
)
"""`TokenCrossEntropy` of a chunk of logits."""

R_DROP: Op[Callable[..., Any]] = Op(
    "r_drop", [_triton("r_drop.triton_r_drop", (torch.float32,)), _token_loss("r_drop.composed_r_drop")], dtype=torch.float32
)
"""Terms of `TokenRDrop` of a chunk of the logits of two passes."""

DENSE_DISTILLATION: Op[Callable[..., Any]] = Op(
    "dense_distillation",
    [_triton("distillation.triton_dense", (torch.float32,)), _token_loss("distillation.composed_dense")],
    dtype=torch.float32,
)
"""Terms of `TokenDistillation` of a chunk of logits, from the teacher's distribution over all entries."""

SPARSE_DISTILLATION: Op[Callable[..., Any]] = Op(
    "sparse_distillation",
    [_triton("distillation.triton_sparse", (torch.float32,)), _token_loss("distillation.composed_sparse")],
    dtype=torch.float32,
)
"""The same from some entries and a tail."""

OPS = {
    op.name: op
    for op in (
        TRAINING_ATTENTION,
        DROPOUT_ATTENTION,
        MATMUL,
        DECODING_LAYERS,
        ENCODING_LAYERS,
        DECODING_ATTENTION,
        FIXED_LINEAR,
        CACHE_MOVES,
        LOG_PROBS,
        CONTINUATIONS,
        EXTENSION,
        PACKED_ATTENTION,
        PACKED_ALIBI_ATTENTION,
        NORM,
        DROPOUT,
        ROTATION,
        GATE,
        CROSS_ENTROPY,
        R_DROP,
        DENSE_DISTILLATION,
        SPARSE_DISTILLATION,
        ARGMAX,
    )
}


def kernels_by_name(names: Mapping[str, str], device_type: str, dtype: torch.dtype) -> AbstractContextManager[None]:
    """A context in which these kernels run: op -> kernel, as `engine.kernels` has them. dtype: of the model's computation.

    Raises RecipeError at once if one of them cannot run there.
    """
    for name, kernel in names.items():
        if (problem := OPS[name].problem(kernel, device_type, dtype)) is not None:
            usable = [other for other in kernel_names(name) if OPS[name].problem(other, device_type, dtype) is None]
            choice = " or ".join(["auto", *usable])
            raise RecipeError(f"engine.kernels.{name} = {kernel} cannot run here ({problem}); choose {name}: {choice}")
    return _forced(names)


@contextmanager
def _forced(names: Mapping[str, str]) -> Iterator[None]:
    with ExitStack() as stack:
        for name, kernel in names.items():
            stack.enter_context(OPS[name].forced(kernel))
        yield


def compiled_kernels(names: Mapping[str, str], unasked: Iterable[str], device_type: str, dtype: torch.dtype) -> dict[str, str]:
    """Those that are compiled at run time, each with one that is not: "op = kernel" -> "op: kernel".

    names: what a recipe names, op -> kernel. unasked: ops of which the chosen kernel counts too. dtype: of the computation.
    """
    chosen = {op: next(name for name, state in OPS[op].states(device_type, dtype).items() if state.is_chosen) for op in unasked}
    compiled = {}
    for op, name in {**chosen, **names}.items():
        if any(kernel.compiled for kernel in OPS[op].kernels if kernel.name == name):
            plain = (kernel.name for kernel in OPS[op].kernels if not kernel.compiled)
            compiled[f"{op} = {name}"] = (
                f"{op}: {next(each for each in plain if OPS[op].problem(each, device_type, dtype) is None)}"
            )
    return compiled


def kernel_names(op: str) -> list[str]:
    """Of its kernels, in the order of choice."""
    return list(dict.fromkeys(kernel.name for kernel in OPS[op].kernels))


def kernel_states(device_type: str, dtype: torch.dtype) -> dict[str, dict[str, KernelState]]:
    """Op -> kernel -> what it does there. dtype: of the model's computation."""
    return {name: op.states(device_type, dtype) for name, op in OPS.items()}


def kernels_in_use(device_type: str, dtype: torch.dtype, names: Mapping[str, str]) -> str:
    """In a line: the kernels that run, and those that a recipe names, op -> kernel. dtype: of the model's computation."""
    states = (each for op, of_op in kernel_states(device_type, dtype).items() if op not in names for each in of_op.items())
    in_use = dict.fromkeys(kernel for kernel, state in states if state.is_chosen)
    return ", ".join([*in_use, *(f"{kernel} for {op}" for op, kernel in names.items())])
