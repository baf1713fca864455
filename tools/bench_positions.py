"""Does decoding slow down with position by more than attention itself costs? Tokens per CPU-second at 64 and at 1,024 tokens.

For each kind of model: the CPU time of single decoder steps when the cache holds so many tokens (random weights and tokens, 4
layers of 128 features, 16 rows), and the time that attention alone takes over the very views of that cache. `beyond` is what a
step at the far position costs beside the near one and what attention costs more there, in percent: 0 where nothing but attention
grows. With beams, each row continues a row of its sentence drawn at random at every step, as in a search; `strangers` is the
worst case, rows that change places and never descend from one another. Near and far take turns, and the fastest round of each
counts, as other work on the machine takes memory bandwidth.

    OMP_NUM_THREADS=1 python tools/bench_positions.py [--near 64] [--far 1024] [--rounds 9]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from bare_loop import cpu_seconds
from pydantic import TypeAdapter
from torch import Tensor

from dstrain.batch import Sequences
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.nn.cache import KeyValueCache
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


def strangers() -> Tensor:
    """The rows of a sentence change places."""
    return torch.arange(ROWS).view(-1, BEAMS).flip(1).flatten()


MODELS: dict[str, tuple[dict[str, Any], Parents]] = {
    "sinusoidal": (PAIRED, alone),
    "rotary": ({**PAIRED, **ROTARY}, alone),
    "alibi": ({**PAIRED, "position": {"kind": "alibi"}}, alone),
    "rotary, grouped heads": ({**PAIRED, **ROTARY, "decoder": {**STACK, "num_kv_heads": 1}}, alone),
    "rotary, decoder-only": ({**SHAPE, **ROTARY, "kind": "decoder_only"}, alone),
    "rotary, 4 beams": ({**PAIRED, **ROTARY}, drawn),
    "rotary, 4 beams, strangers": ({**PAIRED, **ROTARY}, strangers),
}


def step_seconds(model: Model, length: int, parents: Parents) -> float:
    """CPU time of a step with about `length` tokens in the cache, the last few of which were decoded step by step."""
    beams = 1 if parents is alone else BEAMS
    source = Sequences(torch.randint(4, TYPES, (ROWS // beams, SOURCE)), torch.full((ROWS // beams,), SOURCE))
    state = model.start(source, num_sentences=ROWS // beams, rows_per_sentence=beams, max_length=length + STEPS)
    model.step(torch.randint(4, TYPES, (ROWS, length - STEPS - STEPS // 2)), state)
    tokens = torch.randint(4, TYPES, (ROWS, 1))
    for _ in range(2):
        start = cpu_seconds()
        for _ in range(STEPS):
            model.step(tokens, state)
            state.reorder(parents())
    return (cpu_seconds() - start) / STEPS


def attention_seconds(length: int, kv_heads: int) -> float:
    """CPU time of attention alone in all layers of such a step."""
    cache = KeyValueCache(
        depth=DEPTH, num_rows=ROWS, num_heads=kv_heads, max_length=length + STEPS, head_dim=DIM // HEADS, like=torch.empty(0)
    )
    new = torch.randn(ROWS, kv_heads, length, DIM // HEADS)
    layers = [cache.at(depth).append(new, new) for depth in range(DEPTH)]
    query = torch.randn(ROWS, HEADS, 1, DIM // HEADS)
    start = cpu_seconds()
    for _ in range(STEPS):
        for keys, values in layers:
            attention(query, keys, values)
    return (cpu_seconds() - start) / STEPS


@torch.inference_mode()
def main() -> None:
    """Measure in turns and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--near", type=int, default=64)
    parser.add_argument("--far", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    lengths = (args.near, args.far)
    print(f"| model | tokens per CPU-second at {args.near:,} | at {args.far:,} | attention's part | beyond |")
    print("|---|---|---|---|---|")
    for name, (tree, parents) in MODELS.items():
        config: Any = TypeAdapter(ModelConfig).validate_python(tree)
        model = build_model(config, VocabularySizes(source=TYPES, target=TYPES), seed=1).eval()
        kv_heads = config.decoder.num_kv_heads or HEADS
        steps: dict[int, list[float]] = {length: [] for length in lengths}
        attending: dict[int, list[float]] = {length: [] for length in lengths}
        for _ in range(args.rounds + 1):
            for length in lengths:
                steps[length].append(step_seconds(model, length, parents))
                attending[length].append(attention_seconds(length, kv_heads))
        near, far = (min(steps[length][1:]) for length in lengths)
        near_alone, far_alone = (min(attending[length][1:]) for length in lengths)
        beyond = far / (near + far_alone - near_alone) - 1
        speeds = f"{ROWS / near:,.0f} | {ROWS / far:,.0f}"
        print(f"| {name} | {speeds} | {far_alone / far:.0%} of a step | {beyond:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
