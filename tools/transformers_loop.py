"""Transformers' `Seq2SeqTrainer` on the model, the initial weights and the corpus of `translation/multi30k_tiny`.

The model is Marian with dstrain's initial weights (`marian.py`). The examples are those of the prepared DATA. A step has as many
pairs as dstrain's steps have on average, and `DataCollatorForSeq2Seq` pads them. Label smoothing, optimizer, schedule and dropout
are the recipe's. fp32, one thread, a log line every ten steps; no evaluation, no saving, no logging to services. The Trainer does
not keep a moving average of the weights; dstrain's recipe does. Prints one line of JSON like `bare_loop.py`: target tokens
without padding, and CPU-seconds of the steps after the warm-up. It needs `accelerate` and `datasets`.

`--order group_by_length`, the default, is the Trainer's sampler with the least padding. It sorts mega-batches of up to 50 steps
by length, longest first; `--steps` is rounded up to whole mega-batches. The length is that of a pair's longer side, given in a
column of a `datasets.Dataset`; with `--lengths source` it is what the Trainer takes without such a column. `--order random` is
the Trainer's own default.
`--keep-freed-memory` makes malloc keep freed memory, as dstrain's verbs do. Without it the C library's defaults hold.

    python tools/transformers_loop.py --data DATA [--steps 12] [--warmup 2] [--lengths source] [--keep-freed-memory]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from bare_loop import cpu_seconds
from datasets import Dataset
from marian import marian_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import DataCollatorForSeq2Seq, MarianMTModel, PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments

from dstrain.build.training_data import TrainingData
from dstrain.models.config import VocabularySizes
from dstrain.models.factory import build_model
from dstrain.ops.allocator import keep_freed_memory
from dstrain.recipe import Recipe
from dstrain.recipe_file import load_recipe

RECIPE = "translation/multi30k_tiny"
Features = list[dict[str, list[int]]]
"""Token ids of each pair as `input_ids` and `labels`."""


class CountingCollator(DataCollatorForSeq2Seq):
    """Transformers' own, which notes the size of every batch. Its tokenizer only pads.

    targets: real target tokens of the batches in their order. cells: with padding. The Trainer collates one batch ahead.
    """

    def __init__(self, model: MarianMTModel) -> None:
        words = Tokenizer(WordLevel({"<pad>": model.config.pad_token_id}))
        super().__init__(PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>"), model=model)
        self.targets: list[int] = []
        self.cells: list[int] = []

    def __call__(self, features: Features, return_tensors: str | None = None) -> Any:
        """A padded batch with the decoder's inputs."""
        self.targets.append(sum(len(feature["labels"]) for feature in features))
        sides = [{side: feature[side] for side in ("input_ids", "labels")} for feature in features]
        batch = super().__call__(sides, return_tensors)
        self.cells.append(batch["labels"].numel())
        return batch


class CpuClock(transformers.TrainerCallback):
    """seconds: CPU-seconds of the process at the beginning and at the end of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Before the first step."""
        self.seconds.append(cpu_seconds())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """After the optimizer."""
        self.seconds.append(cpu_seconds())


def build_trainer(
    model: MarianMTModel, features: Features | Dataset, recipe: Recipe, *, pairs: int, steps: int, order: str, output: str
) -> Seq2SeqTrainer:
    """The Trainer with the settings of a recipe (Adam, inverse square root, no clipping). pairs: of a step. steps: of the run."""
    optimizer, schedule, smoothing = recipe.optimizer, recipe.schedule, recipe.objective.label_smoothing
    arguments = Seq2SeqTrainingArguments(
        output_dir=output,
        use_cpu=True,
        seed=recipe.training.seed,
        max_steps=steps,
        per_device_train_batch_size=pairs,
        train_sampling_strategy=order,
        # dstrain smooths over the other entries, Transformers over all; this factor gives the same loss
        label_smoothing_factor=smoothing * model.config.vocab_size / (model.config.vocab_size - 1),
        learning_rate=optimizer.learning_rate,
        adam_beta1=optimizer.betas[0],
        adam_beta2=optimizer.betas[1],
        adam_epsilon=optimizer.eps,
        weight_decay=optimizer.weight_decay,
        optim="adamw_torch_fused",  # without weight decay AdamW is Adam
        lr_scheduler_type=schedule.kind,
        warmup_steps=schedule.warmup_steps,
        max_grad_norm=recipe.engine.clip_norm,
        logging_steps=10,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,  # the Trainer would remove the lengths before its sampler reads them
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return Seq2SeqTrainer(model, arguments, train_dataset=features, data_collator=CountingCollator(model))


def read_features(data: TrainingData) -> Features:
    """All training pairs as `Seq2SeqTrainer` takes them."""
    examples = data.train_examples.read(1, np.arange(len(data.train)))
    return [{"input_ids": example.source.tolist(), "labels": example.target.tolist()} for example in examples]


def with_lengths(features: Features) -> Dataset:
    """The same with the column `length` that the Trainer's sampler sorts by: tokens of the longer side."""
    longer = [max(map(len, feature.values())) for feature in features]
    return Dataset.from_list(features).add_column("length", longer)


def initial_model(recipe: Recipe, sizes: VocabularySizes) -> MarianMTModel:
    """Marian with the weights that `dstrain train` begins with."""
    return marian_model(build_model(recipe.model, sizes, seed=recipe.training.seed), positions=recipe.model.max_source_length)


def mega_batch(num_examples: int, pairs: int) -> int:
    """Steps of a sorted mega-batch, as `get_length_grouped_indices` chooses them."""
    return max(1, min(num_examples // (pairs * 4), 50))


def main() -> None:
    """Train on the corpus and print the cost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--order", choices=["group_by_length", "random"], default="group_by_length")
    parser.add_argument("--lengths", choices=["source", "longer"], default="longer")
    parser.add_argument("--keep-freed-memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.keep_freed_memory:
        keep_freed_memory()

    recipe = load_recipe(RECIPE)
    data = TrainingData(args.data, recipe)
    pairs = round(len(data.train) / data.plan_steps(recipe).steps_per_epoch())
    steps = args.steps
    if args.order == "group_by_length":
        steps += -steps % mega_batch(len(data.train), pairs)
    features = read_features(data)
    with tempfile.TemporaryDirectory() as output:
        trainer = build_trainer(
            initial_model(recipe, data.vocabulary),
            with_lengths(features) if args.lengths == "longer" else features,
            recipe,
            pairs=pairs,
            steps=args.warmup + steps,
            order=args.order,
            output=output,
        )
        clock, collated = CpuClock(), trainer.data_collator
        trainer.add_callback(clock)
        trainer.train()
    seconds = clock.seconds[-1] - clock.seconds[args.warmup]
    measured = slice(args.warmup, args.warmup + steps)
    targets, cells = sum(collated.targets[measured]), sum(collated.cells[measured])
    figures = {"target_tokens": targets, "cpu_seconds": round(seconds, 3), "steps": steps, "pairs": pairs}
    print(json.dumps({**figures, "padding": round(1 - targets / cells, 3)}))


if __name__ == "__main__":
    main()
