"""The cost of each variant of the architecture in training: CPU-seconds beside a baseline of the same width, in one process.

The model and the objective of a recipe in a plain loop, as in model_loop.py, once as they are and once for each variant; they
take turns, a few steps each, so that whatever else runs on the machine meets all alike. A ratio is taken within a round, and the
median over the rounds is printed with its range. `products` is the ratio that the multiply-adds of all matrix products promise.

    python tools/variant_loop.py [--recipe translation/multi30k_tiny] [--rounds 7] [--steps 3] [--length 13] [--only rotary ...]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from bare_loop import LENGTH, NUM_TYPES, cpu_seconds
from model_loop import random_batch
from pydantic import TypeAdapter
from torch import nn

from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.nn.attention import CrossAttention, SelfAttention
from dstrain.nn.dropout import seed_masks
from dstrain.nn.embedding import Projection
from dstrain.nn.linear import FusedLinear, Linear
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.train_module import TrainModule
from dstrain.ops.allocator import keep_freed_memory
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe, merge, recipe_tree

YARN = {"kind": "yarn", "factor": 4.0, "original_length": 512}


def both(**changes: Any) -> dict[str, Any]:
    """The same change of encoder and decoder."""
    return {"encoder": changes, "decoder": changes}


def grouped(heads: int) -> dict[str, Any]:
    """So many heads of keys and values everywhere."""
    return {"encoder": {"num_kv_heads": heads}, "decoder": {"num_kv_heads": heads, "num_cross_kv_heads": heads}}


VARIANTS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "rotary": {"position": {"kind": "rotary"}},
    "yarn": {"position": {"kind": "rotary", "scaling": YARN}},
    "dynamic_yarn": {"position": {"kind": "rotary", "scaling": {"kind": "dynamic_yarn", "original_length": 8}}},
    "alibi": {"position": {"kind": "alibi"}},
    "gated": both(feed_forward="gated"),
    "gqa": grouped(2),
    "mqa": grouped(1),
    "rms_norm": {"norm": {"kind": "rms_norm"}},
    "pre_norm": {"norm_order": "pre"},
    "stacked": both(unique_layers=1),
    "factorized": {"embedding": {"kind": "factorized", "dim": 64, "tie": "all"}},
    "output_activation": {"decoder": {"output_activation": "gelu"}},
}


class Loop:
    """One model and its optimizer."""

    def __init__(self, recipe: Recipe, changes: dict[str, Any], length: int) -> None:
        config: Any = TypeAdapter(ModelConfig).validate_python(merge(recipe_tree(recipe)["model"], changes))
        self.model = build_model(config, VocabularySizes(source=NUM_TYPES, target=NUM_TYPES), seed=1)
        self.module = TrainModule(self.model, build_cross_entropy(recipe.objective)).train()
        self.optimizer = torch.optim.Adam(self.module.parameters(), 5e-4, betas=(0.9, 0.98), fused=True)
        self.length = length

    def step(self) -> None:
        """One update on random tokens."""
        batch = random_batch(self.length)
        (self.module(batch).loss_sum / batch.num_targets).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, steps: int) -> float:
        """CPU time of so many steps."""
        start = cpu_seconds()
        for _ in range(steps):
            self.step()
        return cpu_seconds() - start

    def products(self) -> float:
        """Multiply-adds of the matrix products of one forward pass."""
        total = 0

        def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            nonlocal total
            match module:
                case Linear() | FusedLinear() | Projection():
                    total += inputs[0].numel() // inputs[0].shape[-1] * module.weight.numel()
                    back = module.back if isinstance(module, Projection) else None
                    total += 0 if back is None else inputs[0].numel() // inputs[0].shape[-1] * back.numel()
                case SelfAttention():
                    total += 2 * inputs[0].numel() * inputs[0].shape[1]
                case CrossAttention():
                    total += 2 * inputs[0].numel() * inputs[1].shape[2]

        handles = [part.register_forward_hook(count) for part in self.model.modules()]
        with torch.no_grad():
            self.module(random_batch(self.length))
        for handle in handles:
            handle.remove()
        return float(total)


def measure(loops: dict[str, Loop], rounds: int, steps: int, report: Callable[[str], None]) -> dict[str, list[float]]:
    """CPU-seconds of every loop in every round."""
    for loop in loops.values():
        loop.seconds(2)
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(1, rounds + 1):
        for name, loop in loops.items():
            found[name].append(loop.seconds(steps))
        report(f"round {number} of {rounds}: " + ", ".join(f"{name} {times[-1]:.2f}" for name, times in found.items()))
    return found


def main() -> None:
    """Measure alternately and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="translation/multi30k_tiny")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a variant in a round")
    parser.add_argument("--length", type=int, default=LENGTH, help="tokens of a sentence; a batch has as many tokens with any")
    parser.add_argument("--only", nargs="+", choices=[name for name in VARIANTS if name != "baseline"], default=list(VARIANTS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    seed_masks(1, 0)
    keep_freed_memory()
    recipe = load_recipe(args.recipe)
    loops = {name: Loop(recipe, VARIANTS[name], args.length) for name in dict.fromkeys(["baseline", *args.only])}
    products = {name: loop.products() for name, loop in loops.items()}
    times = measure(loops, args.rounds, args.steps, lambda line: print(line, flush=True))
    tokens = args.steps * random_batch(args.length).num_targets
    print(f"\n| variant ({args.length} tokens) | target tokens per CPU-second | time beside the baseline | products |")
    print("|---|---|---|---|")
    for name, seconds in times.items():
        ratios = sorted(own / base for own, base in zip(seconds, times["baseline"], strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        speed = tokens / statistics.median(seconds)
        print(f"| {name} | {speed:,.0f} | {spread} | {products[name] / products['baseline']:.3f} |")


if __name__ == "__main__":
    main()
