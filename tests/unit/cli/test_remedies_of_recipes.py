"""What a message about a recipe says to write can be written: the same recipe is read after the remedy."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from dstrain.engine.ds_config import read_ds_config
from dstrain.errors import RecipeError
from dstrain.recipe_file import load_recipe
from dstrain.training.horizons import Horizons
from tests.unit.cli.remedy_messages import pattern

Overrides = tuple[str, ...]
FALLING = "schedule={kind: linear, warmup_steps: 5, total_steps: 100}"


@dataclass(frozen=True)
class Wrong:
    """The recipe with `overrides` fails with `message`; with each of `remedies` in their place it is read."""

    message: str
    overrides: Overrides
    remedies: tuple[Overrides, ...]
    name: str = "translation/quickstart"


def distillation(keys: str) -> Overrides:
    return (f"objective={{kind: distillation, {keys}}}",)


def lm(message: str, overrides: Overrides, *remedies: Overrides) -> Wrong:
    return Wrong(message, overrides, remedies, "language_modeling/wikitext_tiny")


def wrong(message: str, overrides: Overrides | str, *remedies: Overrides | str) -> Wrong:
    as_tuple = [(each,) if isinstance(each, str) else each for each in (overrides, *remedies)]
    return Wrong(message, as_tuple[0], tuple(as_tuple[1:]))


RECIPES = [
    wrong(
        "compile = layers needs one size a batch, but layout = padded has two; choose layout: auto",
        ("engine.compile=layers", "engine.layout=padded"),
        ("engine.compile=layers", "engine.layout=auto"),
    ),
    wrong(
        "cannot be part of it; choose",
        ("engine.compile=layers", "engine.kernels.norm=liger"),
        ("engine.compile=layers", "engine.kernels.norm=auto"),
        ("engine.compile=none", "engine.kernels.norm=liger"),
    ),
    wrong(
        "cannot be part of it; choose",
        ("engine.compile=layers", "engine.kernels.matmul=native"),
        ("engine.compile=layers", "engine.kernels.matmul=auto"),
        ("engine.compile=none", "engine.kernels.matmul=native"),
    ),
    wrong(
        "choose activation_checkpointing: none, or compile: none",
        ("engine.compile=layers", "engine.activation_checkpointing=selective"),
        ("engine.compile=layers", "engine.activation_checkpointing=none"),
        ("engine.compile=none", "engine.activation_checkpointing=selective"),
    ),
    wrong(
        "choose feed_forward_tiles: 1, or compile: none",
        ("engine.compile=layers", "engine.feed_forward_tiles=2"),
        ("engine.compile=layers", "engine.feed_forward_tiles=1"),
        ("engine.compile=none", "engine.feed_forward_tiles=2"),
    ),
    wrong(
        "but parallel.tensor = {} shares it; choose kernels.cross_entropy: auto or triton",
        ("engine.kernels.cross_entropy=liger", "engine.parallel.tensor=2"),
        ("engine.kernels.cross_entropy=auto", "engine.parallel.tensor=2"),
        ("engine.kernels.cross_entropy=triton", "engine.parallel.tensor=2"),
    ),
    wrong(
        "shares packed tokens, but layout = padded; choose layout: auto",
        ("engine.parallel.sequence=2", "engine.layout=padded"),
        ("engine.parallel.sequence=2", "engine.layout=auto"),
    ),
    wrong(
        "leave hard_weight out, or choose selection: {kind: word_and_sequence}",
        distillation("hard_weight: 0.5, selection: {kind: word}"),
        distillation("selection: {kind: word}"),
        distillation("hard_weight: 0.5, selection: {kind: word_and_sequence}"),
    ),
    wrong(
        "choose selection: {kind: word}, or raise hard_weight",
        distillation("hard_weight: 0, selection: {kind: word_and_sequence}"),
        distillation("hard_weight: 0, selection: {kind: word}"),
        distillation("hard_weight: 0.5, selection: {kind: word_and_sequence}"),
    ),
    wrong(
        "selection: {kind: word}, or a smaller fraction",
        distillation("hard_weight: 0.5, on_policy: {fraction: 1}, selection: {kind: word_and_sequence}"),
        distillation("on_policy: {fraction: 1}, selection: {kind: word}"),
        distillation("hard_weight: 0.5, on_policy: {fraction: 0.5}, selection: {kind: word_and_sequence}"),
    ),
    lm(
        "leave it out, or choose no source (source: null, in tsv source_column: null)",
        ("data.train=[{kind: jsonl, path: x, task: {kind: prefix_lm}}]",),
        ("data.train=[{kind: jsonl, path: x}]",),
        ("data.train=[{kind: jsonl, path: x, source: null, task: {kind: prefix_lm}}]",),
        ("data.train=[{kind: tsv, path: x, source_column: null, task: {kind: prefix_lm}}]",),
    ),
    lm(
        "have a source; set batching.packing: null, or choose text with task: {kind: language_modeling}",
        ("batching.packing={block_size: 100}", "data.train=[{kind: parallel, source: a, target: b}]"),
        (
            "batching.packing=null",
            "data.train=[{kind: parallel, source: a, target: b}]",
            "data.filter={max_source_length: 500, max_target_length: 500}",
        ),
        ("batching.packing={block_size: 100}", "data.train=[{kind: text, path: a, task: {kind: language_modeling}}]"),
    ),
    lm(
        "set document_start, or choose documents: complete_sentences",
        ("batching.packing={block_size: 100, documents: complete_documents}",),
        (
            "batching.packing={block_size: 100, documents: complete_documents}",
            "data.train=[{kind: text, path: a, document_start: '='}]",
        ),
        ("batching.packing={block_size: 100, documents: complete_sentences}",),
    ),
    lm(
        "needs packed sequences, but engine.layout = padded; choose layout: auto, or attention: block",
        ("batching.packing={block_size: 100}", "engine.layout=padded"),
        ("batching.packing={block_size: 100}", "engine.layout=auto"),
        ("batching.packing={block_size: 100, attention: block}", "engine.layout=padded"),
    ),
    lm(
        "batching.packing.block_size = {} is more than {} = {}; lower it, or raise that",
        ("batching.packing={block_size: 5000}",),
        ("batching.packing={block_size: 1000}",),
        ("batching.packing={block_size: 5000}", "batching.max_tokens=5000", "model.max_target_length=5000"),
    ),
    lm(
        "is no regular expression ({}); correct it, or escape a symbol by",
        ("data.train=[{kind: text, path: a, document_start: '('}]",),
        (r"data.train=[{kind: text, path: a, document_start: '\('}]",),
    ),
    lm(
        "choose selection: {kind: global}",
        distillation("selection: {kind: global_by_language, tags: [a, b]}"),
        distillation("selection: {kind: global}"),
    ),
    wrong(
        "remove objective.r_drop",
        ("model.dropout=0", "objective.r_drop.alpha=1"),
        ("model.dropout=0",),
        ("objective.r_drop.alpha=1",),
    ),
    wrong(
        "raise model.dropout, or {}",
        ("model.dropout=0", "objective.r_drop.alpha=1"),
        ("model.dropout=0.1", "objective.r_drop.alpha=1"),
    ),
    wrong(
        "tie = all shares one; choose tie: none",
        "model.embedding={kind: factorized, dim: 8, sides: source, tie: all}",
        "model.embedding={kind: factorized, dim: 8, sides: source, tie: none}",
    ),
    wrong(
        "choose the same width, or tie: none",
        "model.embedding={kind: plain, tie: all, output_dim: 32}",
        "model.embedding={kind: plain, tie: none, output_dim: 32}",
    ),
    Wrong(
        "but a decoder-only model has one; choose tie: decoder",
        ("model.embedding.tie=all",),
        (("model.embedding.tie=decoder",),),
        "translation/multi30k_tiny_decoder_only",
    ),
    wrong(
        "cuts more parts than a micro-batch has tokens, batching.max_tokens = {}; lower it",
        "engine.feed_forward_tiles=4097",
        "engine.feed_forward_tiles=4096",
    ),
    wrong("each rank takes as many heads and features; choose a divisor", "engine.parallel.tensor=3", "engine.parallel.tensor=2"),
    lm(
        "choose a task that makes one (task: {kind: denoising}), model.kind: decoder_only, or a corpus of pairs",
        ("model={preset: tiny}",),
        (),
    ),
    lm(
        "set validation.generation: null",
        ("validation.generation={kind: beam, beam_size: 2}",),
        ("validation.generation=null",),
    ),
    lm("data.train is text without a source; leave it out", ("data.filter.max_ratio=3",), ()),
    lm("cuts sources, and data.train has none; leave it out", ("data.filter.long_sources=truncate",), ()),
    wrong(
        "needs validation.rouge; set it to stemmed or plain, or choose another metric",
        "validation.metric=rouge_l",
        ("validation.metric=rouge_l", "validation.rouge=stemmed"),
        "validation.metric=chrf",
    ),
    lm("but generation = null; set generation, or leave rouge out", ("validation.rouge=plain",), ()),
    wrong("lower it (a tenth of the peak is {})", "schedule.warmup_init=1", "schedule.warmup_init=0.0001"),
    Wrong(
        "source and target with one vocabulary, but data.tokenizer.sharing = separate; choose sharing: joint",
        ("data.tokenizer.sharing=separate",),
        (("data.tokenizer.sharing=joint",),),
        "translation/multi30k_tiny_decoder_only",
    ),
    wrong(
        "choose sharing: joint or tie: decoder",
        ("data.tokenizer.sharing=separate", "model.embedding.tie=all"),
        ("data.tokenizer.sharing=joint", "model.embedding.tie=all"),
        ("data.tokenizer.sharing=separate", "model.embedding.tie=decoder"),
    ),
    wrong(
        "model.from_base names the architecture, too; leave one of the two out",
        "model={preset: tiny, from_base: true}",
        "model={preset: tiny}",
    ),
    wrong(
        "is of kind {}, not {}; leave one of the two out",
        "model={preset: base, kind: decoder_only}",
        "model={preset: base}",
    ),
    wrong("write it as section.key=value", "training.seed", "training.seed=3"),
    wrong("write null for none, or '' in quotes", "adapter=", "adapter=null", "description=''"),
    wrong("is not a YAML value ({}); quote it", "description=[", "description='['"),
    wrong("put the value in quotes", "description=a #b", "description='a #b'"),
    wrong("is the value {}, which has no keys", "training.seed.x=1", "training.seed=1"),
    wrong(
        "items count from 0; to add one, give the whole list",
        "optimizer.betas.2=0.5",
        "optimizer.betas.1=0.5",
        "optimizer.betas=[0.5, 0.5]",
    ),
    wrong(
        "needs validation.generation; set it or choose metric: loss",
        ("validation.metric=bleu", "validation.generation=null"),
        ("validation.metric=bleu", "validation.generation={kind: beam, beam_size: 2}"),
        ("validation.metric=loss", "validation.generation=null"),
    ),
]


@pytest.mark.parametrize("case", RECIPES, ids=[case.message for case in RECIPES])
def test_a_recipe_is_read_after_its_remedy(case: Wrong) -> None:
    with pytest.raises(RecipeError, match=pattern(case.message)):
        load_recipe(case.name, case.overrides)
    for remedy in case.remedies:
        load_recipe(case.name, remedy)


JSON = {
    'write "auto" and set batching.max_tokens': (
        {"train_micro_batch_size_per_gpu": 4},
        {"train_micro_batch_size_per_gpu": "auto"},
        ("batching.max_tokens=500",),
    ),
    'but the recipe has engine.clip_norm = {}; write "auto"': ({"gradient_clipping": 3}, {"gradient_clipping": "auto"}, ()),
    'but the recipe has engine.precision = {}; write "auto"': ({"bf16": {"enabled": True}}, {"bf16": {"enabled": "auto"}}, ()),
    "does not work with engine.precision = {}; leave it out, or use fp32": (
        {"data_types": {"grad_accum_dtype": "bf16"}},
        {"data_types": {"grad_accum_dtype": "fp32"}},
        (),
    ),
    "of different tensor ranks; leave one of them out": (
        {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
        {"zero_optimization": {"stage": 3}},
        ("engine.parallel.tensor=2",),
    ),
    "which stage 3 gathers module by module; choose zero1 or zero2, or engine.compile: none": (
        {"zero_optimization": {"stage": 3}},
        {"zero_optimization": {"stage": 2}},
        ("engine.compile=layers",),
    ),
    "set batching.tokens_per_step in the recipe": ({"train_batch_size": 8}, {}, ("batching.tokens_per_step=500",)),
    "set engine.precision in the recipe": ({"amp": {"enabled": True}}, {}, ("engine.precision=bf16",)),
    "set engine.parallel.tensor in the recipe": ({"tensor_parallel": {"autotp_size": 2}}, {}, ("engine.parallel.tensor=2",)),
    "set engine.parallel.sequence in the recipe": ({"sequence_parallel_size": 2}, {}, ("engine.parallel.sequence=2",)),
    "set engine.activation_checkpointing in the recipe": (
        {"activation_checkpointing": {"partition_activations": True}},
        {},
        ("engine.activation_checkpointing=full",),
    ),
    "set reporting.tensorboard in the recipe": ({"tensorboard": {"enabled": True}}, {}, ("reporting.tensorboard=true",)),
    "set reporting.wandb in the recipe": ({"wandb": {"enabled": True}}, {}, ("reporting.wandb={project: a}",)),
    "set reporting.log_every in the recipe": ({"steps_per_print": 5}, {}, ("reporting.log_every=5",)),
}
"""Message -> a DeepSpeed file, the mended one, and keys of the recipe that the message names."""


@pytest.mark.parametrize("message", JSON)
def test_a_deepspeed_file_is_taken_after_its_remedy(message: str, tmp_path: Path) -> None:
    content, mended, keys = JSON[message]
    path = tmp_path / "ds.json"
    plain = {"zero_optimization": {"stage": 1}}
    named = f"engine.deepspeed={path}"
    tensor = [key for key in keys if "parallel" in key or "compile" in key]
    path.write_text(json.dumps({**plain, **content}))
    with pytest.raises(RecipeError, match=pattern(message)):
        read_ds_config(load_recipe("translation/quickstart", [named, *tensor]).engine)
    path.write_text(json.dumps({**plain, **mended}))
    read_ds_config(load_recipe("translation/quickstart", [named, *keys]).engine)


def test_a_file_of_deepspeed_that_is_missing_is_replaced_by_a_shipped_one() -> None:
    with pytest.raises(RecipeError, match=pattern(NO_FILE)):
        load_recipe("translation/quickstart", ["engine.deepspeed=my/zero1.json"])
    load_recipe("translation/quickstart", ["engine.deepspeed=zero1"])


NO_FILE = "engine.deepspeed: no file {}; give a path to a DeepSpeed JSON file, or {}"
BEYOND = "would change nothing; raise total_steps to {}, or set training.max_steps = {}"
UNKNOWN_END = "set training.max_steps = {} beside it"
TRAIN_TIME = "training.max_hours alone ends the run, so it is unknown at which step: {}"


def test_a_run_of_the_length_that_the_message_names_has_no_idle_end() -> None:
    def horizons(*overrides: str) -> Horizons:
        return Horizons(load_recipe("translation/quickstart", [FALLING, *overrides]))

    with pytest.raises(RecipeError, match=pattern(BEYOND)):
        horizons("training.max_steps=200")
    assert not [*horizons("training.max_steps=100").errors()]
    assert not [*horizons("training.max_steps=200", "schedule.total_steps=200").errors()]
    hours = ("training={max_hours: 1}",)
    (warning,) = horizons(*hours).warnings()
    assert pattern(TRAIN_TIME).search(warning)
    assert pattern(UNKNOWN_END).search(warning)
    assert not [line for line in horizons(*hours, "training.max_steps=100").warnings() if "max_hours" in line]


EXTENDS = "only a file extends a recipe; write `extends: {}` into one of your own"


def test_a_file_extends_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=pattern(EXTENDS)):
        load_recipe("translation/quickstart", ["extends=translation/multi30k_tiny"])
    path = tmp_path / "own.yaml"
    path.write_text("extends: translation/quickstart\n")
    load_recipe(str(path))


SINGLE = (NO_FILE, BEYOND, UNKNOWN_END, TRAIN_TIME, EXTENDS)
"""The messages of the tests that are no table."""
