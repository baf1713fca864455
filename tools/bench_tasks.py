#!/usr/bin/env python3
"""Examples that the tasks of text make in a CPU-second, from lines of prepared data, in micro-batches as training has them.

python tools/bench_tasks.py --data data/denoising
"""

from __future__ import annotations

import argparse
import time
from itertools import cycle
from pathlib import Path

import numpy as np

from dstrain.data.batching.collate import Collator
from dstrain.data.batching.plan import evaluation_batches
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.tasks.build import build_examples
from dstrain.data.tasks.config import Denoising, LanguageModeling, Mass, PrefixLanguageModeling, SpanCorruption, TextTask
from dstrain.data.tokenizers.tokenizer import load_tokenizers


def main() -> None:
    """Read micro-batches by each task, alone and with the collator behind it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="prepared text whose tokenizer has the symbols of the tasks")
    parser.add_argument("--max-tokens", type=int, default=4096)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU-seconds of each measurement (default: %(default)s)")
    args = parser.parse_args()
    tokenizer = load_tokenizers(args.data / "tokenizer").target
    dataset = open_dataset(args.data, "train")
    groups = evaluation_batches(dataset.source_lengths, dataset.target_lengths, args.max_tokens)
    tasks: list[TextTask] = [LanguageModeling(), PrefixLanguageModeling(), Denoising(), Mass(), SpanCorruption()]
    collator = Collator("encoder_decoder", pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id)
    for task in tasks:
        if missing := set(task.symbols()) - set(tokenizer.tokens(range(tokenizer.vocab_size))):
            print(f"{task.kind:20} needs {', '.join(missing)}")
            continue
        examples = build_examples(dataset, [task], tokenizer, split="train")
        for name, collates in (("read", False), ("read and collated", True)):
            began, lines, tokens = time.process_time(), 0, 0
            for number, group in enumerate(cycle(groups)):
                pairs = examples.read(1 + number, group)
                if collates:
                    collator(pairs, np.asarray(group))
                lines, tokens = lines + len(group), tokens + int(dataset.target_lengths[group].sum())
                if time.process_time() - began > args.seconds:
                    break
            seconds = time.process_time() - began
            print(f"{task.kind:20} {name:18} {lines / seconds:10,.0f} lines, {tokens / seconds:12,.0f} tokens a CPU-second")


if __name__ == "__main__":
    main()
