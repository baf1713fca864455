"""No message names a remedy that no test follows: the texts of the package, beside the tables and tests that follow them."""

from __future__ import annotations

import ast

import pytest

from tests.paths import ROOT
from tests.unit.cli import test_remedies, test_remedies_of_calls, test_remedies_of_recipes
from tests.unit.cli.remedy_messages import remedies

TABLES = {
    *(case.message for case in test_remedies.CASES.values()),
    *(case.message for case in test_remedies_of_calls.CASES.values()),
    *(case.message for case in test_remedies_of_recipes.RECIPES),
    *test_remedies_of_recipes.JSON,
    *test_remedies_of_recipes.SINGLE,
}
ELSEWHERE = {
    "is a URL, and only --data may be one; write to a directory, then upload that": (
        "unit/storage/test_outputs.py::test_an_output_is_no_url"
    ),
    "choose batching.shuffle: {kind: shard_window} to read near ones together, which is faster": (
        "unit/build/test_order_of_shards.py::test_many_shards_read_all_at_once_are_warned_of"
    ),
    "raise it, or choose an order that reads fewer shards at a time (batching.shuffle: {kind: shard_window})": (
        "unit/storage/test_file_cache.py::test_what_somebody_holds_is_not_removed"
    ),
    "check the network and the store, then run the same command again: files that were fetched are kept": (
        "unit/data/test_remote_data.py::test_a_store_that_fails_halfway_leaves_whole_files_only"
    ),
    "and --logits are of what is stored: distill with --teacher BUNDLE": (
        "unit/cli/test_dump_logits.py::test_text_that_a_task_makes_examples_of_is_refused"
    ),
    "a task makes another source of it in every epoch, for which only `train --teacher` has a signal": (
        "unit/cli/test_dump_logits.py::test_text_that_a_task_makes_examples_of_is_refused"
    ),
    "reads {} tokens at most; lower --context-window": (
        "unit/evaluation/test_perplexity.py::test_a_window_over_the_limit_is_mended_by_a_smaller_one_or_an_extension"
    ),
    "or extend it: `dstrain extend BUNDLE --factor {} --kind yarn --output LONGER`": (
        "unit/evaluation/test_perplexity.py::test_a_window_over_the_limit_is_mended_by_a_smaller_one_or_an_extension"
    ),
    "prepare it again for the tasks of its corpora": (
        "unit/data/test_task_examples.py::test_data_that_does_not_know_its_corpora"
    ),
    "choose a teacher trained with the data's tokenizer, or say by --vocabulary-map FILE which id is which": (
        "unit/build/test_teachers.py::test_a_permuted_or_larger_vocabulary_teaches_the_same"
    ),
    "put the base bundle there, write its new path into base.path, or name it with --base BUNDLE": (
        "unit/cli/test_moved_base.py::test_a_verb_is_told_where_the_base_is"
    ),
    "the adapter was trained on another base; let base.path or --base name that one": (
        "unit/cli/test_moved_base.py::test_a_verb_is_told_where_the_base_is"
    ),
    "engine.kernels.{} = {} cannot run here ({}); choose {}: {}": (
        "unit/ops/test_kernels.py::test_a_named_kernel_that_cannot_run_is_refused_with_the_reason"
    ),
    "free some space, then run the same command again": (
        "unit/checkpoint/test_bundle.py::test_a_failed_save_leaves_the_old_bundle_and_no_rest"
    ),
    "--tags, --symbols and --text name entries, --tokenizer a directory that has them: give one of both": (
        "unit/build/test_growth.py::test_the_verb"
    ),
    "nothing is to be added: name entries by --tags, --symbols or --text, or a directory by --tokenizer": (
        "unit/build/test_growth.py::test_the_verb"
    ),
    "name a directory like the bundle's": (
        "unit/build/test_growth.py::test_a_tokenizer_with_all_entries_may_number_them_otherwise"
    ),
    "is an entry of the vocabulary already; leave it out of --tags and --symbols": (
        "unit/build/test_growth.py::test_what_cannot_be_added"
    ),
    "has no character that the vocabulary lacks; add --tags or --symbols": (
        "unit/build/test_growth.py::test_characters_of_a_text_that_the_vocabulary_lacks"
    ),
    "name what it lacks by --symbols or --tokenizer": (
        "unit/build/test_growth.py::test_characters_of_a_text_that_the_vocabulary_lacks"
    ),
    "choose one that stays as it is": "unit/build/test_growth.py::test_a_tag_that_normalization_changes",
    "was replaced while it was read, perhaps by a training; run the same command again": (
        "unit/checkpoint/test_bundle.py::test_a_bundle_that_is_replaced_before_its_weights_are_read_is_not_mixed"
    ),
    "PEFT cannot represent the adapter of {}; merge it into a plain bundle (`dstrain merge`), or train it again without": (
        "unit/interop/test_peft_format.py::test_what_peft_cannot_represent"
    ),
    "is for CTranslate2; leave it out beside --format peft": (
        "unit/interop/test_peft_format.py::test_only_an_adapter_is_exported_and_only_its_own_kind_replaced"
    ),
    "train on with longer text: `dstrain train RECIPE --base BUNDLE` with larger lengths in RECIPE's model": (
        "unit/build/test_base.py::test_the_longest_sequences_may_differ_where_no_weight_depends_on_them"
    ),
    "its run has no training.ema; choose --weights trained": "unit/checkpoint/test_consolidate.py::test_mistakes_are_named",
    "which describes the model; name a checkpoint of `dstrain train`": (
        "e2e/test_elastic.py::test_a_run_continues_on_sequence_ranks_and_its_checkpoint_becomes_the_same_bundle"
    ),
    "make a bundle of it: dstrain consolidate {} --output BUNDLE": (
        "e2e/test_elastic.py::test_a_run_continues_on_sequence_ranks_and_its_checkpoint_becomes_the_same_bundle"
    ),
    "free space or repair the disk, then start again to resume": (
        "unit/training/test_trainer.py::test_a_full_disk_while_a_bundle_is_written_is_explained"
    ),
    "the disk is full{}; {}; free some space, then start again to resume": (
        "unit/training/test_trainer.py::test_a_full_disk_while_a_bundle_is_written_is_explained"
    ),
    "cannot write {}: {}; free some space, then start again to resume": (
        "unit/training/test_trainer.py::test_a_full_disk_while_a_bundle_is_written_is_explained"
    ),
    "restore one from a copy, or choose another --output to train from the beginning": (
        "unit/checkpoint/test_manager.py::test_checkpoints_of_which_none_is_usable_are_an_error_and_nothing_is_loaded"
    ),
    "move it out of the folder, or choose the --output of its run": (
        "unit/checkpoint/test_manager.py::test_a_checkpoint_of_another_run_is_refused_by_name"
    ),
    "resume with the version that wrote it, or start a new run from its last bundle (--base RUN/bundles/last)": (
        "e2e/test_adapters.py::test_fine_tuning_without_an_adapter_starts_from_the_base_too"
    ),
    "resume with the version that wrote it, or start again from a bundle": (
        "e2e/test_adapters.py::test_fine_tuning_without_an_adapter_starts_from_the_base_too"
    ),
    "finished files are kept: run the same command again to go on, with fewer --workers": (
        "unit/data/test_prepare_verb.py::test_a_killed_worker_is_reported_and_nothing_finished_is_lost"
    ),
    "finished files are kept: free some space and run the same command again to go on": (
        "unit/data/test_prepare_verb.py::test_no_space_for_a_file_is_one_message"
    ),
    "finished shards stay in %s: run the same command again to go on": (
        "unit/data/test_prepare_verb.py::test_ctrl_c_keeps_finished_shards_and_says_how_to_go_on"
    ),
    "another process is preparing {} ({}); wait for it or choose another --output": (
        "unit/data/test_prepare.py::test_two_at_once_are_refused"
    ),
    "make smaller shards (--tokens-per-shard, --pairs-per-shard)": (
        "unit/data/test_dataset.py::test_a_column_beyond_its_offsets_is_refused"
    ),
    "{} cannot be written; choose another --output, or change the permissions": (
        "unit/storage/test_outputs.py::test_an_output_lies_where_it_can_be_written"
    ),
    "if your text begins with them, name them with --language-tags": (
        "e2e/test_language_tags.py::test_tags_are_single_first_tokens_from_text_to_translation"
    ),
    "(data.tokenizer.source_model and target_model; in import fairseq --sentencepiece)": (
        "unit/data/test_unknown.py::test_the_sentencepiece_model_that_the_warning_asks_for_ends_it"
    ),
    "the checkpoint holds a model for each of {}; choose one with --pair {}": (
        "unit/interop/test_fairseq_languages.py::test_a_model_for_each_pair"
    ),
    "the checkpoint holds models for {}; choose one of these": (
        "unit/interop/test_fairseq_languages.py::test_a_model_for_each_pair"
    ),
    "is not SOURCE-TARGET; give two languages, such as --pair de-en": (
        "unit/interop/test_fairseq_languages.py::test_a_direction_is_chosen_by_pair"
    ),
    "has many directions ({}), and a bundle has one; choose with --pair {}": (
        "unit/interop/test_fairseq_languages.py::test_a_direction_is_chosen_by_pair"
    ),
    "choose two of them with --pair": "unit/interop/test_fairseq_languages.py::test_a_direction_is_chosen_by_pair",
    "has one direction, {}; leave it out": "unit/interop/test_fairseq_languages.py::test_a_bilingual_model_has_its_own_direction",
    "set model.position.scaling.beta_slow by hand if the model was trained later": (
        "unit/interop/test_fairseq_reader.py::test_yarn_without_beta_slow_has_the_default_of_its_time"
    ),
    "dstrain train {}/recipe.yaml --data DATA --base {} --output RUN": (
        "e2e/test_fairseq.py::test_an_imported_model_trains_on_by_its_own_recipe"
    ),
    "Prepare the data with `dstrain prepare`, then `dstrain train`.": (
        "e2e/test_fairseq.py::test_a_command_line_becomes_a_recipe_that_trains"
    ),
    "what is finished stays: run the same command again to go on": (
        "e2e/test_logits.py::test_ranks_share_the_labeling_and_go_on_after_a_kill"
    ),
    "another rank ended unexpectedly (its own message, if any, says why); {}; start again to resume": (
        "e2e/test_resume.py::test_killed_and_resumed_equals_uninterrupted"
    ),
    "It ends now; start again to resume": "e2e/test_resume.py::test_killed_and_resumed_equals_uninterrupted",
    "wait for it or stop it, or choose another --output": (
        "unit/training/test_run_directory.py::test_two_trainings_never_share_a_run"
    ),
    "restore them, or choose another --output to train from the beginning": (
        "unit/training/test_run_directory.py::test_a_run_that_lost_its_checkpoints_is_not_restarted_silently"
    ),
    "name the --data it was started on, or choose another --output": (
        "unit/training/test_run_directory.py::test_other_data_are_refused"
    ),
    "name the first one, in the same order, or choose another --output": (
        "unit/training/test_run_directory.py::test_another_teacher_is_refused"
    ),
    "There is no checkpoint yet: start again from the beginning, with any recipe": (
        "unit/training/test_run_directory.py::test_a_run_killed_before_its_first_checkpoint_begins_again"
    ),
    "report offline by WANDB_MODE=offline or reporting.wandb.mode: offline": (
        "unit/training/test_trackers.py::test_wandb_offline_by_the_environment_works_without_an_account"
    ),
    "the loss is {}; lower optimizer.learning_rate or set engine.clip_norm": (
        "e2e/test_journey.py::test_a_change_that_is_accepted_acts_from_the_resume_on_and_is_in_the_events"
    ),
    "lower the learning rate, warm up longer, or set engine.clip_norm": (
        "e2e/test_journey.py::test_a_change_that_is_accepted_acts_from_the_resume_on_and_is_in_the_events"
    ),
    "with --set optimizer.learning_rate=X --accept-changes optimizer.learning_rate": (
        "e2e/test_journey.py::test_a_change_that_is_accepted_acts_from_the_resume_on_and_is_in_the_events"
    ),
    "lower optimizer.learning_rate, set engine.clip_norm, or use engine.precision: bf16": (
        "e2e/test_journey.py::test_a_change_that_is_accepted_acts_from_the_resume_on_and_is_in_the_events"
    ),
    "does not divide the {} GPUs of --nodes {} --gpus-per-node {}; choose other numbers": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "--vocab-size says what --data knows: leave one of them out": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "does not say how many entries the vocabulary has; give --data DATA": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "objective.kind = {} has no use for a teacher: leave --teacher out": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "--teacher-placement says how a teacher works: add --teacher BUNDLE, or leave it out": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "is longer than the text that data.filter keeps, {} tokens at most; lower it": (
        "unit/build/test_estimate.py::test_mistakes_are_said_and_mended"
    ),
    "or start more ranks; `dstrain estimate` recommends a layout": (
        "unit/build/test_estimate.py::test_a_training_says_its_memory_and_warns_unless_a_remedy_is_followed"
    ),
    "leaves a rank without entries of the {} vocabulary of {}; lower it": (
        "unit/models/test_factory.py::test_a_vocabulary_may_be_uneven_but_every_rank_has_entries"
    ),
    "and --logits are of single ones: distill with --teacher BUNDLE, or set batching.packing: null": (
        "unit/build/test_blocks.py::test_blocks_need_an_online_teacher_that_reads_them"
    ),
    "which cannot read blocks of text: set batching.packing: null, or choose a decoder-only teacher": (
        "unit/build/test_blocks.py::test_blocks_need_an_online_teacher_that_reads_them"
    ),
    "look at the counts of dropped pairs in the manifest, or leave the corpus out": (
        "unit/data/test_sampling.py::test_a_corpus_without_examples_or_with_too_small_a_share_is_an_error"
    ),
    "examples of an epoch: raise its weight, or batching.sampling.examples_per_epoch": (
        "unit/data/test_sampling.py::test_a_corpus_without_examples_or_with_too_small_a_share_is_an_error"
    ),
    "or let data.tokenizer: {kind: sentencepiece} train a vocabulary with it": (
        "unit/data/test_corpora.py::test_a_tag_that_the_vocabulary_lacks_is_an_error"
    ),
    "prepare it again to tell the corpora {} apart": ("unit/data/test_corpora.py::test_data_of_an_earlier_version_is_one_corpus"),
    "and they have fewer than two names; give each corpus a `name`, or leave sampling out": (
        "unit/build/test_multilingual.py::test_sampling_needs_names"
    ),
    "batching.sampling.{}: {} is no corpus of data.train": (
        "unit/build/test_multilingual.py::test_mistakes_in_names_and_weights"
    ),
    "batching.sampling.{} lacks the corpus {} of data.train": (
        "unit/build/test_multilingual.py::test_mistakes_in_names_and_weights"
    ),
    "validation.corpus: {} is no corpus of data.valid": ("unit/build/test_multilingual.py::test_mistakes_in_names_and_weights"),
}
"""Part of a message -> the test that follows its remedy with more than a call: ranks, training, damage, foreign checkpoints."""
NOT_HERE = {
    "every rank needs its own; use --device cuda": "needs several GPUs",
    "choose a divisor of the ranks of a node": "needs several nodes",
    "its output says why: stop the others and start again": "is for the operator of the ranks",
    "save model.module.state_dict() as `model`": "is done where the checkpoint was made",
    "give it at least one sentence pair and prepare the data again": "prepared data always hold a target token",
}
"""Part of a message -> why its remedy cannot be followed in a test."""
NO_REMEDY = {
    "--set": "the name of an option",
    "--set {}={}": "a part of the layout that `dstrain estimate` recommends",
    "job of `dstrain prepare`": "the name of a document",
    "job of `dstrain dump-logits`": "the name of a document",
    "data.train.{} is text without a source (kind: {})": "the first half of a message; its remedy is that of the objective",
    "until 2024-06 this name gave no positions at all without --rope-args; dstrain rotates": "a comment in a recipe",
    "this name gave no positions at all without --alibi-args; dstrain applies ALiBi": "a comment in a recipe",
}
"""What looks like one."""


