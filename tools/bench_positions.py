"""Does decoding slow down with position by more than attention itself costs? Tokens per CPU-second at 64 and at 1,024 tokens.

For each kind of model: the CPU time of single decoder steps when the cache holds so many tokens (random weights and tokens, 4
layers of 128 features, 16 rows), and the time that attention alone takes over the very views of that cache. `beyond` is what a
step at the far position costs beside the near one and what attention costs more there, in percent: 0 where nothing but attention
grows. With beams, rows change places at every step, which copies the cache. Near and far take turns, and
the fastest round of each counts, as other work on the machine takes memory bandwidth.

    OMP_NUM_THREADS=1 python tools/bench_positions.py [--near 64] [--far 1024] [--rounds 9]
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from bare_loop import cpu_seconds
from pydantic import TypeAdapter

from dstrain.batch import Sequences
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import Model, build_model
from dstrain.nn.cache import KeyValueCache
from dstrain.ops.allocator import keep_freed_memory
from dstrain.ops.attention import attention

TYPES, ROWS, SOURCE, HEADS, DIM, DEPTH, STEPS = 1000, 16, 14, 4, 128, 4, 16
STACK = {"depth": DEPTH, "num_heads": HEADS, "ffn_dim": 256}
SHAPE: dict[str, Any] = {"model_dim": DIM, "decoder": STACK, "max_target_length": 2048}
PAIRED: dict[str, Any] = {**SHAPE, "kind": "encoder_decoder", "encoder": STACK}
ROTARY = {"position": {"kind": "rotary"}}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "sinusoidal": (PAIRED, 1),
    "rotary": ({**PAIRED, **ROTARY}, 1),
    "alibi": ({**PAIRED, "position": {"kind": "alibi"}}, 1),
    "rotary, grouped heads": ({**PAIRED, **ROTARY, "decoder": {**STACK, "num_kv_heads": 1}}, 1),
    "rotary, decoder-only": ({**SHAPE, **ROTARY, "kind": "decoder_only"}, 1),
    "rotary, 4 beams": ({**PAIRED, **ROTARY}, 4),
}


def step_seconds(model: Model, length: int, beams: int) -> float:
    """CPU time of a step with about `length` tokens in the cache."""
    source = Sequences(torch.randint(4, TYPES, (ROWS // beams, SOURCE)), torch.full((ROWS // beams,), SOURCE))
    state = model.start(source, num_sentences=ROWS // beams, rows_per_sentence=beams, max_length=length + STEPS)
    model.step(torch.randint(4, TYPES, (ROWS, length - STEPS // 2)), state)
    places = torch.arange(ROWS).view(-1, beams).flip(1).flatten()
    tokens = torch.randint(4, TYPES, (ROWS, 1))
    start = cpu_seconds()
    for _ in range(STEPS):
        model.step(tokens, state)
        state.reorder(places)
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
    for name, (tree, beams) in MODELS.items():
        config: Any = TypeAdapter(ModelConfig).validate_python(tree)
        model = build_model(config, VocabularySizes(source=TYPES, target=TYPES), seed=1).eval()
        kv_heads = config.decoder.num_kv_heads or HEADS
        steps: dict[int, list[float]] = {length: [] for length in lengths}
        alone: dict[int, list[float]] = {length: [] for length in lengths}
        for _ in range(args.rounds + 1):
            for length in lengths:
                steps[length].append(step_seconds(model, length, beams))
                alone[length].append(attention_seconds(length, kv_heads))
        near, far = (min(steps[length][1:]) for length in lengths)
        near_alone, far_alone = (min(alone[length][1:]) for length in lengths)
        beyond = far / (near + far_alone - near_alone) - 1
        speeds = f"{ROWS / near:,.0f} | {ROWS / far:,.0f}"
        print(f"| {name} | {speeds} | {far_alone / far:.0%} of a step | {beyond:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
