"""How long a data set of many shards takes to open and to plan, how much memory, and how fast its rows are read in either order.

python tools/bench_shards.py                               # 10,000 shards of 1,000 pairs
python tools/bench_shards.py --shards 200 --rows 50000

The shards are hard links to one, so they take no space; each is opened, checked and mapped like any other.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from dstrain.data.batching.order import ShuffledOrder
from dstrain.data.batching.shard_window import build_shuffle
from dstrain.data.config import DataConfig
from dstrain.data.prepared.dataset import Dataset, open_split
from dstrain.data.prepared.manifest import load_manifest, write_data_manifest
from dstrain.data.prepared.prepare import prepare
from dstrain.data.shuffling import ExampleShuffle, ShardWindowShuffle, ShuffleConfig
from dstrain.storage.document import FileRecord
from dstrain.storage.hashing import sha256_of_file

MICRO_BATCH = 250


def make(directory: Path, num_shards: int, rows: int) -> None:
    """Prepare one shard, and let `num_shards` names in the manifest be links to it."""
    config = DataConfig.model_validate(
        {
            "train": [{"kind": "grammar", "split": "train", "num_pairs": rows}],
            "valid": [{"kind": "grammar", "split": "valid", "num_pairs": 10}],
            "tokenizer": {"kind": "sentencepiece", "vocab_size": 120},
            "filter": {"max_source_length": 4096, "max_target_length": 4096},
            "pairs_per_shard": rows,
        }
    )
    prepare(config, directory, workers=1, progress=False)
    manifest = load_manifest(directory)
    train = manifest.splits["train"]
    (first,) = train.shards
    names = [f"train/{number:05d}.arrow" for number in range(num_shards)]
    for name in names[1:]:
        os.link(directory / first.file, directory / name)
    path = directory / train.lengths.file
    np.save(path, np.tile(np.load(path), (1, num_shards)))
    lengths = FileRecord(file=train.lengths.file, size=path.stat().st_size, sha256=sha256_of_file(path))
    shards = tuple(first.model_copy(update={"file": name}) for name in names)
    train = train.model_copy(update={"shards": shards, "lengths": lengths})
    write_data_manifest(manifest.model_copy(update={"splits": {**manifest.splits, "train": train}}), directory)


def reading(dataset: Dataset, shards: list[range], shuffle: ShuffleConfig, capacity: int) -> dict[str, float]:
    """The first window, of `capacity` rows: its shards, which are touched for the first time, and rows read a second."""
    order = ShuffledOrder(shards, capacity, seed=1, shuffle=build_shuffle(shuffle))
    began = time.process_time()
    rows = order.window(1, 0)
    planned = time.process_time()
    for start in range(0, len(rows), MICRO_BATCH):
        dataset.read(1, rows[start : start + MICRO_BATCH])
    return {
        "shards_of_a_window": len(np.unique(rows // len(shards[0]))),
        "order_cpu_seconds": round(planned - began, 3),
        "rows_per_cpu_second": round(len(rows) / (time.process_time() - planned)),
    }


def peak_mib() -> int:
    """The most memory that this process has had so far."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) >> 10


def measure(directory: Path, capacity: int) -> dict[str, object]:
    """All figures of the training split in a directory."""
    started = peak_mib()
    cpu_began, began = time.process_time(), time.perf_counter()
    manifest = load_manifest(directory)
    dataset = open_split(directory, manifest, "train")
    cpu, seconds = time.process_time() - cpu_began, time.perf_counter() - began
    opened = peak_mib()
    shards = manifest.splits["train"].shard_rows()
    return {
        "shards": len(shards),
        "pairs": len(dataset),
        "open_cpu_seconds": round(cpu, 2),
        "open_seconds": round(seconds, 2),
        "start_mib": started,
        "open_mib": opened - started,
        "shard_window": reading(dataset, shards, ShardWindowShuffle(), capacity),
        "examples": reading(dataset, shards, ExampleShuffle(), capacity),
        "peak_mib": peak_mib(),
    }


def main() -> None:
    """Make the data, unless it is named, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=10_000, help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=1_000, help="pairs of a shard (default: %(default)s)")
    parser.add_argument("--read", type=int, default=50_000, help="pairs of a window, which are read (default: %(default)s)")
    parser.add_argument("--data", type=Path, help="a prepared directory to measure instead")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    if args.data is None:
        with tempfile.TemporaryDirectory() as folder:
            make(Path(folder), args.shards, args.rows)
            command = [sys.executable, __file__, "--data", folder, "--read", str(args.read), *(["--json"] if args.json else [])]
            subprocess.run(command, check=True)  # another process: its peak of memory is not that of making
        return
    figures = measure(args.data, args.read)
    if args.json:
        json.dump(figures, sys.stdout)
    else:
        print("\n".join(f"{name:20} {value}" for name, value in figures.items()))


if __name__ == "__main__":
    main()
