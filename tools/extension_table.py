"""Perplexity by length of a language model of 256 tokens, extended to 1,024 and 2,048 by each kind, before and after fine-tuning.

The model is language_modeling/wikitext_tiny with 2,000 vocabulary entries, trained on blocks of 256 tokens of WikiText's
validation articles. Fine-tuning takes a few steps with blocks of the new length. Perplexity is of the test articles, cut into
windows of each length, each read alone. Prints the table, and writes it as a picture if matplotlib is installed. Training goes on
where an earlier call ended.

    DSTRAIN_DATA=... python tools/extension_table.py WORK [--steps 300] [--tune-steps 20] [--windows 40]
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import sentencepiece

from dstrain.api import BundleModel, ExtendOptions, extend, load
from dstrain.checkpoint.bundle import find_bundle, save_bundle

RECIPE = "language_modeling/wikitext_tiny"
TRAINED = 256
LENGTHS = (64, 128, 256, 512, 1024, 2048)
EXTENDED = (1024, 2048)
KINDS = ("linear", "ntk", "yarn")
Ids = Sequence[int]
TEXT = Path(os.environ["DSTRAIN_DATA"]) / "wikitext"


def articles(split: str) -> Iterator[str]:
    """The articles of a split, each on one line."""
    lines: list[str] = []
    for line in map(str.strip, (TEXT / f"{split}.txt").read_text(encoding="utf-8").splitlines()):
        if re.fullmatch(r"= [^=].* =", line) and lines:
            yield " ".join(lines)
            lines = []
        if line:
            lines.append(line)
    yield " ".join(lines)


def write_blocks(tokenizer: sentencepiece.SentencePieceProcessor, split: str, length: int, output: Path) -> None:
    """Lines of at most `length` tokens with EOS, cut between words; an article's rest below a quarter of that is left out."""
    with output.open("w", encoding="utf-8") as file:
        for article in articles(split):
            block, used = [], 1
            for word, ids in zip(words := article.split(), tokenizer.encode(words), strict=True):
                if used + len(ids) > length:
                    file.write(" ".join(block) + "\n")
                    block, used = [], 1
                block.append(word)
                used += len(ids)
            if used > length // 4:
                file.write(" ".join(block) + "\n")


def dstrain(*words: str | Path) -> None:
    """One verb."""
    subprocess.run([sys.executable, "-m", "dstrain", *map(str, words)], check=True, stdout=sys.stderr)


def settings(work: Path, length: int, *more: str) -> list[str]:
    """What the recipe becomes for blocks of that length."""
    keys = (
        f"data.tokenizer={{kind: tokenizer_directory, path: {work / 'raw/tokenizer'}}}",
        f"data.train.0.path={work / f'valid.{length}'}",
        f"data.valid.0.path={work / f'test.{length}'}",
        f"data.filter.max_target_length={length}",
        "batching.tokens_per_step=4096",
        "reporting.log_every=5",
        *more,
    )
    return [word for key in keys for word in ("--set", key)]


def prepared(work: Path, length: int) -> Path:
    """Data of blocks of that length."""
    if not (work / "raw" / "manifest.json").exists():
        dstrain("prepare", RECIPE, "--set", "data.tokenizer.vocab_size=2000", "--output", work / "raw")
    (model,) = (work / "raw" / "tokenizer").glob("*.model")
    for split in ("valid", "test"):
        if not (work / f"{split}.{length}").exists():
            write_blocks(sentencepiece.SentencePieceProcessor(model_file=str(model)), split, length, work / f"{split}.{length}")
    dstrain("prepare", RECIPE, *settings(work, length, "model.max_target_length=2048"), "--output", work / f"d{length}")
    return work / f"d{length}"


def trained(work: Path, steps: int) -> Path:
    """The model of 256 tokens."""
    model = (f"model.max_target_length={TRAINED}", "model.dropout=0.1")
    length = (f"training.max_steps={steps}", f"schedule.total_steps={steps}", "validation.every=100", "checkpoint.every=25")
    place = ("--data", prepared(work, TRAINED), "--output", work / "lm")
    dstrain("train", RECIPE, *settings(work, TRAINED, *model, *length), *place)
    return work / "lm" / "bundles" / "last"


