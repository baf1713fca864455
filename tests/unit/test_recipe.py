"""Recipes: names, extends, overrides, and every mistake in words, at once."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dstrain.config_base import Tree
from dstrain.data.config import has_no_source
from dstrain.errors import RecipeError
from dstrain.models.presets import PRESETS
from dstrain.recipe_file import dump_recipe, load_recipe, merge, recipe_names
from tests.paths import ROOT


def errors_of(*overrides: str, recipe: str = "translation/quickstart") -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_is_valid_and_survives_a_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(dump_recipe(recipe))
    assert load_recipe(str(copy)) == recipe


def test_overrides_change_values_at_any_depth() -> None:
    recipe = load_recipe("translation/quickstart", ["training.max_steps=7", "data.train.0.num_pairs=9", "model.dropout=0"])
    assert recipe.training.max_steps == 7
    assert recipe.data.train[0].model_dump()["num_pairs"] == 9
    assert recipe.model.dropout == 0


def test_all_mistakes_are_reported_together_with_the_nearest_key() -> None:
    message = errors_of("training.max_stpes=3", "model.encoder.depht=2", "optimizer.learning_rate=-1")
    assert "3 mistakes" in message
    assert "training.max_stpes: unknown key; did you mean max_steps?" in message
    assert "model.encoder.depht: unknown key; did you mean depth?" in message
    assert "optimizer.learning_rate: input should be greater than 0, not -1" in message


def test_a_key_inside_a_tagged_part_is_named_without_the_tag() -> None:
    assert "data.train.0.num_pear: unknown key; did you mean num_pairs?" in errors_of("data.train.0.num_pear=3")


def test_an_unknown_kind_names_the_choices_once() -> None:
    message = errors_of("data.train.0.kind=paralel")
    assert "1 mistake\n" in message
    assert "data.train.0.kind: 'paralel' is unknown; choose one of 'parallel'" in message


def test_a_missing_value_is_named() -> None:
    assert "schedule.total_steps: missing" in errors_of("schedule={kind: cosine}")


def test_training_must_end() -> None:
    assert "training: training never ends: give max_steps, max_epochs or max_hours" in errors_of("training.max_steps=null")


def test_heads_must_divide_the_width() -> None:
    assert "encoder.num_heads = 3 does not divide model_dim = 128" in errors_of("model.encoder.num_heads=3")


def test_tensor_ranks_must_divide_heads_and_features() -> None:
    sizes = (
        "decoder.num_heads=6",
        "decoder.num_cross_kv_heads=3",
        "encoder.ffn_dim=130",
        "encoder.num_kv_heads=2",
        "model_dim=96",
    )
    message = errors_of("engine.parallel.tensor=4", *(f"model.{size}" for size in sizes))
    refused = {"decoder.num_heads": 6, "decoder.num_cross_kv_heads": 3, "encoder.ffn_dim": 130, "encoder.num_kv_heads": 2}
    for key, value in refused.items():
        assert f"engine.parallel.tensor = 4 does not divide model.{key} = {value}" in message
    assert message.count("engine.parallel.tensor") == len(refused), "keys that the recipe leaves out are not named"


def test_sequence_ranks_must_share_heads_and_packed_tokens() -> None:
    sizes = (
        "decoder.num_heads=6",
        "decoder.num_kv_heads=3",
        "decoder.num_cross_kv_heads=2",
        "encoder.num_heads=4",
        "model_dim=96",
    )
    message = errors_of("engine.parallel.sequence=4", *(f"model.{size}" for size in sizes))
    for key, value, remedy in (("num_heads", 6, "a divisor of the heads"), ("num_kv_heads", 3, "a divisor or a multiple")):
        assert f"engine.parallel.sequence = 4 does not suit model.decoder.{key} = {value}: the ranks share heads" in message
        assert f"choose {remedy}" in message
    assert "num_cross_kv_heads" not in message, "four ranks can read two heads of keys"
    assert "encoder" not in message
    message = errors_of("engine.parallel={tensor: 2, sequence: 4}")
    assert "sequence = 4 does not suit model.encoder.num_heads = 4 over 2 tensor ranks" in message
    message = errors_of("engine.parallel.sequence=2", "engine.layout=padded")
    assert "parallel.sequence = 2 shares packed tokens, but layout = padded; choose layout: auto" in message


def test_training_may_not_outlast_its_schedule() -> None:
    assert "goes beyond schedule.total_steps = 5" in errors_of("schedule={kind: linear, total_steps: 5}")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("schedule={kind: cosine, total_steps: 600, warmup_steps: 600}", "warmup_steps = 600 reaches total_steps = 600"),
        ("schedule={kind: wsd, total_steps: 600, warmup_steps: 1, decay_steps: 600}", "exceed total_steps = 600"),
        ("data.tokenizer.sharing=separate", "tie = all needs one vocabulary for both sides"),
        ("model.max_source_length=100", "data.filter.max_source_length = 1024 keeps sentences that the model does not read"),
    ],
)
def test_sections_that_do_not_fit_together_are_refused(override: str, complaint: str) -> None:
    assert complaint in errors_of(override)


def test_r_drop_without_any_dropout_is_refused() -> None:
    recipe = ["objective.r_drop={alpha: 2}", "model.dropout=0"]
    assert (
        "objective.r_drop.alpha = 2.0 has no effect: every dropout of model and adapter is 0, so both passes are the same; "
        "raise model.dropout, or remove objective.r_drop"
    ) in errors_of(*recipe)
    adapter = "adapter={kind: lora, rank: 2, alpha: 4, dropout: 0.1, targets: [q_proj]}"
    for other in (adapter, "model.attention_dropout=0.1", "model.activation_dropout=0.1", "model.decoder.layer_drop=0.1"):
        assert load_recipe("translation/quickstart", [*recipe, other]).objective.r_drop is not None


def test_values_of_training_options_are_checked() -> None:
    objective = "objective={kind: cross_entropy, average: words, r_drop: {alpha: 0}}"
    message = errors_of(objective, "optimizer.kind=stable", "optimizer.betas=[0.9, 1]")
    assert "objective.average: input should be 'tokens' or 'sentences', not 'words'" in message
    assert "objective.r_drop.alpha: input should be greater than 0, not 0" in message
    assert "optimizer.kind: input should be 'adam', 'adamw' or 'stable_adamw', not 'stable'" in message
    assert "optimizer.betas.1: input should be less than 1, not 1" in message


def test_a_recipe_of_adamw_needs_no_kind() -> None:
    optimizer = load_recipe("translation/quickstart", ["optimizer={learning_rate: 0.1}"]).optimizer
    assert (optimizer.kind, optimizer.eps) == ("adamw", 1e-8)


TEXT = "{kind: text, path: text.txt}"
LANGUAGE_MODEL = "language_modeling/wikitext_tiny"


@pytest.mark.parametrize("place", ["data.train.0", "data.valid.0", "data.test.test.0"])
def test_an_encoder_has_nothing_to_read_of_text_without_a_source(place: str) -> None:
    message = errors_of(f"{place}={TEXT}")
    assert f"{place} is text without a source (kind: text), so an encoder has nothing to read" in message


@pytest.mark.parametrize("overrides", [[], ["data.valid.0={kind: grammar, split: valid, num_pairs: 3}"]])
def test_text_without_a_source_is_not_translated(overrides: list[str]) -> None:
    with pytest.raises(RecipeError, match=r"there is nothing to translate; set validation\.generation: null"):
        load_recipe(LANGUAGE_MODEL, ["validation.generation={kind: beam}", *overrides])


def test_an_objective_that_reads_a_source_needs_one() -> None:
    on_policy = "objective={kind: distillation, on_policy: {fraction: 0.3}}"
    assert load_recipe("translation/quickstart", [on_policy]).objective.on_policy.max_length_offset == 10
    with pytest.raises(RecipeError, match=r"objective\.on_policy samples a target for each source, but data\.train\.0 is text w"):
        load_recipe(LANGUAGE_MODEL, [on_policy])
    by_language = "objective={kind: distillation, selection: {kind: global_by_language, tags: [a]}}"
    with pytest.raises(RecipeError, match=r"by_language reads the language from the source, but data\.train\.0 is text without"):
        load_recipe(LANGUAGE_MODEL, [by_language])
    load_recipe("translation/multi30k_tiny_decoder_only", [by_language])
    message = errors_of("objective={kind: distillation, on_policy: {fraction: 1.5, temperature: 0}}")
    assert "objective.on_policy.fraction: input should be less than or equal to 1, not 1.5" in message
    assert "objective.on_policy.temperature: input should be greater than 0, not 0" in message


def test_the_length_filter_of_a_decoder_only_model_minds_what_it_reads() -> None:
    def error(name: str, *overrides: str) -> str:
        with pytest.raises(RecipeError) as caught:
            load_recipe(name, overrides)
        return str(caught.value)

    found = error(LANGUAGE_MODEL, "data.filter={max_target_length: 2049}")
    assert (
        "data.filter.max_target_length = 2049 keeps text that the model does not read (model.max_target_length = 2048)" in found
    )
    load_recipe(LANGUAGE_MODEL, ["data.filter={max_target_length: 2048}"])
    assert "data.filter.max_ratio compares the lengths of two sides" in error(LANGUAGE_MODEL, "data.filter.max_ratio=2")
    pairs = "translation/multi30k_tiny_decoder_only"
    found = error(pairs, "data.filter.max_source_length=1026")
    assert "keeps sources of 1026 and targets of 1024 tokens, together more than the model reads" in found
    load_recipe(pairs, ["data.filter.max_source_length=1025"])
    assert "one vocabulary" in error(pairs, "data.tokenizer.sharing=separate")


def test_the_deepspeed_file_and_bad_overrides_are_reported_with_the_rest() -> None:
    message = errors_of("training.max_stpes=3", "engine.deepspeed=zreo1", "training.max_steps")
    assert "3 mistakes" in message
    assert "no DeepSpeed configuration 'zreo1'; did you mean zero1?" in message
    assert "write it as section.key=value" in message


def test_a_preset_brings_a_whole_model_and_other_keys_go_over_it() -> None:
    recipe = load_recipe("translation/quickstart", ["model.preset=it2_dist", "model.dropout=0.2"])
    assert recipe.model == PRESETS["it2_dist"].model_copy(update={"dropout": 0.2})
    assert "no preset 'it3'; did you mean it2?" in errors_of("model={preset: it3}")
    assert f"no preset 'zz'; valid: {', '.join(sorted(PRESETS))}" in errors_of("model={preset: zz}")


def test_a_preset_in_a_file_replaces_the_model_that_it_extends(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: translation/quickstart\nmodel: {preset: base, embedding: {tie: all}}\n")
    model = load_recipe(str(child)).model
    assert (model.model_dim, model.norm_order, model.embedding.tie) == (512, "post", "all")
    grandchild = tmp_path / "grandchild.yaml"
    grandchild.write_text("extends: child.yaml\nmodel: {kind: encoder_decoder, dropout: 0.25}\n")
    assert load_recipe(str(grandchild)).model == model.model_copy(update={"dropout": 0.25})


def test_another_version_is_refused() -> None:
    assert "reads recipes of version 1, not 2" in errors_of("version=2")


def test_an_unknown_name_gets_the_nearest_one() -> None:
    assert "did you mean translation/quickstart?" in errors_of(recipe="translation/quickstrt")


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("training.max_steps", "write it as section.key=value"),
        ("training.max_steps.deeper=1", "which has no keys"),
        ("data.train.5.seed=1", "no item of a list of 1"),
        ("data.train.x.seed=1", "'x' is no item of a list"),
        ("training={a: [}", "is not a YAML value"),
    ],
)
def test_a_bad_override_is_explained(override: str, complaint: str) -> None:
    assert complaint in errors_of(override)


def test_extends_merges_sections_key_by_key(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("extends: translation/quickstart\nmodel: {dropout: 0.25}\nschedule: {kind: constant}\n")
    recipe = load_recipe(str(child))
    base = load_recipe("translation/quickstart")
    assert recipe.model.dropout == 0.25
    assert recipe.model.encoder == base.model.encoder
    assert recipe.schedule.model_dump() == {"kind": "constant", "warmup_steps": 0, "warmup_init": 0.0}


def files(directory: Path, **texts: str) -> str:
    """YAML files by name; the path of the first."""
    for name, text in texts.items():
        (directory / f"{name}.yaml").write_text(text)
    return str(directory / f"{next(iter(texts))}.yaml")


def test_extends_goes_to_any_depth_and_joins_a_list_in_order(tmp_path: Path) -> None:
    path = files(
        tmp_path,
        child="extends: [parent.yaml, seeds.yaml]\ntraining: {max_epochs: 3}\n",
        parent="extends: grandparent.yaml\ntraining: {seed: 5, max_steps: 70}\n",
        grandparent="extends: translation/quickstart\ntraining: {max_steps: 9, hang_seconds: 6}\n",
        seeds="training: {seed: 8}\n",
    )
    training = load_recipe(path).training
    assert (training.max_epochs, training.seed, training.max_steps, training.hang_seconds) == (3, 8, 70, 6)
    seeds = (tmp_path / "seeds.yaml").read_text()
    circle = files(tmp_path, seeds=f"extends: [child.yaml]\n{seeds}")
    steps = " -> ".join(f"{tmp_path}/{name}.yaml" for name in ("seeds", "child", "seeds"))
    assert f"seeds.yaml: extends leads in a circle: {steps}; leave one of them out" in errors_of(recipe=circle)


def test_a_mapping_of_the_users_names_is_replaced_and_the_description_is_not_inherited(tmp_path: Path) -> None:
    own = "{kind: grammar, split: test, num_pairs: 3}"
    path = files(tmp_path, own=f"extends: translation/multi30k_tiny\ndata:\n  test:\n    mine: [{own}]\n")
    recipe = load_recipe(path)
    assert list(recipe.data.test) == ["mine"]
    assert recipe.data.train == load_recipe("translation/multi30k_tiny").data.train
    assert (recipe.description, load_recipe("translation/multi30k_tiny").description[:16]) == ("", "Transformer-Tiny")


@pytest.mark.parametrize("empty", ["{}", "null", ""])
def test_test_sets_are_emptied(empty: str, tmp_path: Path) -> None:
    path = files(tmp_path, own=f"extends: translation/quickstart\ndata:\n  test: {empty}\n")
    assert load_recipe(path).data.test == {}


def test_null_empties_a_section_and_is_the_value_of_what_may_be_null(tmp_path: Path) -> None:
    base = "objective: {kind: cross_entropy, label_smoothing: 0.3}\ntraining: {ema: {decay: 0.9}}\n"
    base = f"extends: translation/quickstart\ndata: {{filter: {{max_ratio: 2}}}}\n{base}"
    child = "extends: base.yaml\nobjective:\ndata: {filter: null}\ntraining: {ema: null}\n"
    child += "validation: {metric: loss, generation: null}\n"
    recipe = load_recipe(files(tmp_path, child=child, base=base))
    assert recipe.objective == type(recipe.objective)()
    assert recipe.data.filter.max_ratio is None
    assert (recipe.training.ema, recipe.validation.generation) == (None, None)
    assert load_recipe("translation/quickstart", ["reporting=null"]).reporting.log_every == 50
    assert "schedule: missing; give it a value" in errors_of("schedule=null")
    assert "training.seed: input should be a valid integer, not null" in errors_of("training.seed=null")


OF_UNNAMED_CORPORA = [name for name in recipe_names() if load_recipe(name).batching.sampling is None]
"""Recipes that neither mix corpora by name nor have directions."""


@pytest.mark.parametrize("name", OF_UNNAMED_CORPORA)
def test_every_shipped_recipe_on_own_data_is_extends_and_data(name: str, tmp_path: Path) -> None:
    """Own data of the same kind: pairs, or text with the same task. Recipes that name their corpora want the same names."""
    base = load_recipe(name)
    corpus: Tree = {"kind": "parallel", "source": "my.en", "target": "my.de"}
    if has_no_source(base.data.train):
        corpus = {**base.data.train[0].model_dump(mode="json"), "path": "my.txt"}
    data = {"train": [corpus], "valid": [corpus], "test": {"mine": [corpus]}}
    recipe = load_recipe(files(tmp_path, own=yaml.safe_dump({"extends": name, "data": data})))
    assert [corpus.items() <= read.model_dump(mode="json").items() for _, read in recipe.data.corpora()] == [True] * 3
    assert recipe.model_copy(update={"data": base.data, "description": base.description}) == base


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("5", "child.yaml: extends: give a recipe or a list of recipes, not 5"),
        ("[translation/quickstart, 5]", "extends: give a recipe or a list of recipes, not ['translation/quickstart', 5]"),
        ("", "child.yaml: extends: give a recipe or a list of recipes, not null"),
        (
            "translation/quikstart",
            "child.yaml: extends: recipe 'translation/quikstart': no shipped recipe and no file of that name",
        ),
        ("broken", "/broken.yaml?"),
        ("broken.yaml", "broken.yaml: not valid YAML: line 2"),
        ("child.yaml", "child.yaml: extends leads in a circle"),
    ],
)
def test_a_bad_extends_is_explained(text: str, complaint: str, tmp_path: Path) -> None:
    assert complaint in errors_of(recipe=files(tmp_path, child=f"extends: {text}\n", broken="a: {\n"))


def test_a_near_word_for_extends_is_one_mistake(tmp_path: Path) -> None:
    complaint = errors_of(recipe=files(tmp_path, child="Extend: translation/quickstart\ndata: {}\n"))
    assert complaint.endswith("child.yaml: Extend: unknown key; did you mean extends?")


def test_merge_replaces_a_part_of_another_kind() -> None:
    base = {
        "schedule": {"kind": "cosine", "total_steps": 1},
        "training": {"seed": 1, "max_steps": 2},
        "data": {"test": {"a": []}},
    }
    top = {"schedule": {"kind": "constant"}, "training": {"seed": 3}, "data": {"test": {"b": []}}}
    assert merge(base, top) == {**top, "training": {"seed": 3, "max_steps": 2}}
    assert merge(base, {"schedule": {"total_steps": 2}})["schedule"] == {"kind": "cosine", "total_steps": 2}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [", "not valid YAML"),
        ("- 1", "a recipe is a mapping of sections, not [1]"),
        ("training: {seed: 1, seed: 2}", "the key 'seed' is given twice"),
    ],
)
def test_a_broken_file_is_explained(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    assert complaint in errors_of(recipe=str(path))


@pytest.mark.parametrize("arguments", [["--help"], ["show", "translation/multi30k_tiny"]])
def test_help_and_show_answer_within_a_second(arguments: list[str]) -> None:
    """Of CPU time, which other processes of a busy machine do not add to."""

    def seconds() -> float:
        start = os.times()
        subprocess.run([sys.executable, "-m", "dstrain", *arguments], check=True, capture_output=True, cwd=ROOT)
        end = os.times()
        return end.children_user + end.children_system - start.children_user - start.children_system

    assert seconds() < 1.0


def test_show_prints_yaml_and_a_mistake_ends_with_one_message() -> None:
    def show(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "dstrain", "show", *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )

    good = show("translation/quickstart", "--set", "training.seed=5")
    assert good.returncode == 0
    assert yaml.safe_load(good.stdout)["training"]["seed"] == 5
    bad = show("translation/quickstart", "--set", "training.sede=5")
    assert bad.returncode == 1
    assert "did you mean seed?" in bad.stderr
    assert "Traceback" not in bad.stderr


DENOISING = "pretraining/wikitext_denoising_tiny"


def test_text_with_a_task_that_makes_a_source_is_for_any_model() -> None:
    tasks = ("denoising, mask: 0.1", "prefix_lm", "mass")
    for task in tasks:
        load_recipe(DENOISING, [f"data.train.0.task={{kind: {task}}}"])
        load_recipe(LANGUAGE_MODEL, [f"data.train.0.task={{kind: {task}}}", "data.tokenizer.user_symbols=['<mask>']"])
    with pytest.raises(RecipeError, match=r"data\.valid\.0 is text without a source \(kind: text\), so an encoder has nothing"):
        load_recipe(DENOISING, ["data.valid.0.task={kind: language_modeling}"])
    with pytest.raises(RecipeError, match=r"there is nothing to translate; set validation\.generation: null"):
        load_recipe(DENOISING, ["validation.generation={kind: beam}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data.tokenizer.user_symbols=[]"],
            r"denoising needs the symbol '<mask>'; add it to tokenizer\.user_symbols",
        ),
        (["data.train.0.task={kind: span_corruption}"], r"train\.0\.task = span_corruption needs the symbol '<extra_id_0>'"),
        (["data.train.0.task.mask=1.5"], r"data\.train\.0\.task\.mask: input should be less than 1, not 1\.5"),
        (["data.train.0.task={kind: denoise}"], r"data\.train\.0\.task\.kind: 'denoise' is unknown; choose one of"),
        (["model.max_source_length=500"], r"keeps text that the model does not read \(model\.max_source_length = 500\)"),
    ],
)
def test_mistakes_in_tasks(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe(DENOISING, overrides)
