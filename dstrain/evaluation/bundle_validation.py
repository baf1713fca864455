"""Scores of a finished bundle on any split: the validator's figures without an engine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dstrain.checkpoint.bundle import Bundle
from dstrain.config_base import RougeWords
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.config import DataConfig, TextSource, is_text_only, task_of_text
from dstrain.data.prepared.corpora import NamedCorpora
from dstrain.data.prepared.dataset import named_corpora, open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tasks.build import build_examples
from dstrain.data.tasks.config import LanguageModeling, TextTask
from dstrain.errors import BundleError, DataError
from dstrain.evaluation.translation import build_translation
from dstrain.evaluation.validator import Validator, WholeModel, check_split
from dstrain.generation.config import GenerationConfig
from dstrain.log import logger
from dstrain.objectives.objective import Objective
from dstrain.objectives.train_module import TrainModule
from dstrain.parallel.mesh import Mesh


def validate_bundle(
    bundle: Bundle,
    data: Path,
    split: str,
    mesh: Mesh,
    *,
    trained_on: DataConfig | None,
    objective: Objective,
    generation: GenerationConfig | None,
    required: bool,
    tokenize: str,
    lowercase: bool,
    rouge: RougeWords | None,
    max_tokens: int,
) -> dict[str, Any]:
    """The scores of `Validator` for a bundle whose model is on `mesh.device`; every rank scores its share.

    generation: how to translate; None = only losses, as always for a split that has nothing to translate or to compare with.
    tokenize, lowercase, rouge: see `build_translation`. trained_on: the data section of the bundle's recipe, see
    `tasks_of_split`; None for a bundle without a recipe.
    Raises DataError if the data was prepared with another tokenizer or if translations are `required` of such a split,
    BundleError if the bundle has no tokenizer to compare.
    """
    if bundle.tokenizers is None:
        raise BundleError(f"{bundle.directory} has no tokenizer, so it is unknown whether the ids of {data} are its own")
    manifest = load_manifest(data)
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, str(bundle.directory))
    dataset = open_dataset(data, split)
    corpora = splits_of(DataConfig.model_validate(manifest.data))[split]
    without_source = any(map(is_text_only, corpora))
    examples = build_examples(dataset, _tasks(bundle, corpora, split, trained_on), bundle.tokenizers.target, split=split)
    if generation is not None and (without_source or split == "train"):
        _say_only_losses(split, without_source=without_source, required=required)
        generation = None
    check_split(split, examples.lengths, bundle.model_config)
    named = named_corpora(manifest, split, dataset)
    scored = generation, bundle.model_config, dataset, bundle.tokenizers, mesh
    translation = build_translation(*scored, corpora=named, tokenize=tokenize, lowercase=lowercase, rouge=rouge)
    collator = _collator(bundle, named)
    validator = Validator(
        WholeModel(TrainModule(bundle.model, objective), bundle.model, mesh.device),
        replicas=mesh.replicas,
        data=mesh.data,
        batches=lambda: evaluation_loader(examples, max_tokens, collator, data_rank=mesh.data.rank, data_size=mesh.data.size),
        denominator=objective.denominator,
        translation=translation,
        num_examples=len(dataset),
    )
    scores = validator()
    assert scores is not None, "nothing interrupts this validation"
    return scores


def _tasks(bundle: Bundle, corpora: Sequence[TextSource], split: str, trained_on: DataConfig | None) -> list[TextTask | None]:
    """`tasks_of_split`, of which each must give an encoder something to read. Raises DataError if one does not."""
    tasks = tasks_of_split(corpora, split, trained_on)
    if bundle.model_config.kind == "encoder_decoder" and any(isinstance(task, LanguageModeling) for task in tasks):
        raise DataError(f"the split {split!r} is text without a source: the encoder of {bundle.directory} has nothing to read")
    return tasks


def tasks_of_split(corpora: Sequence[TextSource], split: str, trained_on: DataConfig | None) -> list[TextTask | None]:
    """What is asked of each corpus; None of pairs, which are translated.

    Data does not say what text is for. It is read as the recipe of the bundle reads the same split, or all its training text.
    Raises DataError if the recipe has other corpora for this split, and several tasks.
    """
    own = () if trained_on is None else splits_of(trained_on).get(split, ())
    if [(corpus.kind, is_text_only(corpus)) for corpus in own] == [(corpus.kind, is_text_only(corpus)) for corpus in corpora]:
        return [task_of_text(corpus) for corpus in own]
    trained = () if trained_on is None else trained_on.train
    known = list(dict.fromkeys(task for corpus in trained if (task := task_of_text(corpus)) is not None)) or [LanguageModeling()]
    if len(known) > 1 and any(map(is_text_only, corpora)):
        raise DataError(
            f"the split {split!r} is text, and the bundle was trained by several tasks on text: "
            f"{', '.join(task.kind for task in known)}; prepare data with the corpora of data.{split} of its recipe"
        )
    return [known[0] if is_text_only(corpus) else None for corpus in corpora]


def _collator(bundle: Bundle, corpora: NamedCorpora | None) -> Collator:
    sizes = bundle.vocabulary
    return Collator(bundle.model_config.kind, pad_id=sizes.pad_id, eos_id=sizes.eos_id, start_id=sizes.start_id, corpora=corpora)


def _say_only_losses(split: str, *, without_source: bool, required: bool) -> None:
    """Log why nothing is translated; DataError if the user asked for it."""
    reason = "is text without a source to translate" if without_source else "keeps no raw text to compare with"
    if required:
        raise DataError(f"the split {split!r} {reason}, so only losses are scored: leave --generate and its options out")
    logger.info("the split %r %s: only losses are scored", split, reason)
