"""Perplexity by length of a language model of 256 tokens, extended to 1,024 and 2,048 by each kind, before and after fine-tuning.

The model is language_modeling/wikitext_tiny with 2,000 vocabulary entries, trained on blocks of 256 tokens of WikiText's
validation articles. Fine-tuning takes a few steps with blocks of the new length. A second model has ALiBi instead of rotary
positions (`--no-alibi` leaves it out) and reads longer text than it was trained with as it is. Perplexity is of the first 2,048
tokens of test articles, read in windows of each length whose ends are half a window apart (`dstrain perplexity`): each column
scores the same tokens. Prints the table, and draws it if matplotlib is installed. Goes on where an earlier call ended.

    DSTRAIN_DATA=... python tools/extension_table.py WORK [--steps 500] [--tune-steps 20] [--documents 20]
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import sentencepiece
from extension import KINDS, Table, dstrain, extended, overrides

from dstrain.api import PerplexityOptions, perplexity

RECIPE = "language_modeling/wikitext_tiny"
TRAINED = 256
LENGTHS = (64, 128, 256, 512, 1024, 2048)
EXTENDED = (1024, 2048)
VALIDATED = 2
"""Test articles that a training is validated on, once: the table scores more of them."""
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


def blocks(tokenizer: sentencepiece.SentencePieceProcessor, article: str, length: int) -> list[str]:
    """Pieces of at most `length` tokens with EOS, cut between words; a rest below a quarter of that is left out."""
    pieces, block, used = [], [], 1
    for word, ids in zip(words := article.split(), tokenizer.encode(words), strict=True):
        if used + len(ids) > length:
            pieces.append(" ".join(block))
            block, used = [], 1
        block.append(word)
        used += len(ids)
    return [*pieces, " ".join(block)] if used > length // 4 else pieces


def settings(work: Path, length: int, *more: str) -> list[str]:
    """What the recipe becomes for blocks of that length."""
    return overrides(
        f"data.tokenizer={{kind: tokenizer_directory, path: {work / 'raw/tokenizer'}}}",
        f"data.train.0.path={work / f'valid.{length}'}",
        f"data.valid.0.path={work / f'test.{length}'}",
        f"data.filter.max_target_length={length}",
        "batching.tokens_per_step=4096",
        "reporting.log_every=20",
        *more,
    )


def prepared(work: Path, length: int) -> Path:
    """Data of blocks of that length."""
    tokenizer = opened_tokenizer(work)
    for split, number in (("valid", None), ("test", VALIDATED)):
        if not (path := work / f"{split}.{length}").exists():
            cut = (blocks(tokenizer, article, length) for article in itertools.islice(articles(split), number))
            path.write_text("\n".join(itertools.chain.from_iterable(cut)) + "\n", encoding="utf-8")
    dstrain(
        "prepare", RECIPE, *settings(work, length, f"model.max_target_length={max(LENGTHS)}"), "--output", work / f"d{length}"
    )
    return work / f"d{length}"


def opened_tokenizer(work: Path) -> sentencepiece.SentencePieceProcessor:
    """That of all models."""
    if not (work / "raw" / "manifest.json").exists():
        dstrain("prepare", RECIPE, *overrides("data.tokenizer.vocab_size=2000"), "--output", work / "raw")
    (model,) = (work / "raw" / "tokenizer").glob("*.model")
    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def documents(work: Path, number: int) -> Path:
    """The beginnings of the first test articles that are longer than the longest window, one on a line."""
    tokenizer, path = opened_tokenizer(work), work / f"documents.{number}"
    cut = (blocks(tokenizer, article, max(LENGTHS)) for article in articles("test"))
    path.write_text(
        "\n".join(itertools.islice((pieces[0] for pieces in cut if len(pieces) > 1), number)) + "\n", encoding="utf-8"
    )
    return path


def trained(work: Path, position: str, steps: int) -> Path:
    """The model of 256 tokens with such positions."""
    model = (f"model.max_target_length={TRAINED}", f"model.position={{kind: {position}}}", "model.dropout=0.1")
    length = (f"training.max_steps={steps}", f"schedule.total_steps={steps}", f"validation.every={steps}", "checkpoint.every=50")
    run = work / f"lm_{position}"
    dstrain("train", RECIPE, *settings(work, TRAINED, *model, *length), "--data", prepared(work, TRAINED), "--output", run)
    return run / "bundles" / "last"


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


def figure(bundle: Path, text: Path, length: int) -> float:
    """Perplexity by token in windows of that length."""
    options = PerplexityOptions(bundle=bundle, file=str(text), context_window=length, stride=length // 2, max_tokens=4096)
    return float(perplexity(options)["perplexity"])


def main() -> None:
    """Train, extend, fine-tune, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=500, help="of the model of 256 tokens")
    parser.add_argument("--tune-steps", type=int, default=20, help="of each fine-tuning")
    parser.add_argument("--documents", type=int, default=20, help="test articles that are scored")
    parser.add_argument("--alibi", action=argparse.BooleanOptionalAction, default=True, help="a model with ALiBi, too")
    args = parser.parse_args()
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    text = documents(work, args.documents)
    sizes = {"steps": args.steps, "tune_steps": args.tune_steps, "documents": args.documents}
    table = Table(work / "table.json", "extension", LENGTHS, sizes)
    base = trained(work, "rotary", args.steps)
    reads = extended(base, "none", max(LENGTHS), TRAINED, work / "extended" / "none")
    table.row("none", max(LENGTHS), partial(figure, reads, text))
    if args.alibi:
        reads = extended(trained(work, "alibi", args.steps), "none", max(LENGTHS), TRAINED, work / "extended" / "alibi")
        table.row("none, ALiBi", max(LENGTHS), partial(figure, reads, text))
    for kind, length in itertools.product(KINDS, EXTENDED):
        bundle = extended(base, kind, length, TRAINED, work / "extended" / f"{kind}_{length}")
        table.row(f"{kind}, {length:,}", length, partial(figure, bundle, text))
        table.row(f"{kind}, {length:,}, tuned", length, partial(figure, tuned(work, bundle, length, args.tune_steps), text))
    table.picture(work / "perplexity.png", xlabel="tokens of a window", ylabel="perplexity", yscale="log")


if __name__ == "__main__":
    main()
