"""Does decoding slow down with position by more than attention itself costs? Tokens per CPU-second at 64 and at 1,024 tokens.

For each kind of model: the CPU time of single decoder steps when the cache holds so many tokens (random weights and tokens, 4
layers of 128 features, 16 rows), and the part of it that is spent in the kernel of self-attention. `beyond` is by how much more
a step at the far position costs than if only attention had grown, in percent: 0 where nothing else does. With beams, each row
continues a row of its sentence drawn at random at every step, as in a search; `unrelated` is the worst case, rows that change
places and never descend from one another. Near and far alternate, and the fastest round of each counts, as other work on the
machine takes memory bandwidth.

    OMP_NUM_THREADS=1 python tools/bench_positions.py [--near 64] [--far 1024] [--rounds 9]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from pydantic import TypeAdapter
from torch import Tensor

import dstrain.nn.attention
from dstrain.batch import Sequences
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.ops.allocator import keep_freed_memory
from dstrain.ops.attention import attention

TYPES, ROWS, SOURCE, HEADS, DIM, DEPTH, STEPS, BEAMS = 1000, 16, 14, 4, 128, 4, 16, 4
STACK = {"depth": DEPTH, "num_heads": HEADS, "ffn_dim": 256}
SHAPE: dict[str, Any] = {"model_dim": DIM, "decoder": STACK, "max_target_length": 2048}
PAIRED: dict[str, Any] = {**SHAPE, "kind": "encoder_decoder", "encoder": STACK}
ROTARY = {"position": {"kind": "rotary"}}
Parents = Callable[[], Tensor]


def alone() -> Tensor:
    """Each row continues itself."""
    return torch.arange(ROWS)


def drawn() -> Tensor:
    """Each of a sentence's rows continues one of them."""
    return (torch.arange(0, ROWS, BEAMS)[:, None] + torch.randint(BEAMS, (ROWS // BEAMS, BEAMS))).flatten()


def unrelated() -> Tensor:
    """The rows of a sentence are permuted."""
    return torch.arange(ROWS).view(-1, BEAMS).flip(1).flatten()


MODELS: dict[str, tuple[dict[str, Any], Parents]] = {
    "sinusoidal": (PAIRED, alone),
    "rotary": ({**PAIRED, **ROTARY}, alone),
    "alibi": ({**PAIRED, "position": {"kind": "alibi"}}, alone),
    "rotary, grouped heads": ({**PAIRED, **ROTARY, "decoder": {**STACK, "num_kv_heads": 1}}, alone),
    "rotary, decoder-only": ({**SHAPE, **ROTARY, "kind": "decoder_only"}, alone),
    "rotary, 4 beams": ({**PAIRED, **ROTARY}, drawn),
    "rotary, 4 beams, unrelated": ({**PAIRED, **ROTARY}, unrelated),
}


class AttentionHook:
    """Replaces `attention` in the layers and adds up the time of self-attention."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """As `attention`."""
        start = time.thread_time()
        mixed = attention(query, key, value, **options)
        self.seconds += (time.thread_time() - start) * (key.shape[2] != SOURCE)
        return mixed


def step_seconds(model: Model, length: int, parents: Parents, timed_attention: AttentionHook) -> tuple[float, float]:
    """CPU time of a step with about `length` tokens in the cache, the last few of which were decoded step by step.

    The second number is the part of self-attention.
    """
    beams = 1 if parents is alone else BEAMS
    source = Sequences(torch.randint(4, TYPES, (ROWS // beams, SOURCE)), torch.full((ROWS // beams,), SOURCE))
    state = model.start(source, num_sentences=ROWS // beams, rows_per_sentence=beams, max_length=length + STEPS)
    model.step(torch.randint(4, TYPES, (ROWS, length - STEPS - STEPS // 2)), state)
    tokens = torch.randint(4, TYPES, (ROWS, 1))
    for _ in range(2):
        start, timed_attention.seconds = time.thread_time(), 0.0
        for _ in range(STEPS):
            model.step(tokens, state)
            state.reorder(parents())
    return (time.thread_time() - start) / STEPS, timed_attention.seconds / STEPS


@torch.inference_mode()
def main() -> None:
    """Measure alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--near", type=int, default=64)
    parser.add_argument("--far", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lengths, timed_attention = (args.near, args.far), AttentionHook()
    dstrain.nn.attention.attention = timed_attention  # type: ignore[assignment]
    print(f"| model | tokens per CPU-second at {args.near:,} | at {args.far:,} | attention's part | beyond |")
    print("|---|---|---|---|---|")
    for name, (tree, parents) in MODELS.items():
        config: Any = TypeAdapter(ModelConfig).validate_python(tree)
        model = build_model(config, VocabularySizes(source=TYPES, target=TYPES), seed=1).eval()
        rounds: dict[int, list[tuple[float, float]]] = {length: [] for length in lengths}
        for _ in range(args.rounds + 1):
            for length in lengths:
                rounds[length].append(step_seconds(model, length, parents, timed_attention))
        (near, near_attention), (far, far_attention) = (min(rounds[length][1:]) for length in lengths)
        beyond = far / (near + far_attention - near_attention) - 1
        speeds = f"{ROWS / near:,.0f} | {ROWS / far:,.0f}"
        print(f"| {name} | {speeds} | {far_attention / far:.0%} of a step | {beyond:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
