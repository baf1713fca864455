"""Notes for the reader of a converted recipe: how options were read, where fairseq differs, and options without a counterpart.

A remark is found by the name of an option or of its subject; `{name}` is filled in when the remark is made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dstrain.errors import ImportFormatError
from dstrain.interop.fairseq.options import Settings, SettingsReader, dashed

DIFFERS = {
    "required-batch-size-multiple": "the rest of the last batch was dropped, in training and validation; dstrain drops none",
    "directories": "an epoch read one of them in turn; dstrain's epoch reads all",
    "recurrent-stacking": "decoding mixed the caches of all passes; dstrain has a cache for each",
    "kv-attention-heads": "inert without --attn-implementation fast_gqa; dstrain applies it",
    "use-glu": "left --activation-dropout out; dstrain applies it",
    "factorized": "was refused with shared embeddings; dstrain ties through both factors",
    "lora-args": (
        "a resume applied the adapter twice, and self-attention got no gradient without --use-native-attention; dstrain resumes "
        "exactly and trains every module it names"
    ),
    "input-dim": "translation models ignored it, and so does the recipe",
    "positions-too": "without --no-token-positional-embeddings the embedding had positions as well; dstrain has one kind",
    "decoding": "decoded with every token at position 0; dstrain decodes by the true positions",
    "rope-dynamic": "type dynamic ignored scaling_factor, and so does the recipe",
    "rope-late": (
        "without `type` half of each head was rotated, in interleaved pairs; the recipe rotates whole heads in half-split pairs "
        "(position.fraction: 0.5, layout: interleaved is the old meaning)"
    ),
    "yarn-plain": (
        "without `scale` YaRN was plain rotary, and so is the recipe; for {longest} tokens set "
        "scaling: {{kind: yarn, factor: {factor:g}, original_length: {original}}}"
    ),
    "yarn-dynamic": "type dynamic never went back for shorter text; dstrain goes by the length of each sequence",
    "yarn-slow": "beta_slow was 2 if it was not given until 2024-06, against the documentation; here it is 1",
    "alibi-args": "until 2024-07 the encoder had no bias at all, and decoding had none either; dstrain always applies it",
    "alibi-string": 'the string "{value}" counted as true; here it means false',
    "label-smoothing": "inert with this criterion, and so in the recipe",
    "length-normalize-loss": "divided sums of sentence means by the number of tokens; dstrain by the number of sentences",
    "rdrop-alpha": "switched R-Drop off, and so does the recipe",
    "kd-padding": "counted padding in its rate; dstrain selects among real tokens",
    "kd-queue": "a queue for each process that outgrew its size and was lost on resume; dstrain's is one, bounded and saved",
    "kd-language": "never ran; dstrain goes by the first source token of a sentence",
    "kd-late": "{key} was never read: the loss was lambda KL + (1 - lambda) NLL, and so in the recipe",
    "adam-stable": "never reached the optimizer; dstrain clips updates by their RMS",
    "inverse-sqrt": "divided by zero; the recipe warms up for 1 step",
    "tri-stage": "the last stage fell exponentially; wsd falls in a straight line",
    "bf16": "meant a TPU until 2025; dstrain keeps fp32 master weights",
    "max-update": "beyond the schedule's {total} steps the rate stayed at its end; the recipe ends there",
    "best-checkpoint-metric": "kept the worst, {how} --maximize-best-checkpoint-metric; dstrain knows which direction is better",
    "mask": (
        "rounded the number of masked words up, and spans overlapped, so that fewer were masked; dstrain masks exactly this "
        "share in the mean; random tokens could be special ones, in dstrain they never are"
    ),
    "permute-sentences": (
        "permuted nothing without --bpe gpt2, for no sentence had an end; dstrain's sentences end in a token of sentence_ends"
    ),
    "eval-bleu": ("scored pieces by default, and lengths depended on a batch's padding; dstrain scores text with sacreBLEU 13a"),
}
LACKING = {
    "criterion": "label-smoothed cross-entropy instead",
    "sentence-avg": ("gradients are per token; Adam's steps are the same but for eps; --clip-norm was by sentence"),
    "update-freq": "steps keep one size; the last value is taken",
    "batch-size": "batches are counted in tokens; {assumed} a sentence are assumed",
    "batch-size-too": "batches are counted only in tokens",
    "optimizer": "AdamW instead",
    "lr": "one peak, not one for each epoch; the first is taken",
    "lr-scheduler": "a constant rate instead",
    "force-anneal": "the rate does not fall by epochs",
    "cycles": "one half cosine to the end, not several cycles",
    "loss-scale": "constants of the loss scale belong into the DeepSpeed file, section fp16",
    "keep-best-checkpoints": "one best bundle stays",
    "keep-other": "bundles are written every {every} {unit} only",
    "interval": "one interval, in steps",
    "best-checkpoint-metric": "the loss chooses the best bundle",
    "eval-bleu-args": "{key} = {value!r}: beam search with the other keys instead",
    "eval-bleu-detok": "hypotheses and references are scored as decoded by the tokenizer",
    "eval-bleu-remove-bpe": "`@@` stays in dictionary text, so BLEU is that of pieces; score files after `sed 's/@@ //g'`",
    "eval-tokenized-bleu": "BLEU is sacreBLEU's with its own tokenization",
    "valid-subset": "the split `valid` is validated; others are test sets",
    "task": "dstrain's data are pairs, or text for a language model; replace PAIRS.tsv by yours",
    "lines": "an example is a line of the text, not a block of --tokens-per-sample; blank lines are left out",
    "bpe": "text is split only by dictionaries and SentencePiece; binarized data stay as they are",
}
READ = {
    "store-ema": "the decay rises to --ema-decay as (1 + t) / (10 + t); fairseq's was the same from the first step on",
    "preset": "the preset {name}, written out below with the changes of the other options",
    "filter": "fairseq left longer training sentences out as well; data.filter is the smaller of the two",
    "attn-implementation": "dstrain chooses how attention is computed; every variant works with every way",
    "lora-base": "the base is a bundle that `dstrain import fairseq` makes; `dstrain train --base` takes it",
    "no-world-size": "counted as 1 process; fairseq took all visible GPUs, so multiply batching.tokens_per_step by their number",
    "step": (
        "batching.tokens_per_step = {tokens} (max_tokens) x {accumulation} (update-freq) x {ranks} (processes) = {step} target "
        "tokens, whatever the number of processes now; fairseq counted padding and the longer side, so its steps were smaller: "
        "the `wpb` of its log is the exact number"
    ),
    "deepspeed": "engine.deepspeed = {file}; swapping it does not move the loss",
    "endless": "fairseq trained without end; training.max_epochs = {epochs} is taken",
    "save-interval-updates": "fairseq validates whenever it saves, and so does the recipe",
    "keep": "fairseq kept everything; two checkpoints to resume from, the {bundles} newest bundles and the best one stay",
    "tensorboard-logdir": "the files are written into RUN",
    "teacher-checkpoint-path": "the teacher is a bundle that `dstrain import fairseq` makes; `dstrain train --teacher` takes it",
    "rdrop-alpha": "alpha as in the paper: half of (both cross-entropies + alpha times their symmetric divergence)",
    "mask-token": "the task appended <mask> to the dictionary; append the line `<mask> 0` to dict.txt before `dstrain prepare`",
    "rotate": "fairseq rotated half of the texts if it was not given, and so does the recipe; set rotate: 0 against that",
    "sentencepiece": "text is joined if data.tokenizer.source_model and target_model name the models",
    "elsewhere": "not on this machine: the usual names, one piece a split",
    "placeholder": "replace {path} in data by yours, then `dstrain prepare`",
    "before": "stood before the program's name and was not read",
}


@dataclass
class Notes(SettingsReader):
    """Remarks in the order of finding. The options of a command line are read as they say, see `SettingsReader`.

    lacking: options without a counterpart. unknown: words that are no option of fairseq's that dstrain knows.
    """

    read: list[str] = field(default_factory=list)
    differs: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    faithful = False

    def refusal(self, name: str, value: object, reason: str) -> ImportFormatError:
        """The error for an option that cannot be read."""
        option = dashed(name) if isinstance(value, dict) else f"{dashed(name)} {value}"
        return ImportFormatError(f"{option}: {reason}; fix the command line")

    def unequal(self, name: str, settings: Settings, reason: str) -> None:
        """Note that encoder and decoder differ in an option that is one for both here."""
        encoder, decoder = (f"{side}_{name}" for side in ("encoder", "decoder"))
        self.lacking.append(
            f"{dashed(decoder)} = {settings[decoder]}: differs from {dashed(encoder)} = {settings[encoder]}: {reason}; "
            "the encoder's is taken"
        )

    def ignored(self, name: str, value: Mapping[str, Any], known: set[str]) -> None:
        """Note the keys of a JSON value that fairseq does not read."""
        self.unknown += [f"{dashed(name)}: key {key!r}" for key in value if key not in known]

    def reads(self, option: str, remark: str, **values: object) -> None:
        """Say how an option was read. remark: a key of READ."""
        self.read.append(f"{option}: {READ[remark].format(**values)}")

    def differ(self, option: str, remark: str, **values: object) -> None:
        """Note that fairseq computed something other than the option's meaning. remark: a key of DIFFERS."""
        self.differs.append(f"{option}: {DIFFERS[remark].format(**values)}")

    def lack(self, option: str, remark: str, **values: object) -> None:
        """Note an option that a recipe cannot express. remark: a key of LACKING."""
        self.lacking.append(f"{option}: {LACKING[remark].format(**values)}")
