#!/usr/bin/env python3
"""Share of padding and speed of padded, packed and block batches: one recipe, one process, micro-batches of all kinds in turn.

python tools/bench_packing.py translation/multi30k_tiny --data data/multi30k
python tools/bench_packing.py language_modeling/wikitext_tiny --data data/wikitext --block-size 512

Real tokens are those of the tensors that the model reads. Speed is forward and backward of target tokens in CPU-seconds, so that
other processes of the machine disturb all kinds alike.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from dstrain.batch import Batch
from dstrain.build.training_data import TrainingData
from dstrain.data.batching.config import PackingConfig
from dstrain.data.config import has_no_source, tells_documents
from dstrain.models.factory import build_model
from dstrain.nn.dropout import seed_masks
from dstrain.objectives.build import build_cross_entropy
from dstrain.objectives.config import CrossEntropyConfig
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh, build_mesh
from dstrain.recipe_file import load_recipe

WAYS = get_args(PackingConfig.model_fields["documents"].annotation)


@dataclass
class Kind:
    """One kind of batches. real, padded: tokens of all that were made; seconds, targets: of those that were run."""

    name: str
    batches: Iterator[Batch]
    description: str | None
    real: int = 0
    padded: int = 0
    seconds: float = 0.0
    targets: int = 0

    def next(self) -> Batch:
        """The next batch, counted."""
        batch = next(self.batches)
        for side in {id(side): side for side in (batch.reading, batch.target)}.values():
            self.real += int(side.lengths.sum())
            self.padded += side.tokens.numel()
        return batch

    def line(self, first: Kind) -> str:
        """The figures."""
        speed, base = (kind.targets / max(kind.seconds, 1e-9) for kind in (self, first))
        words = f"{self.name:32} {100 * self.real / self.padded:6.2f} % real tokens"
        return words + (f" {speed:8,.0f} targets a CPU-second, {speed / base:.2f} of {first.name}" if self.seconds else "")


def batches_of(data: TrainingData, name: str, overrides: list[str], mesh: Mesh) -> Iterator[Batch]:
    """The micro-batches of the first epoch, in their order."""
    recipe = load_recipe(name, overrides)
    with data.train_loader(data.plan_steps(recipe), data.collator("train", recipe, mesh), mesh, 1, 0) as steps:
        for _, batches in steps:
            yield from batches


def kinds_of(name: str, directory: Path, block_size: int, mesh: Mesh) -> list[Kind]:
    """All kinds of batches that the recipe can have."""
    variants = {layout: ["batching.packing=null", f"engine.layout={layout}"] for layout in ("padded", "packed")}
    corpora = load_recipe(name).data.train
    if has_no_source(corpora):
        for way in WAYS:
            if way != "complete_documents" or tells_documents(corpora):
                key = f"batching.packing={{block_size: {block_size}, documents: {way}, attention: %s}}"
                variants[f"{way}, document, packed"] = [key % "document"]
                variants[f"{way}, block, padded"] = [key % "block", "engine.layout=padded"]
    kinds = []
    for kind, overrides in variants.items():
        data = TrainingData(directory, load_recipe(name, overrides))
        description = None if data.blocks is None else data.blocks.describe()
        kinds.append(Kind(kind, batches_of(data, name, overrides, mesh), description))
    return kinds


def main() -> None:
    """Print a line for each kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path, required=True, help="its prepared data")
    parser.add_argument("--block-size", type=int, default=512, help="of text (default: %(default)s)")
    parser.add_argument("--batches", type=int, default=20, help="micro-batches of each kind that are made (default: %(default)s)")
    parser.add_argument("--run", type=int, default=4, help="how many of them are run (default: %(default)s)")
    args = parser.parse_args()
    mesh, recipe = build_mesh("cpu"), load_recipe(args.recipe)
    kinds = kinds_of(args.recipe, args.data, args.block_size, mesh)
    vocabulary = TrainingData(args.data, recipe).vocabulary
    module = TrainModule(build_model(recipe.model, vocabulary, seed=1).train(), build_cross_entropy(CrossEntropyConfig()))
    for number in range(args.batches):
        for kind in kinds if number % 2 else reversed(kinds):
            batch = kind.next()
            if number > args.run:
                continue
            seed_masks(1, number)
            began = time.process_time()
            module(batch).loss_sum.backward()
            if number:  # the first run of a kind warms up
                kind.seconds += time.process_time() - began
                kind.targets += batch.num_targets
    for kind in kinds:
        print(kind.line(kinds[0]) + (f"; blocks: {kind.description}" if kind.description else ""))


if __name__ == "__main__":
    main()
