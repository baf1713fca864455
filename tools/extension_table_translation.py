"""BLEU by length of the input of an encoder-decoder with rotary positions, extended by 4, before and after fine-tuning.

Longer inputs are neighboring pairs of Multi30k English-German, one behind the other: 1, 2, 4 or 8 of them. The model is
translation/multi30k_tiny with rotary positions, trained on single pairs and on two at a time, of 48 tokens at most; extended it
reads 192. Fine-tuning takes a few steps with all four lengths. BLEU is of test_2016_flickr, greedily translated: each column has
the same sentences. Prints the table, and draws it if matplotlib is installed. Goes on where an earlier call ended.

    DSTRAIN_DATA=... python tools/extension_table_translation.py WORK [--steps 700] [--tune-steps 50] [--sentences 1000]
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import sacrebleu
from extension import KINDS, Table, dstrain, extended, overrides

from dstrain.api import load

RECIPE = "translation/multi30k_tiny"
PAIRS = (1, 2, 4, 8)
TRAINED_PAIRS = (1, 2)
TRAINED, EXTENDED = 48, 192
SIDES = ("en", "de")
TEXT = Path(os.environ["DSTRAIN_DATA"]) / "multi30k"
SPLITS = {"train": "train", "valid": "val"}
"""A split of the recipe -> the name of its files."""


def concatenated(lines: Sequence[str], pairs: int) -> list[str]:
    """Neighboring lines as one; a rest of fewer is left out."""
    return [" ".join(lines[start : start + pairs]) for start in range(0, len(lines) - pairs + 1, pairs)]


def read(name: str, side: str) -> list[str]:
    """The lines of one side of a split."""
    return (TEXT / f"{name}.{side}").read_text(encoding="utf-8").splitlines()


def corpora(work: Path, pairs: Sequence[int]) -> list[str]:
    """The recipe's keys of training and validation text of so many pairs a line."""
    keys = []
    for split, name in SPLITS.items():
        texts = [{side: work / f"{name}.{count}.{side}" for side in SIDES} for count in pairs]
        for count, sides in zip(pairs, texts, strict=True):
            for side, path in sides.items():
                path.write_text("\n".join(concatenated(read(name, side), count)) + "\n", encoding="utf-8")
        listed = ", ".join(f"{{kind: parallel, source: {sides['en']}, target: {sides['de']}}}" for sides in texts)
        keys.append(f"data.{split}=[{listed}]")
    return keys


def prepared(work: Path, pairs: Sequence[int], longest: int) -> tuple[Path, list[str]]:
    """Data of so many pairs a line, and the recipe's overrides for them."""
    data = work / f"d{longest}"
    tokenizer = f"data.tokenizer={{kind: tokenizer_directory, path: {work / f'd{TRAINED}' / 'tokenizer'}}}"
    keys = overrides(
        *corpora(work, pairs),
        "data.test={}",
        *(f"data.filter.max_{side}_length={longest}" for side in ("source", "target")),
        *([] if longest == TRAINED else [tokenizer]),
    )
    dstrain("prepare", RECIPE, *keys, "--output", data)
    return data, keys


def trained(work: Path, steps: int) -> Path:
    """The model of one or two pairs."""
    data, keys = prepared(work, TRAINED_PAIRS, TRAINED)
    limits = (
        f"model.max_{side}_length={EXTENDED}" for side in ("source", "target")
    )  # as many as translations and valid pairs need
    changes = overrides(
        "model.position={kind: rotary}",
        *limits,
        *("model.dropout=0.1", "optimizer.learning_rate=0.003", f"schedule.warmup_steps={min(400, steps // 2)}"),
        *(f"training.max_steps={steps}", "training.ema.decay=0.98"),
        *(f"validation={{unit: steps, every: {steps}, metric: loss, generation: null}}",),
        "checkpoint={unit: steps, every: 50, keep_checkpoints: 1, keep_bundles: 1}",
    )
    dstrain("train", RECIPE, *keys, *changes, "--data", data, "--output", work / "base")
    return work / "base" / "bundles" / "last"


def tuned(work: Path, base: Path, steps: int) -> Path:
    """A bundle trained on with all lengths."""
    data, keys = prepared(work, PAIRS, EXTENDED)
    run = work / "tuned" / base.name
    changes = overrides(
        "model={from_base: true, dropout: 0.1}",
        *("schedule={kind: constant, warmup_steps: 5}", "optimizer.learning_rate=0.0005", "training.ema=null"),
        f"training.max_steps={steps}",
        f"validation={{unit: steps, every: {steps}, metric: loss, generation: null}}",
        f"checkpoint={{unit: steps, every: {steps}, keep_checkpoints: 1, keep_bundles: 1}}",
    )
    dstrain("train", RECIPE, *keys, *changes, "--data", data, "--output", run, "--base", base)
    return run / "bundles" / "last"


def bleu(bundle: Path, sentences: int, pairs: int) -> float:
    """BLEU (13a, mixed case) of the test sentences, so many pairs at a time."""
    sources, references = (concatenated(read("test_2016_flickr", side)[:sentences], pairs) for side in SIDES)
    hypotheses = load(bundle).generate(sources, beam_size=1)
    return float(sacrebleu.corpus_bleu([best.text for best, *_ in hypotheses], [references]).score)


def main() -> None:
    """Train, extend, fine-tune, translate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=700, help="of the model of 48 tokens")
    parser.add_argument("--tune-steps", type=int, default=50, help="of each fine-tuning")
    parser.add_argument("--sentences", type=int, default=1000, help="of the test set")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sizes = {"steps": args.steps, "tune_steps": args.tune_steps, "sentences": args.sentences}
    table = Table(work / "table.json", "extension", PAIRS, sizes)
    base = trained(work, args.steps)
    for kind in ("none", *KINDS):
        bundle = extended(base, kind, EXTENDED, TRAINED, work / "extended" / kind)
        table.row(kind, max(PAIRS), partial(bleu, bundle, args.sentences))
        table.row(f"{kind}, tuned", max(PAIRS), partial(bleu, tuned(work, bundle, args.tune_steps), args.sentences))
    table.picture(work / "bleu.png", xlabel="pairs of an input", ylabel="BLEU", yscale="linear")


if __name__ == "__main__":
    main()
