"""Wrong recipes as people write them: each mistake counted once, named by its keys, with the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from dstrain.errors import RecipeError
from dstrain.recipe_file import load_recipe

KINDS_OF_TEXT = "'parallel', 'tsv', 'jsonl', "
METRICS = "'loss', 'bleu', 'chrf', 'rouge_1', 'rouge_2' or 'rouge_l'"
NO = "YAML reads no, off and false without quotes as false"


def lines_of(name: str, *overrides: str) -> list[str]:
    """The mistakes of a recipe; the first line counts them."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    lines = str(caught.value).splitlines()
    return [line.strip() for line in lines]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "data.tokenizer.tags=[en, no]",
            f"data.tokenizer.tags.1: input should be a valid string, not false; {NO}: put the word in",
        ),
        (
            "data.tokenizer.tags=[2016]",
            "tags.0: input should be a valid string, not 2016; YAML reads it as a number: put it in quotes",
        ),
        (
            "data.tokenizer.tags=[~]",
            "tags.0: input should be a valid string, not null; YAML reads null, ~ and nothing at all as null",
        ),
        ("objective.chunk_tokens=0", "objective.chunk_tokens: input should be a whole number above 0, or auto, not 0"),
        ("validation.metric=off", f"validation.metric: input should be {METRICS}, not false; {NO}"),
        ("model.kind=no", f"model.kind: false is unknown; {NO}: put the word in quotes; choose one of 'encoder_decoder', "),
        ("model.preset=no", f"model.preset: no preset false; {NO}: put the word in quotes"),
        ("model.dropout=yes", "model.dropout: input should be a valid number, not true; YAML reads yes, on and true"),
        ("adapter=no", "adapter: input should be a section, not false; write null for none"),
        ("training='max_steps:5'", "training: input should be a section, not 'max_steps:5'; put a space after the colon"),
        ("validation.metric=BLEU", f"input should be {METRICS}, not 'BLEU'; did you mean bleu?"),
        ("training={<<: {max_steps: 5}}", "`<<`, which is not read; write the keys of that mapping out"),
        ("training={\u00a0max_steps: 5}", "the key '\\xa0max_steps' begins or ends with a space; if it is an indent"),
        (
            "model={preset: base, kind: decoder_only}",
            "model.kind: the preset base is of kind encoder_decoder, not 'decoder_only'; leave one of the two out",
        ),
        (
            "schedule.warmup_init=1",
            "is a learning rate, and above the peak, optimizer.learning_rate = 0.003; lower it",
        ),
        ("schedule={kind: cosine, total_steps: 500, final: 0.1}", "lower it (a tenth of the peak is 0.0003)"),
        ("model.dropout=no", f"model.dropout: input should be a valid number, not false; {NO}: give a number"),
        (
            "data.train.0.num_pairs=yes",
            "data.train.0.num_pairs: input should be a valid number, not true; YAML reads yes, on and true",
        ),
        (
            "training.max_steps=1e5",
            "training.max_steps: input should be a valid integer, not '1e5'; YAML reads it as text: write 100000",
        ),
        ("training.max_steps=10,000", "input should be a valid integer, not '10,000'; YAML reads it as text: write 10000"),
        ("training.max_steps=1.5", "training.max_steps: input should be a valid integer, not 1.5"),
        ("training.max_steps=010", "(010 is a number of base 8 in YAML; write it in base 10 or in quotes); quote it"),
        ("training.max_steps=", "--set training.max_steps=: the value is missing; write null for none"),
        ("data.test={no: []}", "(the key no is not text in YAML; quote it)"),
        ("extends=translation/quickstart", "only a file extends a recipe; write `extends: translation/quickstart` into one"),
        ("model.embedding.scale=maybe", "model.embedding.scale: input should be true or false, not 'maybe'"),
        ("data.tokenizer.tags=en", "data.tokenizer.tags: input should be a list, not 'en'; put it in brackets: [en]"),
        (
            "data.train={kind: tsv, path: a}",
            "data.train: input should be a list, not {kind: 'tsv', path: 'a'}; put sections in brackets",
        ),
        ("data.valid=my.en", "data.valid: input should be a list, not 'my.en'; put sections in brackets: [{kind: ..., ...}]"),
        ("data.test={kind: tsv, path: a}", "data.test: 'kind' names no test set; write test: {NAME: [{kind: ...}]}"),
        ("data.train.0.weight=2", "data.train.0.weight: unknown key; valid: kind, name, num_pairs, seed, split"),
        ("checkpoint.keep=3", "checkpoint.keep: unknown key; did you mean keep_bundles or keep_checkpoints?"),
        ("train={}", "train: unknown key; did you mean data.train?"),
        ("data.train=[]", "data.train: input should be a list of at least 1 item, not []"),
        ("optimizer.betas=[0.1, 0.2, 0.3]", "optimizer.betas: input should be a list of at most 2 items, not [0.1, 0.2, 0.3]"),
        ("data.test=[a]", "data.test: input should be a mapping, not ['a']; write NAME: VALUE lines, not a list"),
        ("engine=zero1", "engine: input should be a section, not 'zero1'; its keys: deepspeed, precision, clip_norm, "),
        ("model.position=rotary", "model.position: input should be a section, not 'rotary'; write {kind: rotary}"),
        (
            "data.train=[a.en]",
            f"data.train.0: input should be a section, not 'a.en'; write {{kind: KIND, ...}} with a KIND of {KINDS_OF_TEXT}",
        ),
        ("data.train=[{source: a}]", f"data.train.0: missing `kind`; choose one of {KINDS_OF_TEXT}"),
        ("data.test={a: [{path: a}]}", f"data.test.a.0: missing `kind`; choose one of {KINDS_OF_TEXT}"),
        (
            "objective={kind: distillation, features: [{side: encoder}]}",
            "objective.features.0: missing `kind`; choose one of 'hidden_",
        ),
        ("generation={beam_size: 3}", "generation: missing `kind`; choose one of 'beam', 'sampling'"),
        ("validation.metric=blue", f"validation.metric: input should be {METRICS}, not 'blue'; did you mean bleu?"),
        ("model.preset=transformer_big", "model.preset: no preset 'transformer_big'; did you mean big?"),
        ("model.preset=transformer_iwslt_de_en", "model.preset: no preset 'transformer_iwslt_de_en'; did you mean iwslt?"),
        ("seed=3", "seed: unknown key; did you mean training.seed or generation.seed?"),
        ("batching.learning_rate=3", "batching.learning_rate: unknown key; did you mean optimizer.learning_rate?"),
        ("generation.top_k=3", "generation.top_k: unknown key; only kind: 'sampling' has it"),
        ("optimizer.adam_eps=1", "optimizer.adam_eps: unknown key; did you mean eps?"),
        (
            "data.train.1={kind: tsv, path: a}",
            "'1' is no item of a list of 1; items count from 0; to add one, give the whole list",
        ),
        ("optimizer.betas.0.x=1", "--set optimizer.betas.0.x=1: optimizer.betas.0 is the value 0.9, which has no keys"),
        ("description=a #b", "YAML reads a comment from ' #' on; put the value in quotes"),
        ("training.seed.x.y=1", "training.seed is the value 1, which has no keys"),
        ("optimizer.betas.\u00b2=1", "is no item of a list of 2; items count from 0"),
        ("model.dropout=[null, {a: no}]", "model.dropout: input should be a valid number, not [null, {a: false}]"),
        ("version=null", "version: this dstrain reads recipes of version 1, not null"),
    ],
)
def test_a_wrong_value_is_one_line(override: str, message: str) -> None:
    lines = lines_of("translation/quickstart", override)
    assert message in lines[-1]
    assert len(lines) == (1 if override.startswith("version") else 2)


