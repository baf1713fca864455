"""Scores of a finished bundle on any split: the validator's figures without an engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dstrain.checkpoint.bundle import Bundle
from dstrain.data.batching.collate import Collator
from dstrain.data.batching.loader import evaluation_loader
from dstrain.data.config import DataConfig, is_text_only
from dstrain.data.prepared.dataset import open_dataset
from dstrain.data.prepared.manifest import load_manifest
from dstrain.data.sources.corpora import splits_of
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
    objective: Objective,
    generation: GenerationConfig | None,
    required: bool,
    tokenize: str,
    lowercase: bool,
    max_tokens: int,
) -> dict[str, Any]:
    """The scores of `Validator` for a bundle whose model is on `mesh.device`; every rank scores its share.

    generation: how to translate; None = only losses, as always for a split that has nothing to translate or to compare with.
    tokenize, lowercase: of BLEU, see `build_translation`.
    Raises DataError if the data was prepared with another tokenizer or if translations are `required` of such a split,
    BundleError if the bundle has no tokenizer to compare.
    """
    if bundle.tokenizers is None:
        raise BundleError(f"{bundle.directory} has no tokenizer, so it is unknown whether the ids of {data} are its own")
    manifest = load_manifest(data)
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, str(bundle.directory))
    dataset = open_dataset(data, split)
    without_source = any(is_text_only(corpus) for corpus in splits_of(DataConfig.model_validate(manifest.data))[split])
    if without_source and bundle.model_config.kind == "encoder_decoder":
        raise DataError(f"the split {split!r} is text without a source: the encoder of {bundle.directory} has nothing to read")
    if generation is not None and (without_source or split == "train"):
        _say_only_losses(split, without_source=without_source, required=required)
        generation = None
    check_split(split, dataset.lengths, bundle.model_config)
    translation = build_translation(
        generation, bundle.model_config, dataset, bundle.tokenizers, mesh, tokenize=tokenize, lowercase=lowercase
    )
    validator = Validator(
        WholeModel(TrainModule(bundle.model, objective), bundle.model, mesh.device),
        replicas=mesh.replicas,
        data=mesh.data,
        batches=lambda: evaluation_loader(
            dataset,
            max_tokens,
            Collator(
                bundle.model_config.kind,
                pad_id=bundle.vocabulary.pad_id,
                eos_id=bundle.vocabulary.eos_id,
                start_id=bundle.vocabulary.start_id,
            ),
            data_rank=mesh.data.rank,
            data_size=mesh.data.size,
        ),
        denominator=objective.denominator,
        translation=translation,
        num_examples=len(dataset),
    )
    scores = validator()
    assert scores is not None, "nothing interrupts this validation"
    return scores


def _say_only_losses(split: str, *, without_source: bool, required: bool) -> None:
    """Log why nothing is translated; DataError if the user asked for it."""
    reason = "is text without a source to translate" if without_source else "keeps no raw text to compare with"
    if required:
        raise DataError(f"the split {split!r} {reason}, so only losses are scored: leave --generate and its options out")
    logger.info("the split %r %s: only losses are scored", split, reason)