def extended(work: Path, base: Path, kind: str, length: int) -> Path:
    """The bundle as it is after the extension; of kind none, one that only reads longer text."""
    output = work / "extended" / f"{kind}_{length}"
    if kind == "none":
        stored = find_bundle(base)
        save_bundle(
            output,
            model_config=stored.description.model.model_copy(update={"max_target_length": length}),
            vocabulary=stored.description.vocabulary,
            weights={name: stored.read(name) for name in stored.names()},
            tokenizers=stored.tokenizers(),
            recipe=stored.recipe(),
            overwrite=True,
        )
    else:
        extend(ExtendOptions(bundle=base, output=output, kind=kind, factor=length / TRAINED, overwrite=True))  # type: ignore[arg-type]
    return output


def tuned(work: Path, base: Path, length: int, steps: int) -> Path:
    """A bundle trained on with blocks of its new length."""
    run = work / "tuned" / base.name
    keys = (
        "model={from_base: true, dropout: 0.1}",
        *("schedule={kind: constant, warmup_steps: 5}", "optimizer.learning_rate=0.0005"),
        *(f"{key}={steps}" for key in ("training.max_steps", "validation.every", "checkpoint.every")),
    )
    place = ("--data", prepared(work, length), "--output", run, "--base", base)
    dstrain("train", RECIPE, *settings(work, length, *keys), *place)
    return run / "bundles" / "last"


def perplexity(model: BundleModel, rows: list[Ids], length: int, windows: int) -> float:
    """Of the first `windows` windows of `length` tokens, each without context before it."""
    cut = [row[start : start + length] for row in rows for start in range(0, len(row) - length + 1, length)][:windows]
    nll = 0.0
    for window in cut:
        (logits,) = model.logits(None, [[model.bundle.vocabulary.eos_id, *window[:-1]]])
        highest = logits.max(axis=1)
        log_sum = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
        nll += float((log_sum - logits[np.arange(length), window]).sum())
    return math.exp(nll / (len(cut) * length))


def picture(table: dict[str, list[float]], output: Path) -> None:
    """The table as curves."""
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(7, 4))).subplots()
    for name, values in table.items():
        axes.plot(LENGTHS[: len(values)], values, marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens of a window", ylabel="perplexity", xticks=LENGTHS, xticklabels=LENGTHS)
    axes.axvline(TRAINED, color="gray", linestyle=":")
    axes.legend(fontsize="small")
    figure.savefig(output, bbox_inches="tight")


def main() -> None:
    """Train, extend, fine-tune, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tune-steps", type=int, default=20)
    parser.add_argument("--windows", type=int, default=40, help="of each length")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    base = trained(work, args.steps)
    tokenizer = load(base).tokenizer.target
    rows = [tokenizer.encode([article])[0] for article in articles("test")]
    table: dict[str, list[float]] = {}
    print(f"| extension | {' | '.join(f'{length:,}' for length in LENGTHS)} |")
    for kind, length in [("none", LENGTHS[-1]), *itertools.product(KINDS, EXTENDED)]:
        bundle = extended(work, base, kind, length)
        bundles = {"": bundle} if kind == "none" else {"": bundle, ", tuned": tuned(work, bundle, length, args.tune_steps)}
        for suffix, found in bundles.items():
            model = load(found)
            reached = [size for size in LENGTHS if size <= model.bundle.model_config.limits.target]
            table[f"{kind}, {length:,}{suffix}"] = values = [perplexity(model, rows, size, args.windows) for size in reached]
            cells = [f"{value:.1f}" for value in values] + [""] * (len(LENGTHS) - len(values))
            print(f"| {kind}, {length:,}{suffix} | {' | '.join(cells)} |", flush=True)
    if find_spec("matplotlib") is not None:
        picture(table, work / "perplexity.png")


if __name__ == "__main__":
    main()
