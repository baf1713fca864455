"""The teachers of a distillation: dumped logits, or bundles that become online teachers.

Everything is checked before anything is built; teachers are loaded once the run is open.

A teacher must have the student's vocabulary, by its tokenizer's fingerprint. If it has not, a vocabulary map gives
which id of the teacher's each of the student's is, one to one:

    source: [0, 1, 2, 3, 17, 4, ...]     one number for each id of the student, in a YAML or JSON file
    target: [...]                        may be left out if both sides share one vocabulary

The teacher then reads its own ids, and its distribution is that over the vocabulary entries of the student, renormalized. It must
still cut text into the same pieces: a permuted vocabulary, or a larger one of which the student's is a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dstrain.build.training_options import TeacherOptions
from dstrain.checkpoint.bundle import BundleDescription, StoredBundle, find_bundle
from dstrain.config_base import Precision
from dstrain.data.lengths import ExampleLengths, Side
from dstrain.data.prepared.manifest import DataManifest
from dstrain.data.tokenizers.tokenizer import TokenizerPair
from dstrain.distillation.config import DistillationConfig
from dstrain.distillation.objective import signal_request
from dstrain.distillation.store.store import LogitStore, open_store
from dstrain.engine.config import Placement
from dstrain.engine.teacher_engine import TeacherEngine, VocabularyMap
from dstrain.errors import BundleError, DataError
from dstrain.models.config import ModelConfig, VocabularySizes
from dstrain.models.factory import build_model
from dstrain.parallel.mesh import Mesh
from dstrain.storage.hashing import sha256_of_file
from dstrain.storage.parsing import parse_json, parse_yaml, read_text

MAX_MAP_BYTES = 1 << 24
MAX_MAP_VALUES = 2_000_000


@dataclass(frozen=True)
class PlannedTeacher:
    """A teacher that fits. fingerprint: of its weights and of the vocabulary map, if one is used."""

    bundle: StoredBundle
    fingerprint: str
    vocabulary: VocabularyMap | None

    @property
    def model(self) -> ModelConfig:
        """Its architecture."""
        return self.bundle.description.model


def plan_teachers(
    options: TeacherOptions, tokenizers: TokenizerPair, sizes: VocabularySizes, lengths: ExampleLengths
) -> list[PlannedTeacher]:
    """Look at every teacher, adapter bundles among them, without building it. lengths: of the training examples.

    Raises BundleError if one is no bundle, has another vocabulary or reads shorter sentences than the data has; DataError for
    a vocabulary map that is not one or not needed.
    """
    planned = []
    for directory in options.bundles:
        stored = find_bundle(directory)
        description = stored.description
        _require_lengths(directory, description, lengths)
        same = description.tokenizer == tokenizers.fingerprint
        if not same and options.vocabulary_map is None:
            raise BundleError(
                f"the teacher {directory} has another vocabulary (tokenizer {(description.tokenizer or 'none')[:12]}) than the "
                f"data ({tokenizers.fingerprint[:12]}): its ids would mean other words; choose a teacher trained with the data's "
                "tokenizer, or say by --vocabulary-map FILE which id is which"
            )
        vocabulary, fingerprint = None, stored.fingerprint
        if not same and options.vocabulary_map is not None:
            vocabulary = read_vocabulary_map(options.vocabulary_map, sizes, description.vocabulary)
            fingerprint += sha256_of_file(options.vocabulary_map)
        planned.append(PlannedTeacher(stored, fingerprint, vocabulary))
    if options.vocabulary_map is not None and all(teacher.vocabulary is None for teacher in planned):
        raise DataError("--vocabulary-map is not needed: every teacher has the vocabulary of the data; leave it out")
    return planned


def open_logits(directory: Path, data: Path, manifest: DataManifest, objective: DistillationConfig) -> LogitStore:
    """Dumped logits as the objective's source of signals.

    data, manifest: of the training data. Raises DataError if they are unfinished, damaged, of other data or another split than
    train; RecipeError if they lack a signal of the objective.
    """
    store = open_store(directory, data=data, manifest=manifest, renormalize=objective.renormalize)
    if store.manifest.job.split != "train":
        raise DataError(
            f"the logits in {directory} are of the split {store.manifest.job.split!r}, training reads 'train'; dump that one"
        )
    store.require(signal_request(objective))
    return store


def start_teachers(
    planned: Sequence[PlannedTeacher], *, placement: Placement, precision: Precision, mesh: Mesh
) -> list[TeacherEngine]:
    """Load all teachers, the same on every rank. Collective.

    On one rank there is nothing to partition, so `sharded` is `replicated` there.
    """
    if placement == "sharded" and mesh.world.size == 1:
        placement = "replicated"
    return [
        TeacherEngine(
            build_model(
                teacher.bundle.description.model, teacher.bundle.description.vocabulary, seed=None, sequence=mesh.sequence
            ),
            placement=placement,
            precision=precision,
            mesh=mesh,
            weights=teacher.bundle,
            vocabulary=teacher.vocabulary,
        )
        for teacher in planned
    ]


def read_vocabulary_map(path: Path, student: VocabularySizes, teacher: VocabularySizes) -> VocabularyMap:
    """Read a map as the head of this file describes it. DataError: unreadable, other sizes, not one to one, special ids moved."""
    try:
        text = read_text(path, MAX_MAP_BYTES)
        content = parse_json(text, MAX_MAP_VALUES) if path.suffix == ".json" else parse_yaml(text, MAX_MAP_VALUES)
    except (OSError, ValueError) as error:
        raise DataError(f"--vocabulary-map {path} cannot be read: {error}; give a YAML or JSON file") from error
    if not isinstance(content, dict) or "source" not in content or set(content) - {"source", "target"}:
        raise DataError(f"--vocabulary-map {path} must hold the lists `source` and, unless it is the same, `target`")
    sides = {"source": content["source"], "target": content.get("target", content["source"])}
    for side, ids in sides.items():
        problem = _problem(ids, student.model_dump()[side], teacher.model_dump()[side])
        if problem is None and [ids[special] for special in student.special_ids] != list(teacher.special_ids):
            problem = (
                f"pad, eos and the start of a target must be mapped to the teacher's, {teacher.special_ids}, "
                f"not {tuple(ids[special] for special in student.special_ids)}"
            )
        if problem is not None:
            raise DataError(f"--vocabulary-map {path}, {side}: {problem}")
    return VocabularyMap(torch.tensor(sides["source"]), torch.tensor(sides["target"]))


def _problem(ids: Any, student_size: int, teacher_size: int) -> str | None:
    """The mistake in one side of a map."""
    if not isinstance(ids, list) or len(ids) != student_size:
        content = f"{len(ids)} numbers" if isinstance(ids, list) else "no list"
        return f"{content}, but the student has {student_size} ids; give one number for each"
    wrong = next((value for value in ids if type(value) is not int or not 0 <= value < teacher_size), None)
    if wrong is not None:
        return f"{wrong!r} is no id of the teacher, which has {teacher_size}"
    if len(set(ids)) < len(ids):
        twice = next(value for value in ids if ids.count(value) > 1)
        return f"the teacher's id {twice} occurs twice; two ids of the student cannot share one"
    return None


def _require_lengths(directory: Path, description: BundleDescription, lengths: ExampleLengths) -> None:
    """BundleError if the data has sentences that the teacher cannot read."""
    limits = description.model.limits
    readable: dict[Side, int] = {"source": limits.source, "target": limits.target}
    if limits.joint:
        readable = {"source and target": limits.target}
    for side, limit in readable.items():
        if (length := lengths.longest(side).tokens) > limit:
            raise BundleError(
                f"the teacher {directory} reads {limit} {side} tokens at most, but the training data has a pair of "
                f"{length}; leave such pairs out and prepare again (data.filter), or choose another teacher"
            )
