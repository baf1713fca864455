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
    tokenize: str,
    lowercase: bool,
    max_tokens: int,
) -> dict[str, Any]:
    """The scores of `Validator` for a bundle whose model is on `mesh.device`; every rank scores its share.

    generation: how to translate; None = only losses. tokenize, lowercase: of BLEU, see `build_translation`.
    Raises DataError if the data was prepared with another tokenizer, BundleError if the bundle has none to compare.
    """
    if bundle.tokenizers is None:
        raise BundleError(f"{bundle.directory} has no tokenizer, so it is unknown whether the ids of {data} are its own")
    manifest = load_manifest(data)
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, str(bundle.directory))
    if split == "train" and generation is not None:
        raise DataError("the split 'train' keeps no raw text to score translations against: add --no-generate")
    dataset = open_dataset(data, split)
    if any(is_text_only(corpus) for corpus in splits_of(DataConfig.model_validate(manifest.data))[split]):
        _check_plain_text(split, bundle, generation)
    check_split(split, dataset.source_lengths, dataset.target_lengths, bundle.model_config)
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


def _check_plain_text(split: str, bundle: Bundle, generation: GenerationConfig | None) -> None:
    if bundle.model_config.kind == "encoder_decoder":
        raise DataError(f"the split {split!r} is text without a source: the encoder of {bundle.directory} has nothing to read")
    if generation is not None:
        raise DataError(f"the split {split!r} is text without a source, so there is nothing to translate: add --no-generate")
