"""How many tokens of a vocabulary loss have logits at one time, if the recipe leaves it to the device (`chunk_tokens: auto`).

A chunk costs c V numbers of memory. It also reads and writes the gradient of the whole weight, V x E, once: next to the passes
over its logits that is a share of E / c, so a chunk should have about as many tokens as there are features, or more.

CPU: 1,024 tokens, fewer only where their logits would take over 256 MiB, and never under 256. Logits that fit into a cache gain
nothing. CPU time of loss and backward against 1,024 tokens (2,048 tokens of 256 features, one busy core of a Xeon at 2 GHz,
2026-11-30, lowest of two or three, to some 10 %):

| | V | 128 | 256 | 512 | 2,048 |
|---|---|---|---|---|---|
| cross-entropy | 8,000 | 1.03 | 0.99 | 1.12 | 1.12 |
| | 32,000 | 1.13 | 1.19 | 1.04 | 1.03 |
| dense distillation | 8,000 | 1.12 | 0.90 | 0.94 | 0.97 |
| | 32,000 | 1.01 | 1.03 | 1.03 | 0.91 |
| sparse distillation | 32,000 | 1.14 | 1.19 | 1.04 | 1.11 |

GPU, not measured: products want thousands of tokens, and a loss should take a fifth of the memory of all logits of a large batch
at most: as many tokens as have logits of 512 MiB.

The rule sees device and vocabulary only, never the batch, so all ranks cut the same chunks: a sliced vocabulary has collectives
in each. A loss has a few times that memory for its temporaries, see `estimate/loss.py`.
"""

from dstrain.config_base import ChunkTokens

CPU_TOKENS, CPU_BYTES, CPU_LEAST = 1024, 2**28, 256
GPU_BYTES = 2**29
_BYTES = 4  # of a logit, in float32


def resolve_chunk_tokens(chunk_tokens: ChunkTokens, device_type: str, entries: int) -> int:
    """The number itself, or that of `auto` there. entries: of the largest slice of the vocabulary that a rank holds."""
    if chunk_tokens != "auto":
        return chunk_tokens
    if device_type == "cuda":
        return max(1, GPU_BYTES // (_BYTES * entries))
    return min(CPU_TOKENS, max(CPU_LEAST, CPU_BYTES // (_BYTES * entries)))
