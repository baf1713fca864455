"""ROUGE of SciTLDR's test summaries by a small model, pretrained by denoising WikiText or not, at equal steps of fine-tuning.

Both recipes, summarization/scitldr_tiny and summarization/scitldr_tiny_denoising, read one prepared data set. Each seed of
fine-tuning is a row for each start; the pretrained bundle is the same. The last bundles are scored, so that nothing is chosen on
the validation split. The row `first sentence` takes the first sentence of each abstract for its summary. Prints the table.
Everything goes on where an earlier call ended.

    DSTRAIN_DATA=... python tools/summarization_table.py WORK [--steps 300] [--pretraining-steps 400] [--seeds 1 2]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dstrain.evaluation.metrics.corpus import corpus_scores, reference_sets

RECIPE = "summarization/scitldr_tiny"
PRETRAINING = "summarization/scitldr_tiny_denoising"
SCORES = ("rouge_1", "rouge_2", "rouge_l")
TEXT = Path(os.environ["DSTRAIN_DATA"]) / "scitldr"


def dstrain(*words: str | Path) -> str:
    """What one verb prints, and shows on the error stream as well."""
    command = [sys.executable, "-m", "dstrain", *map(str, words)]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(printed, file=sys.stderr)
    return printed


def settings(**keys: str | int) -> list[str]:
    """Overrides of a recipe; a__b is a.b."""
    return [word for key, value in keys.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def trained(recipe: str, data: Path, run: Path, steps: int, *words: str | Path) -> Path:
    """The last bundle of a run, which is scored by its loss on the way."""
    keys = settings(
        training__max_steps=steps,
        schedule__total_steps=steps,
        schedule__warmup_steps=max(1, steps // 10),
        validation__every=max(1, steps // 4),
        validation__metric="loss",
        validation__rouge="null",
        validation__generation="null",
        checkpoint__every=max(1, steps // 8),
    )
    dstrain("train", recipe, "--data", data, "--output", run, *keys, *words)
    return run / "bundles" / "last"


def scored(bundle: Path, data: Path, split: str, *words: str) -> Mapping[str, Any]:
    """What `dstrain validate` prints, kept beside the run."""
    kept = bundle.parents[1] / f"{split}.json"
    if not kept.exists():
        kept.write_text(dstrain("validate", bundle, "--data", data, "--split", split, *words))
    scores: Mapping[str, Any] = json.loads(kept.read_text())
    return scores


def summaries(bundle: Path, data: Path) -> Mapping[str, Any]:
    """Scores of the test summaries, searched for as the recipe's `generation` says."""
    search = ("--beam-size", "4", "--min-length", "10", "--max-length-offset", "60", "--no-repeat-ngram", "3")
    return scored(bundle, data, "scitldr", "--rouge", "stemmed", "--max-length-ratio", "0", *search)


def first_sentences() -> Mapping[str, float]:
    """Scores of the first sentence of every abstract."""
    records = [json.loads(line) for line in (TEXT / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    hypotheses = [record["source"][0] for record in records]
    references = reference_sets([record["target"] for record in records])
    return {score.name: score.value for score in corpus_scores(hypotheses, *references, metrics=(), rouge="stemmed")}


def row(name: str, scores: Mapping[str, float], loss: str = "") -> None:
    """Print a row of the table."""
    print(f"| {name} | {loss} | {' | '.join(f'{scores[key]:.2f}' for key in SCORES)} |", flush=True)


def main(words: Sequence[str] | None = None) -> None:
    """Prepare, pretrain, fine-tune, score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--steps", type=int, default=300, help="of fine-tuning")
    parser.add_argument("--pretraining-steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of fine-tuning")
    parser.add_argument("--source-tokens", type=int, default=512, help="longer abstracts are cut, and counted by prepare")
    args = parser.parse_args(words)
    work = args.work.resolve()
    data = work / "data"
    cut = settings(data__filter__max_source_length=args.source_tokens)
    dstrain("prepare", RECIPE, "--output", data, *cut)
    print("| fine-tuned from | nats a token | ROUGE-1 | ROUGE-2 | ROUGE-L |\n|---|---|---|---|---|")
    row("(first sentence of the abstract)", first_sentences())
    base = trained(PRETRAINING, data, work / "pretrained", args.pretraining_steps, *cut)
    denoising = scored(base, data, "wikitext", "--no-generate")
    for seed in args.seeds:
        for name, start in {"random weights": (), "pretrained weights": ("--base", base)}.items():
            run = work / f"{name.replace(' ', '_')}_{seed}"
            bundle = trained(RECIPE, data, run, args.steps, *cut, *settings(training__seed=seed), *start)
            scores = summaries(bundle, data)
            row(f"{name}, seed {seed}", scores, f"{scores['nll']:.3f}")
    print(f"\nDenoising of WikiText's test lines: {denoising['nll']:.3f} nats a token. ROUGE: {scores['signatures']['rouge_l']}")


if __name__ == "__main__":
    main()
