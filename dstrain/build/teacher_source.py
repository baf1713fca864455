"""A teacher and the prepared data that it reads: what dump-logits, pseudo-label and the angles of a store begin with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dstrain.build.device import open_device, usable_precision
from dstrain.checkpoint.bundle import Bundle, load_bundle
from dstrain.config_base import Precision, PrecisionChoice
from dstrain.data.config import DataConfig, has_no_source
from dstrain.data.prepared.dataset import Dataset, open_dataset
from dstrain.data.prepared.manifest import DataManifest, load_manifest
from dstrain.data.sources.corpora import splits_of
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.engine.construction import COMPUTE_DTYPES
from dstrain.errors import BundleError, DataError
from dstrain.evaluation.validator import check_split


@dataclass(frozen=True)
class TeacherSource:
    """A whole teacher on a device and the prepared split that it reads."""

    bundle: Bundle
    tokenizers: TokenizerPair
    device: str
    precision: Precision
    fingerprint: str
    manifest: DataManifest
    dataset: Dataset


def load_teacher_source(
    teacher: Path, data: Path, split: str, device: str, *, precision: PrecisionChoice, base: Path | None
) -> TeacherSource:
    """Open both; the teacher then computes in `precision`. base: see `load_bundle`.

    DataError or BundleError if they do not fit together or cannot be read.
    """
    chosen = open_device(device)
    bundle, manifest = load_bundle(teacher, device=chosen, base=base), load_manifest(data)
    if bundle.tokenizers is None:
        raise BundleError(f"{teacher} has no tokenizer, so it is unknown whether the ids of {data} are its own")
    manifest.require_tokenizer(bundle.tokenizers.fingerprint, str(teacher))
    computed = usable_precision(precision, chosen)
    bundle.model.to(COMPUTE_DTYPES[computed])
    dataset = open_dataset(data, split)
    if bundle.model_config.kind == "encoder_decoder" and has_no_source(
        splits_of(DataConfig.model_validate(manifest.data))[split]
    ):
        raise DataError(
            f"the split {split!r} of {data} is text without a source: the encoder of {teacher} has nothing to read; a task makes "
            "another source of it in every epoch, for which only `train --teacher` has a signal"
        )
    check_split(split, dataset.lengths, bundle.model_config)
    return TeacherSource(bundle, bundle.tokenizers, chosen, computed, bundle.fingerprint, manifest, dataset)
