"""How much host memory a rank needs until the end of the first training step, above its imports.

    python tools/peak_memory.py [--deepspeed zero3] [--precision fp32] [--layers 8] [--model-dim 512] [--vocabulary 8000]

Starts two ranks on this machine, builds a model of 63 million parameters under the engine, as `dstrain train` does, and takes one
step of 32 tokens, or of --rows sentences of --length tokens on each rank. Prints one JSON line per rank, in bytes:

- `built`, `peak`: highest resident memory until the engine is built, and until the first step has ended, above what the process
  holds after its imports, joining the group and one step of a toy model (libraries are loaded on first use);
- `share`: parameters in the precision of computing, gradients in that of adding up (fp32, or fp16), and 12 bytes of optimizer
  state (fp32 weight and two moments), divided by the ranks; `largest`: the largest tensor, in fp32;
- `later`: the highest after `--further-steps`. From the first step on malloc keeps freed memory, for speed (`ops/allocator.py`),
  unless `--return-freed` lets it go;
- `estimated`: what `dstrain estimate` counts for the rank.

Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

WORLD_SIZE = 2


def resident(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (highest) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) * 1024


def rank(args: argparse.Namespace) -> dict[str, Any]:
    """The measurements of this rank."""
    import numpy as np
    import torch

    from dstrain.batch import Size
    from dstrain.data.batching.collate import Collator
    from dstrain.engine import training_engine
    from dstrain.engine.config import AdamConfig, ConstantSchedule, EngineConfig
    from dstrain.engine.launch import load_deepspeed
    from dstrain.engine.training_engine import TrainEngine
    from dstrain.estimate.parameters import ParameterSizes
    from dstrain.estimate.planner import estimate_layout
    from dstrain.estimate.report import memory_parts
    from dstrain.estimate.workload import ParallelLayout, Sharding, Workload
    from dstrain.models.config import DecoderStackConfig, EncoderDecoderConfig, PlainEmbedding, StackConfig, VocabularySizes
    from dstrain.models.factory import build_model, initial_values
    from dstrain.objectives.config import CrossEntropyConfig
    from dstrain.objectives.cross_entropy import CrossEntropy
    from dstrain.objectives.train_module import TrainModule
    from dstrain.ops.allocator import return_freed_memory
    from dstrain.parallel.mesh import build_mesh

    mesh = build_mesh("cpu")
    load_deepspeed(mesh)
    toy = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(toy.parameters(), fused=True)
    mesh.world.all_reduce(toy(torch.zeros(1, 2)).sum().detach())
    toy(torch.zeros(1, 2)).sum().backward()
    optimizer.step()

    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    before = resident("VmRSS")
    stack: dict[str, Any] = {"depth": args.layers, "num_heads": 8, "ffn_dim": 4 * args.model_dim}
    config = EncoderDecoderConfig(
        model_dim=args.model_dim,
        encoder=StackConfig(**stack),
        decoder=DecoderStackConfig(**stack),
        norm_order="pre",
        embedding=PlainEmbedding(tie="all"),
        position={"kind": "rotary"},
    )
    vocabulary = VocabularySizes(source=args.vocabulary, target=args.vocabulary)
    model = build_model(config, vocabulary, seed=None)
    sizes, counted = [parameter.numel() for parameter in model.parameters()], ParameterSizes.of(model)
    settings = EngineConfig(deepspeed=args.deepspeed, precision=args.precision, activation_checkpointing=args.checkpointing)
    if args.return_freed:
        training_engine.keep_freed_memory = return_freed_memory  # type: ignore[attr-defined]
    engine = TrainEngine(
        TrainModule(model, CrossEntropy(CrossEntropyConfig())),
        optimizer=AdamConfig(learning_rate=1e-3),
        schedule=ConstantSchedule(),
        engine=settings,
        ema=None,
        seed=1,
        mesh=mesh,
        weights=initial_values(model, vocabulary, 1),
    )
    built = resident("VmHWM") - before
    ids = np.arange(args.rows * args.length).reshape(args.rows, args.length) % (args.vocabulary - 4) + 4
    batch = Collator("encoder_decoder", pad_id=1, eos_id=2)([(row, row) for row in ids], np.arange(args.rows))
    size = Size(args.rows * args.length * WORLD_SIZE, args.rows * WORLD_SIZE)
    report = engine.train_step([batch], size)
    peak = resident("VmHWM") - before
    for _ in range(args.further_steps):
        engine.train_step([batch], size)
    workload = Workload(
        model=config,
        vocabulary=vocabulary,
        precision=args.precision,
        loss="cross_entropy",
        chunk_tokens=CrossEntropyConfig().chunk_tokens,
        tokens_per_step=size.num_targets,
        source_length=args.length,
        target_length=args.length,
    )
    sharding = Sharding.of(settings, replicas=WORLD_SIZE, size=counted.model_size)
    layout = ParallelLayout(WORLD_SIZE, 1, 1, args.rows * args.length, args.checkpointing, sharding, "cpu", packed=False)
    memory = estimate_layout(workload, layout, parameters=counted).memory
    computing, gradient = {"fp32": (4, 4), "bf16": (2, 4), "fp16": (2, 2)}[args.precision]
    return {
        "parameters": sum(sizes),
        "built": built,
        "peak": peak,
        "later": resident("VmHWM") - before,
        "share": (computing + gradient + 12) * sum(sizes) // WORLD_SIZE,
        "largest": 4 * max(sizes),
        "loss": report.loss,
        "estimated": {name: round(value) for name, value in {**memory_parts(memory), "total": memory.total}.items()},
    }


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = argparse.ArgumentParser(description="Peak host memory of two ranks until the end of the first training step.")
    parser.add_argument("--deepspeed", default="zero3", help="a file of ds_configs, by name or path")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--layers", type=int, default=8, help="of the encoder and of the decoder")
    parser.add_argument("--model-dim", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8000)
    parser.add_argument("--rows", type=int, default=2, help="sentences of a micro-batch, one a step and rank")
    parser.add_argument("--length", type=int, default=8, help="tokens of a sentence, on each side")
    parser.add_argument("--checkpointing", default="none", choices=("none", "selective", "full"))
    parser.add_argument("--return-freed", action="store_true", help="let malloc return freed memory, in later steps too")
    parser.add_argument("--further-steps", type=int, default=0, help="after the first one")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)  # not from the environment: the caller may be a rank itself
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(rank(args)) + "\n", end="", flush=True)  # in one write: the ranks share the pipe
        os._exit(0)  # DeepSpeed's threads may hold the interpreter
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(WORLD_SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, *sys.argv, "--rank", str(index)], env=shared | {"RANK": str(index), "LOCAL_RANK": str(index)}
        )
        for index in range(WORLD_SIZE)
    ]
    sys.exit(max(process.wait() for process in processes))


if __name__ == "__main__":
    main()
