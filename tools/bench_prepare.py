"""Preparation against bare SentencePiece, at the same time, in CPU-seconds.

Both read Multi30k English-German below the directory that DSTRAIN_DATA names, repeated, with the same BPE
model of 8,000 pieces. Bare SentencePiece encodes lists of lines that are in memory already; dstrain goes from files on the disk
to checked, filtered, hashed and synced Arrow shards with a manifest. The figure of a repetition is lines (both sides) per
CPU-second, user and system, children included; repetitions alternate and the median counts.

    OMP_NUM_THREADS=1 python tools/bench_prepare.py [--copies 10] [--repeats 3] [--workers 1 2]
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import tempfile
import time
from pathlib import Path

import sentencepiece

from dstrain.data.config import DataConfig
from dstrain.data.prepared.prepare import prepare
from dstrain.data.tokenizers.config import TrainedSentencePiece
from dstrain.data.tokenizers.training import train_sentencepiece

CORPUS = Path(os.environ.get("DSTRAIN_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "multi30k"


def cpu_seconds() -> float:
    """Of this process and the children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def encode_alone(model: bytes, sides: list[list[str]]) -> int:
    """SentencePiece's own batch encode, one thread; returns the number of lines."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    for lines in sides:
        processor.encode(lines, out_type=int, num_threads=1)
    return sum(map(len, sides))


def config_for(folder: Path) -> DataConfig:
    """The replicated corpus with a model that is there already."""
    return DataConfig.model_validate(
        {
            "train": [{"kind": "parallel", "source": str(folder / "train.en"), "target": str(folder / "train.de")}],
            "valid": [{"kind": "parallel", "source": str(CORPUS / "val.en"), "target": str(CORPUS / "val.de")}],
            "tokenizer": {"kind": "sentencepiece_files", "source_model": str(folder / "joint.model")},
        }
    )


def main() -> None:
    """Print both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--copies", type=int, default=10, help="how often the 29,000 training pairs are repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for side in ("en", "de"):
            (folder / f"train.{side}").write_bytes((CORPUS / f"train.{side}").read_bytes() * args.copies)
        sides = [(folder / f"train.{side}").read_text(encoding="utf-8").split("\n")[:-1] for side in ("en", "de")]
        model = train_sentencepiece([*sides[0][:29_000], *sides[1][:29_000]], TrainedSentencePiece(vocab_size=8000))
        (folder / "joint.model").write_bytes(model)
        alone: list[float] = []
        ours: dict[int, list[tuple[float, float]]] = {workers: [] for workers in args.workers}
        for repeat in range(args.repeats):
            start = cpu_seconds()
            lines = encode_alone(model, sides)
            alone.append(lines / (cpu_seconds() - start))
            for workers in args.workers:
                start, wall = cpu_seconds(), time.perf_counter()
                prepare(config_for(folder), folder / f"data-{repeat}-{workers}", workers=workers, progress=False)
                ours[workers].append((lines / (cpu_seconds() - start), lines / (time.perf_counter() - wall)))
    yardstick = statistics.median(alone)
    print(f"bare sentencepiece: {yardstick:,.0f} lines per CPU-second")
    for workers, runs in ours.items():
        cpu, wall = (statistics.median(column) for column in zip(*runs, strict=True))
        print(
            f"dstrain prepare, {workers} worker(s): {cpu:,.0f} lines per CPU-second = {cpu / yardstick:.0%} of it; "
            f"{wall:,.0f} lines per second of wall time"
        )


if __name__ == "__main__":
    main()