LAYERS = "objective={{kind: distillation, features: [{{kind: attention, side: cross, layers: {}}}]}}"


@pytest.mark.parametrize(
    ("layers", "messages"),
    [
        ("{}", ["objective.features.0.layers: input should be a mapping of at least 1 item, not {}"]),
        ("{a: 1}", ["objective.features.0.layers: the key 'a' should be a valid integer"]),
        ("{0: 1}", ["objective.features.0.layers: the key '0' should be greater than 0"]),
        (
            "{0: 0}",
            [
                "objective.features.0.layers: the key '0' should be greater than 0",
                "objective.features.0.layers.0: input should be greater than 0, not 0",
            ],
        ),
    ],
)
def test_a_wrong_key_of_a_mapping_is_told_from_its_value(layers: str, messages: list[str]) -> None:
    assert lines_of("translation/quickstart", LAYERS.format(layers))[1:] == messages


def test_every_mistake_is_counted() -> None:
    unfit = ("model.max_source_length=100", "model.max_target_length=100", "data.tokenizer.sharing=separate")
    lines = lines_of("translation/quickstart", *unfit)
    assert lines[0].endswith(": 3 mistakes")
    assert len(lines) == 4
    assert lines_of("translation/quickstart", "model.preset=bg", "model.dorpout=1", "training.seed=x")[0].endswith(": 3 mistakes")
    assert lines_of("translation/quickstart", "data.train=[5]")[0].endswith(": 1 mistake")


def test_a_recipe_without_sections_hears_of_extends(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("training: {max_steps: 5}\n")
    lines = lines_of(str(path))
    assert lines[0].endswith("own.yaml: 6 mistakes")
    assert lines[1] == "version: missing; write 1"
    assert lines[-2] == "(`extends: translation/multi30k_tiny` takes the missing sections from that recipe)"


@pytest.mark.parametrize(
    ("name", "meant"),
    [("v", "v.yaml"), ("V.yaml", "v.yaml"), ("v.yml", "v.yaml"), ("run", "run/recipe.yaml"), ("vv.yaml", "v.yaml")],
)
def test_a_near_file_is_suggested(name: str, meant: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for file in ("v.yaml", "run/recipe.yaml"):
        (tmp_path / file).write_text("extends: translation/quickstart\n")
    assert f"no shipped recipe and no file of that name; did you mean {tmp_path / meant}?" in lines_of(str(tmp_path / name))[0]
    assert "it is a directory; name a file in it, or one of language_modeling/" in lines_of(str(tmp_path))[0]
