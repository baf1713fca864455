"""Memory and time of distillation: chunked projection and loss beside all logits at once, and beside plain cross-entropy.

    python tools/bench_kd.py [--tokens 4096] [--vocab-size 131072] [--chunk-tokens auto] [--divergence forward_kl]

Each way runs in a process of its own, which reports how far its resident memory rose above that before the loss (VmHWM), and the
processor time of loss and backward. `dense` is `linear_distillation` with a teacher beside the student, `sampled` and `top` take
12 stored entries a token, `naive` makes the logits of both models and leaves the rest to autograd. A limit that is given by
--limit-percent makes the exit code 1 where `dense` needs more than that share of naive's memory.

Then the bytes that dumped logits take, files and all: 1,000 tokens in sentences of 25, at 65,536 vocabulary entries of which
about 12 a token are likely.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from dstrain.data.batching.collate import Collator
from dstrain.distillation.store.codec import TokenKeys, build_codec
from dstrain.distillation.store.dump import ShardDraft
from dstrain.distillation.store.manifest import Method, SampleMethod, TopKMethod
from dstrain.ops.divergence import Divergence, DivergenceKind
from dstrain.ops.teacher_signal import DenseSignal, SparseSignal
from dstrain.ops.token_loss.cross_entropy import linear_cross_entropy
from dstrain.ops.token_loss.distillation import DistillationTerms, linear_distillation, reference_linear_distillation
from dstrain.storage.hashing import HashingWriter

WAYS = ("naive", "dense", "sampled", "top", "cross_entropy")
STUDENT_DIM, TEACHER_DIM, KEPT = 64, 96, 12


def peak_bytes() -> int:
    """The highest resident memory of this process so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def one(args: argparse.Namespace) -> dict[str, float]:
    """Memory above the inputs, and processor seconds, of one way."""
    torch.manual_seed(1)
    features = torch.randn(args.tokens, STUDENT_DIM, requires_grad=True)
    weight = (torch.randn(args.vocab_size, STUDENT_DIM) / 8).requires_grad_()
    labels = torch.randint(args.vocab_size, (args.tokens,))
    signal: DenseSignal | SparseSignal = DenseSignal(
        [torch.randn(args.tokens, TEACHER_DIM)], [torch.randn(args.vocab_size, TEACHER_DIM) / 8]
    )
    if args.way in {"sampled", "top"}:
        ids = torch.stack([torch.randperm(args.vocab_size)[:KEPT] for _ in range(args.tokens)])
        tail = torch.full((args.tokens,), 0.4 if args.way == "top" else 0.0)
        signal = SparseSignal(ids, torch.full(ids.shape, 1 / KEPT) * (1 - tail[:, None]), tail)
    terms = DistillationTerms(Divergence(args.divergence, 0.5), 1.0, 1.0, 1.0, 0.1)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from the resident memory of now
    before, begin = peak_bytes(), time.process_time()
    if args.way == "cross_entropy":
        loss = linear_cross_entropy(features, weight, labels, label_smoothing=0.1, chunk_tokens=args.chunk_tokens)[0]
    else:
        function = reference_linear_distillation if args.way == "naive" else linear_distillation
        loss = function(features, weight, labels, signal, terms=terms, chunk_tokens=args.chunk_tokens, selected=None).loss
    loss.backward()
    return {"bytes": peak_bytes() - before, "seconds": time.process_time() - begin, "loss": loss.item() / args.tokens}


def stored(method: Method, vocab_size: int = 65536, sentences: int = 40, length: int = 25) -> tuple[float, float]:
    """Entries kept and bytes taken a token."""
    torch.manual_seed(1)
    draft, kept = ShardDraft(build_codec(method, vocab_size)), 0
    for first in range(0, sentences, 4):
        examples = np.arange(first, first + 4)
        batch = Collator("encoder_decoder", pad_id=1, eos_id=2)([(np.arange(length), np.arange(length))] * 4, examples)
        logits = 7.0 * torch.randn(4 * length, vocab_size)
        keys = TokenKeys(examples.repeat(length), np.tile(np.arange(length), 4))
        chosen = [tensor.numpy() for tensor in draft.codec.select(logits, keys)]
        kept += sum(len(np.unique(row)) for row in chosen[0])
        draft.add(batch, chosen)
    with tempfile.TemporaryFile() as file:
        sink = HashingWriter(file)
        tokens = draft.finish(sink)
    return kept / tokens, sink.size / tokens


def main() -> int:
    """Run all ways, each in its process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab-size", type=int, default=131072)
    parser.add_argument("--chunk-tokens", type=lambda text: text if text == "auto" else int(text), default="auto")
    parser.add_argument("--divergence", choices=get_args(DivergenceKind), default="forward_kl")
    parser.add_argument("--limit-percent", type=float)
    parser.add_argument("--way", choices=WAYS, help="run only this one and print JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(one(args)))
        return 0
    found = {}
    for way in WAYS if args.divergence == "forward_kl" else ("naive", "dense", "top"):
        command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[way] = json.loads(run.stdout)
        figures, share = found[way], found[way]["bytes"] / found["naive"]["bytes"]
        size = f"{figures['bytes'] / 2**20:9.0f} MiB {share:7.1%}"
        print(f"{way:14} {size} {figures['seconds']:7.2f} s  loss {figures['loss']:.6f}")
    for name, method in (("sampled, 50 draws", SampleMethod()), ("top 64", TopKMethod(k=64))):
        kept, size = stored(method)
        print(f"{name:18} {kept:5.1f} entries  {size:6.1f} bytes a token")
    limit = args.limit_percent
    return int(limit is not None and found["dense"]["bytes"] > limit / 100 * found["naive"]["bytes"])


if __name__ == "__main__":
    raise SystemExit(main())