def covered(part: str, texts: dict[str, str]) -> list[str]:
    """The texts that a part belongs to: the equal one, else all that hold it."""
    return [part] if part in texts else [text for text in texts if part in text]


@pytest.fixture(scope="module")
def texts() -> dict[str, str]:
    return remedies()


def test_every_remedy_is_followed(texts: dict[str, str]) -> None:
    parts = {*TABLES, *ELSEWHERE, *NOT_HERE, *NO_REMEDY}
    followed = {text for part in parts for text in covered(part, texts)}
    open_ones = [f"{place}: {text}" for text, place in texts.items() if text not in followed]
    assert not open_ones, "follow them in a table of test_remedies*.py, or name the test that does in ELSEWHERE"


def test_a_part_tells_one_message_from_all_others(texts: dict[str, str]) -> None:
    """So that a test of one remedy is not taken for that of another with the same end."""
    found = {part: len(covered(part, texts)) for part in {*TABLES, *ELSEWHERE, *NOT_HERE, *NO_REMEDY}}
    assert not {part: number for part, number in found.items() if number > 1}
    assert not [part for part in {*ELSEWHERE, *NOT_HERE, *NO_REMEDY} if found[part] != 1]


def test_the_tests_elsewhere_are_there() -> None:
    for place in set(ELSEWHERE.values()):
        file, _, name = place.partition("::")
        tree = ast.parse((ROOT / "tests" / file).read_text())
        assert any(isinstance(node, ast.FunctionDef) and node.name == name for node in ast.walk(tree)), place
